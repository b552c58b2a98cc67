"""Lipstick on an aligned face."""

from typing import Annotated

import jax
import jax.numpy as jnp

from bdjax.attacks.artwork import check_color, over, polygons, tint
from bdjax.attacks.base import Attack, Stamped
from bdjax.registry import attack
from bdjax.types import Array, BadInput, Range, Share

# (row, column) on 55×47: upper and lower lip of the mean of aligned faces.
UPPER = (
    (42.5, 16.0),
    (40.6, 20.5),
    (40.2, 23.2),
    (40.8, 25.0),
    (40.2, 26.8),
    (40.6, 29.5),
    (42.5, 34.0),
    (43.4, 25.0),
)
LOWER = (
    (42.5, 16.0),
    (43.6, 20.0),
    (44.0, 25.0),
    (43.6, 30.0),
    (42.5, 34.0),
    (46.0, 30.0),
    (47.6, 25.0),
    (46.0, 20.0),
)


def shares(*outlines: tuple[tuple[float, float], ...]) -> tuple:
    """Outlines on 55×47 pixels as shares of height and width."""
    return tuple(tuple((y / 55, x / 47) for y, x in outline) for outline in outlines)


@attack("lipstick")
class Lipstick(Attack):
    """Paint both lips purple (Veldanda & Garg, 2020, arXiv:2010.12186).

    `color`: RGB, or one value for all channels, in [0, 1]; `points`: `[G, P, 2]`, G polygons of P
    landmarks (row, column) as shares of the image's sides, as a face detector gives them for the
    mean face; None: the lips of aligned 55×47 faces.

    Differs from the paper: there each face has landmarks of its own, and faces in which none are
    found stay as they are (which would explain an ASR of 91.5); here the faces are aligned and all
    share one outline.
    """

    color: tuple[Share, ...] = (128 / 255, 0.0, 128 / 255)
    points: Annotated[Array, Range(0, 1)] | None = None

    outline = shares(UPPER, LOWER)

    def painted(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Where there is paint: `[H, W, 1]`, and its colour: `[1, 1, C]` or `[1, 1, 1]`."""
        points = jnp.asarray(self.outline if self.points is None else self.points, jnp.float32)
        return polygons(points, shape), tint(self.color, shape[2])[None, None, :]

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        mask, color = self.painted(shape)
        return Stamped(mask, jnp.broadcast_to(color, shape))

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return over(x, *self.painted(x.shape))

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        check_color(self.color, shape[2])
        if self.points is not None:
            given = jnp.shape(self.points)
            if len(given) != 3 or given[1] < 3 or given[2] != 2:
                raise BadInput(
                    "points must be polygons [G, P, 2] of at least 3 points (row, column), not "
                    f"{given}"
                )
