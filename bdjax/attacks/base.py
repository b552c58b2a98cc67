"""What attacks share: the rows of a poisoned training set, label maps, and pasting a picture into
an image.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.registry import admit, check_given, pytree, static, validate
from bdjax.train import GIVEN, Curves, Recipe, clean_plan, fit, poisoned_set, poisoning_key
from bdjax.types import (
    Array,
    BadInput,
    Class,
    Count,
    Label,
    Model,
    Plan,
    Share,
    Split,
    Variables,
    check_images,
    check_labels,
    check_variables,
    shown,
)

Labels = Literal["all-to-one", "all-to-all", "source-specific", "clean-label"]


class Stamped(NamedTuple):
    """What a trigger makes of every image x: (1 − m)⊙x + m⊙Δ, m = `mask: [H, W, 1]` and
    Δ = `pattern: [H, W, C]`, up to `most: []` in a pixel.
    """

    mask: jax.Array
    pattern: jax.Array
    most: Array | float = 0.0


class Part(NamedTuple):
    """One share of the poisoned rows: `eligible: [N]` bool base images, `rate` of N, `kind`,
    `label: [N]`, loss `weight`.
    """

    eligible: jax.Array
    rate: Array | float
    kind: int
    label: jax.Array
    weight: Array | float = 1.0


def poison_rows(key: jax.Array, y: jax.Array, parts: Sequence[Part], append: bool = False) -> Plan:
    """The plan in which each part takes `round(rate · N)` random rows of those still free
    (replace), or adds copies (append).

    A part with fewer eligible images than its rate asks for takes them all. Under `append` a plan
    has N·(1 + parts) rows, of which the first `size` exist.
    """
    n = y.shape[0]
    plan = clean_plan(y)
    taken = jnp.zeros(n, bool)
    added = [(plan, jnp.ones(n, bool))]
    for i, part in enumerate(parts):
        free = part.eligible if append else part.eligible & ~taken
        # Poisoned are the rows of lowest rank in a random permutation: the shapes do not depend on
        # the rate.
        draw = jnp.where(free, jax.random.uniform(jax.random.fold_in(key, i), (n,)), 2.0)
        rank = jnp.argsort(jnp.argsort(draw))
        chosen = free & (
            rank < jnp.round(jnp.asarray(part.rate, jnp.float32) * n).astype(jnp.int32)
        )
        if append:
            copies = plan._replace(
                kind=jnp.full(n, part.kind), label=part.label, weight=jnp.full(n, part.weight)
            )
            added.append((copies, chosen))
        else:
            taken = taken | chosen
            plan = plan._replace(
                kind=jnp.where(chosen, part.kind, plan.kind),
                label=jnp.where(chosen, part.label, plan.label),
                weight=jnp.where(chosen, part.weight, plan.weight),
            )
    return joined(added) if append else plan


def joined(parts: Sequence[tuple[Plan, jax.Array]]) -> Plan:
    """One plan of several, the rows that exist in front: of each its rows, numbered 0 … M − 1, and
    which of them exist: `[M]`. The numbers of a plan follow those of the plans before it.
    """
    columns = zip(*(plan[:-1] for plan, _ in parts), strict=True)
    exists = jnp.concatenate([some for _, some in parts])
    whole = Plan(*map(jnp.concatenate, columns), size=exists.sum())
    before = np.cumsum([0, *(len(some) for _, some in parts[:-1])])
    numbers = [plan.number + first for (plan, _), first in zip(parts, before, strict=True)]
    whole = whole._replace(number=jnp.concatenate(numbers))
    return whole.take(jnp.argsort(~exists, stable=True), whole.size)


ATTACKED = GIVEN | {"data": Split, "variables": Variables | None, "classes": Count}


def _admitted(method: Callable) -> Callable:
    """`train` or `plan` behind the check of the attack's own values."""
    names = inspect.signature(method)

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        given = names.bind(self, *args, **kwargs).arguments
        check_given(type(self).__name__, ATTACKED, given)
        if given.get("variables"):
            check_variables(given["variables"])
        if "model" in given:
            model, data = given["model"], given["data"]
            check_images(data.image, model.shape, data.label, model.classes)
            admit(given["recipe"], np.shape(data.image)[0])
            admit(self, model.shape, model.classes)
        else:
            validate(self)
            check_labels(given["y"], given["classes"])
        return method(self, *args, **kwargs)

    return guarded


