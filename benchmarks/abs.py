"""ABS on the CNN of Shamshiri & Sohn: stimulation of its dense layer as it grows, and trigger
inversion.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from bdjax import datasets
from bdjax.defenses.invert.abs import Abs, Candidate
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import unit
from benchmarks.measure import Case, flops

NEURONS = {"smoke": (128,), "cpu": (512, 1024, 2048), "paper": (512, 1024, 2048, 4096)}
CANDIDATES = {"smoke": (1,), "cpu": (1, 2, 4), "paper": (1, 4, 16, 64)}
STEPS = 10
LAYER = 9
"""Modules of the rival's net up to the dense layer and its activation function."""


def cases(rivals, scale: str) -> Iterator[Case]:
    data = datasets.load()
    defense = Abs(steps=STEPS, sites=("penultimate",))
    x = unit(data.clean.image[: defense.images])
    label = jnp.asarray(data.clean.label[: defense.images])
    few = x[: defense.images // 3]
    pixels = None if rivals is None else rivals.tensors(x, label)[0]
    for neurons in NEURONS[scale]:
        model = build(Cnn(hidden=neurons), data.shape, data.classes)

        def stimulate(v, x, label, model=model):
            return defense.stimulate(model, v, x, label)[0]

        rival = None if rivals is None else partial(rivals.abs_stimulation,
                                                    rivals.cnn(hidden=neurons).eval(), pixels,
                                                    LAYER)  # fmt: skip
        work = 2.0 * neurons * defense.levels * len(x) * neurons * data.classes
        yield Case("ABS stimulation, neurons", neurons, stimulate,
                   (model.init(jax.random.key(0)), x, label), rival, work)  # fmt: skip
    model = build(Cnn(), data.shape, data.classes)
    variables = model.init(jax.random.key(0))
    forward = flops(lambda v, x: model.apply(v, x).acts["penultimate"], variables, few)
    for count in CANDIDATES[scale]:
        candidates = Candidate(
            jnp.arange(count), jnp.zeros(count, jnp.int32), jnp.ones(count, bool)
        )

        def invert(v, x, candidates):
            return defense.pixel(jax.random.key(0), model, v, x, candidates)

        rival = None
        if rivals is not None and pixels is not None:
            rival = partial(
                rivals.abs_inversion,
                rivals.cnn().eval(),
                pixels[: len(few)],
                LAYER,
                count,
                STEPS,
                49,
            )
        yield Case("ABS inversion, neurons", count, invert, (variables, x, candidates), rival,
                   2 * forward * STEPS * count)  # fmt: skip
