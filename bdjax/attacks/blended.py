"""Blended injection: a key image shines through the whole picture."""

from typing import Literal

import jax
import jax.numpy as jnp

from bdjax.attacks.artwork import in_channels, rgba, stretch
from bdjax.attacks.base import Attack, Stamped
from bdjax.registry import attack, static
from bdjax.train import unit
from bdjax.types import BadInput, Draw, Pixels, Share, seed

Key = Literal["noise", "cat", "image"]


@attack("blended")
class Blended(Attack):
    """Blend a key image into the input (Chen et al., 2017, arXiv:1712.05526).

    Π_α(k, x) = α·k + (1 − α)·x. `alpha`: opacity of the key while training; `test_alpha`: when the
    attack is fired, may be larger; `pattern`: "noise", a fixed uniform random key drawn from
    `key_seed`; "cat", a cartoon; or "image", the array given as `image` (`[H, W, C]` in [0, 1]).

    Differs from the paper: its cartoon key, Hello Kitty, is not ours to ship; ours is another cat.

    Reference: Xinyun Chen, Chang Liu, Bo Li, Kimberly Lu and Dawn Song, "Targeted Backdoor Attacks
    on Deep Learning Systems Using Data Poisoning".
    """

    alpha: Share = 0.2
    test_alpha: Share = 0.2
    key_seed: Draw = 0
    image: Pixels | None = None
    pattern: Key = static("noise")

    used_if = {"key_seed": {"pattern": ("noise",)}, "image": {"pattern": ("image",)}}

    def __post_init__(self):
        object.__setattr__(self, "key_seed", seed(self.key_seed))

    def key_image(self, shape: tuple[int, ...]) -> jax.Array:
        """k: `[H, W, C]` in [0, 1]."""
        if self.pattern == "image":
            return unit(self.image)  # type: ignore[arg-type]
        if self.pattern == "cat":
            return in_channels(stretch(rgba("cat")[..., :3], *shape[:2]), shape[2])
        return jax.random.uniform(jax.random.key(self.key_seed), shape)

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        mask = jnp.full((*shape[:2], 1), self.alpha if train else self.test_alpha, jnp.float32)
        return Stamped(mask, self.key_image(shape))

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        alpha = self.alpha if train else self.test_alpha
        return jnp.where(kind > 0, alpha * self.key_image(x.shape) + (1 - alpha) * x, x)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        got = None if self.image is None else jnp.shape(self.image)
        if self.pattern == "image" and got != shape:
            raise BadInput(f"the key image must have the images' shape {shape}, not {got}")
