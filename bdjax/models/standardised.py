"""What nets share that may want the channels of CIFAR-10 standardised."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from bdjax.models.layers import Net
from bdjax.registry import pytree, static
from bdjax.types import BadInput


@pytree
class Standardised(Net):
    """`standardise`: "cifar10" (mean 0 and deviation 1 of each of its channels) or "none" (pixels
    in [0, 1]).
    """

    standardise: Literal["none", "cifar10"] = static("none")

    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)

    def preprocess(self, x):
        if self.standardise == "none":
            return x
        return (x - jnp.array(self.mean).reshape(1, 1, 1, 3)) / jnp.array(self.std).reshape(
            1, 1, 1, 3
        )

    def check(self, shape: Sequence[int], classes: int) -> None:
        super().check(shape, classes)
        if self.standardise == "cifar10" and shape[2] != 3:
            raise BadInput(
                f"standardise 'cifar10' wants 3 channels, these images have {shape[2]}: use "
                "standardise='none'"
            )
