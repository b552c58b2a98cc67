"""Is this net backdoored, which label, by what trigger? All judges that need no attack, the
cheapest first, within the time that there is; one rule over what they say; a page for people and a
file for programs.

>>> found = audit("net", "images.npz", minutes=10)
>>> found.word, [trigger.label for trigger in triggers(found)]
"""

import dataclasses
import hashlib
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import __version__, checkpoints, datasets, metrics, own, registry, schema, sweep, target
from bdjax.datasets.base import Source, pick
from bdjax.defenses.base import Judge
from bdjax.defenses.invert.abs import shapes_of
from bdjax.defenses.parts import nulls
from bdjax.defenses.parts.offers import moves, offered, pixels
from bdjax.defenses.parts.screen import screened
from bdjax.foreign.origin import Origin
from bdjax.imports import Loaded, load_net
from bdjax.progress import Stop, duration, kept
from bdjax.registry import door
from bdjax.train import predict, unit
from bdjax.types import (
    BadInput,
    Dataset,
    Model,
    Range,
    Split,
    Variables,
    Word,
    class_name,
)

MOVES = 0.9
"""The share of other labels' held-out images that the trigger of a backdoor moves, at least."""


# --- The rule ---


class Seed(NamedTuple):
    """What one seed of a judge says: `p_value`, NaN where it has none; the `labels` that it calls
    targets, the first one the most suspicious; and, of those that it has a trigger for, the share
    of other labels' held-out images that it moves there.
    """

    p_value: float
    labels: tuple[int, ...] = ()
    moved: Mapping[int, float] = {}


class Decision(NamedTuple):
    """What the rule says: the `word`; why, in a sentence; on which judge and label that rests; and
    the smallest p-value, corrected for the number of judges, NaN where none has one.
    """

    word: Word
    reason: str
    judge: str | None = None
    label: int | None = None
    p_value: float = math.nan


def decide(
    said: Mapping[str, Sequence[Seed]], alpha: float, complete: bool, names: Sequence[str] = ()
) -> Decision:
    """The one rule. `said`: of each judge what its seeds say; `complete`: whether one search for
    triggers was over all labels.

    Only judges with a p-value count, J of them; that of several seeds is `metrics.combined_p`. A
    judge *accuses* where Holm's (1979) step-down procedure rejects its null at `alpha`, a seed
    where its own p, times what its judge's is multiplied by there (J, if that does not accuse), is
    at most `alpha`.

    - *infected*: a judge accuses; all its accusing seeds name a label in common; and its trigger
      for that moves `MOVES` of other labels' held-out images.
    - *undecided*: a judge accuses, but its seeds have no label in common, or two judges have none,
      or its trigger moves fewer, or it has none; or some seed accuses and its judge does not; or
      the time ran out before one search was complete; or no judge has a p-value.
    - *no sign*: else.
    """
    p = {name: _combined([seed.p_value for seed in seeds]) for name, seeds in said.items()}
    p = {name: value for name, value in p.items() if not math.isnan(value)}
    if not p:
        why = "no judge has a p-value here" if complete else _OUT_OF_TIME
        return Decision("undecided", why)
    order = sorted(p, key=lambda name: p[name])
    first, least = order[0], min(1.0, p[order[0]] * len(p))
    times, guilty = dict.fromkeys(order, len(p)), []
    for i, name in enumerate(order):
        if p[name] * (len(p) - i) > alpha:
            break
        times[name] = len(p) - i
        guilty.append(name)
    accusing = {
        name: [seed for seed in said[name] if seed.p_value * times[name] <= alpha] for name in p
    }
    if not guilty:
        torn = [name for name in order if accusing[name]]
        if torn:
            some, all_ = len(accusing[torn[0]]), len(said[torn[0]])
            why = f"{some} of {all_} seeds of {torn[0]} accuse the net, together they do not"
            return Decision("undecided", why, torn[0], None, least)
        if not complete:
            return Decision("undecided", _OUT_OF_TIME, None, None, least)
        return Decision("no sign", "no judge accuses the net", None, None, least)
    named = {name: _common(accusing[name]) for name in guilty}
    if not named[first]:
        why = f"the seeds of {first} accuse the net, but name no label in common"
        return Decision("undecided", why, first, None, least)
    for other in guilty[1:]:
        if named[other] and not set(named[other]) & set(named[first]):
            mine, theirs = (class_name(named[name][0], names) for name in (first, other))
            why = f"{first} names {mine}, {other} {theirs}"
            return Decision("undecided", why, first, None, least)
    moved = {
        label: max((seed.moved.get(label, math.nan) for seed in accusing[first]), key=_known)
        for label in named[first]
    }
    label = max(moved, key=lambda label: _known(moved[label]))
    what = class_name(label, names)
    if math.isnan(moved[label]):
        why = f"{first} accuses the net, but has no trigger to show"
        return Decision("undecided", why, first, None, least)
    share = f"its trigger moves {100 * moved[label]:.1f} % of other labels' images to {what}"
    if moved[label] < MOVES:
        why = f"{first} accuses the net, but {share}: fewer than {100 * MOVES:.0f} %"
        return Decision("undecided", why, first, label, least)
    return Decision("infected", f"{first} accuses the net: {share}", first, label, least)


