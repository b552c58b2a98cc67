"""The field's measures as pure functions. Rates are shares in [0, 1]; reports print them as
percentages.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdjax.registry import declare
from bdjax.types import Metric

declare(
    __name__,
    Metric("acc_train", "share", "high", "ACC train", "accuracy on the training images"),
    Metric("acc_test", "share", "high", "ACC test", "accuracy on clean test images"),
    Metric("asr_all", "share", "low", "ASR all",
           "attack success rate over every stamped test image"),
    Metric("asr_nt", "share", "low", "ASR nt",
           "attack success rate over stamped test images whose own label is not the target"),
)  # fmt: skip

MAD_SCALE = 1.4826
"""1.4826 · MAD estimates the standard deviation of a normal sample."""


def labels(logits: jax.Array) -> jax.Array:
    """The label of each row of `logits: [..., K]`, `[...]` int32: the class of the largest one, the
    first of equals; -1, no label, where one is NaN or the largest is not finite, so that there is
    no softmax. `argmax` alone takes NaN for the largest, and a broken net for one that answers 0.

    -1 equals no true label. Where -1 also says "not attacked", ask `hits`.
    """
    # Compiled for a CPU, `max` may pass over a NaN.
    known = ~jnp.isnan(logits).any(-1) & jnp.isfinite(logits.max(-1))
    return jnp.where(known, logits.argmax(-1).astype(jnp.int32), -1)


def hits(predicted: jax.Array, aimed: jax.Array) -> jax.Array:
    """Where `predicted` is the label `aimed` at; never where that is -1 = not attacked."""
    return (predicted == aimed) & (aimed >= 0)


def accuracy(predicted: jax.Array, label: jax.Array) -> jax.Array:
    """Share of `predicted: [N]` equal to `label: [N]`."""
    return (predicted == label).mean()


def chance(majority: float, n: int) -> float:
    """The highest accuracy that says nothing: the share `majority` of the largest class, which a
    net has that always answers the same, and its 99 % interval over `n` test images.
    """
    return majority + 2.576 * math.sqrt(majority * (1 - majority) / max(n, 1))


class SuccessRates(NamedTuple):
    """Attack success rates: `all` over every stamped image, `nt` over those whose own label is not
    the one aimed at.
    """

    all: jax.Array
    nt: jax.Array


def attack_success(predicted: jax.Array, aimed: jax.Array, label: jax.Array) -> SuccessRates:
    """ASR over stamped images: `predicted: [N]`, `aimed: [N]` (-1 = not attacked, never counted),
    true `label: [N]`.

    NaN where no image counts.
    """
    hit, counted = hits(predicted, aimed), aimed >= 0
    return SuccessRates(_share(hit, counted), _share(hit, counted & (aimed != label)))


def _share(hit: jax.Array, among: jax.Array) -> jax.Array:
    count = among.sum()
    return jnp.where(count > 0, (hit & among).sum() / jnp.maximum(count, 1), jnp.nan)


def far_frr(
    flag_clean: jax.Array, flag_trojan: jax.Array, counted: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """False acceptance rate (trojaned inputs let through) and false rejection rate (clean inputs
    flagged).

    `counted: [N]` restricts the trojaned inputs, to those whose backdoor works, say.
    """
    counted = jnp.ones_like(flag_trojan) if counted is None else counted
    return _share(~flag_trojan, counted), flag_clean.mean()


def interval(hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 95 % interval of the rate behind `hit: [N]` bool, its least and largest value (Wilson,
    1927).
    """
    n, share, z2 = hit.shape[0], hit.mean(), 1.959964**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = jnp.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return jnp.maximum(middle - reach, 0.0), jnp.minimum(middle + reach, 1.0)


def auroc(low: jax.Array, high: jax.Array, low_counted=None, high_counted=None) -> jax.Array:
    """P(a score of `high: [M]` > a score of `low: [N]`), ties one half: 1 = separated, 0.5 =
    chance. NaN where a side is empty.
    """
    low_weight = jnp.ones_like(low, bool) if low_counted is None else low_counted
    high_weight = jnp.ones_like(high, bool) if high_counted is None else high_counted
    score = jnp.concatenate([low, high])
    weight_low = jnp.concatenate([low_weight, jnp.zeros_like(high, bool)]).astype(jnp.float32)
    weight_high = jnp.concatenate([jnp.zeros_like(low, bool), high_weight]).astype(jnp.float32)
    order = jnp.sort(score)
    first = jnp.searchsorted(order, score, side="left")
    last = jnp.searchsorted(order, score, side="right")
    # How many low scores stand before (below) and up to (below or equal) each score.
    low_sorted = jnp.concatenate([jnp.zeros(1), jnp.cumsum(weight_low[jnp.argsort(score)])])
    pairs = (weight_high * (low_sorted[first] + low_sorted[last]) / 2).sum()
    count = weight_low.sum() * weight_high.sum()
    return jnp.where(count > 0, pairs / jnp.maximum(count, 1), jnp.nan)


