"""MNTD: 4, 8, 16 shadow nets on 1,000 images for one epoch, then ten epochs of query tuning over them."""

import jax

from bdjax import datasets
from bdjax.defenses.models.mntd import Mntd
from bdjax.models.layers import build
from bdjax.models.mntd import MntdMnist
from bdjax.train import Recipe, unit
from bdjax.types import Split
from benchmarks.measure import Case, forward_flops

SHADOWS, IMAGES = (4, 8, 16), 1000


def case(rivals, shadows: int) -> Case:
    """`shadows` nets, half of them trojaned; nothing is held out on either side."""
    data = datasets.load()
    split = Split(data.train.image[:IMAGES], data.train.label[:IMAGES])
    model = build(MntdMnist(), data.shape, data.classes)
    defense = Mntd(shadows=shadows // 2, validation=0, recipe=Recipe(epochs=1, batch=100))

    @jax.jit
    def learn(split):
        keys = jax.random.split(jax.random.key(0))
        nets, trojaned, _ = defense.shadow_nets(keys[0], model, split)
        return defense.train_meta(keys[1], model, nets, trojaned, unit(split.image))

    placed = jax.device_put(split)
    rival = None
    if rivals is not None:
        image, label = rivals.tensors(split.image, split.label)
        rival = lambda: rivals.mntd(shadows, image, label, 100, defense.meta.epochs)  # noqa: E731
    work = shadows * forward_flops(model, 3 * IMAGES + 2 * defense.meta.epochs * defense.queries)
    return Case(f"mntd {shadows} shadow nets", lambda: learn(placed), rival, work, shadows)


def cases(rivals) -> list[Case]:
    return [case(rivals, shadows) for shadows in SHADOWS]
