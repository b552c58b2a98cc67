"""VGG-16 and VGG-19 with BatchNorm, as torchvision and BackdoorBench have them."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from bdjax.models.layers import HE, act, batch_norm, conv, dense, dropout, max_pool, site
from bdjax.models.standardised import Standardised
from bdjax.registry import model, static
from bdjax.types import Size

COUNTS = {"16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}


@model("vgg-bn")
class VggBn(Standardised):
    """Thirteen or sixteen 3×3 convolutions with BatchNorm and three dense layers (Simonyan &
    Zisserman, 2014, arXiv:1409.1556).

    138,365,992 trainable parameters with `depth` 16, 143,678,248 with 19, at 1000 classes. What is
    left of the image is pooled, or repeated, to 7×7. Half of the `hidden` units are dropped in
    training. Layers have torchvision's names, so that its weights load. Kernels start as He's.

    Sites: `conv_S_I` is convolution I of stage S after its ReLU (`conv_last` the last one).
    """

    depth: Literal["16", "19"] = static("16")
    hidden: Size = static(4096)
    smallest = 32

    def layers(self, x, train, classes):
        number = 0  # of the layer in torchvision's list
        counts = COUNTS[self.depth]
        for stage, count in enumerate(counts, 1):
            for i in range(1, count + 1):
                pads = ((1, 1), (1, 1))
                features = min(32 << stage, 512)
                x = conv(x, features, 3, f"features.{number}", padding=pads, init=HE)
                x = batch_norm(x, train, f"features.{number + 1}")
                last = stage == 5 and i == count
                x = act("conv_last" if last else f"conv_{stage}_{i}", x)
                number += 3
            x = max_pool(x, 2)
            number += 1
        x = site("pooled", pooled(x, 7))
        x = dropout(act("dense_1", dense(x, self.hidden, "classifier.0", init=HE)), 0.5, train)
        x = dropout(act("penultimate", dense(x, self.hidden, "classifier.3", init=HE)), 0.5, train)
        return dense(x, classes, "classifier.6")


def pooled(x, size: int):
    """The means over `size`×`size` windows that lie evenly over `x: [B, H, W, C]`, and overlap, or
    repeat, where that is smaller.
    """
    rows, columns = (_windows(length, size) for length in x.shape[1:3])
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns)


def _windows(length: int, size: int) -> np.ndarray:
    matrix = np.zeros((size, length), np.float32)
    for i in range(size):
        start, end = i * length // size, -(-(i + 1) * length // size)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
