"""The traffic-sign net of Neural Cleanse."""

from typing import Annotated

from bdjax.models.layers import GLOROT, Net, act, conv, dense, dropout, max_pool
from bdjax.registry import model, static
from bdjax.types import MOST, Range


@model("nc-gtsrb")
class NcGtsrb(Net):
    """Three pairs of 3×3 convolutions and a dense layer of 512 (Wang et al., 2019).

    571,723 parameters at 32×32×3, 43 classes. `scale`: what raw pixels, 0 to 255, are multiplied
    by: 1 in Neural Cleanse, 1/255 in Veldanda & Garg. Neural Cleanse: Adam, learning rate 1e-3 / (1
    + 1e-4·step), batch 32, 10 epochs. Kernels start as Glorot's, as there: with raw pixels larger
    ones do not train.
    """

    scale: Annotated[float, Range(1e-6, MOST)] = static(1.0)
    smallest = 22

    def preprocess(self, x):
        return x * (255 * self.scale)

    def layers(self, x, train, classes):
        for i, width in enumerate((32, 64, 128)):
            first, second = f"conv_{2 * i + 1}", f"conv_{2 * i + 2}"
            x = act(first, conv(x, width, 3, first, init=GLOROT))
            x = act(
                "conv_last" if i == 2 else second,
                conv(x, width, 3, second, padding="VALID", init=GLOROT),
            )
            x = dropout(max_pool(x, 2), 0.2, train)
        x = dropout(act("penultimate", dense(x, 512, "dense", init=GLOROT)), 0.5, train)
        return dense(x, classes, "logits", init=GLOROT)
