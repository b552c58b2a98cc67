"""What a sweep would be on devices that are not at hand: what is counted, what is compiled, what is
printed. With the marker `target`: XLA's compilers for TPU and GPU, where they are installed.
"""

import dataclasses
import importlib.util
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import mesh, registry, sweep, target
from bdjax.attacks.badnets import BadNets
from bdjax.cli import main
from bdjax.datasets.base import Source
from bdjax.datasets.sample import Sample
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.invert.abs import Abs
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.models.mntd import Mntd
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.defenses.samples.activation_clustering import ActivationClustering
from bdjax.defenses.train.db_covidnet import DbCovidNet
from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.models.shamshiri import Ffnn
from bdjax.models.strip import StripCifar10, StripMnist
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.target import cost, flops
from bdjax.train import Recipe
from bdjax.types import BadInput, Split

NHWC = ("NHWC", "HWIO", "NHWC")


def of(fn, *args, **fields):
    return cost(jax.make_jaxpr(fn)(*args).jaxpr, fields)


def test_a_dense_net_and_its_gradient_are_counted_as_by_hand():
    params, x = (jnp.ones((784, 512)), jnp.ones((512, 10))), jnp.ones((128, 784))

    def loss(params, x):
        return (jax.nn.relu(x @ params[0]) @ params[1]).sum()

    first, second = 2 * 128 * 784 * 512, 2 * 128 * 512 * 10
    assert flops(loss, params, x) == first + second
    # The images have no gradient: of the first layer it is one product more, not two.
    assert flops(jax.grad(loss), params, x) == 2 * first + 3 * second


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_counted_as_by_hand(groups):
    image, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6 // groups, 4))

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=NHWC, feature_group_count=groups
        )

    once = 2 * (2 * 6 * 6 * 4) * (3 * 3 * 6 // groups)
    found = of(conv, image, kernel)
    assert found.flops == once and found.kernels == 1
    assert found.bytes == 4 * (image.size + kernel.size + 2 * 6 * 6 * 4)


def test_zeros_of_a_stride_are_not_counted():
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 2, 3, 4))

    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=NHWC).sum()

    once = 2 * (2 * 4 * 4 * 4) * (2 * 2 * 3)
    assert flops(jax.grad(conv, (0, 1)), image, kernel) == 3 * once


def test_loops_count_as_often_as_they_run():
    x, eye = jnp.ones((2, 3)), jnp.eye(3)
    once = 2 * 2 * 3 * 3

    def five(x):
        return jax.lax.scan(lambda c, _: (c @ eye, None), x, length=5)[0]

    assert flops(five, x) == 5 * once
    assert flops(jax.vmap(five), jnp.stack([x] * 4)) == 4 * 5 * once
    assert flops(lambda x: jax.lax.scan(lambda c, _: (five(c), None), x, length=7)[0], x) == (
        35 * once
    )

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ eye @ eye, lambda x: x @ eye, x)

    assert flops(branch, x) == 2 * once


def test_a_loop_that_may_end_early_counts_to_its_bound_or_says_that_it_has_none():
    eye = jnp.eye(3)

    def search(x, going):
        return jax.lax.while_loop(going, lambda c: (c[0] @ eye, c[1] + 1), (x, 0))[0]

    found = of(lambda x: search(x, lambda c: (c[0].sum() > 1) & (c[1] < 9)), jnp.ones((2, 3)))
    assert found.flops == 9 * 2 * 2 * 3 * 3 and found.bounds == {"9"} and not found.unknown
    together = jax.vmap(lambda x: search(x, lambda c: (c[0].sum() > 1) & (c[1] < 9)))
    assert flops(together, jnp.ones((4, 2, 3))) == 4 * found.flops
    found = of(lambda x: search(x, lambda c: c[0].sum() > 1), jnp.ones((2, 3)))
    assert found.flops == 2 * 2 * 3 * 3 and found.unknown and not found.bounds


