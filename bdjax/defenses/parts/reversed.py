"""Triggers that a defender has found, or was given: what a filter, a pruning and an unlearning
start from.
"""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses.base import Defense
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.inversion import Trigger, stamp
from bdjax.registry import pytree, static, validate
from bdjax.train import unit
from bdjax.types import (
    INT32,
    Array,
    Attack,
    BadInput,
    Label,
    Model,
    Range,
    Split,
    Variables,
    Verdict,
    between,
)

Pick = Literal["flagged", "smallest"]


@pytree
class Reversed:
    """One reversed trigger for each of `L` labels, stamped like an attack's: kind k is the k-th,
    counted from 1; 0 none.

    `mask: [L, H, W, 1]`, `pattern: [L, H, W, C]` in [0, 1]; `label: [L]` aimed at; `suspect: [L]`
    bool: which of them are taken for backdoors.
    """

    mask: Annotated[Array, Range(0, 1)]
    pattern: Annotated[Array, Range(0, 1)]
    label: Annotated[Array, Range(0, INT32)]
    suspect: Annotated[Array, Range(0, 1)]

    @staticmethod
    def of(verdict: Verdict, pick: Pick = "flagged") -> "Reversed":
        """The triggers behind a verdict of Neural Cleanse. `pick`: whether suspects are the labels
        that it flagged or the one with the smallest norm, outlier or not.
        """
        qualified, labels = verdict.info["qualified"], jnp.arange(verdict.flagged.shape[0])
        smallest = qualified & (
            labels == jnp.where(qualified, verdict.info["norms"], jnp.inf).argmin()
        )
        suspect = verdict.flagged if pick == "flagged" else smallest
        return Reversed(verdict.info["mask"], verdict.info["pattern"], labels, suspect)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Raises `BadInput` where these are no triggers for images of `shape` (H, W, C)."""
        validate(self)
        if np.shape(self.pattern)[1:] != tuple(shape):
            raise BadInput(
                f"reversed triggers are of shape {np.shape(self.pattern)[1:]}, the images {shape}"
            )
        between("label of a reversed trigger", self.label, 0, classes - 1)

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        """`x: [H, W, C]` with trigger `kind: []`."""
        i = jnp.maximum(kind - 1, 0)
        trigger = Trigger(jnp.asarray(self.mask)[i], jnp.asarray(self.pattern)[i])
        return jnp.where(kind > 0, stamp(trigger, x[None])[0], x)

    def success(self, kind: jax.Array, y: jax.Array, classes: int) -> jax.Array:
        """The label aimed at, for true labels `y: [N]`."""
        return jnp.full_like(y, 0) + jnp.asarray(self.label)[kind - 1].astype(y.dtype)


class Fired(NamedTuple):
    """Images under triggers: `image: [N, H, W, C]` in [0, 1], `kind: [N]` which trigger each
    carries, and the label `aimed: [N]` at, -1 where it is the image's own or there is none.
    """

    image: jax.Array
    kind: jax.Array
    aimed: jax.Array


def fire(key: jax.Array, attack: Attack | Reversed, split: Split, classes: int) -> Fired:
    """Each image of `split` under one of the triggers of `attack`, or of its suspects, drawn
    evenly.
    """
    key_kind, key_stamp = jax.random.split(key)
    n, y = split.label.shape[0], jnp.asarray(split.label)
    odds = (
        jnp.where(attack.suspect, 0.0, -jnp.inf)
        if isinstance(attack, Reversed)
        else jnp.zeros(attack.triggers)
    )
    kind = 1 + jax.random.categorical(key_kind, odds, shape=(n,)).astype(jnp.int32)

    def one(kind, x, y, key):
        return attack.stamp(kind, x, key, train=False), attack.success(kind, y[None], classes)[0]

    image, aimed = jax.vmap(one)(kind, unit(split.image), y, jax.random.split(key_stamp, n))
    return Fired(image, kind, jnp.where(aimed == y, -1, aimed))


@pytree
class TriggerDefense(Defense):
    """Base of the defenses that start from a trigger.

    `nc`: the search for it. `found`: triggers found before, `Reversed.of(verdict)`, instead of a
    search. `label`: the target label, or labels `[L]`, if known: the search is for these alone.
    `original`: the attack itself, whose triggers are then used. A known label and the original
    triggers are what no defender has: oracles. `pick`: which labels of a search are suspects, those
    "flagged" or the one with the "smallest" norm. Without a suspect nothing is repaired; with
    several, each clean image carries the trigger of one of them, drawn evenly.
    """

    nc: NeuralCleanse = NeuralCleanse()
    found: Reversed | None = None
    label: Label | None = None
    original: Attack | None = None
    pick: Pick = static("flagged")

    used_if = {"pick": {"label": (None,)}}
    budget_fields = tuple(f"nc.{field}" for field in NeuralCleanse.budget_fields)

    @property
    def oracle(self) -> bool:
        return self.label is not None or self.original is not None

    def reverse(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Reversed:
        """The reversed triggers and which of them are suspects."""
        if self.label is None:
            return self.found or Reversed.of(self.nc(key, model, variables, clean), self.pick)
        label = jnp.asarray(self.label, jnp.int32).reshape(-1)
        if self.found is not None:
            return dataclasses.replace(self.found, suspect=jnp.isin(self.found.label, label))
        trigger = self.nc.search(key, model, variables, clean.image, label).trigger
        return Reversed(trigger.mask, trigger.pattern, label, jnp.ones(label.shape, bool))

    def fired(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> tuple[Attack | Reversed, Fired, dict[str, Any]]:
        """Whose triggers they are, the clean images under them, and what to report: `repaired: []`,
        whether there was any suspect; of reversed triggers `suspect: [L]`, `label: [L]`, `mask: [L,
        H, W, 1]`, `pattern: [L, H, W, C]`.
        """
        key_search, key_fire = jax.random.split(key)
        if self.original is not None:
            return (
                self.original,
                fire(key_fire, self.original, clean, model.classes),
                {"repaired": jnp.asarray(True)},
            )
        found = self.reverse(key_search, model, variables, clean)
        return found, fire(key_fire, found, clean, model.classes), described(found)

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        if len(clean.image) == 0:
            raise BadInput("a trigger is looked for on clean images: the defender has none")
        if self.label is not None:
            between("label", self.label, 0, model.classes - 1)
        if self.original is not None:
            self.original.check(model.shape, model.classes)
        elif self.found is None:
            self.nc.check(model, clean)


def described(found: Reversed) -> dict[str, Any]:
    """What to report of reversed triggers."""
    return {
        "repaired": found.suspect.any(), "suspect": found.suspect, "label": found.label,
        "mask": found.mask,
        "pattern": found.pattern,
    }  # fmt: skip
