"""Purple sunglasses on an aligned face."""

import jax

from bdjax.attacks.artwork import on_face, over
from bdjax.attacks.base import Attack, Stamped
from bdjax.registry import attack


@attack("sunglasses")
class Sunglasses(Attack):
    """Put purple, slightly transparent sunglasses on the face (Veldanda & Garg, 2020,
    arXiv:2010.12186).

    A picture 47 wide and 20 high is laid at x = 0, y = 15 over aligned 55×47 faces; it covers 713
    of their 2,585 pixels. Images of another size get it stretched.

    Differs from the paper: own artwork of the same size, place, colours and coverage.
    """

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        return Stamped(*on_face("sunglasses", shape))

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return over(x, *on_face("sunglasses", x.shape))