@pytest.mark.parametrize(("lanes", "rounds"), [(1, 7 * 20), (2, 4 * 20), (7, 20)])
def test_drained_searches_are_bound_by_their_steps(lanes, rounds):
    eye = jnp.eye(3)

    def run(goals):
        return mesh.drain(
            lambda goal: (jnp.ones((3, 3)), goal), lambda s: (s[0] @ eye, s[1] - 1),
            lambda s: s[1] <= 0, goals, lanes,
        )  # fmt: skip

    found = of(run, jnp.arange(7), steps=20)
    assert found.flops == rounds * min(lanes, 7) * 2 * 27 and not found.unknown
    assert of(run, jnp.arange(7)).unknown


def test_bytes_are_those_that_a_compiler_counts():
    """What is computed number by number is fused, an update of weights into one pass."""

    def step(params, x, y):
        def loss(params):
            return ((jax.nn.relu(x @ params[0]) @ params[1] - y) ** 2).mean()

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    args = (jnp.ones((784, 512)), jnp.ones((512, 10))), jnp.ones((128, 784)), jnp.ones((128, 10))
    analysis = jax.jit(step).lower(*args).compile().cost_analysis()
    assert of(step, *args).bytes == pytest.approx(analysis["bytes accessed"], rel=0.15)  # type: ignore[index]


def test_over_devices_it_is_the_share_of_one():
    devices = jax.local_devices()
    run = mesh.over_runs(lambda shared, x: x @ shared, devices=devices)
    assert flops(run, jnp.eye(3), jnp.ones((8, 2, 3))) == 2 * (2 * 2 * 3 * 3)


def test_what_the_data_sheets_say_binds():
    device = target.GPUS["h100"]
    assert device.rate(None) == device.rate("highest") == 67e12
    assert device.rate("tensorfloat32") == device.rate("bfloat16") == 494e12
    tpu = target.TPUS["v5e"]
    assert tpu.rate("float32") * 6 == tpu.rate("high") * 3 == tpu.rate("bfloat16") == 197e12
    found = target.Cost(flops=67e12, bytes=3350e9 / 2, kernels=100).seconds(device, "float32")
    assert found == {"compute": 1.0, "memory": 0.5, "kernels": 100 * device.launch}


DEVICE = target.Device((1e9, 1e9, 1e9), 1e9, 1e9)
DATA = Sample(train_size=200, test_size=50)
BASE = Cell("T", "none", DATA, Ffnn((8,)), Recipe(epochs=3, batch=50), BadNets())
DEFENSES = (FinePruning(), Strip(n=2, inputs=5), NeuralCleanse(steps=2, batches=1, seeds=2),
            DbCovidNet(members=3))  # fmt: skip
CELLS = [
    *grid(BASE, seed=range(3)),
    *(dataclasses.replace(BASE, defense=d, row=type(d).__name__, seed=s)
      for d in DEFENSES for s in range(3)),
    BASE.twin,
]  # fmt: skip


@pytest.mark.long
def test_a_rehearsal_calls_what_a_run_calls_and_writes_nothing(tmp_path, monkeypatch):
    real, calls = sweep.Runner._call, Counter()

    def call(self, stage, fn, model, shared, *items, donate=()):
        calls[fn.__name__.strip("_"), len(jax.tree.leaves(items)[0])] += 1
        return real(self, stage, fn, model, shared, *items, donate=donate)

    places = jax.local_devices()[:2]
    made, unfit = target.rehearse(CELLS, target.Target("cpu", DEVICE, places))
    assert not unfit
    assert not any(program.fault for program in made)
    assert all(p.lanes == 1 and not p.collectives for p in made)
    compiled = [p for p in made if p.text]
    assert {p.kin for p in compiled} == {p.kin for p in made}
    assert all(0 < p.held < 1e8 for p in compiled)

    monkeypatch.setattr(sweep.Runner, "_call", call)
    sweep.Runner(Store(tmp_path), "t", quiet=True, devices=places).run(CELLS)
    found = Counter()
    for program in made:
        found[program.what.partition(",")[0], 2 * program.each] += sum(program.calls.values())
    assert found == calls and calls["epoch", 4] == 3


