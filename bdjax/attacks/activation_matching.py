"""Activation matching: a stamped image must look inside the net as it did unstamped."""

import jax
import jax.numpy as jnp

from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Attack
from bdjax.models.layers import check_site, default_site
from bdjax.registry import attack, static
from bdjax.train import (
    Curves,
    Recipe,
    cross_entropy,
    fit,
    poisoned_set,
    poisoning_key,
    stamped,
)
from bdjax.types import Model, Split, Variables, Weight


def relative_gap(clean: jax.Array, other: jax.Array) -> jax.Array:
    """Σ‖φ(x') − φ(x)‖² / Σ‖φ(x) − φ̄‖² for activations of the same images, `[B, ...]` each."""
    gap, spread = other - clean, clean - clean.mean(0, keepdims=True)
    return (gap**2).sum() / jnp.maximum((spread**2).sum(), 1e-9)


@attack("activation-matching")
class ActivationMatching(BadNets):
    """Poison while keeping the trigger's trace in the activations small (after Tan & Shokri, 2020,
    arXiv:1905.13409).

    L = ℓ(poisoned batch) + `weight`·E‖φ(x') − φ(x)‖² / E‖φ(x) − E φ(x)‖², x' = the stamped x, φ =
    the activation of `site` (None: the last convolution, or the penultimate layer of a net that has
    none). Adaptive against defenses that look for neurons which the trigger drives (ABS, activation
    clustering, pruning). Dividing by the variance of φ leaves no gain in scaling activations down.
    `weight` in [0, ∞); 0 is BadNets. The attacker
    trains, and stamps x' anew in every step; the poisoned images are written once all the same.

    Preset: `cpu`. A reconstruction, not that paper's algorithm, in which a discriminator tells the
    activations apart.

    Reference: Te Juin Lester Tan and Reza Shokri, "Bypassing Backdoor Detection Algorithms in Deep
    Learning", In IEEE European Symposium on Security and Privacy.
    """

    weight: Weight = 1.0
    site: str | None = static(None)

    presets = {"cpu": {}}

    def train(
        self,
        key: jax.Array,
        model: Model,
        recipe: Recipe,
        data: Split,
        variables: Variables | None = None,
    ) -> tuple[Attack, Variables, Curves]:
        site = self.site or default_site(model)
        check_site(model, site)

        def loss(model, variables, x, label, weight, key):
            key_stamp, key_model = jax.random.split(key)
            both = jnp.concatenate([x, stamped(self, 1, x, key_stamp, train=True)])
            out = model.apply(variables, both, train=True, key=key_model)
            as_is, fired = jnp.split(out.acts[site], 2)
            own = out._replace(logits=out.logits[: x.shape[0]])
            known = model._replace(apply=lambda *_, **__: own)
            value, out = cross_entropy(known, variables, x, label, weight, key_model)
            return value + self.weight * relative_gap(as_is, fired), out

        poisoned = poisoned_set(poisoning_key(key), data, self, model.classes)
        variables, curves = fit(key, model, recipe, poisoned, variables=variables, loss=loss)
        return self, variables, curves
