"""An attack of a stranger's own, with a part of its own."""

import jax.numpy as jnp

import bdjax
from bdjax.types import Share, Size


@bdjax.pytree
class Lamp:
    """What lights the corner."""

    size: Size = bdjax.static(3)
    strength: Share = 1.0


@bdjax.attack("corner-light")
class CornerLight(bdjax.Attack):
    """Lights a corner (Stranger, 2026)."""

    lamp: Lamp = Lamp()

    presets = {"faint": {"lamp": Lamp(strength=0.4)}}

    def trigger(self, x, key):
        size = self.lamp.size
        return x.at[-size:, -size:].set(jnp.asarray(self.lamp.strength, x.dtype))