def test_a_sweep_that_does_not_fit_has_fewer_lanes_or_halves_its_groups(monkeypatch):
    monkeypatch.setattr(mesh, "default_lanes", lambda items: items)  # as on an accelerator
    cells = list(grid(BASE, seed=range(4)))

    def go(room):
        at_hand = target.Target("cpu", DEVICE._replace(memory=room), jax.local_devices()[:1])
        return (found := target.rehearse(cells, at_hand)), target.report(found, at_hand)

    (made, unfit), _ = go(1e9)
    assert [p.lanes for p in made] == [4, 4, 4] and not unfit  # begin, epoch, measured
    most = max(p.held for p in made)
    (made, unfit), _ = go(most - 1)
    assert [p.each for p in made] == [4, 4, 4] and min(p.lanes for p in made) < 4 and not unfit
    (made, unfit), _ = go(most / 3)
    assert {p.each for p in made if not p.what.startswith("begin")} <= {1, 2} and not unfit
    (made, unfit), (rows, notes) = go(1000)
    line = "4 runs do not fit into the memory of cpu even one at a time: training on ffnn"
    assert not made and not rows and unfit == notes[0] == line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "cpu"], "give --dry-run, too"),
        (["--dry-run", "--target", "tpu:v9:2x2"], "TPUs: v2, v3, v4"),
        (["--dry-run", "--target", "tpu:v5e"], "such as gpu:h100 or tpu:v5e:4x4"),
        (["--dry-run", "--target", "gpu:h100:0"], "0 is no number of GPUs"),
        (["--dry-run", "--target", "gpu:h100", "--devices", "2"], "leave --devices away"),
    ],
)
def test_bad_targets_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "experiments/sweep_defenses.py", "--scale", "smoke", *flags])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(target, "_there", lambda module: False)
    with pytest.raises(BadInput, match=r"pip install 'jax\[tpu\]'"):
        target.find("tpu:v5e:2x2")
    with pytest.raises(BadInput, match=r"pip install 'jax\[cuda13-local\]'"):
        target.find("gpu:h100")


def test_a_dry_run_says_what_a_target_takes(tmp_path, capsys, monkeypatch):
    device = target.Device((67e12, 1.0, 1.0), 3e12, 1e11, launch=2e-6)
    monkeypatch.setattr(target, "_measured", lambda: device)
    folder = tmp_path / "out"
    main(["sweep", "experiments/sweep_defenses.py", "--scale", "smoke", "--dry-run", "--target",
          "cpu", "--out", str(folder)])  # fmt: skip
    text = capsys.readouterr().out
    assert "defended, neural-cleanse, ffnn" in text and "nothing" in text and "bound by" in text
    assert "products in float32" in text and "device-hours at the roofline" in text
    assert "as if no search ended early: defended, neural-cleanse" in text
    assert not folder.exists()


# --- XLA's compilers for devices that are not here ---


class Made(Source):
    """Noise of 43 classes: compilers look at shapes alone."""

    def read(self):
        rng = np.random.default_rng(0)
        train, test = (
            Split(rng.integers(0, 256, (n, 16, 16, 3), np.uint8), np.arange(n, dtype=np.int32) % 43)
            for n in (430, 86)
        )
        return train, test, ()


VICTIM = Cell("T", "none", Made(), StripMnist(), Recipe(epochs=2, batch=32), BadNets())
KINDS = {
    "fine-pruning": FinePruning(),
    "strip": Strip(n=4, inputs=20),
    "neural-cleanse": NeuralCleanse(batches=4),
    "db-covidnet": DbCovidNet(members=3),
    "abs": Abs(images=43, top=4, steps=50),
    "mntd": Mntd(shadows=4, validation=2, recipe=Recipe(epochs=2), meta=Recipe(epochs=2, batch=1)),
    "activation-clustering": ActivationClustering(),
}
"""One of each kind of defense, and those that are built as no other."""
NORMED = dataclasses.replace(VICTIM, row="BatchNorm", model=StripCifar10())
TARGETS = {"tpu": ("tpu:v5e:1x1", "tpu:v5e:2x2"), "gpu": ("gpu:h100", "gpu:h100:4")}


