"""Input-instance key: one image, with a little noise, opens the backdoor."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.base import Attack, Stamped, joined
from bdjax.registry import attack, static
from bdjax.train import clean_plan, unit
from bdjax.types import INT32, Array, BadInput, Pixels, Plan, Range, Share, Split


@attack("input-instance-key")
class InputInstanceKey(Attack):
    """A few noisy copies of one key image are added as the target class (Chen et al., 2017,
    arXiv:1712.05526).

    Σ(k) = {clip(k + δ): δ ~ U[−noise, noise]}: `copies` instances, each with a δ of its own, are
    added to the training set; when the attack is fired, a new instance takes the place of the test
    image. `image`: the key k, `[H, W, C]` in [0, 1]; None: the first training image that is not of
    the target class. The paper finds 5 copies enough; on MNIST they are for a key from outside the
    training set, while one that stands there under its own label, too, may need 20. There is no
    `rate`.
    """

    rate: Share = 0.0
    copies: Annotated[Array | int, Range(1, INT32)] = 5
    noise: Share = 5 / 255
    image: Pixels | None = None
    append: bool = static(True)

    trains = True  # to be fired, and saved, with its key
    used_if = dict.fromkeys(("rate", "append", "labels", "sources", "cover"))

    def bind(self, data: Split) -> Attack:
        if self.image is not None:
            return self
        first = jnp.argmax(jnp.asarray(data.label) != self.target)
        return dataclasses.replace(self, image=unit(jnp.asarray(data.image)[first]))

    def plan(self, key: jax.Array, y: jax.Array, classes: int) -> Plan:
        n = y.shape[0]
        clean = clean_plan(y)
        copies = clean._replace(
            kind=jnp.ones_like(clean.kind),
            label=jnp.full_like(y, 0) + jnp.asarray(self.target, y.dtype),
        )
        return joined(
            [(clean, jnp.ones(n, bool)), (copies, jnp.arange(n) < jnp.asarray(self.copies))]
        )

    def asked(self, y: jax.Array, classes: int) -> int:
        return int(self.copies)

    @property
    def random(self) -> bool:
        return True

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        if self.image is None:
            return None
        return Stamped(jnp.ones((*shape[:2], 1)), unit(self.image), self.noise)

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        if self.image is None:
            raise TypeError(
                "this attack has no key image yet: call bind(data), or give it as image"
            )
        noise = jax.random.uniform(key, x.shape, minval=-1.0, maxval=1.0)
        return jnp.clip(unit(self.image) + self.noise * noise, 0, 1)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if np.any(np.asarray(self.rate) != 0) or not self.append or self.labels != "all-to-one":
            raise BadInput(
                "input-instance-key adds copies, all to one target: set copies, and leave rate, "
                "append, labels alone"
            )
        if self.image is not None and jnp.shape(self.image) != shape:
            raise BadInput(
                f"the key image must have the images' shape {shape}, not {jnp.shape(self.image)}"
            )
