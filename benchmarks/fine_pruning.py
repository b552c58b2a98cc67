"""Fine-Pruning's curve: accuracy on 200 images with 0, 1, … all channels of the last convolution
pruned.
"""

from collections.abc import Iterator
from functools import partial

import jax

from bdjax import datasets
from bdjax.channels import channel_means, curve
from bdjax.models.layers import build
from bdjax.models.shamshiri import Cnn
from benchmarks.measure import Case

CHANNELS = {"smoke": (8,), "cpu": (16, 32, 64, 128), "paper": (16, 32, 64, 128, 256, 512)}
IMAGES = 200


def cases(rivals, scale: str) -> Iterator[Case]:
    data = datasets.load()
    split = data.clean[slice(IMAGES)]
    for channels in CHANNELS[scale]:
        model = build(Cnn(features=(32, channels), hidden=256), data.shape, data.classes)

        def prune(v, split, model=model):
            order = jax.numpy.argsort(channel_means(model, v, "conv_last", split.image))
            return curve(model, v, "conv_last", order, split.image, split.label)

        rival = None
        if rivals is not None:
            net = rivals.cnn(hidden=256, features=channels).eval()
            rival = partial(rivals.pruning_curve, net, *rivals.tensors(split.image, split.label), 5)
        yield Case(
            "Fine-Pruning, channels", channels, prune, (model.init(jax.random.key(0)), split), rival
        )