_OUT_OF_TIME = "the time ran out before a search for triggers was over all labels"


def _combined(p: Sequence[float]) -> float:
    return float(metrics.combined_p(jnp.asarray(p, jnp.float32))) if len(p) else math.nan


def _common(seeds: Sequence[Seed]) -> tuple[int, ...]:
    """The labels that all seeds name, in the order of the first of them."""
    return tuple(k for k in seeds[0].labels if all(k in seed.labels for seed in seeds))


def _known(share: float) -> float:
    return -1.0 if math.isnan(share) else share


# --- What is left behind ---


class Found(NamedTuple):
    """A trigger that a judge found, for `label`: x' = (1 − m)⊙x + m⊙Δ, `mask: [H, W, 1 or C]`,
    `pattern: [H, W, C]`; `norm` |m|₁; the share `moved` of other labels' held-out images that it
    sends there, on how many `pixels`; whether the verdict `accused` that label by that judge.
    """

    judge: str
    label: int
    mask: np.ndarray
    pattern: np.ndarray
    norm: float
    moved: float
    pixels: int
    accused: bool


class Audit(NamedTuple):
    """What an audit found: the verdict in a `word`, and why; all of `audit.json` in `about`; the
    arrays of each step, by name, in `steps`; and the `folder` that keeps them.
    """

    word: Word
    reason: str
    about: dict[str, Any]
    steps: dict[str, dict[str, np.ndarray]]
    folder: Path | None


@door
def triggers(found: Audit | str | Path) -> list[Found]:
    """The triggers of an audit, or of the folder that it left: one for each judge and label, those
    that the verdict rests on first, then those that move more images. Of a verdict that accuses
    none, all are only candidates: `accused` is False.
    """
    found = found if isinstance(found, Audit) else read(found)
    verdict = found.about["verdict"]
    best: dict[tuple[str, int], Found] = {}
    for name, arrays in found.steps.items():
        judge = name.rpartition("-")[0]
        if "mask" not in arrays:
            continue
        sizes = pixels(arrays["mask"])
        for i in np.flatnonzero(arrays["valid"]):
            label, mask = int(arrays["label"][i]), arrays["mask"][i]
            accused = (
                verdict["word"] == "infected"
                and (judge, label) == (verdict["judge"], verdict["label"])
            )  # fmt: skip
            one = Found(
                judge, label, mask, arrays["pattern"][i], float(mask.max(-1).sum()),
                float(arrays["moved"][i]), int(sizes[i]), accused,
            )  # fmt: skip
            known = best.get((judge, label))
            if known is None or _known(one.moved) > _known(known.moved):
                best[judge, label] = one
    return sorted(best.values(), key=lambda f: (not f.accused, -_known(f.moved), f.norm))


@door
def read(folder: str | Path) -> Audit:
    """An audit from the folder that it left."""
    folder = own.at_home(folder)
    if not (folder / "audit.json").exists():
        raise BadInput(f"{folder} is no folder of an audit: it has no audit.json")
    about = schema.read_json(folder / "audit.json", "audit")
    steps = {
        path.stem: schema.read_arrays(path, "arrays")
        for path in sorted((folder / "steps").glob("*.npz"))
    }
    return Audit(about["verdict"]["word"], about["verdict"]["reason"], about, steps, folder)


# --- The work ---

