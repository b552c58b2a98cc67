"""Training the CNN of Shamshiri & Sohn on a poisoned Fashion-MNIST sample for an epoch, by batch
size.
"""

from collections.abc import Iterator
from functools import partial

import jax

from bdjax import datasets
from bdjax.attacks.badnets import BadNets
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import Recipe, advance, begin, poisoned_set
from benchmarks.measure import Case, forward_flops

IMAGES = 1920
SCALES = {"smoke": (32,), "cpu": (32, 128), "paper": (32, 128, 512)}


def cases(rivals, scale: str) -> Iterator[Case]:
    data = datasets.load()
    model = build(Cnn(), data.shape, data.classes)
    for batch in SCALES[scale]:
        split = data.train[slice(IMAGES)]
        key, recipe = jax.random.key(0), Recipe(batch=batch, epochs=1)

        def epoch(key, state, split, recipe=recipe):
            return advance(
                key, state, model, recipe, poisoned_set(key, split, BadNets(), 10), epochs=1
            )

        rival = None
        if rivals is not None:
            image, label = rivals.tensors(split.image, split.label)
            net, poisoned = rivals.cnn(), rivals.torch.rand(len(label)) < 0.1
            rival = partial(rivals.train, net, image, label, poisoned, batch)
        work = 3 * forward_flops(model, IMAGES // batch * batch)
        yield Case(
            "Training, batch", batch, epoch, (key, begin(key, model, recipe), split), rival, work
        )
