"""MNTD: shadow nets on 1,000 images for one epoch, then ten epochs of query tuning over them."""

from collections.abc import Iterator
from functools import partial

import jax

from bdjax import datasets
from bdjax.defenses.models.mntd import Mntd
from bdjax.models.layers import build
from bdjax.models.mntd import MntdMnist
from bdjax.train import Recipe, unit
from benchmarks.measure import Case, forward_flops

SHADOWS = {"smoke": (4,), "cpu": (4, 8, 16), "paper": (4, 8, 16, 64, 256)}
IMAGES = 1000


def cases(rivals, scale: str) -> Iterator[Case]:
    data = datasets.load()
    split = data.train[slice(IMAGES)]
    model = build(MntdMnist(), data.shape, data.classes)
    for shadows in SHADOWS[scale]:  # half of them trojaned; nothing is held out on either side
        defense = Mntd(shadows=shadows // 2, validation=0, recipe=Recipe(epochs=1, batch=100))

        def learn(split, defense=defense):
            keys = jax.random.split(jax.random.key(0))
            nets, trojaned, _ = defense.shadow_nets(keys[0], model, split)
            return defense.train_meta(keys[1], model, nets, trojaned, unit(split.image))

        rival = None
        if rivals is not None:
            image, label = rivals.tensors(split.image, split.label)
            rival = partial(rivals.mntd, shadows, image, label, 100, defense.meta.epochs)
        work = shadows * forward_flops(
            model, 3 * IMAGES + 2 * defense.meta.epochs * defense.queries
        )
        yield Case("MNTD, shadow nets", shadows, learn, (split,), rival, work)