@pytree
class Attack:
    """Base of the attacks that poison rows with one trigger.

    `rate`: poison rate, the share of the training set that is stamped, in [0, 1]. `target`: target
    label. `labels`: which images are stamped and what they are called. `sources`: the source
    classes of a source-specific attack. `cover`: share of the training set that is stamped but
    keeps its label (source-specific). `append`: add stamped copies instead of replacing.

    Whoever poisons a data set writes each image once, with its place, noise or pose: it is the same
    in every epoch. `redraw`: all of it is drawn anew in every step, by an attacker who controls the
    training.
    """

    rate: Share = 0.1
    target: Label = 0
    cover: Share = 0.0
    labels: Labels = static("all-to-one")
    sources: tuple[Class, ...] = static(())
    append: bool = static(False)
    redraw: bool = static(False, before=False)

    trains: ClassVar[bool] = False
    """Whether `train` does more than poison rows, and is run whole; what it returns is what is
    fired.
    """
    plans: ClassVar[bool] = False
    """Whether rows come from a `plan` of its own, not from `shares`."""

    used_if = {
        "target": {"labels": ("all-to-one", "source-specific", "clean-label")},
        "sources": {"labels": ("source-specific",)},
        "cover": {"labels": ("source-specific",)},
    }

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, said in (("train", "trains"), ("plan", "plans")):
            owner = next(one for one in cls.__mro__ if name in vars(one))
            if owner is cls or not issubclass(owner, Attack):  # a mixin's are its own, too
                setattr(cls, name, _admitted(vars(owner)[name]))
                if said not in vars(cls):
                    setattr(cls, said, True)

    @property
    def triggers(self) -> int:
        """How many triggers are fired at test time: kinds 1 … triggers. Further kinds exist in
        training only.
        """
        return 1

    @property
    def probes(self) -> dict[str, int]:
        """Further kinds worth firing at test time, by name: the parts of a combined trigger, say.
        They do not count as ASR.
        """
        return {}

    @property
    def random(self) -> bool:
        """Whether stamps depend on their keys."""
        return False

    @property
    def brightest(self) -> float:
        """The highest value that a pixel of a training row may have; a fired image has at most
        1.
        """
        return 1.0

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        """What trigger `kind` makes of images of `shape`; None where an attack cannot say it
        without the image or the key. `bdjax.testing` holds attacks to it.
        """
        return None

    def bind(self, data: Split) -> "Attack":
        """This attack with the images that it takes from the attacker's data; most take none. Does
        nothing if repeated.
        """
        return self

    @_admitted
    def train(
        self,
        key: jax.Array,
        model: Model,
        recipe: Recipe,
        data: Split,
        variables: Variables | None = None,
    ) -> tuple["Attack", Variables, Curves]:
        """A victim of this attack trained on `data`, and the attack as it is to be fired.

        Attacks that craft their trigger for a net, or twist training, have their own version, by
        which they are `trains`; all others poison rows, so that whoever trains in chunks (the
        sweep) may call `poisoned_set` and `advance` instead. Rows of `data` are poisoned by
        `poisoning_key(key)`, so that judges of the rows find those that were trained on.
        """
        attack = self.bind(data)
        poisoned = poisoned_set(poisoning_key(key), data, attack, model.classes)
        variables, curves = fit(key, model, recipe, poisoned, variables=variables)
        return attack, variables, curves

    @_admitted
    def plan(self, key: jax.Array, y: jax.Array, classes: int) -> Plan:
        """Which rows the training set has: labels `y: [N]` of `classes` classes."""
        return poison_rows(key, y, self.shares(y, classes), self.append)

    def shares(self, y: jax.Array, classes: int) -> list[Part]:
        """The shares of the training set that are stamped."""
        eligible = self.success(jnp.asarray(1), y, classes) >= 0
        if self.labels == "clean-label":
            eligible = y == self.target
        label = y if self.labels == "clean-label" else self.success(jnp.asarray(1), y, classes)
        parts = [Part(eligible, self.rate, 1, label), Part(~eligible, self.cover, 1, y)]
        return parts if self.labels == "source-specific" else parts[:1]

    def base(self, y: jax.Array, classes: int) -> jax.Array:
        """Labels of the images that the plan is for: those of the training set, `y: [N]`, unless
        this attack makes images of its own.
        """
        return y

    def asked(self, y: jax.Array, classes: int) -> int:
        """How many rows the attack is to stamp of images with labels `y: [N]`. Raises `BadInput`
        where a rate comes to no image, or is of classes that have none.
        """
        total = 0
        for part in self.shares(y, classes):
            # As `poison_rows` counts, in float32.
            wanted = int(jnp.round(jnp.asarray(part.rate, jnp.float32) * y.shape[0]))
            if float(part.rate) > 0 and not wanted:
                raise BadInput(
                    f"a share of {shown(part.rate)} of {y.shape[0]} images is none: nothing would "
                    "be poisoned; give a higher rate"
                )
            if wanted and not np.any(part.eligible):
                raise BadInput(
                    "no training image is of a class that the attack stamps: nothing would be "
                    "poisoned"
                )
            total += wanted
        return total

    def count(self, key: jax.Array, y: jax.Array, classes: int) -> dict[str, int]:
        """What `plan` does to images with labels `y: [N]`: `rows` in all; `asked` for by the rates;
        `poisoned`, those that are stamped, of which `relabelled` get another label than their
        image's and `clean_label` keep it; `added`, those beyond N. Raises `BadInput` where nothing
        is poisoned that was asked for.
        """
        y = self.base(y, classes)
        asked, plan = self.asked(y, classes), self.plan(key, y, classes)
        exists = np.arange(plan.kind.shape[0]) < np.asarray(plan.size)
        poisoned = exists & np.asarray(plan.kind > 0)
        kept = np.asarray(plan.label) == np.asarray(y)[np.asarray(plan.source)]
        if asked and not poisoned.any():
            raise BadInput("no training image is left for the attack: nothing would be poisoned")
        found = {
            "rows": exists, "poisoned": poisoned, "relabelled": poisoned & ~kept,
            "clean_label": poisoned & kept,
        }  # fmt: skip
        counts = {name: int(rows.sum()) for name, rows in found.items()}
        return counts | {"added": max(counts["rows"] - y.shape[0], 0), "asked": asked}

    def targets(self, classes: int) -> jax.Array:
        """The labels that one of the triggers is to give, by `success`: `[K]` bool."""
        y = jnp.arange(classes, dtype=jnp.int32)
        aimed = [self.success(jnp.asarray(k), y, classes) for k in range(1, self.triggers + 1)]
        return jnp.isin(y, jnp.stack(aimed))

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """The stamped image of `x: [H, W, C]`, in [0, 1]."""
        raise TypeError(f"{type(self).__name__} must define trigger(x, key)")

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        """`x: [H, W, C]` with trigger `kind: []` (0 = unchanged). `train=False`: as fired at test
        time, where that differs.
        """
        return jnp.where(kind > 0, self.trigger(x, key), x)

    def success(self, kind: jax.Array, y: jax.Array, classes: int) -> jax.Array:
        """The label that counts as a hit for true labels `y: [N]`; -1 where this attack does not
        aim at `y`.
        """
        if self.labels == "all-to-all":
            return (y + 1) % classes
        hit = jnp.full_like(y, 0) + jnp.asarray(self.target, y.dtype)
        if self.labels == "source-specific":
            aimed = jnp.isin(y, jnp.asarray(self.sources, y.dtype))
            return jnp.where(aimed, hit, -1)
        return hit

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        """Raises `BadInput` where this attack cannot be run on images of `shape` (H, W, C) with
        `classes` classes.
        """
        validate(self)
        if np.any(np.asarray(self.target) >= classes):
            raise BadInput(
                f"target label {self.target} is not one of the {classes} classes 0 … {classes - 1}"
            )
        if self.labels == "source-specific" and not self.sources:
            raise BadInput(
                "a source-specific attack needs sources, the classes that it aims at: sources=(1, "
                "2)"
            )
        if any(s >= classes for s in self.sources):
            raise BadInput(
                f"sources {self.sources} are not all among the classes 0 … {classes - 1}"
            )
        if self.labels == "source-specific" and np.any(np.isin(self.target, self.sources)):
            raise BadInput(
                f"the target {self.target} is one of the sources {self.sources}: these images "
                "would keep their label; take it out"
            )


