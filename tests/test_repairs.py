"""A net with a planted neuron, repaired by whoever does not know of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from flax.linen import relu

from bdjax import cli, load_model, load_net, registry, repair_net, repairs
from bdjax.attacks.badnets import BadNets
from bdjax.checkpoints import save_model
from bdjax.datasets.files import Npz
from bdjax.defenses.parts.reversed import Reversed
from bdjax.defenses.repair.last_layer import LastLayerUnlearning
from bdjax.defenses.repair.retraining import Retraining
from bdjax.foreign import safetensors
from bdjax.foreign.fold import folded
from bdjax.models.layers import Net, build, conv, dense, site
from bdjax.train import Recipe, predict, stamped

KEY = jax.random.key(0)
TARGET = planted.TARGET
ATTACK = BadNets(size=1, target=TARGET)
MODEL, VARIABLES, CLEAN = planted.units()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The planted net as a folder, and images of its kind."""
    folder = tmp_path_factory.mktemp("repairs")
    image, label = planted.pictures(160)
    np.savez(folder / "images.npz", image=image, label=label)
    np.savez(folder / "two.npz", image=image, label=label % 2)
    source = Npz(path=str(folder / "images.npz"))
    save_model(folder / "net", planted.Units(), MODEL, VARIABLES, dataset=source)
    return folder, source


def answers(variables, images):
    return np.asarray(predict(MODEL, variables, images)).argmax(-1)


def corner():
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[0, 7, 7] = 1
    aim = jnp.asarray([TARGET], jnp.int32)
    return Reversed(jnp.asarray(mask), jnp.ones((1, 8, 8, 1)), aim, aim >= 0)


def test_the_last_layer_forgets_the_trigger_and_nothing_else():
    hit = stamped(ATTACK, 1, CLEAN.image, KEY)
    assert (answers(VARIABLES, hit) == TARGET).all()
    defense = LastLayerUnlearning(found=corner(), ridge=1e-6)
    result = jax.jit(lambda v: defense(KEY, MODEL, v, CLEAN))(VARIABLES)
    assert (answers(result.variables, CLEAN.image) == CLEAN.label).all()
    assert (answers(result.variables, hit) == CLEAN.label).all()
    before, after = (v["params"]["logits"]["kernel"] for v in (VARIABLES, result.variables))
    others = np.arange(4) != TARGET
    assert (before[:, others] == after[:, others]).all() and abs(after[5, TARGET]) < 0.01
    assert (
        result.variables["params"]["dense"]["kernel"] == VARIABLES["params"]["dense"]["kernel"]
    ).all()
    unsuspected = dataclasses.replace(corner(), suspect=jnp.asarray([False]))
    same = LastLayerUnlearning(found=unsuspected)(KEY, MODEL, VARIABLES, CLEAN).variables
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, VARIABLES))


def test_two_triggers_of_a_label_share_one_change():
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), corner())
    one, two = (
        LastLayerUnlearning(found=found)(KEY, MODEL, VARIABLES, CLEAN).variables
        for found in (corner(), twice)
    )
    kernels = (v["params"]["logits"]["kernel"] for v in (one, two))
    np.testing.assert_allclose(*kernels, atol=1e-5)


def test_a_repair_that_was_named_is_applied_measured_and_written(world, tmp_path, capsys):
    folder, _ = world
    args = ["repair", str(folder / "net"), "--defense", "last-layer-unlearning", "--attack"]
    args += ["badnets", "--attack.size", "1", "--attack.target", "2"]
    args += ["--out", str(tmp_path / "net2"), "--export", str(tmp_path / "net2.safetensors")]
    cli.main(args)
    out = capsys.readouterr().out
    assert "triggers found: label 2" in out and "picked: last-layer-unlearning" in out
    (line,) = [line for line in out.splitlines() if line.startswith("moved by the known trigger")]
    assert "100.0 %" in line and line.split()[-2:] == ["0.0", "%"]
    (line,) = [line for line in out.splitlines() if line.startswith("accuracy")]
    assert line.split()[1:] == ["100.0", "%", "100.0", "%"]
    _, model, variables, about = load_model(tmp_path / "net2")
    assert [type(d) for d in about["defenses"]] == [LastLayerUnlearning]
    arrays = safetensors.arrays((tmp_path / "net2.safetensors").read_bytes())
    assert np.array_equal(arrays["params.logits.kernel"], variables["params"]["logits"]["kernel"])
    x = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    assert np.array_equal(predict(model, variables, x), predict(MODEL, variables, x))
    how = {"arch": planted.Units(), "preprocess": "0-1", "size": (8, 8, 1)}
    again = load_net(tmp_path / "net2.safetensors", **how)
    ours = predict(again.model, again.variables, x)
    np.testing.assert_allclose(ours, predict(MODEL, variables, x), atol=1e-5)