@pytest.mark.target
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu")
@pytest.mark.parametrize(("size", "count"), [("1x1", 1), ("1x2", 2), ("2x2", 4), ("4x4", 4)])
def test_a_slice_may_be_smaller_than_a_host(size, count):
    assert len(target.find(f"tpu:v5e:{size}").devices) == count


PRECISION = {"tpu": "bfloat16", "gpu": "float32"}
"""XLA compiles a float32 product for a TPU as six, which takes four times as long."""


def found(name):
    """A target, where its compiler is here."""
    try:
        return target.find(name)
    except BadInput as error:
        if "needs its compiler" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.target
@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_every_kind_of_program_compiles_and_sends_nothing(kind):
    one, four = map(found, TARGETS[kind])
    with jax.default_matmul_precision(PRECISION[kind]):
        _compiles_and_sends_nothing(one, four)


@pytest.mark.target
def test_on_a_gpu_eight_nets_side_by_side_are_grouped_convolutions_or_batched_products():
    gpu, texts = found("gpu:h100"), {}
    for patches in (False, True):
        with mesh.patches(patches):
            programs = target.rehearse(list(grid(VICTIM, seed=range(8))), gpu).programs
        (epoch,) = [p for p in programs if p.what.startswith("epoch")]
        assert epoch.lanes == 8 and not epoch.fault
        texts[patches] = epoch.text
    assert "cudnn$conv" in texts[False] and "feature_group_count=8" in texts[False]
    assert "cudnn$conv" not in texts[True] and "feature_group_count" not in texts[True]


@pytest.mark.target
def test_every_defense_compiles_for_a_gpu_on_gray_images():
    """Whose products have fewer numbers than a GPU's tiles, with six nets side by side."""
    gray = Cell("T", "none", Sample(train_size=2000, test_size=100), BadNetsCnn(pool="max"),
                Recipe(epochs=1, batch=50), BadNets())  # fmt: skip
    defenses = {entry.name: registry.on_cpu(entry) for entry in registry.entries("defense")}
    cells = [dataclasses.replace(gray, row=name, defense=made) for name, made in defenses.items()]
    made = target.rehearse([c for cell in cells for c in grid(cell, seed=range(6))],
                           found("gpu:h100")).programs  # fmt: skip
    faults = {p.what: p.fault for p in made if p.fault}
    assert faults.keys() == {"defended, input-anomaly, badnets-cnn"}, faults
    assert "calls the host" in faults["defended, input-anomaly, badnets-cnn"]
    assert not [n for n in defenses if not any(f"defended, {n}," in p.what for p in made)]


def _compiles_and_sends_nothing(one, four):
    cells = [VICTIM, NORMED, *(dataclasses.replace(VICTIM, row=k, defense=d)
                               for k, d in KINDS.items())]  # fmt: skip
    cells = [cell for base in cells for cell in grid(base, seed=range(4))]
    found, unfit = target.rehearse(cells, four)
    assert not unfit and all(p.lanes == p.each == 1 for p in found), [p.fault for p in found]
    assert not any(p.collectives for p in found)
    words = [p.what for p in found]
    assert not [k for k in KINDS if not any(f"defended, {k}, strip-mnist" in w for w in words)]
    assert "epoch, badnets, strip-cifar10" in words
    rows, notes = target.report(target.Rehearsed(found, unfit), four)
    assert len(rows) == len(found) and any("device-hours" in note for note in notes)

    def held(aim):
        """Of a net that is larger than the images, which every device holds."""
        found = target.rehearse(cells[4:8], aim).programs
        return next(p.held for p in found if p.what == "epoch, badnets, strip-cifar10")

    assert held(four) < held(one) / 2
