"""DB-COVIDNet: four members of the CNN of Shamshiri & Sohn, trained for one epoch."""

import jax

from bdjax import datasets
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.train.db_covidnet import DbCovidNet
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import Recipe, poisoned_set
from bdjax.types import Split
from benchmarks.measure import Case, forward_flops

MEMBERS, IMAGES = 4, 1280


def cases(rivals) -> list[Case]:
    data = datasets.load()
    split = Split(data.train.image[:IMAGES], data.train.label[:IMAGES])
    model = build(Cnn(), data.shape, data.classes)
    recipe, defense = Recipe(epochs=1), DbCovidNet(members=MEMBERS, keep=4)

    @jax.jit
    def train(split):
        key = jax.random.key(0)
        return defense(key, model, recipe, poisoned_set(key, split, BadNets(), 10), split).variables

    placed = jax.device_put(split)
    rival = None
    if rivals is not None:
        image, label = rivals.tensors(split.image, split.label)
        poisoned = rivals.torch.rand(IMAGES) < 0.1
        rival = lambda: rivals.ensemble(MEMBERS, image, label, poisoned, recipe.batch)  # noqa: E731
    work = 3 * forward_flops(model, IMAGES) * MEMBERS
    return [Case(f"ensemble of {MEMBERS}", lambda: train(placed), rival, work)]
