"""The measures on cases worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from bdjax import metrics


def test_asr_denominators():
    label = jnp.array([0, 1, 2, 3])
    predicted = jnp.array([0, 0, 2, 0])
    rates = metrics.attack_success(predicted, jnp.zeros(4, int), label)
    assert rates.all == 0.75  # the target's own image counts
    assert rates.nt == pytest.approx(2 / 3)  # it does not


def test_asr_of_a_source_specific_attack_counts_its_sources_only():
    rates = metrics.attack_success(
        jnp.array([0, 0, 5]), jnp.array([-1, 0, 0]), jnp.array([4, 1, 1])
    )
    assert rates.all == rates.nt == 0.5


def test_asr_of_nobody_is_nan():
    assert np.isnan(metrics.attack_success(jnp.array([0]), jnp.array([0]), jnp.array([0])).nt)


def test_the_interval_of_a_rate_is_wilsons():
    for n in (1, 40, 1000):
        for hits in (0, 1, n // 3, n):
            found = metrics.interval(jnp.arange(n) < hits)
            wanted = binomtest(hits, n).proportion_ci(0.95, "wilson")
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_far_frr():
    far, frr = metrics.far_frr(
        jnp.array([True, False, False, False]), jnp.array([True, False, True, False])
    )
    assert (far, frr) == (0.5, 0.25)
    far, _ = metrics.far_frr(
        jnp.array([False]), jnp.array([True, False, True]), jnp.array([True, False, True])
    )
    assert far == 0


def test_auroc_equals_sklearn_with_ties_and_weights():
    rng = np.random.default_rng(0)
    low, high = (
        rng.integers(0, 10, 50).astype(np.float32),
        rng.integers(3, 13, 40).astype(np.float32),
    )
    expected = roc_auc_score(np.r_[np.zeros(50), np.ones(40)], np.r_[low, high])
    assert metrics.auroc(jnp.asarray(low), jnp.asarray(high)) == pytest.approx(expected, abs=1e-6)
    keep = rng.random(40) < 0.5
    expected = roc_auc_score(np.r_[np.zeros(50), np.ones(keep.sum())], np.r_[low, high[keep]])
    found = metrics.auroc(jnp.asarray(low), jnp.asarray(high), None, jnp.asarray(keep))
    assert found == pytest.approx(expected, abs=1e-6)
    assert np.isnan(metrics.auroc(jnp.zeros(3), jnp.ones(2), None, jnp.zeros(2, bool)))


def test_anomaly_index_of_the_published_example():
    # Three values around 10, one far below: median 10, MAD 1.4826.
    x = jnp.array([9.0, 10.0, 11.0, 10.0, 1.0])
    np.testing.assert_allclose(metrics.anomaly_index(x)[4], 9 / 1.4826, rtol=1e-5)


def test_anomaly_index_of_equals_is_zero():
    np.testing.assert_array_equal(metrics.anomaly_index(jnp.full(4, 7.0)), 0)


def test_entropy_by_hand():
    p = jnp.array([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(metrics.entropy(p), [0, 2, 1], atol=1e-6)
