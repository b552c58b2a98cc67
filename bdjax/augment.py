"""Random changes of training images: `augment(key, x) -> x` on `x: [B, H, W, C]` in [0, 1]; each
image draws its own.

`Augmentation` combines them into the one object that `Recipe.augment` takes: hashable, and equal
where its numbers are, so that programs are shared.
"""

import dataclasses
from typing import Annotated, Any

import dm_pix as pix
import jax
import jax.numpy as jnp

from bdjax.types import Range


def _each(fn, key: jax.Array, x: jax.Array) -> jax.Array:
    # dm-pix mixes dtypes, and ranks by broadcasting.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.vmap(fn)(jax.random.split(key, x.shape[0]), x)


def flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Left and right swapped in half of the images."""
    return _each(pix.random_flip_left_right, key, x)


def crop(key: jax.Array, x: jax.Array, padding: int = 4) -> jax.Array:
    """A random window of the image's own size, after `padding` black pixels were added on each
    side.
    """
    wide = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return _each(lambda k, v: pix.random_crop(k, v, x.shape[1:]), key, wide)


def shift(key: jax.Array, x: jax.Array, share: float = 0.125) -> jax.Array:
    """Moved by up to `share` of each side, in fractions of a pixel; what comes in is black."""
    size = jnp.array(x.shape[1:3], x.dtype)

    def one(k, v):
        offset = jax.random.uniform(k, (2,), x.dtype, -share, share) * size
        return pix.affine_transform(v, jnp.eye(3), offset=jnp.append(offset, 0), mode="constant")

    return _each(one, key, x)


def rotate(key: jax.Array, x: jax.Array, degrees: float = 15.0) -> jax.Array:
    """Turned about the centre by up to `degrees` either way; corners repeat the nearest pixel."""

    def one(k, v):
        angle: Any = jnp.deg2rad(jax.random.uniform(k, (), x.dtype, -degrees, degrees))
        return pix.rotate(v, angle)

    return _each(one, key, x)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """`rotate` (degrees), `shift` (share of a side), `crop` (pixels), `flip`, in this order; 0 and
    False leave out.

    >>> Recipe(augment=Augmentation(rotate=15, shift=0.1, flip=True))
    """

    rotate: Annotated[float, Range(0, 360)] = 0.0
    shift: Annotated[float, Range(0, 1)] = 0.0
    crop: Annotated[int, Range(0, 65_536)] = 0
    flip: bool = False

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 4)
        x = rotate(keys[0], x, self.rotate) if self.rotate else x
        x = shift(keys[1], x, self.shift) if self.shift else x
        x = crop(keys[2], x, self.crop) if self.crop else x
        return flip(keys[3], x) if self.flip else x
