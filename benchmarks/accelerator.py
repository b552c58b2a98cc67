"""`python -m benchmarks accelerator --out DIR`: what an accelerator gives, on a fresh machine with
jax and torch.

First whether it computes what a CPU computes, for every registered net and attack and a defense of
each kind; then what rounded products change; then how many lanes are best, and how convolutions of
several kernels side by side are; then long jobs against PyTorch on the same device. It stops by
itself after nine minutes: the same command goes on.
"""

import dataclasses
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bdjax import datasets, mesh, registry, testing
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.defenses.samples.activation_clustering import ActivationClustering
from bdjax.defenses.train.db_covidnet import DbCovidNet
from bdjax.models.conv import conv_general_dilated
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.models.strip import StripMnist
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.sweep import Runner, device_name
from bdjax.train import Recipe
from bdjax.types import Metric
from benchmarks import ensemble, measure, neural_cleanse, strip, sweep

registry.declare(
    __name__,
    Metric("difference", "", "low", hint="largest difference from the CPU, of the largest value"),
)
MINUTES = 9.0
HEADS = ("compile s", "ours s", "torch s", "ratio", "difference")
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
LANES = {"smoke": (1, 2), "cpu": (1, 2, 4, 8), "paper": (1, 2, 4, 8, 16, 32, 64)}
SIDE_BY_SIDE = {"smoke": 2, "cpu": 4, "paper": 8}
SHAPES = ((1, 32, 5, 28), (32, 64, 5, 14), (3, 32, 3, 32), (64, 64, 3, 16), (512, 512, 3, 4))
"""Channels, features, kernel and image side of convolutions that several members have."""
LONG = {
    "smoke": (10, 2, 2, 5),
    "cpu": (43, 8, 4, 100),
    "paper": (43, 64, 32, 2000),
}
"""Labels, victims, members and inputs of the long jobs."""
STEPS = {"smoke": 1, "cpu": 1, "paper": 8}
Make = Callable[[], tuple[dict[str, float], dict[str, float]]]
"""A row's metrics, and its seconds."""


# --- The same numbers ---


def logits(name: str) -> Make:
    """How far a net's logits and gradients are from the CPU's."""

    def make():
        net = registry.make("model", name)
        model = build(net, testing.smallest(net), 5)
        variables, x = testing.variables_like(model), np.random.default_rng(0)
        images = x.uniform(size=(8, *model.shape)).astype(np.float32)

        def values(v, x):
            def loss(params):
                return (model.apply({**v, "params": params}, x).logits ** 2).sum()

            return model.apply(v, x).logits, jax.grad(loss)(v["params"])

        def on(device):
            with mesh.aiming(device.platform):
                return jax.device_get(jax.jit(values)(*jax.device_put((variables, images), device)))

        here, there = (on(device) for device in (jax.devices()[0], jax.devices("cpu")[0]))
        return {"difference": apart(here, there)}, {}

    return make


def apart(here: Any, there: Any) -> float:
    """The largest difference of two pytrees' leaves, of the largest value of a leaf."""
    pairs = zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in pairs if np.size(a)
    )


def checked(name: str) -> Make:
    """That an attack keeps its contract on this device; one of pictures is given some."""

    def make():
        for attack in testing.with_pictures(registry.make("attack", name)):
            testing.check_attack(attack)
        return {}, {}

    return make


DATA = datasets.source("fashion-mnist-sample", train_size=2000, test_size=500)
BASE = Cell("", "", DATA, StripMnist(), Recipe(epochs=3, batch=50), BadNets())
KINDS = {
    "no defense": None,
    "train": DbCovidNet(members=4, keep=2),
    "repair": FinePruning(recipe=Recipe(epochs=1, batch=50)),
    "invert": NeuralCleanse(steps=8, batches=8),
    "inputs": Strip(n=20, inputs=100),
    "samples": ActivationClustering(),
}
SHOWN = ("acc_test", "asr_nt", "anomaly_index", "tpr", "fpr")


def judged(kind: str, devices: Any, precision: str) -> dict[str, float]:
    """The metrics of a victim under a defense, computed on `devices`."""
    cell = dataclasses.replace(BASE, defense=KINDS[kind])
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision(precision):
        (row,) = Runner(Store(folder), "accelerator", devices=devices, quiet=True).run([cell])
    return {name: row["metrics"][name] for name in SHOWN if name in row["metrics"]}


def agreement(kind: str) -> Make:
    """A kind of defense, here and on the CPU: its metrics here, and how far they are apart."""

    def make():
        here, there = (
            judged(kind, devices[:1], "float32") for devices in (jax.devices(), jax.devices("cpu"))
        )
        return {**here, "difference": max(abs(here[k] - there[k]) for k in here)}, {}

    return make


def rounded(kind: str, precision: str) -> Make:
    """What products of another precision change of the metrics."""
    return lambda: (judged(kind, jax.devices()[:1], precision), {})


# --- How fast ---


