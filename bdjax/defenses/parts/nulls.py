"""How surprising a label's trigger is: held against other labels of the net, or against those of
nets that are known to be clean.

Sizes are compared as logarithms, one-sided: what is small is suspicious.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdjax.types import Array


def student(t: Array, freedom: Array | float) -> jax.Array:
    """P(T ≤ t) of Student's distribution with `freedom` degrees of freedom."""
    t, freedom = jnp.asarray(t, jnp.float32), jnp.asarray(freedom, jnp.float32)
    tail = jax.scipy.special.betainc(freedom / 2, 0.5, freedom / (freedom + t**2)) / 2
    return jnp.where(t < 0, tail, 1 - tail)


def by_spacings(sizes: Array) -> jax.Array:
    """The p-value `[]` of the smallest of many labels, told from those that come next: `sizes:
    [m]`, the smallest ones of all, m ≥ 4.

    In the tail of most distributions of log sizes, whatever its scale, i times the gap between the
    i-th and the next is exponential, all with one mean (Rényi, 1953): p is that of the first gap
    beside the mean of the others, P(F ≥ f) with 2 and 2(m − 2) degrees of freedom. As only the tail
    is looked at, the number of labels does not matter; that those given are the smallest is what
    the screening must see to: where it misses some, or brings others, gaps are wider, p is larger.
    """
    logs = jnp.sort(jnp.log(jnp.maximum(jnp.asarray(sizes, jnp.float32), 1e-6)))
    gaps = jnp.diff(logs) * jnp.arange(1, logs.shape[0], dtype=jnp.float32)
    rest = gaps.shape[0] - 1
    mean = jnp.maximum(gaps[1:].mean(), 1e-6)
    return (1 + gaps[0] / (mean * rest)) ** (-rest)


class Pooled(NamedTuple):
    """What clean nets say of their labels' log sizes: each label's own `effect: [K]`, by how much
    it lies above the mean of its net; the `spread: []` of what is left, which all labels and nets
    share; of how many `nets` and `freedom` degrees.
    """

    effect: jax.Array
    spread: jax.Array
    nets: float
    freedom: float


def pooled(sizes: Array) -> Pooled:
    """The null behind `sizes: [N, K]` of N ≥ 2 clean nets: log size = net + label + rest. As all
    labels share the spread of the rest, few nets tell small p-values apart: it has (N − 1)(K − 1)
    degrees of freedom.
    """
    logs = jnp.log(jnp.maximum(jnp.asarray(sizes, jnp.float32), 1e-6))
    n, k = logs.shape
    own = logs - logs.mean(1, keepdims=True)
    effect = own.mean(0)
    freedom = float(max((n - 1) * (k - 1), 1))
    rest = own - effect[None]
    spread = jnp.maximum(jnp.sqrt((rest**2).sum() / freedom), 1e-6)
    return Pooled(effect, spread, float(n), freedom)


def against_clean(sizes: Array, able: Array, null: Pooled) -> tuple[jax.Array, jax.Array]:
    """The p-value `[]` of the smallest of `sizes: [K]`, each held against its own label on clean
    nets, and which label that is: `[]`; only one that is `able: [K]`, whose trigger works, can be
    it.

    The net's own level is the mean of its other labels: t = (log x − effect − level) / (s·√((1 +
    1/N)·K/(K − 1))); K times the tail of the smallest.
    """
    known = jnp.isfinite(jnp.asarray(sizes))
    k = known.sum().astype(jnp.float32)
    rest = jnp.log(jnp.maximum(jnp.where(known, jnp.asarray(sizes), 1.0), 1e-6)) - null.effect
    total = jnp.where(known, rest, 0.0).sum()
    level = (total - rest) / jnp.maximum(k - 1, 1)
    t = (rest - level) / (null.spread * jnp.sqrt((1 + 1 / null.nets) * k / (k - 1)))
    t = jnp.where(known & jnp.asarray(able), t, jnp.inf)
    found = jnp.minimum(1.0, k * student(t.min(), null.freedom))
    return jnp.where(jnp.isfinite(t.min()), found, jnp.where(k > 1, 1.0, jnp.nan)), t.argmin()


def ranked(index: Array, clean: Array) -> jax.Array:
    """The p-value `[]` of a judge's `index: []` among those of `clean: [N]` nets: the share that
    are as high, the judged one counted: 1/(N + 1) at least.
    """
    clean = jnp.asarray(clean, jnp.float32)
    return (1 + (clean >= jnp.asarray(index, jnp.float32)).sum()) / (clean.shape[0] + 1)
