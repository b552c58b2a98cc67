"""Defenses of a stranger's own, one of each kind."""

import jax
import jax.numpy as jnp

import bdjax
from bdjax.train import clean_set, unit
from bdjax.types import Positive


@bdjax.defense("clip-weights")
class ClipWeights(bdjax.Repair):
    """Clips every weight (Stranger, 2026)."""

    limit: Positive = 0.5

    presets = {"hard": {"limit": 1e-6}}

    def __call__(self, key, model, variables, clean):
        limit = jnp.asarray(self.limit, jnp.float32)
        weights = jax.tree.map(lambda w: jnp.clip(w, -limit, limit), variables["params"])
        return bdjax.Repaired({**variables, "params": weights}, {"limit": limit})


@bdjax.defense("clean-only")
class CleanOnly(bdjax.Training):
    """Trains on the defender's images alone (Stranger, 2026)."""

    def __call__(self, key, model, recipe, data, clean):
        variables, _ = bdjax.fit(key, model, recipe, clean_set(clean))
        return bdjax.Repaired(variables, {})


@bdjax.defense("big-logit")
class BigLogit(bdjax.Inversion):
    """Flags the label with the largest bias (Stranger, 2026)."""

    def once(self, key, model, variables, clean):
        bias = variables["params"]["logits"]["bias"]
        flagged = bias == bias.max()
        return bdjax.Verdict(bias.max(), bias.max() > 0, flagged, {"norms": -bias}, jnp.nan)


@bdjax.defense("any-net")
class AnyNet(bdjax.Judge):
    """Says that every net is infected (Stranger, 2026)."""

    def once(self, key, model, variables, clean):
        no = jnp.zeros(model.classes, bool)
        return bdjax.Verdict(jnp.asarray(9.0), jnp.asarray(True), no, {}, jnp.nan)


@bdjax.defense("too-bright")
class TooBright(bdjax.InputFilter):
    """Flags bright images (Stranger, 2026)."""

    limit: Positive = 0.3

    def __call__(self, key, model, variables, clean, x):
        score, boundary = -unit(x).mean((1, 2, 3)), -jnp.asarray(self.limit, jnp.float32)
        return bdjax.Scores(score, boundary, score <= boundary, {})


@bdjax.defense("every-other")
class EveryOther(bdjax.SampleFilter):
    """Suspects every other row (Stranger, 2026)."""

    def __call__(self, key, model, variables, data):
        odd = jnp.arange(len(data.plan.label)) % 2 == 1
        return bdjax.Suspects(odd.astype(jnp.float32), odd, {})
