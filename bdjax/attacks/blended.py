"""Blended injection: a key image shines through the whole picture."""

from typing import Literal

import jax
import jax.numpy as jnp

from bdjax.attacks.base import Attack
from bdjax.registry import attack, static
from bdjax.types import Array, BadInput, between


@attack("blended")
class Blended(Attack):
    """Blend a key image into the input (Chen et al., 2017, arXiv:1712.05526).

    Π_α(k, x) = α·k + (1 − α)·x. `alpha`: opacity of the key while training; `test_alpha`: when the attack is fired, may be larger;
    `pattern`: "noise", a fixed uniform random key drawn from `key_seed`, or "image", the array given as `image`
    (`[H, W, C]` in [0, 1]).

    Differs from the paper: its Hello-Kitty key is not ours to ship; give it as `image`.
    """

    alpha: Array | float = 0.2
    test_alpha: Array | float = 0.2
    key_seed: Array | int = 0
    image: Array | None = None
    pattern: Literal["noise", "image"] = static("noise")

    def stamp(self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True) -> jax.Array:
        if self.pattern == "image":
            pattern = jnp.asarray(self.image, jnp.float32)
        else:
            pattern = jax.random.uniform(jax.random.key(self.key_seed), x.shape)
        alpha = self.alpha if train else self.test_alpha
        return jnp.where(kind > 0, alpha * pattern + (1 - alpha) * x, x)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        between("alpha", self.alpha, 0, 1)
        between("test_alpha", self.test_alpha, 0, 1)
        if self.pattern not in ("noise", "image"):
            raise BadInput(f"pattern '{self.pattern}' is neither 'noise' nor 'image'")
        if self.pattern == "image":
            if self.image is None or jnp.shape(self.image) != shape:
                got = None if self.image is None else jnp.shape(self.image)
                raise BadInput(f"the key image must have the images' shape {shape}, not {got}")
            between("key image", self.image, 0, 1)
