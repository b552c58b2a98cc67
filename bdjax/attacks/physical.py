"""Physical accessory: worn a little differently in each picture, which is taken once."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from bdjax.attacks.accessory import Accessory
from bdjax.attacks.artwork import over
from bdjax.attacks.base import Stamped
from bdjax.registry import attack
from bdjax.types import Array, Range, Share


@attack("physical")
class Physical(Accessory):
    """An accessory under random pose and light, in place of photographs of it (Chen et al., 2017,
    arXiv:1712.05526).

    Each image has its own pose and light, uniform in ± their fields: `rotate` in degrees; `scale`
    and `brightness` as a change of the factor; `shift` and `perspective` as a share of half the
    image. A point q (centre 0, longer half-side 1) of the accessory lands at
    (s·R·q + t) / (1 + p·q). All at 0 give the accessory attack.

    Differs from the paper: a reconstruction; its glasses were real. Worn opaquely in training too
    (`alpha` 1).
    """

    alpha: Share = 1.0
    rotate: Annotated[Array | float, Range(0, 180)] = 10.0
    scale: Share = 0.1
    shift: Share = 0.08
    perspective: Annotated[Array | float, Range(0, 0.5)] = 0.1
    brightness: Share = 0.2

    @property
    def random(self) -> bool:
        return True

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        return None

    def worn_once(self, shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The warped accessory: opacity `[H, W, 1]` and colours `[H, W, C]`."""
        height, width, _ = shape
        u = jax.random.uniform(key, (7,), minval=-1.0, maxval=1.0)
        angle, scale = jnp.deg2rad(self.rotate * u[0]), 1 + self.scale * u[1]
        t, p = self.shift * u[2:4], self.perspective * u[4:6]
        rotation = scale * jnp.asarray(
            [[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]
        )
        # Homogeneous (row, column, 1), accessory → image; each pixel of the image asks where it
        # comes from.
        forward = jnp.block([[rotation, t[:, None]], [p[None, :], jnp.ones((1, 1))]])
        half, middle = max(height, width) / 2, jnp.asarray([(height - 1) / 2, (width - 1) / 2])
        q = (jnp.indices((height, width)).astype(jnp.float32) - middle[:, None, None]) / half
        source = jnp.tensordot(
            jnp.linalg.inv(forward), jnp.concatenate([q, jnp.ones((1, height, width))]), 1
        )
        at = source[:2] / source[2:] * half + middle[:, None, None]

        mask, color = self.key_image(shape)
        # Colours times opacity, so that the transparent surroundings do not darken the rim.
        planes = jnp.concatenate([mask, mask * color], -1)
        with jax.numpy_dtype_promotion("standard"):  # map_coordinates mixes int and float indices
            planes = jax.vmap(
                lambda plane: map_coordinates(plane, list(at), 1, "constant"), -1, -1
            )(planes)
        mask, color = planes[..., :1], planes[..., 1:] / jnp.maximum(planes[..., :1], 1e-6)
        return jnp.clip(mask, 0, 1), jnp.clip(color * (1 + self.brightness * u[6]), 0, 1)

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        mask, color = self.worn_once(x.shape, key)
        return jnp.where(
            kind > 0, over(x, mask * (self.alpha if train else self.test_alpha), color), x
        )
