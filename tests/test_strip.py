"""STRIP on nets whose entropies are known by hand, and on real images."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.datasets.sample import Sample
from bdjax.defenses.inputs.strip import Strip, entropies, spread, superimpose
from bdjax.defenses.parts.boundary import quantile_boundary
from bdjax.types import BadInput, Model, Output, Split

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)


def net(logits, shape=SHAPE, classes=3) -> Model:
    """A model without variables from `logits(x: [B, H, W, C]) -> [B, K]`."""

    def apply(variables, x, *, train=False, edits=None, key=None):
        return Output(logits(x), {}, variables)

    return Model(lambda key: {}, apply, shape, classes, ())


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), np.uint8)


KERNEL = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
LINEAR = net(lambda x: x.reshape(x.shape[0], -1) @ jnp.asarray(KERNEL))


@pytest.mark.parametrize("blend, by_hand", [
    ("sum", lambda x, t: x + 0.5 * t),
    ("average", lambda x, t: (x + 0.5 * t) / 1.5),
    ("clipped", lambda x, t: np.clip(x + 0.5 * t, 0, 1)),
])  # fmt: skip
def test_entropies_by_hand(blend, by_hand):
    x, overlays = images(3), images(5, 2)
    # As many replicas as overlays: every input meets each of them once, in whatever order.
    found = entropies(KEY, LINEAR, {}, x, overlays, 5, blend=blend, alpha=0.5, base=2.0, batch=4)
    assert found.shape == (3, 5)
    for i in range(3):
        expected = []
        for overlay in overlays:
            z = by_hand(x[i] / 255, overlay / 255).reshape(-1) @ KERNEL
            p = np.exp(z) / np.exp(z).sum()
            expected.append(-(p * np.log2(p)).sum())
        np.testing.assert_allclose(np.sort(found[i]), np.sort(expected), rtol=1e-4)


def test_certain_and_clueless_nets():
    x = images(2)
    certain = net(lambda x: jnp.zeros((x.shape[0], 3)).at[:, 1].set(1e4))
    assert entropies(KEY, certain, {}, x, images(4), 4).tolist() == [[0.0] * 4] * 2
    clueless = net(lambda x: jnp.zeros((x.shape[0], 3)))
    np.testing.assert_allclose(entropies(KEY, clueless, {}, x, images(4), 4), np.log2(3), rtol=1e-6)
    np.testing.assert_allclose(
        entropies(KEY, clueless, {}, x, images(4), 4, base=3.0), 1, rtol=1e-6
    )


def test_the_unclipped_sum_leaves_the_unit_interval_and_the_others_do_not():
    white = jnp.ones((1, 1, 1, 1))
    assert [
        float(superimpose(white, white, blend).ravel()[0])
        for blend in ("sum", "average", "clipped")
    ] == [2, 1, 1]


def marked(n: int) -> Split:
    """`n` images, each with a white pixel of its own."""
    image = np.zeros((n, n, 1, 1), np.uint8)
    image[np.arange(n), np.arange(n)] = 255
    return Split(image, np.zeros(n, np.int32))


def test_overlays_of_an_input_differ_and_never_fit_the_boundary():
    # Undecided (1 bit) unless an image meets itself, when a pixel adds up to 2: then certain.
    twice = net(
        lambda x: jnp.stack([1e3 * jax.nn.relu(x.max((1, 2, 3)) - 1.5), 0 * x[:, 0, 0, 0]], 1),
        (12, 1, 1),
        2,
    )
    clean = marked(12)
    scores = jax.jit(lambda: Strip(n=6)(KEY, twice, {}, clean, clean.image))()
    np.testing.assert_allclose(scores.info["clean"], np.ones(6), rtol=1e-6)
    # Of the twelve inputs, six are overlays and meet themselves exactly once among all six
    # different overlays.
    np.testing.assert_allclose(np.sort(scores.score), [5 / 6] * 6 + [1] * 6, rtol=1e-6)


@pytest.fixture(scope="module")
def real():
    """Real images, and a net for them in which a white corner pixel decides alone."""
    data = Sample(train_size=2000, test_size=400).load()
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(784, 10)).astype(np.float32)) / 8

    def logits(x):
        hot = jnp.where(x[:, -1, -1, :] > 0.99, 1e3 * jax.nn.one_hot(jnp.asarray([0]), 10), 0.0)
        return x.reshape(x.shape[0], -1) @ kernel + hot

    return data, net(logits, data.shape, 10)


def test_trigger_on_real_images_is_caught_and_clean_images_pass(real):
    data, model = real
    stamped = np.array(data.test.image)
    stamped[:, -1, -1] = 255
    strip = Strip(n=40, frr=0.05, boundary="empirical")
    run = jax.jit(lambda x: strip(KEY, model, {}, data.clean, x))
    clean, trojan = run(data.test.image), run(stamped)
    np.testing.assert_array_equal(clean.flagged, clean.score <= clean.boundary)
    assert float(trojan.score.max()) < 1e-3 and bool(trojan.flagged.all())
    # The boundary comes from 100 other images: the false rejection rate is near 5 %, not exactly
    # there.
    assert float(clean.flagged.mean()) < 0.13
    as_float = run(data.test.image.astype(np.float32) / 255)
    np.testing.assert_allclose(as_float.score, clean.score, rtol=1e-4)


def test_boundary_is_the_quantile_and_leaves_can_be_vmapped(real):
    data, model = real
    rates = jnp.asarray([0.01, 0.1, 0.5])

    @jax.jit
    def run(rates):
        def both(frr):
            calls = (
                Strip(n=5, frr=frr, inputs=60, boundary=kind) for kind in ("normal", "empirical")
            )
            return [strip(KEY, model, {}, data.clean, data.test.image[:7]) for strip in calls]

        return jax.vmap(both)(rates), both(0.1)

    (normal, empirical), (alone, _) = run(rates)
    entropy = np.asarray(normal.info["clean"][0])
    assert entropy.shape == (60,)
    expected = [NormalDist(entropy.mean(), entropy.std()).inv_cdf(float(rate)) for rate in rates]
    np.testing.assert_allclose(normal.boundary, expected, rtol=1e-4)
    # Of 60: none, six, thirty may be rejected; the next one passes, barely.
    np.testing.assert_allclose(empirical.boundary, np.sort(entropy)[[0, 6, 30]], rtol=1e-5)
    np.testing.assert_allclose(empirical.info["frr_fit"], [0, 0.1, 0.5], rtol=1e-6)
    for found in (normal, empirical):
        rejected = (entropy[None] <= np.asarray(found.boundary)[:, None]).sum(1)
        np.testing.assert_allclose(found.info["frr_fit"], rejected / 60, rtol=1e-6)
    np.testing.assert_allclose(alone.score, normal.score[1], rtol=1e-5)
    np.testing.assert_allclose(alone.boundary, normal.boundary[1], rtol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.29, 0.3, 0.5, 0.99, 1.0])
def test_an_empirical_boundary_never_rejects_more_than_it_is_asked_to(rate):
    """Whatever ties there are; and as many as it may where there are none."""
    rng = np.random.default_rng(0)
    apart = rng.permutation(np.linspace(0.1, 3, 100))
    cases = {
        "apart": apart, "equal": np.ones(100), "zero": np.zeros(100), "one": np.ones(1),
        "tied at the bottom": np.where(np.arange(100) < 40, 0.2, apart),
        "a few values": rng.integers(1, 5, 100) / 7, "tiny": apart * 1e-5, "below 0": -apart,
    }  # fmt: skip
    for name, scores in cases.items():
        scores = jnp.asarray(scores, jnp.float32)
        rejected = scores <= jax.jit(quantile_boundary)(scores, rate)
        assert float(rejected.mean()) <= np.float32(rate), name
        if name in ("apart", "below 0"):
            assert int(rejected.sum()) == min(round(rate * 100), 99)
    # A score that is not a number passes, and takes no other's place.
    scores = jnp.asarray([*apart, *[np.nan] * 100], jnp.float32)
    rejected = scores <= quantile_boundary(scores, 0.1)
    assert int(rejected.sum()) == 20


@pytest.mark.parametrize("kind", ["normal", "empirical"])
def test_a_boundary_that_is_not_above_zero_is_no_fit_and_flags_nothing(kind):
    certain = net(lambda x: jnp.zeros((x.shape[0], 3)).at[:, 1].set(1e4))
    clean = Split(images(40), np.zeros(40, np.int32))
    run = lambda frr, model: jax.jit(  # noqa: E731
        lambda frr: Strip(n=5, frr=frr, boundary=kind)(KEY, model, {}, clean, images(6, 2))
    )(frr)
    scores = run(0.1, certain)
    assert float(scores.boundary) <= 0 and (scores.score == 0).all()
    assert float(scores.info["valid_fit"]) == 0 and not bool(scores.flagged.any())
    assert float(scores.info["frr_fit"]) == 0 < float(scores.info["frr_fit_high"]) < 0.2
    # An unclear net: a normal fit whose spread is too wide for the rate.
    small, usual = run(1e-6, LINEAR), run(0.3, LINEAR)
    assert float(usual.info["valid_fit"]) == 1 and float(usual.boundary) > 0
    if kind == "normal":
        assert float(small.boundary) < 0 and float(small.info["valid_fit"]) == 0


def test_batch_size_number_of_replicas_and_jit_do_not_change_a_replica(real):
    data, model = real
    x, overlays = data.test.image[:9], data.clean.image[:30]
    whole, pieces, fewer = jax.jit(
        lambda: [
            entropies(KEY, model, {}, x, overlays, n, batch=batch)
            for n, batch in ((20, 1000), (20, 7), (8, 500))
        ]
    )()
    np.testing.assert_allclose(pieces, whole, rtol=1e-5)
    # The first columns are what a smaller n gives: one run shows how the spread falls with n.
    np.testing.assert_allclose(fewer, whole[:, :8], rtol=1e-5)
    np.testing.assert_allclose(entropies(KEY, model, {}, x, overlays, 20), whole, rtol=1e-5)


def test_spread_by_hand_and_the_number_of_replicas_by_its_slope():
    h = np.random.default_rng(0).normal(1, 0.3, (40, 1)) + np.random.default_rng(1).normal(
        0, 1, (40, 12)
    )
    found = spread(jnp.asarray(h, jnp.float32))
    by_hand = [h[:, :n].mean(1).std() for n in range(1, 13)]
    np.testing.assert_allclose(found.sigma, by_hand, rtol=1e-5)
    # Means over N = 1, 2 … of inputs ±1: σ is 1, ½, ⅖, ⅖, ⅖ …: it moves by a fifth from 2 to 3, and
    # then no more.
    mean = np.array([1, 1 / 2, 2 / 5, 2 / 5, 2 / 5, 2 / 5])
    first = np.diff(mean * np.arange(1, 7), prepend=0)
    planted = jnp.asarray(np.outer([1, -1], first), jnp.float32)
    assert [int(spread(planted, flat).enough) for flat in (0.01, 0.19, 0.21, 0.6)] == [3, 3, 2, 2]
    assert int(spread(planted[:, :2], 0.01).enough) == 2 and int(spread(planted[:, :1]).enough) == 1
    # Nothing to see: all alike; one input that is not a number.
    assert int(spread(jnp.ones((5, 8))).enough) == 2
    np.testing.assert_allclose(
        spread(jnp.concatenate([h, h[:1] * np.nan])).sigma, by_hand, rtol=1e-5
    )


def test_two_replicas_are_enough_to_run_and_the_report_has_the_curve(real):
    data, model = real
    scores = jax.jit(
        lambda: Strip(n=2, inputs=30)(KEY, model, {}, data.clean, data.test.image[:3])
    )()
    assert (
        scores.score.shape == (3,)
        and scores.info["sigma"].shape == (2,)
        and int(scores.info["enough"]) == 2
    )
    assert float(scores.info["sigma"][-1]) == pytest.approx(float(scores.info["std"]), rel=1e-4)


def test_the_papers_protocol_takes_training_images_and_the_other_never_does(real):
    data, model = real
    x, nothing = data.test.image[:5], data.clean._replace(image=np.zeros_like(data.clean.image))
    held_out = Strip(n=5, inputs=20)
    original = Strip(n=5, inputs=20, images=data.train.image[:60])
    run = jax.jit(lambda strip, clean: strip(KEY, model, {}, clean, x))
    same = run(held_out, Split(data.train.image[:60], data.train.label[:60]))
    np.testing.assert_allclose(run(original, nothing).score, same.score, rtol=1e-5)
    np.testing.assert_allclose(
        run(original, data.clean).info["clean"], same.info["clean"], rtol=1e-5
    )
    with pytest.raises(BadInput, match="40 are left"):
        Strip(n=41, inputs=20, images=data.train.image[:60]).check(model, data.clean)
    with pytest.raises(BadInput, match=r"the model's shape \(28, 28, 1\), not \(4, 4, 1\)"):
        Strip(n=5, images=images(30)).check(model, data.clean)


def test_nan_logits_have_no_score_and_are_not_flagged():
    model = net(lambda x: jnp.where(x[:, :1, 0, 0] > 0.5, jnp.nan, 1.0) * jnp.ones((1, 3)))
    clean = Split(np.zeros((20, *SHAPE), np.uint8), np.zeros(20, np.int32))
    x = np.zeros((2, *SHAPE), np.uint8)
    x[1, 0] = 255
    scores = jax.jit(lambda: Strip(n=5)(KEY, model, {}, clean, x))()
    assert np.isnan(scores.score[1]) and not bool(scores.flagged[1])
    assert float(scores.score[0]) == pytest.approx(np.log2(3), rel=1e-5) and np.isfinite(
        scores.boundary
    )


def test_bad_input():
    clean = Split(images(100), np.zeros(100, np.int32))
    Strip(n=50).check(LINEAR, clean)
    for bad, says in (
        (Strip(n=51), "draws 51 different overlays.* 50 are left"),
        (Strip(n=10, inputs=95), "5 are left"),
        (Strip(n=10, inputs=1), "2 or more"),
        (Strip(n=0), "n 0"),
        (Strip(frr=1.5), "frr"),
        (Strip(base=1.0), "base"),
        (Strip(blend="product"), "blend"),  # type: ignore[arg-type]
        (Strip(boundary="mean"), "boundary"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(LINEAR, clean)
    with pytest.raises(BadInput, match="2 or more, not 0"):
        Strip().check(LINEAR, clean[:0])
