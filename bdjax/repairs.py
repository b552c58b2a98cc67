"""A net repaired by whoever was given it: which repair is picked without knowing the trigger, what
it stops, and what it costs.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import datasets, imports, registry
from bdjax.audits import triggers
from bdjax.datasets.base import Source, divide, together
from bdjax.datasets.files import sized
from bdjax.defenses.base import Defense, Repair
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.inversion import Trigger, stamp
from bdjax.defenses.parts.reversed import Reversed, TriggerDefense
from bdjax.defenses.parts.screen import screened
from bdjax.foreign.fold import folded
from bdjax.sweep import answers, labelled, takes
from bdjax.train import stamped, unit
from bdjax.types import (
    Attack,
    BadInput,
    Model,
    Range,
    Seed,
    Split,
    Variables,
    class_name,
)

HELD = 0.25
"""The share of the images that no repair sees: by them one is picked."""
FEW, LEADERS = 20, 10
"""Of more labels than `FEW` only the `LEADERS`, by a screening, are searched to the end."""
FACTORS = (1.0, 0.3, 3.0)
"""By which a learning rate is multiplied, where it decides most of what a repair leaves."""
STEPS = 300
"""The fewest steps of a fine-tuning: of few images it has many epochs."""


class Tried(NamedTuple):
    """A repair that was tried: its `accuracy` on held-out images, the largest share of these that a
    trigger `moved`, and why it was left out, `fault`.
    """

    name: str
    accuracy: float = np.nan
    moved: float = np.nan
    seconds: float = 0.0
    fault: str = ""

    @property
    def score(self) -> float:
        """By which repairs are compared: what is kept less what is still moved."""
        return -np.inf if self.fault else self.accuracy - self.moved


class Line(NamedTuple):
    """A line of the table: a number of the net as it was, and as it is now."""

    what: str
    before: float
    after: float
    share: bool = True


class Mended(NamedTuple):
    """A repaired net, as `load_model` gives nets; the `defense` that was picked; all that was
    `tried`, the net as it was first; and a `table` of before and after on images that neither the
    repair nor the choice has seen.
    """

    net: Any
    model: Model
    variables: Variables
    about: dict[str, Any]
    defense: Defense
    tried: tuple[Tried, ...]
    table: tuple[Line, ...]


class _Given(NamedTuple):
    """The net as it was, and the user's clean images: those that repairs see, those that the choice
    sees, those of the table.
    """

    model: Model
    variables: Variables
    seen: Split
    held: Split
    test: Split


@registry.door
def repair_net(
    net: str | Path,
    dataset: str | Path | Source | None = None,
    *,
    defense: Defense | None = None,
    audit: str | Path | None = None,
    attack: Attack | None = None,
    minutes: Annotated[float, Range(1e-3, 1e6)] = 10.0,
    seed: Seed = 0,
    say: Callable[[str], Any] = print,
) -> Mended:
    """The net in a folder or a file, repaired by `defense` or, for None, by the best of the repairs
    that apply to it and leave one that can be exported.

    `dataset`: clean images (None: those that the net's folder names); where their classes are not
    the net's, it labels them, and accuracy is agreement with the net as it was. `audit`: the folder
    of one, whose triggers are taken (None: Neural Cleanse looks for some). `attack`: a trigger that
    is known, which is measured and nothing else. No repair is begun after `minutes`.

    A repair is picked on images that it has not seen, by accuracy less the share of them that
    triggers move: those of another search than the one that it was given.
    """
    if defense is not None and not isinstance(defense, Repair):
        name = registry.name_of(defense) or type(defense).__name__
        raise BadInput(f"{name} repairs no net: `bdjax list defenses` shows what does")
    told = None if audit is None else audited(audit)
    loaded = imports.load_net(net)
    model, variables, about = loaded.model, loaded.variables, loaded.about
    source: Any = about["dataset"] if dataset is None else dataset
    if source is None:
        raise BadInput(f"{net} names no data set: give clean images of its kind, --dataset")
    source = sized(datasets.source(source), model.shape)
    data = source.load()
    takes(model, data)
    if not (own := data.classes == model.classes):
        data = labelled(source, model, variables, "net").load()
    joined = together(data.train, data.clean)
    seen, held = divide(joined, HELD, int(seed) % 2**31)
    if min(len(seen.label), len(held.label)) < 2:
        raise BadInput(f"{len(joined.label)} clean images are too few: give a few hundred")
    given = _Given(model, variables, seen, held, data.test)
    if own and (why := imports.strange(_right(model, variables, data.test), data.test.label)):
        say(f"warning: {why}; a repair learns wrong labels of them")
    if defense is not None:  # before the search, which takes minutes
        registry.admit(defense, model, seen)
    if attack is not None:
        registry.admit(attack, model.shape, model.classes)
    key_find, key_proof, key_mend, key_table = jax.random.split(jax.random.key(seed), 4)
    found = search(key_find, model, variables, seen) if told is None else told
    found.check(model.shape, model.classes)
    suspects = sorted({int(k) for k in np.asarray(found.label)[np.flatnonzero(found.suspect)]})
    names = ", ".join(class_name(k, data.names) for k in suspects)
    say(f"triggers found: {f'label {names}' if suspects else 'none'}")
    if defense is None and not suspects:
        raise BadInput(
            "no label has a trigger that reaches it on these images, so that nothing says which "
            "repair is good: name one, such as --defense fine-pruning"
        )
    proof, _ = again(key_proof, model, variables, seen, suspects)
    tried, (picked, after) = _picked(key_mend, given, defense, found, proof, float(minutes), say)
    mended = picked.wrap(model)
    table = tuple(_table(key_table, given, mended, after, proof, attack, about, own, data.names))
    now = {
        "defenses": (*about["defenses"], picked),
        "metrics": {"acc_test": table[0].after} if own else None,
    }
    if dataset is not None:
        now |= {"dataset": source, "fingerprint": None}
    return Mended(loaded.net, mended, after, {**about, **now}, picked, tried, table)


# --- Triggers ---


def judge() -> NeuralCleanse:
    """The search for triggers: short, with a price on the mask from the start."""
    return NeuralCleanse(**NeuralCleanse.presets["cpu"], start_at_zero=False)


def search(key: jax.Array, model: Model, variables: Variables, clean: Split) -> Reversed:
    """The triggers of the suspects: of the labels that the judge flags or, where it flags none, of
    the one with the smallest; none where no label has one that reaches it.
    """
    nc = judge()
    if model.classes > FEW:
        key_screen, key = jax.random.split(key)
        order = jax.jit(lambda v: screened(key_screen, model, v, clean.image).order)(variables)
        leaders = sorted(map(int, np.asarray(order)[:LEADERS]))
        nc = dataclasses.replace(nc, labels=tuple(leaders))
    nc.check(model, clean)
    verdict = jax.jit(lambda v: nc(key, model, v, clean))(variables)
    found = Reversed.of(verdict, "flagged" if bool(verdict.infected) else "smallest")
    rows = np.flatnonzero(np.asarray(found.suspect))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], found)


def audited(folder: str | Path) -> Reversed:
    """The triggers of an audit: those of the label that it accuses or, where it accuses none, of
    the label whose trigger moves most images.
    """
    found = triggers(folder)
    if not found:
        raise BadInput(f"{folder}: this audit found no trigger")
    found = [one for one in found if one.label == found[0].label]
    pattern = np.stack([one.pattern for one in found])
    mask = np.stack([np.broadcast_to(one.mask, one.pattern.shape) for one in found])
    label = np.asarray([one.label for one in found], np.int32)
    return Reversed(
        jnp.asarray(mask), jnp.asarray(pattern), jnp.asarray(label), jnp.asarray(label) >= 0
    )


def again(
    key: jax.Array, model: Model, variables: Variables, clean: Split, labels: Sequence[int]
) -> tuple[Reversed, np.ndarray]:
    """Triggers of `labels: [L]` by a search for these alone, and their |m|₁, `[L]`."""
    aims = jnp.asarray(labels, jnp.int32)
    if not labels:
        h, w, c = model.shape
        nothing = Reversed(jnp.zeros((0, h, w, 1)), jnp.zeros((0, h, w, c)), aims, aims > 0)
        return nothing, np.zeros(0)
    found = jax.jit(lambda v: judge().search(key, model, v, clean.image, aims))(variables)
    trigger = found.trigger
    return Reversed(trigger.mask, trigger.pattern, aims, aims >= 0), np.asarray(found.norm)


def moved(model: Model, variables: Variables, images: Split, triggers: Reversed) -> list[float]:
    """The share of the images of other labels that each of `triggers` brings to its own."""
    x, shares = unit(images.image), []
    for mask, pattern, label in zip(triggers.mask, triggers.pattern, np.asarray(triggers.label)):
        said = answers(model, variables, stamp(Trigger(mask, pattern), x))
        shares.append(float(np.mean(said[np.asarray(images.label) != label] == label)))
    return shares


def _right(model: Model, variables: Variables, images: Split) -> float:
    return float(np.mean(answers(model, variables, images.image) == np.asarray(images.label)))


# --- Repairs ---


def _picked(
    key: jax.Array, given: _Given, named: Repair | None, found: Reversed, proof: Reversed,
    minutes: float, say: Callable[[str], Any],
) -> tuple[tuple[Tried, ...], tuple[Defense, Variables]]:  # fmt: skip
    """What was tried, and the best repair with what it leaves."""
    begun, tried, best = time.monotonic(), [], None

    def measured(name: str, model: Model, variables: Variables, seconds: float) -> Tried:
        accuracy = _right(model, variables, given.held)
        worst = max(moved(model, variables, given.held, proof), default=0.0)
        return Tried(name, accuracy, worst, seconds)

    def told(one: Tried) -> None:
        tried.append(one)
        numbers = f"{one.accuracy:.1%} right, triggers move {one.moved:.1%}, {one.seconds:.0f} s"
        say(f"  {one.name}: {one.fault or numbers}")

    told(measured("as it was", given.model, given.variables, 0.0))
    ways = _ways(given, found) if named is None else [_taken(named, found)]
    for name, repairs, fault in ways:
        late = best is not None and time.monotonic() - begun > 60 * minutes
        if fault or late:
            told(Tried(name, fault=fault or f"not tried: {minutes:g} minutes were over"))
            continue
        run = jax.jit(lambda d, v: d(key, given.model, v, given.seen).variables)
        for way, defense in repairs:
            start = time.monotonic()
            after = jax.block_until_ready(run(defense, given.variables))
            model = defense.wrap(given.model)
            one = measured(f"{name}{way}", model, after, time.monotonic() - start)
            if named is None:
                one = one._replace(fault=_unexported(model, after))
            told(one)
            if best is None or one.score > best[0]:
                best = one.score, defense, after
            if named is None and time.monotonic() - begun > 60 * minutes:
                break
    if best is None or best[0] == -np.inf:
        raise BadInput("no repair that can be exported applies to this net: name one, --defense")
    if best[0] <= tried[0].score:
        say("no repair that was tried does better than the net as it was: the best of them is kept")
    return tuple(tried), best[1:]


Way = tuple[str, list[tuple[str, Repair]], str]
"""A repair's name, how it is tried, and why it is not."""


def _taken(defense: Repair, found: Reversed) -> Way:
    """A repair that was asked for, with the triggers that were found where it looks for some."""
    name = registry.name_of(defense) or type(defense).__name__
    if isinstance(defense, TriggerDefense) and defense.label is defense.original is defense.found:
        defense = dataclasses.replace(defense, found=found)  # all are None
    return name, [("", defense)], ""


def _ways(given: _Given, found: Reversed) -> list[Way]:
    """The registered repairs, as they are tried: those that start from the triggers first, those
    with a search of their own last.
    """
    ways: list[tuple[int, Way]] = []
    for entry in registry.entries("defense"):
        if not issubclass(entry.cls, Repair):
            continue
        presets = getattr(entry.cls, "presets", {})
        order = [p for p in ("cpu", "paper", *presets) if p in presets] or [None]
        made = [registry.make("defense", entry.name, preset) for preset in order]
        able = [one for one in made if one.wrap(given.model) is given.model and not one.oracle]
        if not able:
            fault = "it wraps the net, which no file of another format can hold"
            ways.append((3, (entry.name, [], fault)))
            continue
        defense = _long_enough(able[0], len(given.seen.label))
        cost = 1 + any("." in f and f.split(".")[0] != "recipe" for f in defense.budget_fields)
        if isinstance(defense, TriggerDefense):
            defense, cost = dataclasses.replace(defense, found=found), 0
        try:
            registry.admit(defense, given.model, given.seen)
        except BadInput as error:
            ways.append((3, (entry.name, [], str(error))))
            continue
        ways.append((cost, (entry.name, list(_varied(defense)), "")))
    return [way for _, way in sorted(ways, key=lambda one: one[0])]


def _long_enough(defense: Any, images: int) -> Any:
    """With the epochs that make `STEPS` steps of so many images."""
    recipe = getattr(defense, "recipe", None)
    if recipe is None or not recipe.epochs:
        return defense
    each = max(images // min(recipe.batch, images), 1)
    return registry.replace(defense, ["recipe", "epochs"], max(recipe.epochs, -(-STEPS // each)))


def _varied(defense: Any) -> Iterator[tuple[str, Any]]:
    """With other learning rates, where that decides most."""
    if defense.sensitive != "recipe.lr":
        yield "", defense
        return
    for factor in FACTORS:
        lr = factor * defense.recipe.lr
        yield f", lr {lr:g}", registry.replace(defense, ["recipe", "lr"], lr)


def _unexported(model: Model, variables: Variables) -> str:
    """Why no file could hold the net; "" where one can."""
    try:
        folded(model, variables)
    except BadInput as error:
        return str(error)
    return ""


# --- Before and after ---


def _table(
    key: jax.Array, given: _Given, model: Model, after: Variables, proof: Reversed,
    attack: Attack | None, about: dict[str, Any], own: bool, names: Sequence[str],
) -> Iterator[Line]:  # fmt: skip
    """Shares of the test images, of the net as it was and as it is now."""
    both = (given.model, given.variables), (model, after)
    word = "accuracy" if own else "agreement with the net as it was"
    before, now = (_right(*net, given.test) for net in both)
    yield Line(word, before, now)
    aims = [int(k) for k in np.asarray(proof.label)]
    shares = [moved(*net, given.test, proof) for net in both]
    norms = [again(key, *net, given.seen, aims)[1] for net in both]
    for i, k in enumerate(aims):
        label = class_name(k, names)
        yield Line(f"moved by the trigger of label {label}", shares[0][i], shares[1][i])
        yield Line(f"pixels of a new trigger of label {label}", *(n[i] for n in norms), share=False)
    known: Any = about["attack"] if attack is None else attack
    for kind in range(1, 1 + (known.triggers if known is not None else 0)):
        assert known is not None
        x = stamped(known, kind, given.test.image, jax.random.fold_in(key, kind))
        label = jnp.asarray(given.test.label)
        aimed = np.asarray(known.success(jnp.asarray(kind), label, model.classes))
        counted = (aimed >= 0) & (aimed != np.asarray(label))
        before, now = (float(np.mean((answers(*net, x) == aimed)[counted])) for net in both)
        number = f" {kind}" if known.triggers > 1 else ""
        yield Line(f"moved by the known trigger{number}", before, now)
    if (poisoned := about.get("triggered")) is not None:
        before, now = (_right(*net, Split(poisoned.image, poisoned.label)) for net in both)
        yield Line("moved, of the poisoned images that came with it", before, now)
