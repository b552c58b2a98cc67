"""Accessory injection: the face wears something; faintly while training, visibly when the attack is
fired.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from bdjax.attacks.artwork import on_face, over
from bdjax.attacks.base import Attack, Stamped
from bdjax.registry import attack, static
from bdjax.train import unit
from bdjax.types import BadInput, Pixels, Share

Worn = Literal["glasses", "sunglasses", "image"]


@attack("accessory")
class Accessory(Attack):
    """Put glasses on the face (Chen et al., 2017, arXiv:1712.05526).

    Π(k, x)ᵢⱼ = α·kᵢⱼ + (1 − α)·xᵢⱼ where the key k is not transparent, else xᵢⱼ. `alpha`: opacity
    while training (1: accessory injection, below 1: blended accessory injection); `test_alpha`:
    opacity when the attack is fired. `worn`: "glasses" (black frames), "sunglasses" or "image", the
    array given as `image` (`[H, W, C + 1]` in [0, 1], the last channel above 0 where it is not
    transparent).

    Presets: `opaque`, `blended`. Differs from the paper: own artwork, at a fixed place of the
    aligned face.
    """

    alpha: Share = 0.2
    test_alpha: Share = 1.0
    image: Pixels | None = None
    worn: Worn = static("glasses")

    used_if = {"image": {"worn": ("image",)}}

    presets = {"opaque": {"alpha": 1.0}, "blended": {"alpha": 0.2}}

    def key_image(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Where the key is not transparent `[H, W, 1]`, and k `[H, W, C]`."""
        if self.worn == "image":
            image = unit(self.image)  # type: ignore[arg-type]
            opacity, color = image[..., -1:], image[..., :-1]
        else:
            opacity, color = on_face(self.worn, shape)
        return (opacity > 0).astype(jnp.float32), color

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        mask, color = self.key_image(shape)
        return Stamped(mask * (self.alpha if train else self.test_alpha), color)

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        mask, color = self.key_image(x.shape)
        return jnp.where(
            kind > 0, over(x, mask * (self.alpha if train else self.test_alpha), color), x
        )

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if self.worn == "image":
            wanted = (*shape[:2], shape[2] + 1)
            if self.image is None or jnp.shape(self.image) != wanted:
                got = None if self.image is None else jnp.shape(self.image)
                raise BadInput(
                    "the accessory image must have the images' shape and one channel of opacity, "
                    f"{wanted}, not {got}"
                )
