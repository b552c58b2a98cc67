"""DB-COVIDNet: members of the CNN of Shamshiri & Sohn, trained for one epoch."""

from collections.abc import Iterator
from functools import partial

import jax

from bdjax import datasets
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.train.db_covidnet import DbCovidNet
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import Recipe, poisoned_set
from benchmarks.measure import Case, forward_flops

MEMBERS = {"smoke": (1,), "cpu": (1, 4, 8, 16), "paper": (1, 4, 8, 16, 32, 64)}
IMAGES = 640


def cases(rivals, scale: str) -> Iterator[Case]:
    for members in MEMBERS[scale]:
        yield case(rivals, members)


def case(rivals, members: int) -> Case:
    """So many members."""
    data = datasets.load()
    split = data.train[slice(IMAGES)]
    model, recipe = build(Cnn(), data.shape, data.classes), Recipe(epochs=1)
    # One member of few would be half of them: no design guarantees their vote.
    defense = DbCovidNet(members=members, keep=4, design="random")

    def train(split):
        key = jax.random.key(0)
        return defense(key, model, recipe, poisoned_set(key, split, BadNets(), 10), split).variables

    rival = None
    if rivals is not None:
        image, label = rivals.tensors(split.image, split.label)
        poisoned = rivals.torch.rand(IMAGES) < 0.1
        rival = partial(rivals.ensemble, members, image, label, poisoned, recipe.batch)
    work = 3 * forward_flops(model, IMAGES) * members
    return Case("DB-COVIDNet, members", members, train, (split,), rival, work)
