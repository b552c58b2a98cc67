"""Input anomaly detection: what scikit-learn would say, planted outliers, real images."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.inputs.input_anomaly import InputAnomaly
from bdjax.train import stamped
from bdjax.types import BadInput, Model, Split

KEY = jax.random.key(0)


def net(clean) -> Model:
    """A net for such images, which is not looked at."""
    nothing: Any = None
    return Model(nothing, nothing, clean.image.shape[1:], 10, ())


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda defense, clean, x: defense(KEY, net(clean), {}, clean, x))


def test_svm_is_scikit_learns(run, sample):
    """The scores are those of an SVM around four fifths of the clean images, the boundary a
    quantile of the others'.
    """
    from sklearn.svm import OneClassSVM

    clean, x = sample.clean[:150], sample.test.image[:40]
    found = run(InputAnomaly(frr=0.3), clean, np.concatenate([x, clean.image]))
    rows = np.asarray(jax.random.permutation(jax.random.split(KEY, 3)[0], 150))
    flat = [
        images.reshape(len(images), -1) / np.float32(255) for images in (clean.image[rows[30:]], x)
    ]
    np.testing.assert_allclose(
        found.score[:40], OneClassSVM(nu=0.3).fit(flat[0]).decision_function(flat[1]), atol=1e-4
    )
    np.testing.assert_array_equal(found.flagged, found.score <= found.boundary)
    assert np.asarray(found.flagged)[40:][rows[:30]].sum() == 9
    assert float(found.info["frr_fit"]) == pytest.approx(0.3)
    # Pixels in [0, 1] and the rates as a leaf give the same.
    rates = jnp.asarray([0.3, 0.05])
    both = jax.jit(
        jax.vmap(
            lambda frr: InputAnomaly(frr=frr)(KEY, net(clean), {}, clean, x / np.float32(255)).score
        )
    )(rates)
    np.testing.assert_allclose(both[0], found.score[:40], atol=1e-4)
    assert float(jnp.abs(both[1] - both[0]).max()) > 0.1


@pytest.mark.parametrize("classifier", ["svm", "tree"])
def test_planted_anomaly(run, classifier):
    # Two kinds of images, left half bright or right half bright; never both, never none.
    image = np.zeros((200, 6, 6, 1), np.float32)
    image[::2, :, :3] = image[1::2, :, 3:] = 0.8
    image += np.random.default_rng(0).uniform(0, 0.1, image.shape).astype(np.float32)
    strange = np.stack([np.full((6, 6, 1), 0.85, np.float32), np.full((6, 6, 1), 0.05, np.float32)])
    found = run(InputAnomaly(frr=0.05, classifier=classifier),
                Split(image, np.zeros(200, np.int32)),
                np.concatenate([image[:50], strange]))  # fmt: skip
    assert found.flagged[50:].all() and float(found.flagged[:50].mean()) <= 0.2


def test_real_images(run, sample, victim):
    """At false alarms below 20 % the SVM rejects many stamped images; the tree, by its luck,
    between few and most.
    """
    _, _, attack = victim
    x = jnp.concatenate(
        [sample.test.image / np.float32(255), stamped(attack, 1, sample.test.image, KEY)]
    )
    clean = sample.train[::2]  # the images stand in the order of their classes
    for classifier, least in (("svm", 0.35), ("tree", 0.0)):
        flagged = np.asarray(run(InputAnomaly(classifier=classifier), clean, x).flagged)
        frr, caught = (
            flagged[: len(sample.test.label)].mean(),
            flagged[len(sample.test.label) :].mean(),
        )
        print(classifier, frr, caught)
        assert frr < 0.2 and caught > least


def test_not_a_number_and_constant_images(run):
    clean = Split(np.full((20, 4, 4, 1), 9, np.uint8), np.zeros(20, np.int32))
    x = np.zeros((3, 4, 4, 1), np.float32)
    x[1, 0, 0] = np.nan
    for classifier in ("svm", "tree"):
        found = run(InputAnomaly(classifier=classifier), clean, x)
        assert (
            np.isnan(found.score[1])
            and not found.flagged[1]
            and np.isfinite(found.score[::2]).all()
        )


def test_bad_input():
    clean = Split(np.zeros((20, 4, 4, 1), np.uint8), np.zeros(20, np.int32))
    InputAnomaly().check(net(clean), clean)
    for bad, data, says in (
        (InputAnomaly(frr=0.0), clean, "frr 0.0"),
        (InputAnomaly(classifier="forest"), clean, "classifier 'forest'"),  # type: ignore[arg-type]
        (InputAnomaly(), clean[:1], "2 or more, not 1"),
    ):
        with pytest.raises(BadInput, match=says):
            bad.check(net(clean), data)
