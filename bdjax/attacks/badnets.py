"""BadNets: a fixed picture is pasted into the image."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from bdjax.attacks.base import Attack, check_box, paste, start_of
from bdjax.registry import attack, static
from bdjax.types import Array, BadInput, between

Shape = Literal["square", "pixel", "pattern"]

# Opacity of each trigger, one character a cell.
BITMAPS: dict[str, tuple[str, ...]] = {
    "square": ("#",),
    "pixel": ("#",),
    "pattern": ("..#", ".#.", "#.#"),
}


def bitmap(shape: str) -> jax.Array:
    """The opacity `[h, w]` of a named shape."""
    return jnp.asarray([[float(cell == "#") for cell in row] for row in BITMAPS[shape]])


@attack("badnets")
class BadNets(Attack):
    """Paste a pixel, a pattern or a square (Gu et al., 2017, arXiv:1708.06733).

    `shape`: what is pasted; `size`: side of its box in pixels (a traced value may vary within one program); `row`, `col`: place of the
    box, below 0 counted from the end (-1 = flush with the last row); `color`: one value a channel, or one for all, in [0, 1];
    `random_place`: a new place for each image. The default is the flush 5×5 white square of Shamshiri & Sohn (2023).

    Presets: `square`, `pixel`, `pattern` (Gu et al.'s MNIST triggers, one pixel off the corner).
    """

    shape: Shape = static("square")
    size: Array | int = 5
    row: Array | int = -1
    col: Array | int = -1
    color: tuple[float, ...] = (1.0,)
    random_place: bool = static(False)

    presets = {
        "square": {},
        "pixel": {"shape": "pixel", "size": 1, "row": -2, "col": -2},
        "pattern": {"shape": "pattern", "size": 3, "row": -2, "col": -2},
    }

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        height, width, _ = x.shape
        if self.random_place:
            u, v = jax.random.uniform(key, (2,))
            top = jnp.floor(u * (height - self.size + 1)).astype(jnp.int32)
            left = jnp.floor(v * (width - self.size + 1)).astype(jnp.int32)
        else:
            top, left = start_of(self.row, self.size, height), start_of(self.col, self.size, width)
        return paste(x, bitmap(self.shape), jnp.asarray(self.color), top, left, self.size)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if self.shape not in get_args(Shape):
            raise BadInput(f"trigger shape '{self.shape}' is not one of {', '.join(get_args(Shape))}")
        if len(self.color) not in (1, shape[2]):
            raise BadInput(f"color has {len(self.color)} values for images of {shape[2]} channels")
        for value in self.color:
            between("color", value, 0, 1)
        check_box(self.row, self.col, self.size, shape)