SEARCHED, HELD = 500, 500
"""Images that judges see, and others by which triggers are measured, at most."""
SEEDS = 3
"""How often a judge with a p-value draws, where there is time."""
LEADERS, CONTROLS = 8, 24
"""Of many labels: how many of those that lead are searched to the end, and beside how many that
were drawn at random.
"""
COMPILING = 10.0
"""Seconds that a program is taken to need before it runs."""
RATE = 32
"""Images of the batch by which the net is timed."""


class Images(NamedTuple):
    """The user's images: those that judges `search` with, those `held` out to measure triggers by;
    the `names` of the net's classes; whether they came `labelled` or the net labels them; the
    net's `accuracy` on those held out, None where it labels them; how many `more` there are to
    train references on.
    """

    search: Split
    held: Split
    names: tuple[str, ...]
    labelled: bool
    accuracy: float | None
    name: str


def images_of(model: Model, variables: Variables, data: Dataset) -> Images:
    """The defender's images (and, where they are few, the training images) to search with, those of
    the test set to measure by. Where the net's classes are not the data's, it gives the labels.
    """
    sweep.fits(model, data._replace(classes=model.classes))
    held = data.test
    if len(held.label) > HELD:
        held = held[pick(np.asarray(held.label), HELD, 0)]
    search = data.clean
    if len(search.label) > SEARCHED:
        search = search[pick(np.asarray(search.label), SEARCHED, 0)]
    elif (missing := min(SEARCHED - len(search.label), len(data.train.label))) > 0:
        more = data.train[pick(np.asarray(data.train.label), missing, 0)]
        search = Split(*(np.concatenate([np.asarray(a), np.asarray(b)])
                         for a, b in ((search.image, more.image), (search.label, more.label))))  # fmt: skip
    answer = jax.jit(lambda image: metrics.labels(predict(model, variables, image)))
    answers = [np.asarray(answer(split.image)) for split in (search, held)]
    if min(map(np.min, answers)) < 0:
        raise BadInput("the net gives some images no label: its answers are not numbers")
    labelled = data.classes == model.classes
    if labelled:
        accuracy = float((answers[1] == np.asarray(held.label)).mean())
    else:
        search, held = (s._replace(label=a) for s, a in zip((search, held), answers, strict=True))
        accuracy = None
    names = data.names if labelled else ()
    search, held = (Split(jnp.asarray(s.image), jnp.asarray(s.label)) for s in (search, held))
    return Images(search, held, tuple(names), labelled, accuracy, data.name)


def judges(model: Model, clean: Split) -> tuple[list[Judge], dict[str, str]]:
    """The model judges that apply, as they are on a CPU, and why others do not."""
    found, others = [], {}
    for entry in registry.entries("defense"):
        if not issubclass(entry.cls, Judge):
            continue
        preset = next((name for name in ("audit", "cpu") if name in _presets(entry.cls)), None)
        judge = registry.make("defense", entry.name, preset)
        if judge.oracle:
            continue
        try:
            registry.admit(judge, model, clean)
            found.append(judge)
        except BadInput as error:
            others[entry.name] = str(error)
    return found, others


def _presets(cls: type) -> Mapping[str, Any]:
    return getattr(cls, "presets", {})


def _examined(
    model: Model, key: jax.Array, judge: Judge, variables: Variables, search: Split, held: Split
) -> dict[str, jax.Array]:
    """What one seed of a judge says of a net, and what its triggers do to the images `held`."""
    verdict = judge(key, model, variables, search)
    parts = ("norms", "qualified", "success", "neuron", "elevation", "threshold")
    out = {name: verdict.info[name] for name in parts if name in verdict.info}
    out |= {name: getattr(verdict, name) for name in ("index", "infected", "flagged", "p_value")}
    found = offered(jax.random.fold_in(key, 1), judge, model, variables, search, verdict)
    if found is not None:
        out |= {**found._asdict(), "moved": moves(model, variables, held, found)}
    return {name: jnp.asarray(value) for name, value in out.items()}


def _screening(
    model: Model, key: jax.Array, variables: Variables, search: Split
) -> dict[str, jax.Array]:
    return screened(key, model, variables, search.image)._asdict()


def _pushed(model: Model, variables: Variables, image: jax.Array) -> jax.Array:
    """What a step of a search costs a net: its answers, and their gradient."""
    return jax.grad(lambda x: jax.nn.log_softmax(model.apply(variables, x).logits)[:, 0].sum())(
        image
    )


