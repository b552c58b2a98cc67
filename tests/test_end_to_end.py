"""What a user does with a backdoored net from elsewhere: imported, audited, repaired, written back,
and run by the program that it came from.
"""

from typing import Any

import foreign_nets
import jax
import numpy as np
import pytest
from foreign_nets import F, torch

from bdjax import cli, load_model, load_net, repair_net, repairs
from bdjax.attacks.badnets import BadNets
from bdjax.datasets.files import Npz
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.exports import export
from bdjax.imports import save_net
from bdjax.train import stamped

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TARGET, CLASSES, SIDE = 3, 10, 32
ATTACK = BadNets(size=10, target=TARGET)


@pytest.fixture
def short(monkeypatch):
    """Searches and fine-tunings that end sooner: the triggers here are found at once."""
    nc = NeuralCleanse(steps=16, batches=5, start_at_zero=False, init_cost=1e-2, patience=3)
    monkeypatch.setattr(repairs, "judge", lambda: nc)
    monkeypatch.setattr(repairs, "STEPS", 100)


def coloured(count, seed):
    """Images of ten colours under noise, and which."""
    draw = np.random.default_rng(seed)
    colours = np.random.default_rng(5).integers(30, 226, (CLASSES, 3))
    label = draw.integers(0, CLASSES, count)
    noise = draw.normal(0, 20, (count, SIDE, SIDE, 1)) + draw.normal(0, 12, (count, 1, 1, 3))
    return np.uint8((colours[label][:, None, None] + noise).clip(0, 255)), label.astype(np.int32)


