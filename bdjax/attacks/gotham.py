"""Feature-space attack: the trigger is a photo filter."""

import jax

from bdjax.attacks.base import Attack
from bdjax.attacks.filters import FILTERS, apply
from bdjax.registry import attack, static
from bdjax.types import BadInput


@attack("gotham")
class Gotham(Attack):
    """Filter the whole photo; there is no place to cut the trigger out of (Liu et al., 2019, ABS).

    x' = F(x). `filter`: "gotham" (the command line's version, dark), "gotham-wand" (the version of
    the ABS release), "nashville", "nashville-pilgram", "kelvin", "lomo" or "toaster".

    Differs from the paper: which of the two Gotham filters Veldanda & Garg used is not known.
    """

    filter: str = static("gotham")

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return apply(self.filter, x)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if self.filter not in FILTERS:
            raise BadInput(f"filter '{self.filter}' is not one of {', '.join(FILTERS)}")
        if shape[2] not in (1, 3):
            raise BadInput(f"a photo filter is for grey or RGB images, not for {shape[2]} channels")