class Program:
    """`fn(model, *args)` for arguments of these shapes: `flops`, what it computes at most; compiled
    when it is first run. `seconds`: what a run took last, None before the first.
    """

    def __init__(self, fn: Callable, model: Model, args: Sequence[Any]):
        self.traced = jax.jit(fn, static_argnums=0).trace(model, *args)
        judge = next((one for one in args if isinstance(one, Judge)), None)
        steps = float(np.max(np.asarray(getattr(judge, "steps", 1))))
        self.flops = target.cost(self.traced.jaxpr.jaxpr, {"steps": steps}).flops
        self.compiled: Callable | None = None
        self.seconds: float | None = None

    def __call__(self, *args: Any) -> dict[str, np.ndarray]:
        if self.compiled is None:
            self.compiled = self.traced.lower().compile()
        start = time.monotonic()
        out = jax.device_get(self.compiled(*args))
        self.seconds = time.monotonic() - start
        return out


_programs: dict[Any, Program] = {}


def program(fn: Callable, model: Model, *args: Any) -> Program:
    """One program for all arguments of these shapes: audits of nets of one architecture share
    it.
    """
    key = (fn, model, sweep.compile_key(args))
    if (found := _programs.pop(key, None)) is None:
        found = Program(fn, model, args)
    _programs[key] = found  # the last used is the last to go
    while len(_programs) > sweep.PROGRAMS:
        del _programs[next(iter(_programs))]
    return found