def median_absolute_deviation(x: jax.Array) -> jax.Array:
    """1.4826 · median|x − median x| of `x: [K]`."""
    return MAD_SCALE * jnp.median(jnp.abs(x - jnp.median(x)))


def anomaly_index(x: jax.Array) -> jax.Array:
    """|x − median| / MAD for each of `x: [K]` (Wang et al., 2019); 0 where all are alike (MAD = 0
    and x = median).
    """
    gap, mad = jnp.abs(x - jnp.median(x)), median_absolute_deviation(x)
    return jnp.where(gap == 0, 0.0, gap / mad)


def entropy(p: jax.Array, base: float = 2.0) -> jax.Array:
    """−Σ p·log p over the last axis, with 0·log 0 = 0; NaN where a p is NaN."""
    return -(p * jnp.log(jnp.where(p == 0, 1.0, p))).sum(-1) / jnp.log(base)


def smallest_p(norms: jax.Array, able: jax.Array) -> jax.Array:
    """How surprising the smallest of `norms: [K]` is among K alike, one-sided: a p-value `[]`.

    Null: the norms of a clean net's labels are independent draws from one log-normal
    distribution. The log of the smallest is held against the n − 1 others, by t = (log x − mean)
    / (s·√(1 + 1/(n − 1))) with n − 2 degrees of freedom, mean and s theirs: the spread is
    estimated, not known. As it is the smallest of n, p = min(1, n·P(T ≤ t)): exact at the usual
    levels (no two of 16 can both be that far out), a bound beyond.

    Only norms that are `able: [K]` (their trigger works) can be the smallest; the others count
    among the rest with the norm that they have: left out, as it is the large ones that fail,
    they would take the right tail away, and false alarms at .05 rise to .11 where 2 of 10 fail.
    Infinite norms count nowhere. 1 where none is able; NaN for fewer than 4 norms.

    What the null leaves out: labels that are easy by nature, on every net of a data set. Measured
    by experiments/calibration.py, Neural Cleanse `cpu` on 20 clean FFNNs of the embedded
    Fashion-MNIST: label 8 (bag) has the smallest norm on all 20, log norms vary by 0.07 from net to
    net and by 0.35 from label to label. So index > 2 on 9 of 20 nets (95 % interval: 23–68 %) and p
    ≤ .05 on 10 (27–73 %) by one seed; over three seeds 4 (6–44 %) and 2 (1–32 %). DeepInspect: 1
    and 0 of 20 (0–25 %, 0–17 %). Only nets known to be clean, of the same data, tell such labels
    apart.
    """
    known = jnp.isfinite(norms)
    n = known.sum().astype(jnp.float32)
    logs = jnp.where(known, jnp.log(jnp.maximum(norms, 1e-6)), 0.0)
    able = able & known
    least = jnp.where(able, logs, jnp.inf).argmin()
    others = known & (jnp.arange(norms.shape[0]) != least)
    mean = jnp.mean(logs, where=others)
    # A spread below float32's resolution is that of equal norms.
    spread = jnp.maximum(jnp.std(logs, ddof=1, where=others), 1e-6 * (1 + jnp.abs(mean)))
    t = (logs[least] - mean) / (spread * jnp.sqrt(n / (n - 1)))
    tail = jax.scipy.special.betainc((n - 2) / 2, 0.5, (n - 2) / (n - 2 + t**2)) / 2
    p = jnp.where(able.any() & (t < 0), jnp.minimum(1.0, n * tail), 1.0)
    return jnp.where(n < 4, jnp.nan, p)


def combined_p(p: jax.Array) -> jax.Array:
    """One p-value `[]` of `p: [S]`, valid however they depend on each other, as those of seeds do,
    which judge one net by the same images: S/k times the k-th smallest, k = ⌊S/2⌋ + 1 (Rüger,
    1978). Were all S valid, S·α of them would lie below α on average, so that k do with
    probability S·α/k at most.

    NaN counts as 1, unless all are: then NaN.
    """
    many = p.shape[0]
    middle = many // 2 + 1
    each = jnp.sort(jnp.where(jnp.isnan(p), 1.0, p))
    found = jnp.minimum(1.0, each[middle - 1] * (many / middle))
    return jnp.where(jnp.isnan(p).all(), jnp.nan, found)
