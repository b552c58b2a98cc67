"""Defenses of the training set: planted clusters, scores from NumPy's SVD, degenerate classes, a
real victim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import metrics
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.parts.classes import principal
from bdjax.defenses.samples.activation_clustering import (
    ActivationClustering,
    halfway,
    silhouettes,
    two_means,
    unmix,
)
from bdjax.defenses.samples.spectral_signatures import SpectralSignatures
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.train import Recipe, TrainSet, evaluate, fit, poisoned_set, without
from bdjax.types import BadInput, Model, Output, Plan, Split

KEY = jax.random.key(0)
SIDE, CLASSES = 6, 4
RNG = np.random.default_rng(0)


@functools.cache
def reader(classes: int = CLASSES) -> Model:
    """A model whose activations are the pixels themselves (SIDE² of them) times
    `variables["scale"]`.
    """

    def apply(variables, x, *, train=False, edits=None, key=None):
        act = x.reshape(x.shape[0], -1) * variables["scale"]
        return Output(act[:, :classes], {"penultimate": act}, variables)

    return Model(
        lambda key: {"scale": jnp.ones(())}, apply, (SIDE, SIDE, 1), classes, ("penultimate",)
    )


ONE = {"scale": jnp.ones(())}


def train_set(act: np.ndarray, label: np.ndarray, size: int | None = None) -> TrainSet:
    """Rows with given activations `[M, SIDE²]` and labels, of which the first `size` exist."""
    n = len(label)
    plan = Plan(
        jnp.arange(n),
        jnp.zeros(n, jnp.int32),
        jnp.asarray(label, jnp.int32),
        jnp.ones(n),
        jnp.arange(n),
        jnp.asarray(size or n),
    )
    return TrainSet(act.astype(np.float32).reshape(n, SIDE, SIDE, 1), plan)


def planted(share: float = 0.2, n: int = 400) -> tuple[TrainSet, np.ndarray]:
    """Four classes of noise about their centres;
    in class 2 the share `share` of rows lies apart.
    """
    label = RNG.integers(0, CLASSES, n)
    act = RNG.normal(size=(CLASSES, SIDE**2))[label] * 3 + RNG.normal(size=(n, SIDE**2))
    poison = (label == 2) & (RNG.random(n) < share)
    act[poison] += 8 * RNG.normal(size=SIDE**2) / SIDE
    return train_set(act, label), poison


@functools.cache
def program(model: Model):
    """One program for all defenses of one structure."""
    return jax.jit(lambda defense, variables, data: defense(KEY, model, variables, data))


def run(defense, data: TrainSet, variables=ONE, classes: int = CLASSES):
    return program(reader(classes))(defense, variables, data)


@pytest.mark.parametrize("reduce", ["pca", "ica"])
def test_clustering_returns_the_planted_rows(reduce):
    data, poison = planted()
    found = run(
        ActivationClustering(reduce=reduce, dims=4, rule="silhouette", silhouette=0.3), data
    )
    np.testing.assert_array_equal(found.removed, poison)
    np.testing.assert_array_equal(found.info["suspicious"], [[0, 0], [0, 0], [0, 1], [0, 0]])
    assert float(found.info["share"][2]) == pytest.approx(
        poison.sum() / (np.asarray(data.plan.label) == 2).sum()
    )
    assert metrics.auroc(found.score[~poison], found.score[poison]) > 0.95
    assert int(without(data, found.removed).plan.size) == len(poison) - poison.sum()


def test_rules_by_size():
    data, _ = planted(0.3)
    label = np.asarray(data.plan.label)
    halves = run(ActivationClustering(reduce="pca", size=0.5), data)
    assert [
        0 < (np.asarray(halves.removed) & (label == k)).sum() < (label == k).sum() / 2
        for k in range(4)
    ] == [1] * 4
    none = run(ActivationClustering(reduce="pca", size=0.01), data)
    assert not none.removed.any()
    np.testing.assert_array_equal(none.info["cluster"], halves.info["cluster"])


def test_distance_finds_rows_that_lie_with_another_class():
    data, _ = planted(0)
    act, label = data.image.reshape(-1, SIDE**2).copy(), np.asarray(data.plan.label)
    moved = (label == 1) & (RNG.random(len(label)) < 0.3)
    act[moved] = act[label == 3][RNG.integers(0, (label == 3).sum(), moved.sum())] + 0.1
    found = run(ActivationClustering(reduce="pca", rule="distance"), train_set(act, label))
    np.testing.assert_array_equal(found.removed, moved)


def test_lanes_jit_and_rows_that_do_not_exist_change_nothing():
    data, _ = planted()
    act, label = np.asarray(data.image), np.asarray(data.plan.label)
    more = train_set(
        np.concatenate([act, 50 * act[:100]]), np.concatenate([label, label[:100]]), len(label)
    )
    for defense in (ActivationClustering(reduce="pca", dims=4), SpectralSignatures()):
        alone, side, padded = (
            run(defense, data), run(dataclasses.replace(defense, lanes=4), data), run(defense, more)
        )  # fmt: skip
        np.testing.assert_array_equal(alone.removed, side.removed)
        np.testing.assert_allclose(alone.score, side.score, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(alone.removed, padded.removed[: len(label)])
        assert not padded.removed[len(label) :].any()


@pytest.mark.parametrize("projection", ["centred", "released"])
def test_spectral_score_by_numpy(projection):
    data, poison = planted()
    act, label = np.asarray(data.image).reshape(len(poison), -1), np.asarray(data.plan.label)
    found = run(SpectralSignatures(projection=projection, remove=0.25), data)
    for k in range(CLASSES):
        rows = act[label == k]
        top = np.linalg.svd(rows - rows.mean(0))[2][0]
        score = (
            ((rows - rows.mean(0)) @ top) ** 2 if projection == "centred" else np.abs(rows @ top)
        )
        np.testing.assert_allclose(np.asarray(found.score)[label == k], score, rtol=0.02, atol=0.05)
        assert float(found.info["boundary"][k]) == pytest.approx(np.quantile(score, 0.75), rel=0.02)
        assert np.asarray(found.removed)[label == k].sum() == pytest.approx(0.25 * len(rows), abs=1)
    if projection == "centred":
        assert (
            np.asarray(found.removed)[poison].all()
            and metrics.auroc(found.score[~poison], found.score[poison]) > 0.95
        )


DEGENERATE = (ActivationClustering(), ActivationClustering(rule="distance"), SpectralSignatures(),
              SpectralSignatures(projection="released"))  # fmt: skip


@pytest.mark.parametrize(
    "defense", DEGENERATE, ids=lambda d: f"{type(d).__name__}-{getattr(d, 'rule', '')}"
)
def test_empty_single_and_constant_classes_lose_nothing(defense):
    # Class 0 has no row, 1 has one, 2 has ordinary ones, all those of 3 are equal.
    label = np.repeat([1, 2, 3], [1, 40, 60])
    act = np.concatenate([RNG.normal(size=(41, SIDE**2)), np.full((60, SIDE**2), 0.1)])
    defense = dataclasses.replace(defense, **({"size": 0.5} if hasattr(defense, "size") else {}))
    found = run(defense, train_set(act, label))
    assert not np.asarray(found.removed)[(label == 1) | (label == 3)].any()
    assert np.isfinite(found.score).all()


def test_rows_that_are_not_numbers_have_no_score_and_do_not_harm_the_others():
    data, poison = planted()
    act = np.asarray(data.image).copy()
    act[7] = np.nan
    for defense in (ActivationClustering(dims=4), SpectralSignatures(remove=0.4)):
        found = run(defense, data._replace(image=act))
        assert np.isnan(found.score[7]) and not found.removed[7]
        others = np.arange(len(poison)) != 7
        assert (
            np.isfinite(np.asarray(found.score)[others]).all()
            and np.asarray(found.removed)[poison & others].all()
        )
        lost = run(defense, data, {"scale": jnp.asarray(jnp.nan)})
        assert np.isnan(lost.score).all() and not lost.removed.any()


def test_one_class_and_fewer_activations_than_components():
    label = np.zeros(50, int)
    act = np.where(np.arange(50)[:, None] < 10, 4.0, 0.0) + 0.1 * RNG.normal(size=(50, SIDE**2))
    found = run(ActivationClustering(dims=100), train_set(act, label), classes=1)
    np.testing.assert_array_equal(found.removed, np.arange(50) < 10)
    assert not run(
        ActivationClustering(rule="distance"), train_set(act, label), classes=1
    ).removed.any()


# --- The parts ---


def test_principal_axes_are_numpys_and_scikit_learns_components_are_ours():
    from sklearn.decomposition import FastICA

    sources = np.stack(
        [RNG.laplace(size=2000), RNG.uniform(-1, 1, 2000), np.sign(RNG.normal(size=2000))], 1
    )
    x = (sources @ RNG.normal(size=(3, 9)) + 1e-3 * RNG.normal(size=(2000, 9))).astype(
        np.float32
    ) + 5
    weight = (np.arange(2000) < 1500).astype(np.float32)
    mean, axes, variance = map(np.asarray, jax.jit(lambda x, w: principal(KEY, x, w, 3))(x, weight))
    _, s, v = np.linalg.svd(x[:1500] - x[:1500].mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(v[:3] @ axes), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(variance, s[:3] ** 2 / 1500, rtol=1e-3)

    z = (x - mean) @ axes / np.sqrt(variance)
    ours = z[:1500] @ np.asarray(jax.jit(unmix)(KEY, z, weight)).T
    theirs = FastICA(3, whiten="unit-variance", random_state=0).fit_transform(x[:1500])
    match = np.abs(np.corrcoef(ours.T, theirs.T)[:3, 3:])
    np.testing.assert_allclose(np.sort(match.max(1)), 1, atol=0.01)


def test_two_means_and_silhouettes_are_scikit_learns():
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_samples

    z = np.concatenate([RNG.normal(size=(80, 3)), RNG.normal(size=(40, 3)) + 2]).astype(np.float32)
    weight = (np.arange(120) % 5 > 0).astype(np.float32)
    toward, border = halfway(jax.jit(lambda z, w: two_means(KEY, z, w, 10))(z, weight))
    ours = np.asarray(z @ toward > border)
    kept = weight > 0
    theirs = KMeans(2, n_init=10, random_state=0).fit_predict(z[kept])
    assert max((ours[kept] == theirs).mean(), (ours[kept] != theirs).mean()) == 1
    group = np.where(kept, 4 + ours, -1)
    found = np.asarray(jax.jit(lambda z, g: silhouettes(z, g, batch=50))(z, group))
    np.testing.assert_allclose(found[kept], silhouette_samples(z[kept], theirs), atol=1e-3)
    assert not found[~kept].any()


def test_what_is_left_is_trained_on_and_nothing_else():
    data, _ = planted()
    removed = jnp.arange(400) % 3 == 0
    rest = without(data, removed)
    assert int(rest.plan.size) == 266
    np.testing.assert_array_equal(rest.plan.source[:266], np.flatnonzero(~np.asarray(removed)))
    assert int(without(rest, jnp.ones(400, bool)).plan.size) == 1


# --- Real images ---


def test_real_victim(sample):
    """All-to-all, a tenth of each class, as in the paper of activation clustering: what is found,
    and what is left of the backdoor when the net is trained again without it.
    """
    model, attack = (
        build(Ffnn(hidden=(64,)), sample.shape, sample.classes),
        BadNets(rate=0.1, labels="all-to-all"),
    )
    data, recipe = (
        poisoned_set(KEY, sample.train, attack, sample.classes),
        Recipe(epochs=15, batch=32),
    )
    train = jax.jit(lambda key, removed: fit(key, model, recipe, without(data, removed))[0])
    measure = jax.jit(lambda variables: evaluate(KEY, model, variables, sample.test, attack))
    poison = np.asarray(data.plan.kind > 0)
    variables = train(KEY, jnp.zeros(len(poison), bool))
    before = measure(variables)
    assert float(before["asr_nt"]) > 0.5
    judge = jax.jit(lambda defense: defense(jax.random.key(1), model, variables, data))
    for defense, least, pure in (
        (ActivationClustering(), 0.9, 0.8),
        (ActivationClustering(rule="exclusionary", recipe=recipe), 0.6, 0.9),
        (SpectralSignatures(), 0.9, 0.6),  # it drops 15 % whatever there is
        (SpectralSignatures(projection="released"), 0.0, 0.0),
    ):
        found = judge(defense)
        removed = np.asarray(found.removed)
        recall, precision = (
            (removed & poison).sum() / poison.sum(),
            (removed & poison).sum() / removed.sum(),
        )
        auroc = float(metrics.auroc(found.score, found.score, ~poison, poison))
        after = measure(train(jax.random.key(9), found.removed))
        print(
            defense,
            *(f"{float(v):.3f}" for v in (recall, precision, auroc, after["acc"], after["asr_nt"])),
        )
        assert recall > least and precision > pure
        if least:
            assert auroc > 0.95 and float(after["asr_nt"]) < 0.3 < float(before["asr_nt"])
            assert float(after["acc"]) > float(before["acc"]) - 0.1


def test_bad_input():
    for bad, says in (
        (ActivationClustering(site="conv_9"), "no site 'conv_9'"),
        (ActivationClustering(reduce="tsne"), "reduce 'tsne'"),  # type: ignore[arg-type]
        (ActivationClustering(rule="biggest"), "rule 'biggest'"),  # type: ignore[arg-type]
        (ActivationClustering(size=1.5), "size 1.5"),
        (ActivationClustering(dims=0), "dims 0"),
        (SpectralSignatures(remove=-0.1), "remove -0.1"),
        (SpectralSignatures(projection="both"), "projection 'both'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(
                reader(), Split(np.zeros((9, SIDE, SIDE, 1), np.uint8), np.zeros(9, np.int32))
            )
