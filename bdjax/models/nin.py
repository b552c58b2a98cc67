"""Network in Network."""

from typing import Literal

from bdjax.models.layers import HE, act, conv, dropout, max_pool
from bdjax.models.standardised import Standardised
from bdjax.registry import model, static


@model("nin")
class Nin(Standardised):
    """Convolutions and 1×1 convolutions, then the mean of each class's map (Lin et al., 2013,
    arXiv:1312.4400).

    966,986 parameters at 32×32×3, 10 classes. `conv_last` is the last hidden convolution;
    `penultimate` are the class maps `[B, h, w, K]` after their ReLU, whose means are the logits: no
    dense layer follows. `standardise`: "cifar10" (mean and deviation of each channel) or "none"
    (pixels in [0, 1]). Kernels start as He's. Veldanda & Garg: SGD, momentum 0.9 with Nesterov,
    learning rate 0.01, 0.005, 0.001 from epochs 0, 81, 141 of 200, batch 128, L2 1e-4, shift 12.5 %
    and flips.

    Reference: Min Lin, Qiang Chen and Shuicheng Yan, "Network In Network".
    """

    standardise: Literal["none", "cifar10"] = static("cifar10")

    mean = (125.307 / 255, 122.95 / 255, 113.865 / 255)
    std = (62.9932 / 255, 62.0887 / 255, 66.7048 / 255)

    def layers(self, x, train, classes):
        for i, block in enumerate(
            (((192, 5), (160, 1), (96, 1)), ((192, 5), (192, 1), (192, 1)), ((192, 3), (192, 1)))
        ):
            if i:
                x = dropout(max_pool(x, 3, 2, "SAME"), 0.5, train)
            for j, (width, size) in enumerate(block):
                name = f"conv_{i + 1}_{j + 1}"
                x = act(
                    "conv_last" if name == "conv_3_2" else name, conv(x, width, size, name, init=HE)
                )
        return act("penultimate", conv(x, classes, 1, "logits", init=HE)).mean((1, 2))
