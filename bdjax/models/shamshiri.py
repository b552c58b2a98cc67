"""The two nets of Shamshiri & Sohn: a CNN and a family of feed-forward nets."""

from typing import Literal

import jax.numpy as jnp
from flax.linen import relu

from bdjax.models.layers import Net, conv, dense, max_pool, site
from bdjax.registry import model, static
from bdjax.types import BadInput, Size


@model("cnn")
class Cnn(Net):
    """Two 5×5 convolutions and a dense layer of 2048 (Shamshiri & Sohn, 2023).

    `pool`: "each", 2×2 max-pooling after both convolutions, or "last", after the second alone;
    `padding`: "SAME" or "VALID". Parameters at 28×28×1, 10 classes: 6,497,162 (each, SAME),
    2,171,786 (each, VALID).

    Differs from the paper: padding, number of pools and optimiser are not given there; the defaults
    are ours.

    Reference: Samaneh Shamshiri and Insoo Sohn, "Defense Method Challenges Against Backdoor Attacks
    in Neural Networks".
    """

    padding: Literal["SAME", "VALID"] = static("SAME")
    pool: Literal["each", "last"] = static("each")
    features: tuple[Size, Size] = static((32, 64))
    hidden: Size = static(2048)

    def layers(self, x, train, classes):
        x = site("conv_1", relu(conv(x, self.features[0], 5, "conv_1", padding=self.padding)))
        x = max_pool(x, 2) if self.pool == "each" else x
        x = site("conv_2_pre", conv(x, self.features[1], 5, "conv_2", padding=self.padding))
        x = max_pool(site("conv_last", relu(x)), 2)
        x = site("penultimate", relu(site("dense_pre", dense(x, self.hidden, "dense"))))
        return dense(x, classes, "logits")

    def check(self, shape, classes):
        super().check(shape, classes)
        if min(shape[:2]) < (16 if self.padding == "VALID" else 4):
            raise BadInput(f"images of {shape[0]}×{shape[1]} are too small for this net")


@model("ffnn")
class Ffnn(Net):
    """Feed-forward net with optional long-range links (Shamshiri & Sohn, 2023).

    `hidden`: widths of the hidden layers; `links`: "chain" (each layer reads the one before),
    "input" (and the input too) or "all" (and every earlier layer: with a link mask, any
    feed-forward graph). A link mask is zeros in the kernels, kept by `fit(trainable=…)`. Differs
    from the paper: it gives no widths; 2×256 is ours.
    """

    hidden: tuple[Size, ...] = static((256, 256))
    links: Literal["chain", "input", "all"] = static("input")

    def layers(self, x, train, classes):
        nodes = [site("input", x.reshape(x.shape[0], -1))]
        for i, width in enumerate((*self.hidden, classes)):
            past = {"chain": nodes[-1:], "input": [nodes[0], *nodes[1:][-1:]], "all": nodes}[
                self.links
            ]
            last = i == len(self.hidden)
            x = dense(jnp.concatenate(past, 1), width, "logits" if last else f"dense_{i + 1}")
            if last:
                return x
            name = "penultimate" if i == len(self.hidden) - 1 else f"hidden_{i + 1}"
            nodes.append(site(name, relu(site(f"{name}_pre", x))))
        raise AssertionError("unreachable")

    def check(self, shape, classes):
        super().check(shape, classes)
        if not self.hidden:
            raise BadInput("hidden (): at least one hidden layer is needed")
