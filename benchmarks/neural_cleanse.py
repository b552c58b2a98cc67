"""Neural Cleanse on the CNN of Shamshiri & Sohn: 10 labels, batches of 32, two outer steps of 31 mini-batches each."""

import jax

from bdjax import datasets
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from benchmarks.measure import Case, forward_flops

OUTER = 2


def cases(rivals) -> list[Case]:
    data = datasets.load()
    model = build(Cnn(), data.shape, data.classes)
    variables = model.init(jax.random.key(0))
    defense = NeuralCleanse(steps=OUTER)
    images = data.clean.image[: defense.batch * defense.batches]
    labels = jax.numpy.arange(data.classes)
    search = jax.jit(lambda v, images: defense.search(jax.random.key(0), model, v, images, labels).norm)
    placed = jax.device_put((variables, images))
    rival = None
    if rivals is not None:
        net = rivals.cnn().eval()
        pixels, _ = rivals.tensors(images, data.clean.label[: len(images)])
        rival = lambda: rivals.neural_cleanse(net, pixels, data.classes, OUTER, defense.batch)  # noqa: E731
    steps = data.classes * OUTER * defense.batches
    work = 2 * forward_flops(model, defense.batch) * steps
    return [Case(f"neural-cleanse {data.classes} labels B=32", lambda: search(*placed), rival, work)]
