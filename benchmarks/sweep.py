"""A grid rate × target × seed of small victims, trained by one compiled call for an epoch each."""

import itertools
from collections.abc import Iterator
from functools import partial

import jax

from bdjax import datasets
from bdjax.attacks.badnets import BadNets
from bdjax.mesh import over_runs
from bdjax.models.layers import build
from bdjax.models.strip import StripMnist
from bdjax.sweep import stack
from bdjax.train import Recipe, fit, poisoned_set
from benchmarks.measure import Case, forward_flops

GRID = tuple(itertools.product((0.01, 0.05, 0.1, 0.2), (0, 4, 9, 7), (0, 1, 2, 3)))
VICTIMS = {"smoke": (1,), "cpu": (1, 4, 8, 24, 64), "paper": (1, 4, 8, 24, 64)}
IMAGES = 1280


def cases(rivals, scale: str) -> Iterator[Case]:
    for victims in VICTIMS[scale]:
        yield case(rivals, "Training, victims", victims, victims, 1)


def case(
    rivals, series: str, size: int, victims: int, devices: int, lanes: int | None = None
) -> Case:
    """The first `victims` of the grid, spread over `devices`, `lanes` of them side by side."""
    data = datasets.load()
    split = data.train[slice(IMAGES)]
    model, recipe = build(StripMnist(), data.shape, data.classes), Recipe(epochs=1, batch=32)

    def train(split, item):
        key, attack = item
        return fit(
            key,
            model,
            recipe,
            poisoned_set(jax.random.fold_in(key, 1), split, attack, data.classes),
        )[0]

    run = over_runs(train, lanes=lanes, devices=jax.local_devices()[:devices])
    items = stack(
        [
            (jax.random.key(seed), BadNets(rate=rate, target=target))
            for rate, target, seed in GRID[:victims]
        ]
    )
    rival = None
    if rivals is not None:
        image, label = rivals.tensors(split.image, split.label)
        rival = partial(rivals.victims, GRID[:victims], image, label, recipe.batch)
    return Case(
        series, size, run, (split, items), rival, victims * 3 * forward_flops(model, IMAGES)
    )