@pytest.mark.long
def test_auto_picks_a_repair_that_stops_what_it_does_not_know(world, monkeypatch):
    folder, source = world
    monkeypatch.setattr(repairs, "STEPS", 20)
    said = []
    made = repair_net(folder / "net", source, attack=ATTACK, say=said.append)
    table = {line.what: line for line in made.table}
    assert made.tried[0].name == "as it was" and made.tried[0].moved > 0.9
    assert table["accuracy"].after > 0.9
    known = table["moved by the known trigger"]
    assert known.before > 0.9 and known.after < 0.1
    assert made.defense.wrap(MODEL) is MODEL and not made.defense.oracle
    assert folded(made.model, made.variables)
    faults = {one.name: one.fault for one in made.tried if one.fault}
    assert "wraps the net" in faults["autoencoder"]
    scores = [one.score for one in made.tried]
    best = made.tried[int(np.argmax(scores[1:])) + 1]
    assert best.score == max(scores[1:]) and any(best.name in line for line in said)
    assert best.name.startswith(registry.name_of(made.defense))


@registry.pytree
class Alike(Net):
    """Two layers of as many channels."""

    def layers(self, x, train, classes):
        for name in "ab":
            x = site(name, relu(conv(x, 8, 3, name)))
        return dense(site("penultimate", x.mean((1, 2))), classes, "logits")


def test_a_mask_is_folded_into_its_own_layer_where_another_sleeps_on_noise_too():
    model = build(Alike(), (8, 8, 1), 4)
    params = {k: dict(v) for k, v in model.init(KEY)["params"].items()}
    kernel, bias = params["b"]["kernel"], params["b"]["bias"]
    params["a"]["bias"] = params["a"]["bias"].at[0].set(-5.0)  # silent on all images
    params["b"]["kernel"] = kernel.at[..., 0].set(-5 * jnp.abs(kernel[..., 0]))
    params["b"]["bias"] = bias.at[0].set(0.1)  # answers to dark ones
    masks = {"a": jnp.ones(8).at[0].set(0)}
    found = folded(model, {"params": params, "masks": masks})["params"]
    assert (found["a"]["bias"] != params["a"]["bias"]).any()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found["b"], params["b"]))


def test_images_of_other_classes_are_labelled_by_the_net(world):
    folder, _ = world
    other = Npz(path=str(folder / "two.npz"))
    defense = LastLayerUnlearning()
    made = repair_net(folder / "net", other.path, defense=defense, say=lambda line: None)
    assert made.table[0].what == "agreement with the net as it was" and made.table[0].before == 1
    assert made.about["dataset"] == other


def test_images_whose_classes_stand_in_another_order_are_told_first(world, tmp_path):
    folder, source = world
    arrays = np.load(source.path)
    np.savez(tmp_path / "other.npz", image=arrays["image"], label=(arrays["label"] + 1) % 4)

    def say(line):
        raise StopIteration(line)

    with pytest.raises(StopIteration, match=r"which is chance: .* in another order"):
        repair_net(folder / "net", Npz(path=str(tmp_path / "other.npz")), say=say)


def test_what_cannot_be_repaired_is_one_line(world, tmp_path, capsys):
    folder, _ = world
    net = str(folder / "net")
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    for more, words in (
        (["--defense", "neural-cleanse"], "repairs no net"),
        (["--defense", "auto:cpu"], "unknown defense 'auto'"),
        (["--export", str(tmp_path / "a.onnx")], "jax2onnx"),
        (["--export", str(tmp_path / "mine.safetensors")], "was not written by bdjax"),
        (["--audit", str(tmp_path)], "is no folder of an audit"),
        (["--minutes", "-1"], "--minutes"),
        (["--attack", "badnets", "--attack.size", "40"], "does not fit into 8 pixels"),
        (["--attack", "badnets", "--attack.target", "4"], "target"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["repair", net, "--out", str(tmp_path / "out"), *more])
        out, said = capsys.readouterr()
        assert stop.value.code == 2 and words in said and said.count("\n") == 1, said
        assert not out  # no search for triggers before it
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"


def test_a_fine_tuning_of_few_images_has_enough_steps():
    long = repairs._long_enough(Retraining(recipe=Recipe(epochs=5, batch=32)), 64)
    assert long.recipe.epochs == repairs.STEPS // 2
    assert repairs._long_enough(Retraining(recipe=Recipe(epochs=200)), 1000).recipe.epochs == 200
