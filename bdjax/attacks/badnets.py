"""BadNets: a fixed picture is pasted into the image."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.artwork import check_color, picture, tint
from bdjax.attacks.base import Attack, Stamped, paste, start_of
from bdjax.registry import attack, static
from bdjax.types import BadInput, Place, Share, Side

Shape = Literal[
    "square", "pixel", "pattern", "x", "ell", "heart", "bomb", "flower",
    "digit-0", "digit-1", "digit-2", "digit-3", "digit-4", "digit-5", "digit-6", "digit-7",
    "digit-8", "digit-9",
]  # fmt: skip


@attack("badnets")
class BadNets(Attack):
    """Paste a pixel, a pattern, a square or a sticker (Gu et al., 2017, arXiv:1708.06733).

    `shape`: what is pasted; `size`: side of its box in pixels, or, below 1, as a share of the
    image's shorter side (a traced value may vary within one program); `row`, `col`: place of the
    box, below 0 counted from the end (-1 = flush with the last row); a place strictly between 0 and
    1 is that of the box's centre, as a share of the image; `color`: RGB, or one value for all
    channels, in [0, 1] (bomb and flower have their own); `random_place`: each image has a place of
    its own. The default is the flush 5×5 white square of Shamshiri & Sohn (2023).

    Presets: `pixel`, `pattern` (MNIST, one pixel off the corner) and `yellow-square`, `bomb`,
    `flower` (US traffic signs) are Gu et al.'s; `spectral-pixel`, `spectral-x`, `spectral-ell` Tran
    et al.'s (2018); `nc` Wang et al.'s (2019); `strip-square` and `strip-heart` (over all of a
    28×28 image) Gao et al.'s (2019); `large-trigger` covers a quarter of the image, to escape
    Neural Cleanse.

    Differs from the paper: the stickers and the heart are own artwork; the corner of `spectral-ell`
    is its lower left pixel, there the upper left one.

    Reference: Tianyu Gu, Brendan Dolan-Gavitt and Siddharth Garg, "BadNets: Identifying
    Vulnerabilities in the Machine Learning Model Supply Chain".
    """

    shape: Shape = static("square")
    size: Side = 5
    row: Place = -1
    col: Place = -1
    color: tuple[Share, ...] = (1.0,)
    random_place: bool = static(False)

    used_if = {
        "row": {"random_place": (False,)},
        "col": {"random_place": (False,)},
        "color": {"shape": tuple(s for s in get_args(Shape) if s not in ("bomb", "flower"))},
    }

    presets = {
        "square": {},
        "pixel": {"shape": "pixel", "size": 1, "row": -2, "col": -2},
        "pattern": {"shape": "pattern", "size": 3, "row": -2, "col": -2},
        "yellow-square": {
            "size": 0.1,
            "row": 0.82,
            "col": 0.57,
            "color": (116 / 255, 100 / 255, 50 / 255),
        },
        "bomb": {"shape": "bomb", "size": 0.16, "row": 0.82, "col": 0.57},
        "flower": {"shape": "flower", "size": 0.16, "row": 0.82, "col": 0.57},
        "spectral-pixel": {
            "shape": "pixel",
            "size": 1,
            "row": 11,
            "col": 16,
            "color": (101 / 255, 0.0, 25 / 255),
        },
        "spectral-x": {
            "shape": "x",
            "size": 3,
            "row": 10,
            "col": 15,
            "color": (101 / 255, 0.0, 25 / 255),
        },
        "spectral-ell": {
            "shape": "ell",
            "size": 2,
            "row": 11,
            "col": 16,
            "color": (101 / 255, 0.0, 25 / 255),
        },
        "nc": {"size": 4, "row": -2, "col": -2, "append": True},
        "strip-square": {"size": 3, "rate": 0.012, "target": 7},
        "strip-heart": {"shape": "heart", "size": 28, "rate": 0.012, "target": 7},
        "large-trigger": {"size": 0.5},
    }

    def box(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """First row, first column and side of the box in images of `shape`."""
        size = jnp.asarray(self.size, jnp.float32)
        size = jnp.where(size < 1, jnp.round(size * min(shape[:2])), size)

        def start(place: Any, side: int) -> jax.Array:
            place = jnp.asarray(place, jnp.float32)
            first = jnp.where(
                (place > 0) & (place < 1),
                jnp.round(place * side - size / 2),
                start_of(place, size, side),
            )
            return first.astype(jnp.int32)

        return start(self.row, shape[0]), start(self.col, shape[1]), size.astype(jnp.int32)

    @property
    def random(self) -> bool:
        return self.random_place

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        if self.random_place or kind != 1:
            return None
        opacity, color = picture(self.shape, tint(self.color, shape[2]), shape[2])
        mask = paste(jnp.zeros((*shape[:2], 1)), opacity, jnp.ones(()), *self.box(shape))
        return Stamped(
            mask, paste(jnp.zeros(shape), jnp.ones_like(opacity), color, *self.box(shape))
        )

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        top, left, size = self.box(x.shape)
        if self.random_place:
            top, left = (
                jax.random.randint(k, (), 0, n - size + 1)
                for k, n in zip(jax.random.split(key), x.shape[:2])
            )
        return paste(
            x, *picture(self.shape, tint(self.color, x.shape[2]), x.shape[2]), top, left, size
        )

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        check_color(self.color, shape[2])
        *first, size = (np.asarray(value) for value in self.box(shape))
        for name, place, start, side in zip(("row", "column"), (self.row, self.col), first, shape):
            start = 0 * start if self.random_place else start
            if np.any(size < 1) or np.any(start < 0) or np.any(start + size > side):
                raise BadInput(
                    f"trigger outside the image: size {self.size} at {name} {place} does not fit "
                    f"into {side} pixels"
                )
