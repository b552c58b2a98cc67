"""Training the CNN of Shamshiri & Sohn on a poisoned Fashion-MNIST sample, one epoch, batches of 32 and 128."""

import jax

from bdjax import datasets
from bdjax.attacks.badnets import BadNets
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from bdjax.train import Recipe, advance, begin, poisoned_set
from benchmarks.measure import Case, forward_flops


def case(rivals, batch: int, images: int) -> Case:
    """One epoch of `images` images."""
    data = datasets.load()
    split = data.train[:images]
    model = build(Cnn(), data.shape, data.classes)
    key, recipe = jax.random.key(0), Recipe(batch=batch, epochs=1)
    state = begin(key, model, recipe)

    @jax.jit
    def epoch(key, state, split):
        return advance(key, state, model, recipe, poisoned_set(key, split, BadNets(), 10), epochs=1)

    placed = jax.device_put(split)
    rival = None
    if rivals is not None:
        image, label = rivals.tensors(split.image, split.label)
        net, poisoned = rivals.cnn(), rivals.torch.rand(images) < 0.1
        rival = lambda: rivals.train(net, image, label, poisoned, batch)  # noqa: E731
    work = 3 * forward_flops(model, images // batch * batch)
    return Case(f"train B={batch}", lambda: epoch(key, state, placed), rival, work)


def cases(rivals) -> list[Case]:
    return [case(rivals, 32, 960), case(rivals, 128, 2560)]