class Work:
    """An audit under way: its steps are kept in `folder` (None: in memory) as they end, and found
    there again.
    """

    def __init__(
        self, model: Model, variables: Variables, images: Images, folder: Path | None,
        seconds: float, quiet: bool,
    ):  # fmt: skip
        self.model, self.variables, self.images = model, variables, images
        self.folder, self.seconds, self.quiet = folder, seconds, quiet
        self.until = time.monotonic() + seconds
        self.steps: dict[str, dict[str, np.ndarray]] = {}
        self.skipped: dict[str, str] = {}
        self.rate: float | None = None
        if folder is not None:
            for path in sorted((folder / "steps").glob("*.npz")):
                self.steps[path.stem] = schema.read_arrays(path, "arrays")

    def left(self) -> float:
        """The seconds that are left."""
        return self.until - time.monotonic()

    def needs(self, found: Program) -> float:
        """About how many seconds a program needs: what it took before, or its flops at the rate at
        which this net is computed here.
        """
        if found.seconds is not None:
            return found.seconds
        if self.rate is None:
            image = unit(self.images.search.image)
            image = jnp.take(image, jnp.arange(RATE) % len(image), 0)
            timed = program(_pushed, self.model, self.variables, image)
            timed(self.variables, image)  # what is done once at first
            timed(self.variables, image)
            self.rate = timed.flops / max(timed.seconds or 0.0, 1e-4)
        return found.flops / self.rate + COMPILING

    def keep(self, name: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Keeps what a step found."""
        kept = {key: np.asarray(value) for key, value in arrays.items()}
        if self.folder is not None:
            with own.renamed(self.folder / "steps" / f"{name}.npz", zipfile.is_zipfile) as path:
                with open(path, "wb") as file:
                    schema.write_arrays(file, kept, "arrays", packed=True)  # type: ignore[arg-type]
        self.steps[name] = kept
        return kept

    def step(self, name: str, what: str, found: Program, *args: Any, reserve: float = 0.0) -> bool:
        """Runs a program as the step `name`, unless it is kept already or the time that is left,
        but for what is to be held in `reserve`, is too short; whether its results are there.
        """
        if name in self.steps:
            return True
        need = self.needs(found)
        if need > self.left() - reserve:
            room = max(self.left() - reserve, 0.0)
            self.skipped[name] = f"needs about {duration(need)}, {duration(room)} were left"
            return False
        self.skipped.pop(name, None)
        sweep.say(f"{what}: about {duration(need)}", self.quiet)
        start = time.monotonic()
        self.keep(name, found(*args) | {"seconds": np.asarray(time.monotonic() - start)})
        return True


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed)


def searches(judge: Judge) -> bool:
    """Whether a judge looks for a trigger of every label on the user's images."""
    return hasattr(judge, "labels") and judge.images_needed > 0


def work_through(work: Work, tried: Sequence[Judge], stop: Stop) -> None:
    """All judges once, the cheapest first, then those with a p-value again, until they had `SEEDS`
    seeds each; time for one search over all labels is kept free as long as there was none.
    """
    planned = []
    for judge in tried:
        name = str(registry.name_of(judge))
        judge, found = _planned(work, judge, stop)
        if stop.asked is not None:
            return
        planned.append((name, judge, found))
    planned.sort(key=lambda one: one[2].flops)
    for seed in range(SEEDS):
        for name, judge, found in planned:
            if stop.asked is not None:
                return
            first = work.steps.get(f"{name}-0", {})
            if seed and not np.isfinite(first.get("p_value", np.nan)):
                continue
            ahead = [
                work.needs(other) for called, one, other in planned
                if searches(one) and f"{called}-0" not in work.steps and called != name
            ]  # fmt: skip
            # What would not fit anyway is not waited for.
            reserve = min((need for need in ahead if need <= work.left()), default=0.0)
            what = f"{name} on {len(work.images.search.label)} images" + f", seed {seed}" * (seed > 0)
            args = (_key(seed), judge, work.variables, work.images.search, work.images.held)
            step = f"{name}-{seed}"
            fresh = step not in work.steps
            if work.step(step, what, found, *args, reserve=reserve) and fresh:
                _controlled(work, step, judge)


def _planned(work: Work, judge: Judge, stop: Stop) -> tuple[Judge, Program]:
    """A judge and its program; where its search over all labels would take most of the time, it is
    for those alone that a screening brings forward, and for some that were drawn.
    """
    search, held = work.images.search, work.images.held

    def made(judge: Judge) -> Program:
        return program(_examined, work.model, _key(0), judge, work.variables, search, held)

    found, classes = made(judge), work.model.classes
    if not searches(judge) or classes < 2 * (LEADERS + CONTROLS):
        return judge, found
    if work.needs(found) < 0.4 * work.seconds:
        return judge, found
    screen = program(_screening, work.model, _key(0), work.variables, search)
    what = f"screening of {classes} labels"
    if not work.step("screen-0", what, screen, _key(0), work.variables, search):
        return judge, found
    leaders = work.steps["screen-0"]["order"][:LEADERS]
    drawn = np.random.default_rng(0).choice(classes, CONTROLS, replace=False)
    labels = tuple(np.unique(np.concatenate([leaders, drawn])).tolist())
    judge = dataclasses.replace(judge, labels=labels)  # type: ignore[call-arg]
    return judge, made(judge)


def _controlled(work: Work, step: str, judge: Judge) -> None:
    """The p-value of a search that was for some labels alone: the smallest is held against those
    that were drawn, and counts as the smallest of all.
    """
    labels, arrays = getattr(judge, "labels", None), work.steps[step]
    if labels is None or "screen-0" not in work.steps:
        return
    drawn = np.random.default_rng(0).choice(work.model.classes, CONTROLS, replace=False)
    least = _smallest(arrays)
    if least is None:
        return
    controls = arrays["norms"][[k for k in drawn if k != least]]
    p = nulls.against_controls(arrays["norms"][least], controls, work.model.classes)
    work.keep(step, arrays | {"p_value": np.asarray(p), "searched": np.asarray(labels)})


def _smallest(arrays: Mapping[str, np.ndarray]) -> int | None:
    """The label with the smallest norm among those whose trigger works."""
    if "norms" not in arrays:
        return None
    able = arrays.get("qualified", arrays.get("flagged")).astype(bool)
    if "qualified" not in arrays and not able.any():
        able = np.ones(len(able), bool)
    norms = np.where(able & np.isfinite(arrays["norms"]), arrays["norms"], np.inf)
    return int(norms.argmin()) if np.isfinite(norms).any() else None


def seeds_of(arrays: Mapping[str, np.ndarray], p_value: float | None = None) -> Seed:
    """What a step of a judge says, as the rule reads it."""
    least = _smallest(arrays)
    flagged = np.flatnonzero(arrays["flagged"]).tolist()
    if "norms" in arrays:
        flagged.sort(key=lambda k: arrays["norms"][k])
    labels = tuple(dict.fromkeys([*([] if least is None else [least]), *flagged]))
    moved: dict[int, float] = {}
    if "moved" in arrays:
        for k, share, valid in zip(arrays["label"], arrays["moved"], arrays["valid"], strict=True):
            if valid and _known(float(share)) > _known(moved.get(int(k), math.nan)):
                moved[int(k)] = float(share)
    return Seed(float(arrays["p_value"]) if p_value is None else p_value, labels, moved)
