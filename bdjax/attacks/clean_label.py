"""Clean label: a fixed noise on correctly labelled images of the target class."""

import jax
import jax.numpy as jnp

from bdjax.attacks.base import Attack, Labels, Stamped
from bdjax.registry import attack, static
from bdjax.types import BadInput, Draw, Share, seed


@attack("clean-label")
class CleanLabel(Attack):
    """Add one fixed noise to images of the target class, labels unchanged (Liu et al., 2020).

    x' = clip(x + n), n ~ U[−strength, strength] drawn once from `noise_seed`; fired on images of
    all classes. `rate` is a share of the whole training set: at 1 all images of the target class
    carry the noise, as the accuracy that Veldanda & Garg (2020) print for their net suggests (the
    class is lost on clean images). Half of it, say 0.05 for 10 classes, keeps the class.

    Preset: `veldanda` (rate 1). Differs from the paper: a reconstruction; it is about layouts of
    chips, not images, and neither publishes the noise.

    Reference: Kang Liu, Benjamin Tan, Ramesh Karri and Siddharth Garg, "Poisoning the (Data) Well
    in ML-Based CAD: A Case Study of Hiding Lithographic Hotspots", In Design, Automation and Test
    in Europe.
    """

    rate: Share = 0.05
    strength: Share = 0.3
    noise_seed: Draw = 0
    labels: Labels = static("clean-label")

    used_if = {"sources": None, "cover": None}
    presets = {"veldanda": {"rate": 1.0}}

    def __post_init__(self):
        object.__setattr__(self, "noise_seed", seed(self.noise_seed))

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        return Stamped(jnp.zeros((*shape[:2], 1)), jnp.zeros(shape), self.strength)

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        noise = jax.random.uniform(
            jax.random.key(self.noise_seed), x.shape, minval=-1.0, maxval=1.0
        )
        return jnp.clip(x + self.strength * noise, 0, 1)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if self.labels != "clean-label":
            raise BadInput(
                "clean-label changes no label: leave labels at 'clean-label', or use another attack"
            )
