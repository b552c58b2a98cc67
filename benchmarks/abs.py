"""ABS on the CNN of Shamshiri & Sohn: stimulation of its dense layer as it grows, and trigger inversion."""

import jax
import jax.numpy as jnp

from bdjax import datasets
from bdjax.defenses.invert.abs import Abs, Candidate
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import unit
from benchmarks.measure import Case, flops

NEURONS, CANDIDATES, STEPS = (512, 1024, 2048), (1, 2, 4), 10
LAYER = 9
"""Modules of the rival's net up to the dense layer and its activation function."""


def cases(rivals) -> list[Case]:
    data = datasets.load()
    defense = Abs(steps=STEPS, sites=("penultimate",))
    x = unit(data.clean.image[: defense.images])
    label = jnp.asarray(data.clean.label[: defense.images])
    few = x[: defense.images // 3]
    pixels = None if rivals is None else rivals.tensors(x, label)[0]
    return [
        *(_stimulation(rivals, data, defense, x, label, pixels, neurons) for neurons in NEURONS),
        *(_inversion(rivals, data, defense, x, few, pixels, count) for count in CANDIDATES),
    ]


def _net(data, neurons: int):
    model = build(Cnn(hidden=neurons), data.shape, data.classes)
    return model, model.init(jax.random.key(0))


def _stimulation(rivals, data, defense, x, label, pixels, neurons: int) -> Case:
    model, variables = _net(data, neurons)
    run = jax.jit(lambda v, x, label: defense.stimulate(model, v, x, label)[0])
    rival = None
    if rivals is not None:
        net = rivals.cnn(hidden=neurons).eval()
        rival = lambda: rivals.abs_stimulation(net, pixels, LAYER)  # noqa: E731
    work = 2.0 * neurons * defense.levels * len(x) * neurons * data.classes
    return Case(f"abs stimulation, {neurons} neurons", lambda: run(variables, x, label), rival, work)


def _inversion(rivals, data, defense, x, few, pixels, count: int) -> Case:
    model, variables = _net(data, NEURONS[-1])
    candidates = Candidate(jnp.arange(count), jnp.zeros(count, jnp.int32), jnp.ones(count, bool))
    run = jax.jit(lambda v, x: defense.pixel(jax.random.key(0), model, v, x, candidates))
    rival = None
    if rivals is not None:
        net = rivals.cnn().eval()
        rival = lambda: rivals.abs_inversion(net, pixels[: len(few)], LAYER, count, STEPS, 49)  # noqa: E731
    forward = flops(lambda v, x: model.apply(v, x).acts["penultimate"], variables, few)
    return Case(
        f"abs inversion, {count} neurons × {STEPS}",
        lambda: run(variables, x),
        rival,
        2 * forward * STEPS * count,
        count,
    )
