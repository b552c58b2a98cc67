"""A grid rate × target × seed of small victims, trained by one compiled call: 1, 4, 8, 24 of them, one epoch each."""

import itertools

import jax

from bdjax import datasets
from bdjax.attacks.badnets import BadNets
from bdjax.mesh import over_runs, place
from bdjax.models.layers import build
from bdjax.models.strip import StripMnist
from bdjax.sweep import stack
from bdjax.train import Recipe, fit, poisoned_set
from bdjax.types import Split
from benchmarks.measure import Case, forward_flops

GRID = tuple(itertools.product((0.01, 0.05, 0.1, 0.2), (0, 4, 9), (0, 1)))
VICTIMS, IMAGES = (1, 4, 8, len(GRID)), 1280


def case(rivals, victims: int) -> Case:
    """The first `victims` of the grid."""
    data = datasets.load()
    split = Split(data.train.image[:IMAGES], data.train.label[:IMAGES])
    model = build(StripMnist(), data.shape, data.classes)
    recipe, grid = Recipe(epochs=1, batch=32), list(GRID[:victims])

    def train(split, item):
        key, attack = item
        return fit(key, model, recipe, poisoned_set(jax.random.fold_in(key, 1), split, attack, data.classes))[0]

    run = jax.jit(over_runs(train, devices=jax.local_devices()[:1]))
    items = stack([(jax.random.key(seed), BadNets(rate=rate, target=target)) for rate, target, seed in grid])
    placed = place(split, items, jax.local_devices()[:1])
    rival = None
    if rivals is not None:
        image, label = rivals.tensors(split.image, split.label)
        rival = lambda: rivals.victims(grid, image, label, recipe.batch)  # noqa: E731
    work = victims * 3 * forward_flops(model, IMAGES)
    return Case(f"sweep of {victims} victims", lambda: run(*placed), rival, work, victims)


def cases(rivals) -> list[Case]:
    return [case(rivals, victims) for victims in VICTIMS]
