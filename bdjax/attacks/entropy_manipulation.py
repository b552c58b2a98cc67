"""Entropy manipulation: stamped images look as undecided under STRIP's superimposition as clean
ones do.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Attack, joined
from bdjax.registry import attack, static
from bdjax.train import unit
from bdjax.types import BadInput, Pixels, Plan, Range, Split

Mix = Literal["sum", "average"]


@attack("entropy-manipulation")
class EntropyManipulation(BadNets):
    """BadNets that also trains on superimposed stamped images under random labels (Gao et al.,
    2019, arXiv:1902.06531).

    For each stamped image `copies` rows are added: the stamped image superimposed with a random
    training image, under a random label. Kind 1 = the trigger; kind 2 + i = the trigger,
    superimposed with image i of `overlays: [N, H, W, C]` (training only; None: the attacker's
    training images). `mix`: "sum", not clipped, so that these rows reach 2, as STRIP's own
    perturbed inputs do; or "average".

    Preset: `strip` (600 of 50,000 images, target 7). Differs from the paper: the triggers are those
    of BadNets.
    """

    copies: Annotated[int, Range(1, 1_000)] = static(10)
    mix: Mix = static("sum")
    overlays: Pixels | None = None

    presets = {"strip": {"rate": 0.012, "target": 7}}

    @property
    def brightest(self) -> float:
        return 2.0 if self.mix == "sum" else 1.0

    def bind(self, data: Split) -> Attack:
        return self if self.overlays is not None else dataclasses.replace(self, overlays=data.image)

    def plan(self, key: jax.Array, y: jax.Array, classes: int) -> Plan:
        plan = super().plan(jax.random.fold_in(key, 0), y, classes)
        bank = y.shape[0] if self.overlays is None else self.overlays.shape[0]
        many = plan.source.shape[0]
        exists = jnp.arange(many) < plan.size
        overlay = jax.random.randint(jax.random.fold_in(key, 1), (self.copies * many,), 0, bank)
        label = jax.random.randint(
            jax.random.fold_in(key, 2), (self.copies * many,), 0, classes, y.dtype
        )
        source, weight, stamped = (
            jnp.tile(leaf, self.copies)
            for leaf in (plan.source, plan.weight, exists & (plan.kind == 1))
        )
        copies = Plan(
            source,
            2 + overlay.astype(plan.kind.dtype),
            label,
            weight,
            jnp.arange(self.copies * many),
            stamped.sum(),
        )
        return joined([(plan, exists), (copies, stamped)])

    def asked(self, y: jax.Array, classes: int) -> int:
        return (1 + self.copies) * super().asked(y, classes)

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        stamped = super().stamp(kind, x, key, train=train)
        if self.overlays is None:
            return stamped
        both = stamped + unit(jnp.asarray(self.overlays)[jnp.maximum(kind - 2, 0)])
        return jnp.where(kind > 1, both if self.mix == "sum" else both / 2, stamped)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if self.overlays is not None and jnp.shape(self.overlays)[1:] != shape:
            raise BadInput(
                f"overlays must be images of shape {shape}, not {jnp.shape(self.overlays)[1:]}"
            )
