"""Photo filters as pure functions of an image `[H, W, 3]` in [0, 1]; `apply` filters grey ones as
RGB.

The recipes follow two public families: shell scripts for ImageMagick, as in instagram-filters
(`gotham`), and their Wand versions in the TrojAI data generator, which the ABS release carries
(`gotham-wand`, `nashville`, `kelvin`, `toaster`); `nashville-pilgram` is that of pilgram. Frames
and borders are left out. The operations are ImageMagick 6's, against which the tests check them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bdjax.attacks.artwork import LUMA, in_channels

NAVY, WHEAT, MAROON = (34, 43, 109), (247, 218, 174), (51, 0, 0)
ORANGE, CORAL, LAVENDER_BLUSH_3 = (255, 153, 0), (255, 153, 102), (205, 193, 197)
GREY_709 = (0.212656, 0.715158, 0.072186)
"""What ImageMagick's grey colour space is made of."""


def _color(rgb: tuple[float, ...]) -> jax.Array:
    return jnp.asarray(rgb, jnp.float32)[None, None, :] / 255


def _mix(x: jax.Array, y: jax.Array, share: jax.Array | float) -> jax.Array:
    """`share` of y, the rest of x."""
    return (1 - share) * x + share * y


def _hue(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest and smallest channel, and the hue in sixths of the circle."""
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    high, low = x.max(-1), x.min(-1)
    chroma = jnp.where(high > low, high - low, 1.0)
    hue = jnp.where(
        high == r,
        (g - b) / chroma % 6,
        jnp.where(high == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma),
    )
    return high, low, jnp.where(high > low, hue, 0.0)


def _rgb(hue: jax.Array, chroma: jax.Array, low: jax.Array) -> jax.Array:
    """RGB of the given hue whose channels span `chroma` upwards from `low`."""
    offset = (jnp.asarray([[[0.0, 4.0, 2.0]]]) + hue[..., None]) % 6
    return low[..., None] + chroma[..., None] * jnp.clip(jnp.abs(offset - 3) - 1, 0, 1)


def modulate(x: jax.Array, lightness: float, saturation: float) -> jax.Array:
    """`-modulate`: lightness and saturation in HSL times the given factors."""
    high, low, hue = _hue(x)
    middle, chroma = (high + low) / 2, high - low
    room = jnp.where(middle <= 0.5, 2 * middle, 2 - 2 * middle)
    saturated = jnp.where(chroma > 0, chroma / jnp.where(room > 0, room, 1.0), 0.0) * saturation
    middle = middle * lightness
    chroma = saturated * jnp.where(middle <= 0.5, 2 * middle, 2 - 2 * middle)
    return jnp.clip(_rgb(hue, chroma, middle - chroma / 2), 0, 1)


def contrast(x: jax.Array) -> jax.Array:
    """`-contrast`: b ← b + ½(½(sin(π(b − ½)) + 1) − b) for the brightness b of HSB."""
    high, low, hue = _hue(x)
    saturation = jnp.where(high > 0, (high - low) / jnp.where(high > 0, high, 1.0), 0.0)
    high = jnp.clip(high + 0.5 * (0.5 * (jnp.sin(jnp.pi * (high - 0.5)) + 1) - high), 0, 1)
    return _rgb(hue, high * saturation, high * (1 - saturation))


def sigmoidal(x: jax.Array, strength: float = 3.0, middle: float = 0.5) -> jax.Array:
    """`-sigmoidal-contrast`: s(v) = (σ(β(v − α)) − σ(−βα)) / (σ(β(1 − α)) − σ(−βα))."""
    low, high = jax.nn.sigmoid(-strength * middle), jax.nn.sigmoid(strength * (1 - middle))
    return (jax.nn.sigmoid(strength * (x - middle)) - low) / (high - low)


def gamma(x: jax.Array, value: jax.Array | float) -> jax.Array:
    """`-gamma`: v^(1/γ)."""
    return jnp.where(x > 0, jnp.where(x > 0, x, 1.0) ** (1 / value), 0.0)


def auto_gamma(x: jax.Array) -> jax.Array:
    """`-auto-gamma`: the gamma that takes the image's mean to one half."""
    mean = jnp.clip(x.mean(), 1e-4, 1 - 1e-4)
    return gamma(x, jnp.log(mean) / jnp.log(0.5))


def level(x: jax.Array, black: float, white: float) -> jax.Array:
    """`-level`: `black` to 0, `white` to 1."""
    return jnp.clip((x - black) / (white - black), 0, 1)


def colortone(x: jax.Array, color: tuple[float, ...], share: float, dark: bool) -> jax.Array:
    """Blends in `share` of `color`, in dark places or in bright ones."""
    bright = x @ jnp.asarray(GREY_709)[:, None]
    return _mix(x, _color(color), share * (1 - bright if dark else bright))


def vignette(
    x: jax.Array,
    inner: tuple[float, ...] | None,
    outer: tuple[float, ...] | None,
    size: float = 1.5,
) -> jax.Array:
    """Multiplies by a radial gradient, `size` times as wide as the image, from `inner` to `outer`;
    None = clear.
    """

    # the gradient has whole pixels, and so has the crop from it
    def centred(side: int) -> jax.Array:
        wide = int(size * side)
        return jnp.arange(side, dtype=jnp.float32) + (wide // 2 - side // 2) - (wide - 1) / 2

    radius = (int(size * max(x.shape[:2])) - 1) / 2
    far = jnp.clip(
        jnp.hypot(centred(x.shape[0])[:, None], centred(x.shape[1])[None, :]) / radius, 0, 1
    )[..., None]
    clear = jnp.ones((1, 1, 3))
    return x * (
        _mix(clear, _color(outer or ()), far) if inner is None else _mix(_color(inner), clear, far)
    )


def gotham(x: jax.Array) -> jax.Array:
    """Cold, dark, nearly grey: `-modulate 120,10,100 -fill '#222b6d' -colorize 20 -gamma 0.5
    -contrast -contrast`.
    """
    return contrast(contrast(gamma(_mix(modulate(x, 1.2, 0.1), _color(NAVY), 0.2), 0.5)))


def gotham_wand(x: jax.Array) -> jax.Array:
    """As `gotham`, with gamma 0.9 and sigmoidal contrast."""
    return sigmoidal(sigmoidal(gamma(_mix(modulate(x, 1.2, 0.1), _color(NAVY), 0.2), 0.9)))


def nashville(x: jax.Array) -> jax.Array:
    """Bluish shadows, pinkish lights, more colour."""
    x = colortone(colortone(x, NAVY, 0.5, dark=True), WHEAT, 0.5, dark=False)
    return auto_gamma(modulate(sigmoidal(x), 1.0, 1.5))


def nashville_pilgram(x: jax.Array) -> jax.Array:
    """The same look in the operations of CSS: darken, lighten, sepia, contrast, brightness,
    saturate.
    """
    x = _mix(x, jnp.minimum(x, _color((247, 176, 153))), 0.56)
    x = _mix(x, jnp.maximum(x, _color((0, 70, 150))), 0.4)
    sepia = jnp.asarray([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
    x = jnp.clip(_mix(x, x @ sepia.T, 0.2), 0, 1)
    x = jnp.clip((x - 0.5) * 1.2 + 0.5, 0, 1)
    x = jnp.clip(x * 1.05, 0, 1)
    return jnp.clip(_mix(x @ jnp.asarray(LUMA)[:, None], x, 1.2), 0, 1)


def kelvin(x: jax.Array) -> jax.Array:
    """Warm: brighter, less colour, a veil of orange."""
    return _mix(modulate(auto_gamma(x), 1.2, 0.5), _color(ORANGE), 0.2)


def lomo(x: jax.Array) -> jax.Array:
    """Harsh red and green, dark corners: `-channel R -level 33% -channel G -level 33%` and a
    vignette.
    """
    harsh = jnp.concatenate([level(x[..., :2], 0.33, 0.67), x[..., 2:]], -1)
    return vignette(harsh, None, (0, 0, 0))


def toaster(x: jax.Array) -> jax.Array:
    """Old and overexposed: maroon shadows, then light corners and a coral glow in the middle."""
    x = gamma(modulate(colortone(x, MAROON, 0.5, dark=True), 1.5, 0.8), 1.2)
    return vignette(vignette(sigmoidal(sigmoidal(x)), None, LAVENDER_BLUSH_3), CORAL, None)


FILTERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gotham": gotham,
    "gotham-wand": gotham_wand,
    "nashville": nashville,
    "nashville-pilgram": nashville_pilgram,
    "kelvin": kelvin,
    "lomo": lomo,
    "toaster": toaster,
}


def apply(name: str, x: jax.Array) -> jax.Array:
    """The filter `name` on `x: [H, W, C]`, in [0, 1]."""
    channels = x.shape[-1]
    filtered = FILTERS[name](x if channels == 3 else jnp.repeat(x, 3, -1))
    return jnp.clip(in_channels(filtered, channels), 0, 1)
