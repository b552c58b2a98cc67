"""The boundary of a judge of inputs, from the scores of clean images that it was not fitted on."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import metrics
from bdjax.registry import declare
from bdjax.types import Array, Metric

declare(
    __name__,
    Metric("frr_fit", "share", "low", "FRR fit",
           "FRR of the boundary on the very clean images that it was fitted to"),
    Metric("frr_fit_low", "share", "low", "FRR fit low", "least value of its 95 % interval"),
    Metric("frr_fit_high", "share", "low", "FRR fit high", "largest value of its 95 % interval"),
)  # fmt: skip


def quantile_boundary(scores: jax.Array, rate: Array | float) -> jax.Array:
    """The boundary `[]` under which at most the share `rate` of `scores: [N]` is flagged, whatever
    ties there are.

    It lies just below the ⌊rate·N⌋ + 1-th smallest score, so that what ties with that one passes.
    Scores that are not numbers are never flagged.
    """
    n = scores.shape[0]
    # Compared as shares, which are constants: in float32, 0.29 · 100 is below 29.
    shares = (np.arange(1, n + 1) / n).astype(np.float32)
    count = (shares <= jnp.asarray(rate, jnp.float32)).sum()
    first = jnp.sort(scores)[jnp.minimum(count, n - 1)]
    return first - 1e-6 * jnp.maximum(jnp.abs(first), 1e-6)


def realised(flagged: jax.Array) -> dict[str, jax.Array]:
    """`frr_fit: []`, the share of the clean images behind the boundary that it flags, `flagged:
    [N]`, and its 95 % interval, `frr_fit_low`, `frr_fit_high`.
    """
    low, high = metrics.interval(flagged)
    return {"frr_fit": flagged.mean(), "frr_fit_low": low, "frr_fit_high": high}
