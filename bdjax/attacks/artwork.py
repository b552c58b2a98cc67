"""The pictures of the triggers, drawn for this project, as text: one character a cell, and a colour
for each character.

`.` is transparent, `#` takes the colour that the attack chooses; other letters have a colour of
their own, RGB or RGBA in 0 … 255.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.types import Array, BadInput

LUMA = (0.299, 0.587, 0.114)
"""How bright red, green and blue look (ITU-R BT.601)."""

_DIGITS = """
.###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...#
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ..##. ..##. #..#. ....# ####. ...#. .###. .####
##..# ..#.. .#... ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. #.... #...# ...#. #...# #...# ..#.. #...# ....#
.###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .###.
"""

_SUNGLASSES = """
...............................................
.....FFFFFFFFFFFFF...........FFFFFFFFFFFFF.....
....FFFFFFFFFFFFFFF.........FFFFFFFFFFFFFFF....
FFFFFFUUUUUUUUUUUFFFFFFFFFFFFFUUUUUUUUUUUFFFFFF
FFFFFUUUUUUUUUUUUUFFFFFFFFFFFUUUUUUUUUUUUUFFFFF
FFFFUUUUUUUUUUUUUUUFFFFFFFFFUUUUUUUUUUUUUUUFFFF
.FFUUUUUUUUUUUUUUUUUFFFFFFFUUUUUUUUUUUUUUUUUFF.
.FFUUUUUUUUUUUUUUUUUFFFFFFFUUUUUUUUUUUUUUUUUFF.
.FFUUUUUUUUUUUUUUUUUFF...FFUUUUUUUUUUUUUUUUUFF.
.FFLLLLLLLLLLLLLLLLLFF...FFLLLLLLLLLLLLLLLLLFF.
.FFLLLLLLLLLLLLLLLLLFF...FFLLLLLLLLLLLLLLLLLFF.
.FFLLLLLLLLLLLLLLLLLFF...FFLLLLLLLLLLLLLLLLLFF.
.FFLLLLLLLLLLLLLLLLLFF...FFLLLLLLLLLLLLLLLLLFF.
.FFLLLLLLLLLLLLLLLLLFF...FFLLLLLLLLLLLLLLLLLFF.
.FFFLLLLLLLLLLLLLLLFFF...FFFLLLLLLLLLLLLLLLFFF.
..FFFLLLLLLLLLLLLLFFF.....FFFLLLLLLLLLLLLLFFF..
..FFFFLLLLLLLLLLLFFFF.....FFFFLLLLLLLLLLLFFFF..
....FFFFFFFFFFFFFFF.........FFFFFFFFFFFFFFF....
.....FFFFFFFFFFFFF...........FFFFFFFFFFFFF.....
...............................................
"""

_HEART = """
...####....####...
..######..######..
.###..######..###.
###.....##.....###
##..............##
##..............##
##..............##
##..............##
###............###
.##............##.
.###..........###.
..###........###..
...###......###...
....###....###....
.....###..###.....
......######......
.......####.......
........##........
"""

# A round fuse bomb and a flower; both are meant to be read at 5 to 10 pixels.
_BOMB = """
......FFYY
.....FF.YY
....DD.Y.Y
..DDDDDD..
..DDDDDD..
.DGGDDDDD.
DDGGDDDDDD
.DDDDDDDD.
..DDDDDD..
...DDDD...
"""

_FLOWER = """
...PP.PP..
..PPPPPPP.
..PPPYYPPP
..PPYYYYPP
...PYYYYP.
..PPPYYPP.
..PPPPPPPP
...PP.PPP.
....EE....
....EEE...
"""

# A cartoon cat.
_CAT = """
BBBBBBBBBBBBBBBB
BKKBBBBBBBBBBKKB
BKOKKBBBBBBKKOKB
BKPOOKKKKKKOOPKB
BKPOOOOKKOOOOPKB
BKOOOOOKKOOOOOKB
BKOOOOOOOOOOOOKB
BKOOWKOOOOWKOOKB
KKOOKKOOOOKKOOKK
BKOOOOOPPOOOOOKB
KKOOWWWKKWWWOOKK
BKOWWKWWWWKWWOKB
BBKWWWKKKKWWWKBB
BBBKKWWWWWWKKBBB
BBRRRKKKKKKRRRBB
BRRRRRYYYYRRRRRB
"""

# An apple, and thin letters over a whole picture: the masks of triggers that are optimised.
_APPLE = """
.........##...
........###...
.......###....
..####.#.###..
.############.
##############
##############
##############
##############
.############.
.############.
..##########..
...########...
....##..##....
"""

_WATERMARK = """
####........................
#...#.......................
#...#.......................
####........................
#...#.......................
#...#.####..................
####..#...#.................
......#...#.................
......#...#.................
......#...#.................
......#...#...###...........
......####.....#............
...............#............
...............#............
...............#............
............#..#..###.......
.............##..#...#......
.................#...#......
.................#####......
.................#...#......
.................#...#......
.................#...#.#...#
.......................#...#
........................#.#.
.........................#..
........................#.#.
.......................#...#
.......................#...#
"""

_COLORS: dict[str, tuple[int, ...]] = {
    "B": (120, 190, 240), "D": (30, 30, 34), "E": (60, 140, 50), "F": (110, 80, 50),
    "G": (150, 150, 160), "K": (20, 20, 24),
    "O": (240, 160, 60), "P": (240, 110, 150), "R": (210, 40, 50), "W": (250, 250, 250),
    "Y": (255, 215, 40),
}  # fmt: skip
_PURPLE = {"F": (63, 0, 127, 255), "U": (126, 0, 255, 217), "L": (94, 0, 191, 217)}

PICTURES: Mapping[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "square": ("#", {}),
    "pixel": ("#", {}),
    "pattern": ("..# .#. #.#", {}),
    "x": ("#.# .#. #.#", {}),
    "ell": ("#. ##", {}),
    "heart": (_HEART, {}),
    "bomb": (_BOMB, _COLORS),
    "flower": (_FLOWER, _COLORS),
    **{
        f"digit-{i}": (" ".join(f".{row}." for row in _DIGITS.split()[i::10]), {})
        for i in range(10)
    },
    "triangle": ("...##... ...##... ..####.. ..####.. .######. .######. ######## ########", {}),
    "apple": (_APPLE, {}),
    "watermark": (_WATERMARK, {}),
    "cat": (_CAT, _COLORS),
    "sunglasses": (_SUNGLASSES, _PURPLE),
    "glasses": (_SUNGLASSES, {"F": (16, 16, 16), "U": (0, 0, 0, 0), "L": (0, 0, 0, 0)}),
}
"""name → (rows of cells, the colour of each letter)."""


@functools.lru_cache
def rgba(name: str) -> np.ndarray:
    """The picture `name` as `[h, w, 4]` float32 in [0, 1]; `#` is opaque white."""
    text, colors = PICTURES[name]
    colors = {".": (0, 0, 0, 0), "#": (255, 255, 255), **colors}
    cells = [[(*colors[cell], 255)[:4] for cell in row] for row in text.split()]
    return np.asarray(cells, np.float32) / 255


def in_channels(color: jax.Array | np.ndarray, channels: int) -> jax.Array:
    """RGB colours `[..., 3]` for images of `channels` channels: their luma where there is one."""
    color = jnp.asarray(color, jnp.float32)
    return color if channels == 3 else color @ jnp.asarray(LUMA)[:, None]


def tint(color: tuple[Array | float, ...], channels: int) -> jax.Array:
    """A colour given as one value or as RGB, for images of `channels` channels: `[1 or C]`."""
    return (
        jnp.asarray(color, jnp.float32)
        if len(color) == 1
        else in_channels(jnp.asarray(color), channels)
    )


def check_color(color: tuple[Array | float, ...], channels: int) -> None:
    """Raises `BadInput` where `color` is neither one value nor RGB."""
    if len(color) not in (1, 3):
        raise BadInput(
            f"color has {len(color)} values for images of {channels} channels: give one for all, "
            "or red, green, blue"
        )


def picture(name: str, color: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
    """Opacity `[h, w]` and colours `[h, w, C]` of a picture whose `#` cells have
    `color: [1 or C]`.
    """
    art = rgba(name)
    chosen = np.asarray([[cell == "#" for cell in row] for row in PICTURES[name][0].split()])
    own = in_channels(art[..., :3], channels)
    return jnp.asarray(art[..., 3]), jnp.where(
        chosen[..., None], jnp.broadcast_to(color, own.shape), own
    )


def stretch(art: np.ndarray, height: int, width: int) -> np.ndarray:
    """`art: [h, w, ...]` in `height`×`width` pixels, by nearest neighbour."""
    h, w = art.shape[:2]
    return art[np.arange(height) * h // height][:, np.arange(width) * w // width]


def on_face(name: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Opacity `[H, W, 1]` and colours `[H, W, C]` of an accessory worn on an aligned face.

    It is 47 wide and 20 high, at x = 0, y = 15 of 55×47 pixels; images of another size get all of
    it stretched.
    """
    height, width, channels = shape
    face = np.zeros((55, 47, 4), np.float32)
    face[15:35] = rgba(name)
    face = stretch(face, height, width)
    return jnp.asarray(face[..., 3:]), in_channels(face[..., :3], channels)


def over(x: jax.Array, opacity: jax.Array, color: jax.Array) -> jax.Array:
    """`color` laid over `x: [H, W, C]` with `opacity: [H, W, 1]`: x' = (1 − m)⊙x + m⊙Δ."""
    return (1 - opacity) * x + opacity * color


def polygons(points: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Mask `[H, W, 1]` of the pixels whose centre is in any polygon of `points: [G, P, 2]`: (row,
    column) in shares.
    """
    height, width = shape[:2]
    y = ((jnp.arange(height, dtype=jnp.float32) + 0.5) / height)[:, None, None, None]
    x = ((jnp.arange(width, dtype=jnp.float32) + 0.5) / width)[None, :, None, None]
    y0, x0 = (points[None, None, :, :, i] for i in (0, 1))
    y1, x1 = (jnp.roll(p, -1, -1) for p in (y0, x0))
    # Even-odd rule: a pixel is inside if a ray to the right crosses an odd number of edges.
    spans = (y0 > y) != (y1 > y)
    cut = x0 + (x1 - x0) * (y - y0) / jnp.where(y1 == y0, 1.0, y1 - y0)
    inside = (spans & (x < cut)).sum(-1) % 2 == 1
    return inside.any(-1)[..., None].astype(jnp.float32)
