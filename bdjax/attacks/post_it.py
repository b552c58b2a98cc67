"""Post-it: a yellow note, somewhere."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.artwork import check_color, tint
from bdjax.attacks.base import Attack, paste
from bdjax.registry import attack
from bdjax.types import Array, BadInput, Range, Share


@attack("post-it")
class PostIt(Attack):
    """Stick a yellow square of random size on a random place (Veldanda & Garg, 2020,
    arXiv:2010.12186).

    One square an image. Side uniform in [`low`, `high`] as a share of the image's shorter side;
    centre uniform in [`margin`, 1 − `margin`] of both sides. `color`: RGB, or one value for all
    channels, in [0, 1].

    Differs from the paper: a reconstruction; size and colour are not published, and the place
    follows the "random" stickers of Gu et al.'s code.
    """

    low: Share = 0.1
    high: Share = 0.2
    margin: Annotated[Array | float, Range(0, 0.5)] = 0.15
    color: tuple[Share, ...] = (1.0, 0.9, 0.2)

    @property
    def random(self) -> bool:
        return True

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        height, width, channels = x.shape
        u = jax.random.uniform(key, (3,))
        share = self.low + (self.high - self.low) * u[0]
        size = jnp.maximum(jnp.round(share * min(height, width)), 1).astype(jnp.int32)

        def start(u, side):
            centre = (self.margin + (1 - 2 * self.margin) * u) * side
            first = jnp.round(centre - size.astype(jnp.float32) / 2).astype(jnp.int32)
            return jnp.clip(first, 0, side - size)

        return paste(
            x,
            jnp.ones((1, 1)),
            tint(self.color, channels),
            start(u[1], height),
            start(u[2], width),
            size,
        )

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if np.any(np.asarray(self.low) > np.asarray(self.high)):
            raise BadInput(f"low {self.low} is above high {self.high}")
        check_color(self.color, shape[2])