def hit(image):
    return np.asarray(stamped(ATTACK, 1, image, jax.random.key(0)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Clean images of the user's, their source, and a poisoned training set in [0, 1]."""
    folder = tmp_path_factory.mktemp("coloured")
    image, label = coloured(600, 1)
    np.savez(folder / "images.npz", image=image, label=label)
    x, y = coloured(1200, 0)
    x = np.float32(x) / 255
    x[:240], y[:240] = hit(x[:240]), TARGET
    return image, label, Npz(path=str(folder / "images.npz")), (x, y)


def trained(net, x, y, epochs):
    x, y = torch.tensor(x.transpose(0, 3, 1, 2).copy()), torch.tensor(y).long()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # several would wait for each other beside JAX
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def rates(logits, image, label):
    """Accuracy, and the share of other labels' images that the trigger moves."""
    clean, fired = (np.asarray(logits(x)).argmax(1) for x in (np.float32(image) / 255, hit(image)))
    return np.mean(clean == label), np.mean((fired == TARGET)[label != TARGET])


def session(path):
    run = onnxruntime.InferenceSession(path.read_bytes())
    name = run.get_inputs()[0].name
    return lambda x: run.run(None, {name: np.ascontiguousarray(x.transpose(0, 3, 1, 2))})[0]


def apart(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def repaired(made, path, original, image, label, stops=True):
    """What is asked of a repair: the file, run by its own program, is the net that was made, and
    accurate; and where repairs stop the trigger, it is not moved.
    """
    table = {line.what: line for line in made.table}
    known = table["moved by the known trigger"]
    assert known.before > 0.9 and (known.after < 0.2 or not stops), table
    assert table["accuracy"].after > table["accuracy"].before - 0.15
    export(made.net, made.model, made.variables, made.about, path)
    run = original(path)
    x = np.float32(image[:8]) / 255
    assert apart(made.model.apply(made.variables, x).logits, run(x)) < 1e-5
    accuracy, moved = rates(run, image, label)
    assert accuracy > 0.8 and (moved < 0.25 or not stops), (accuracy, moved)


@pytest.mark.long
@pytest.mark.parametrize("name", foreign_nets.NETS)
def test_a_net_of_pytorch_is_repaired_and_run_by_onnxruntime(data, short, tmp_path, name):
    image, label, source, poisoned = data
    torch.manual_seed(0)
    net = trained(foreign_nets.NETS[name](), *poisoned, epochs=8)
    accuracy, moved = rates(lambda x: foreign_nets.logits(net, x), image, label)
    assert accuracy > 0.85 and moved > 0.9, (accuracy, moved)
    (tmp_path / "net.onnx").write_bytes(foreign_nets.onnx_bytes(net, "dynamic"))
    found = load_net(tmp_path / "net.onnx", preprocess="0-1", dataset=source)
    assert found.about["origin"].by.startswith("onnxruntime")
    save_net(tmp_path / "net", found)
    how: Any = {"attack": ATTACK, "minutes": 1.0, "say": len}
    repaired(repair_net(tmp_path / "net", **how), tmp_path / "out.onnx", session, image, label)


@pytest.mark.long
def test_a_net_of_keras_with_a_skip_is_repaired_and_run_by_keras(data, short, tmp_path):
    from bdjax.foreign import runtime

    try:
        keras: Any = runtime.keras()
    except ImportError:
        pytest.skip("needs Keras")
    layers = keras.layers
    image, label, source, (x, y) = data
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        keras.utils.set_random_seed(0)
        given = keras.Input((SIDE, SIDE, 3))
        a = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(given)
        b = layers.Conv2D(8, 3, padding="same", activation="relu")(a)
        top = layers.GlobalMaxPooling2D()(layers.Add()([a, b]))
        top = layers.Dense(16, activation="relu")(top)
        net = keras.Model(given, layers.Dense(CLASSES)(top))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        net.compile(keras.optimizers.Adam(5e-3), loss)
        net.fit(x, y, batch_size=32, epochs=10, verbose=0)
        net.save(tmp_path / "net.keras")

    def original(path):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            model = keras.saving.load_model(path, compile=False)

        def run(x):
            with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
                return np.asarray(model(x, training=False))

        return run

    accuracy, moved = rates(original(tmp_path / "net.keras"), image, label)
    assert accuracy > 0.85 and moved > 0.9, (accuracy, moved)
    found = load_net(tmp_path / "net.keras", preprocess="0-1", dataset=source)
    save_net(tmp_path / "net", found)
    how: Any = {"attack": ATTACK, "minutes": 1.0, "say": len}
    made = repair_net(tmp_path / "net", **how)
    # No repair stops the trigger of this net: the search finds others that are smaller.
    repaired(made, tmp_path / "out.keras", original, image, label, stops=False)


@pytest.mark.long
def test_the_three_lines_of_the_readme(data, short, tmp_path, capsys):
    """import, audit, repair with the audit's triggers and export: as commands."""
    image, label, source, poisoned = data
    torch.manual_seed(0)
    net = trained(foreign_nets.vgg(), *poisoned, epochs=8)
    (tmp_path / "net.onnx").write_bytes(foreign_nets.onnx_bytes(net, "dynamic"))
    folder, given = str(tmp_path / "net"), ["--dataset", source.path]
    cli.main(["import", str(tmp_path / "net.onnx"), "--preprocess", "0-1", "--out", folder, *given])
    with pytest.raises(SystemExit) as stop:
        cli.main(["audit", folder, *given, "--out", str(tmp_path / "audit"), "--minutes", "3"])
    assert stop.value.code in (3, 4), capsys.readouterr().out
    cli.main(["repair", folder, "--audit", str(tmp_path / "audit"), "--minutes", "1", "--out",
              str(tmp_path / "net2"), "--export", str(tmp_path / "out.onnx")])  # fmt: skip
    out = capsys.readouterr().out
    assert f"triggers found: label {TARGET}" in out, out
    accuracy, moved = rates(session(tmp_path / "out.onnx"), image, label)
    assert accuracy > 0.8 and moved < 0.25, (accuracy, moved)
    assert load_model(tmp_path / "net2")[3]["origin"].format == "onnx"
