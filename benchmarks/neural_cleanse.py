"""Neural Cleanse: the CNN of Shamshiri & Sohn by outer steps of 31 mini-batches, and STRIP's small
net by labels.
"""

from collections.abc import Iterator
from functools import partial

import jax

from bdjax import datasets
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.models.strip import StripMnist
from benchmarks.measure import Case, forward_flops

STEPS = {"smoke": (1,), "cpu": (1, 2), "paper": (1, 2, 4, 8)}
LABELS = {"smoke": (10,), "cpu": (10, 43, 100, 1283), "paper": (10, 43, 100, 1283)}


def cases(rivals, scale: str) -> Iterator[Case]:
    for steps in STEPS[scale]:
        yield case(
            rivals,
            "Neural Cleanse, outer steps",
            steps,
            Cnn(),
            "cnn",
            10,
            NeuralCleanse(steps=steps),
        )
    for labels in LABELS[scale]:
        defense = NeuralCleanse(steps=1, batches=4)
        yield case(
            rivals, "Neural Cleanse, labels", labels, StripMnist(), "strip_cnn", labels, defense
        )


def case(
    rivals, series: str, size: int, net, rival_net: str, labels: int, defense: NeuralCleanse
) -> Case:
    """A search for the triggers of all labels of an untrained net: its time does not depend on the
    weights.
    """
    data = datasets.load()
    model = build(net, data.shape, labels)
    images = data.clean.image[: defense.batch * defense.batches]

    def search(v, images):
        return defense.search(jax.random.key(0), model, v, images, jax.numpy.arange(labels)).norm

    rival = None
    if rivals is not None:
        opponent = getattr(rivals, rival_net)(labels).eval()
        pixels, _ = rivals.tensors(images, data.clean.label[: len(images)])
        rival = partial(
            rivals.neural_cleanse, opponent, pixels, labels, defense.steps, defense.batch
        )
    work = 2 * forward_flops(model, defense.batch * defense.batches) * labels * int(defense.steps)
    return Case(series, size, search, (model.init(jax.random.key(0)), images), rival, work)