def start_of(place: Array | int, size: Array | int, side: int) -> jax.Array:
    """First row (or column) of a box: `place` counts from the start; below 0 from the end, -1 =
    flush with the last row.
    """
    place = jnp.asarray(place)
    return jnp.where(place < 0, side + place + 1 - size, place)


def paste(x: jax.Array, bitmap: jax.Array, color: jax.Array, top, left, size) -> jax.Array:
    """`x: [H, W, C]` with `bitmap` drawn in a `size`×`size` box: x' = (1 − m)⊙x + m⊙Δ.

    `bitmap: [h, w]` opacity in [0, 1], read by nearest neighbour, so that `size`, `top` and `left`
    may all be traced; `color: [h, w, C]` or broadcastable to it. Pixels outside the box stay
    untouched.
    """
    h, w = bitmap.shape
    rows = jnp.arange(x.shape[0]) - top
    cols = jnp.arange(x.shape[1]) - left
    inside = ((rows >= 0) & (rows < size))[:, None] & ((cols >= 0) & (cols < size))[None, :]
    i = jnp.clip(rows * h // size, 0, h - 1)
    j = jnp.clip(cols * w // size, 0, w - 1)
    mask = jnp.where(inside, bitmap[i][:, j], 0.0)[..., None]
    delta = jnp.broadcast_to(color, (h, w, x.shape[2]))[i][:, j]
    return (1 - mask) * x + mask * delta


def check_box(top: Any, left: Any, size: Any, shape: tuple[int, int, int]) -> None:
    """Raises `BadInput` where a `size`×`size` box at (top, left) leaves the image."""
    for name, place, side in (("row", top, shape[0]), ("column", left, shape[1])):
        first = np.asarray(start_of(place, size, side))
        if (
            np.any(np.asarray(size) < 1)
            or np.any(first < 0)
            or np.any(first + np.asarray(size) > side)
        ):
            raise BadInput(
                f"trigger outside the image: size {size} at {name} {place} does not fit into "
                f"{side} pixels"
            )
