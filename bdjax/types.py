"""What flows through the house: every function of bdjax takes and returns these.

Letters in shapes: `N` images, `B` batch, `H W C` height, width, channels, `K` classes, `M` rows of
a poisoned training set. Pixels are float32 in [0, 1], NHWC, at every boundary; stored images are
uint8.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Variables = Mapping[str, Any]
"""A model's state: `params`, `batch_stats` where it has BatchNorm, and `masks: {site: [C]}` where
channels were pruned.
"""
Edits = Mapping[str, Callable[[jax.Array], jax.Array]]


class BadInput(ValueError):
    """The user's input is wrong: the message is one line that says what to do. The command line
    exits with code 2.
    """


def between(name: str, value: Any, low: float, high: float) -> None:
    """Raises `BadInput` unless low ≤ value ≤ high (NaN is outside)."""
    array = np.asarray(value, np.float64)
    if not np.all((array >= low) & (array <= high)):
        raise BadInput(f"{name} {value} is outside [{low:g}, {high:g}]")


class Split(NamedTuple):
    """Images that belong together.

    `image: [N, H, W, C]` uint8, `label: [N]` int32, `group: [N]` int32 or None (frames of one
    object share a group).
    """

    image: Array
    label: Array
    group: Array | None = None

    def __getitem__(self, rows) -> "Split":  # type: ignore[override]
        """The rows `rows`: an index array or slice over N."""
        return Split(*(None if leaf is None else leaf[rows] for leaf in self))  # type: ignore[arg-type]


class Dataset(NamedTuple):
    """A data set in memory. The attacker trains on `train`; `clean` is the defender's own held-out
    data; `test` only measures.
    """

    name: str
    train: Split
    clean: Split
    test: Split
    classes: int
    names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(H, W, C)`."""
        return self.train.image.shape[1:]  # type: ignore[return-value]


class Output(NamedTuple):
    """`logits: [B, K]`; `acts: {site: [B, ...]}`; `variables`: the input variables, BatchNorm
    statistics updated if training.
    """

    logits: jax.Array
    acts: dict[str, jax.Array]
    variables: Variables


class Model(NamedTuple):
    """A network as two pure functions.

    `init(key) -> variables`; `apply(variables, x, *, train=False, edits=None, key=None) -> Output`
    with `x: [B, H, W, C]` in [0, 1]. `sites`: the places, in order of the forward pass, where a
    defense may look (`acts`), cut (`masks`) or push (`edits`).
    """

    init: Callable[..., Variables]
    apply: Callable[..., Output]
    shape: tuple[int, int, int]
    classes: int
    sites: tuple[str, ...]


class Plan(NamedTuple):
    """Which rows a poisoned training set has. Sizes depend on N alone, so that rates can be
    vmapped.

    `source: [M]` the base image of a row; `kind: [M]` its trigger, 0 = none; `label: [M]` its
    training label; `weight: [M]` its weight in the loss; `size: []` how many rows, counted from the
    first, exist: the others are never drawn.
    """

    source: jax.Array
    kind: jax.Array
    label: jax.Array
    weight: jax.Array
    size: jax.Array


class Repaired(NamedTuple):
    """The variables that a defense leaves behind, of the model `defense.wrap(model)`, and what it
    reports: curves, counts, the pruning order.
    """

    variables: Variables
    info: dict[str, Any]


class Verdict(NamedTuple):
    """A judgement on a model. `index: []` anomaly index; `infected: []` bool; `flagged: [K]` bool,
    labels called targets.
    """

    index: jax.Array
    infected: jax.Array
    flagged: jax.Array
    info: dict[str, Any]


class Scores(NamedTuple):
    """A judgement on inputs. `score: [B]`, lower = more suspicious; `boundary: []`; `flagged: [B]`
    = `score <= boundary`.
    """

    score: jax.Array
    boundary: jax.Array
    flagged: jax.Array
    info: dict[str, Any]


class Suspects(NamedTuple):
    """A judgement on training rows. `score: [M]`, higher = more suspicious; `removed: [M]` bool."""

    score: jax.Array
    removed: jax.Array
    info: dict[str, Any]
