"""Input anomaly detection: a classical detector that has seen clean images alone."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses.base import InputFilter
from bdjax.defenses.parts.boundary import quantile_boundary, realised
from bdjax.registry import defense, static
from bdjax.train import unit
from bdjax.types import Array, BadInput, Model, Range, Scores, Split, Variables

Classifier = Literal["svm", "tree"]


def svm(clean: Array, shuffled: Array, x: Array, nu: Array, seed: Array) -> np.ndarray:
    """Signed distance of `x: [B, D]` to a one-class SVM around `clean: [N, D]`."""
    from sklearn.svm import OneClassSVM

    found = OneClassSVM(nu=float(nu)).fit(np.asarray(clean)).decision_function(np.asarray(x))
    return found.astype(np.float32)


def tree(clean: Array, shuffled: Array, x: Array, nu: Array, seed: Array) -> np.ndarray:
    """P(`x: [B, D]` is clean) − ½ by a decision tree that tells `clean: [N, D]` from `shuffled: [N,
    D]`.
    """
    from sklearn.tree import DecisionTreeClassifier

    model = DecisionTreeClassifier(min_samples_leaf=5, random_state=int(seed))
    model.fit(np.concatenate([clean, shuffled]), np.repeat([1, 0], len(clean)))
    return (np.asarray(model.predict_proba(np.asarray(x)))[:, 1] - 0.5).astype(np.float32)


@defense("input-anomaly")
class InputAnomaly(InputFilter):
    """Reject inputs that a classical detector finds strange (Liu et al., 2017, arXiv:1710.00942).

    A reconstruction: of the paper we know that it tells legitimate from anomalous inputs with a
    support vector machine and with a decision tree. Here both read pixels and learn from the
    defender's clean images alone:

    - "svm": a one-class SVM (RBF, γ = 1 / (D·variance)) around them; score = signed distance to its
      border;
    - "tree": clean images against as many in which each pixel comes from another clean image, so
      that all but its own distribution is lost; leaves of 5 or more; score = P(clean) − ½.

    A fifth of the images, at random, is held out of the learning: an input is flagged if it scores
    lower than all but `frr` of them, in (0, 1]. The default is the paper's false positive rate; it
    is also the SVM's ν. The model is not looked at. An input that holds something that is not a
    number has no score and is not flagged. `info`: that of `boundary.realised`.

    Presets: `svm`, `tree`, `cpu` (the SVM).
    """

    frr: Annotated[Array | float, Range(1e-6, 1)] = 0.122
    classifier: Classifier = static("svm")

    presets = {"svm": {}, "tree": {"classifier": "tree"}, "cpu": {}}

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split, x: Array
    ) -> Scores:
        key_split, key_shuffle, key_tree = jax.random.split(key, 3)
        image, asked = (unit(images).reshape(len(images), -1) for images in (clean.image, x))
        held, known = jnp.split(jax.random.permutation(key_split, image), [max(1, len(image) // 5)])
        shuffled = jax.random.permutation(key_shuffle, known, axis=0, independent=True)
        whole = jnp.isfinite(asked).all(1)
        judged = jnp.concatenate([held, jnp.where(whole[:, None], asked, 0.0)])
        frr = jnp.asarray(self.frr, jnp.float32)
        score = jax.pure_callback(
            {"svm": svm, "tree": tree}[self.classifier],
            jax.ShapeDtypeStruct(judged.shape[:1], jnp.float32),
            known, shuffled, judged, frr, jax.random.randint(key_tree, (), 0, 2**31 - 1),
            vmap_method="sequential",
        )  # fmt: skip
        boundary = quantile_boundary(score[: len(held)], frr)
        fit = realised(score[: len(held)] <= boundary)
        score = jnp.where(whole, score[len(held) :], jnp.nan)
        return Scores(score, boundary, score <= boundary, fit)

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        if len(clean.image) < 2:
            raise BadInput(
                f"the detector learns from clean images: it needs 2 or more, not {len(clean.image)}"
            )