def timed(case: measure.Case, rivals: Any, repeats: int) -> Make:
    """A case of the other benchmarks, against PyTorch on the same device."""

    def make():
        rival = case.rival and functools.partial(rivals.whole, case.rival)
        found = measure.run(case._replace(rival=rival), repeats)
        return found, {"compile": found.pop("compile_s"), "run": found.pop("run_s")}

    return make


def lanes(count: int, most: int, repeats: int) -> Make:
    """The seconds of training `most` victims, `count` side by side."""

    def make():
        return timed(sweep.case(None, "", most, most, 1, count), None, repeats)()

    return make


def written(patches: bool, make: Make) -> Make:
    """The same row, of programs whose convolutions are products of patches, or native."""

    def make_so():
        with mesh.patches(patches):
            return make()

    return make_so


def side_by_side(kernels: int, channels: int, features: int, size: int, side: int) -> measure.Case:
    """A convolution and its two gradients for so many kernels, each with 32 images of its own."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (kernels, 32, side, side, channels))
    w = jax.random.normal(keys[1], (kernels, size, size, channels, features))

    def loss(x, w):
        names = ("NHWC", "HWIO", "NHWC")
        return (conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=names) ** 2).sum()

    work = 3.0 * 2 * kernels * 32 * side**2 * size**2 * channels * features
    return measure.Case("", kernels, jax.vmap(jax.grad(loss, (0, 1))), (x, w), None, work)


def plan(scale: str, repeats: int) -> Iterator[tuple[str, str, Make]]:
    """Each row: its table, its name, and how it is made."""
    rivals = measure.rivals()
    for entry in registry.entries("model"):
        yield "Logits and gradients, as on a CPU", entry.name, logits(entry.name)
    for entry in registry.entries("attack"):
        yield "Attacks keep their contract", entry.name, checked(entry.name)
    for kind in KINDS:
        yield "A defense of each kind, as on a CPU", kind, agreement(kind)
    for kind in ("no defense", "invert"):
        for precision in PRECISIONS:
            yield "Rounded products", f"{kind}, {precision}", rounded(kind, precision)
    for count in LANES[scale]:
        table = f"Lanes, {LANES[scale][-1]} victims"
        yield table, f"{count} side by side", lanes(count, LANES[scale][-1], repeats)
    kernels = SIDE_BY_SIDE[scale]
    forms = [
        (f"{c} → {o}, {k}×{k}, {n}×{n}", side_by_side(kernels, c, o, k, n)) for c, o, k, n in SHAPES
    ]
    forms.append((f"{kernels} victims", sweep.case(None, "", kernels, kernels, 1, kernels)))
    for (name, case), patches in itertools.product(forms, (False, True)):
        table = f"Convolutions of {kernels} nets side by side"
        form = "products of patches" if patches else "native"
        yield table, f"{name}, {form}", written(patches, timed(case, None, repeats))
    labels, victims, members, inputs = LONG[scale]
    judge = NeuralCleanse(steps=STEPS[scale], batches=31)
    cases = (
        neural_cleanse.case(rivals, "", labels, Cnn(), "cnn", labels, judge),
        sweep.case(rivals, "", victims, victims, 1),
        ensemble.case(rivals, members),
        strip.case(rivals, "", inputs, inputs, 100),
    )
    names = (
        f"Neural Cleanse, {labels} labels, {STEPS[scale]} outer steps", f"{victims} victims",
        f"an ensemble of {members}", f"STRIP, {inputs} inputs × 100",
    )  # fmt: skip
    for name, case in zip(names, cases, strict=True):
        yield "Long jobs", name, timed(case, rivals, repeats)


# --- Rows ---


def line(row: Mapping[str, Any]) -> str:
    """A row as people read it, under `HEADS`."""
    found, spent = row["metrics"], row["seconds"]
    cells = [f"{spent[name]:.2f}" if spent.get(name) else "" for name in ("compile", "run")]
    cells += [
        f"{found[name]:.{digits}{kind}}" if name in found else ""
        for name, digits, kind in (("torch_s", 2, "f"), ("ratio", 1, "f"), ("difference", 1, "e"))
    ]
    more = [f"{name} {found[name]:.3f}" for name in SHOWN if name in found]
    head = f"{row['table']}: {row['row']}".ljust(100)
    return head + "".join(f"{cell:>12}" for cell in cells) + "  " + ", ".join(more)


def rows(scale: str, done: Mapping[str, Any], repeats: int) -> Iterator[dict[str, Any]]:
    """A row after the other, those of `done` as they are, until `MINUTES` are over."""
    begun = time.monotonic()
    for table, name, make in plan(scale, repeats):
        run = registry.digest(table, name, scale, device_name(), jax.__version__)
        if run in done:
            yield done[run]
            continue
        if time.monotonic() - begun > 60 * MINUTES:
            over = f"{MINUTES:g} minutes are over: with --out the same command goes on from here"
            print(over, file=sys.stderr, flush=True)
            return
        start = time.monotonic()
        found, seconds = make()
        seconds = {"compile": 0.0, "run": time.monotonic() - start} | seconds
        found = {k: float(v) for k, v in found.items()}
        config = {"repeats": repeats}
        yield measure.row("accelerator", table, name, scale, found, seconds, config, run=run)
