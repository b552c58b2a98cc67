"""Is this net backdoored, which label, by what trigger? All judges that need no attack, the
cheapest first, within the time that there is; one rule over what they say; a page for people and a
file for programs.

>>> found = audit("net", "images.npz", minutes=10)
>>> found.word, [trigger.label for trigger in triggers(found)]
"""

import dataclasses
import functools
import hashlib
import math
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import (
    __version__,
    datasets,
    own,
    references,
    registry,
    schema,
    sweep,
    target,
)
from bdjax.datasets.base import Source, pick, together
from bdjax.datasets.files import sized
from bdjax.defenses.base import Judge
from bdjax.defenses.inputs.strip import entropies
from bdjax.defenses.invert.abs import Abs, seeds, shapes_of
from bdjax.defenses.invert.mm_bd import MmBd
from bdjax.defenses.parts import nulls
from bdjax.defenses.parts.inversion import Trigger, stamp
from bdjax.defenses.parts.offers import moves, offered, pixels
from bdjax.defenses.parts.screen import ROUNDS, screened
from bdjax.foreign.origin import Origin
from bdjax.imports import Loaded, load_net, strange
from bdjax.progress import Stop, duration, kept
from bdjax.registry import door
from bdjax.rule import Seed, combined, decide, or_least, smallest
from bdjax.train import unit
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
    arrays of each step, by name, in `steps`; the `folder` that keeps them; and what the net and the
    images were `given` as, on a command line.
    """

    word: Word
    reason: str
    about: dict[str, Any]
    steps: dict[str, dict[str, np.ndarray]]
    folder: Path | None
    given: tuple[str, str] = ("NET", "IMAGES")


CODES: dict[Word, int] = {"no sign": 0, "infected": 3, "undecided": 4}
"""The exit codes of `bdjax audit`."""


@door
def triggers(found: Audit | str | Path) -> list[Found]:
    """The triggers of an audit, or of the folder that it left: one for each judge and label, those
    that the verdict rests on first, then those of the label that comes first, then those that move
    more images. Of a verdict that accuses none, all are only candidates: `accused` is False.
    """
    found = found if isinstance(found, Audit) else read(found)
    verdict = found.about["verdict"]
    best: dict[tuple[str, int], Found] = {}
    for name, arrays in found.steps.items():
        judge = name.rpartition("-")[0]
        if not {"mask", "moved"} <= arrays.keys():  # not one of a judge on this net
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
            if known is None or or_least(one.moved) > or_least(known.moved):
                best[judge, label] = one
    first = verdict.get("suspect")
    return sorted(
        best.values(),
        key=lambda f: (not f.accused, f.label != first, -or_least(f.moved), f.norm),
    )


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
LEADERS, LIFTED, WIDEST, LONGER = 8, 2, 2, 2
"""Of many labels: how many of those that lead a screening are searched to the end, beside those
that the first neurons of each site lift, and those that are won by the widest margins; and how many
times as long as one of few labels.
"""
MORE: dict[str, dict[str, Any]] = {"abs": {"top": 20, "per_site": 3}}
"""By judge, what an audit has more of than the preset `cpu`: stimulation looks at all labels at
once, and more of its candidates are looked at, too.
"""
LEAN: dict[str, dict[str, int]] = {
    "abs": {"images": 15, "top": 12, "per_site": 2},
    "deep-inspect": {"steps": 1000},
    "mesa": {"epochs": 3},
    "mm-bd": {"starts": 1, "steps": 30},
    "mntd": {"shadows": 12, "validation": 6, "recipe.epochs": 6},
    "neural-cleanse": {"batches": 5},
}
"""By judge, what it has at most where all of them, once, would take more than the time."""
WHOLE = 0.4
"""The share of the time that a search over all labels may take; else they are screened."""
COMPILING = 10.0
"""Seconds that a program is taken to need before it runs."""
SHOWN, SHOWN_BY, BLENDS = 5, 100, 10
"""Images on which a trigger is shown, those by which its effect is drawn, and blends of each."""
RATE = 32
"""Images of the batch by which the net is timed."""


class Images(NamedTuple):
    """The user's images: those that judges `search` with, those `held` out to measure triggers by;
    the `names` of the net's classes; whether they came `labelled` or the net labels them; the
    net's `accuracy` on those held out, None where it labels them; and what the data set is called.
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
    sweep.takes(model, data)
    held = data.test
    if len(held.label) > HELD:
        held = held[pick(np.asarray(held.label), HELD, 0)]
    search = data.clean
    if len(search.label) > SEARCHED:
        search = search[pick(np.asarray(search.label), SEARCHED, 0)]
    elif (missing := min(SEARCHED - len(search.label), len(data.train.label))) > 0:
        more = data.train[pick(np.asarray(data.train.label), missing, 0)]
        search = together(search, more)
    said = [sweep.answers(model, variables, split.image) for split in (search, held)]
    if min(map(np.min, said)) < 0:
        raise BadInput("the net gives some images no label: its answers are not numbers")
    labelled = data.classes == model.classes
    if labelled:
        accuracy = float((said[1] == np.asarray(held.label)).mean())
    else:
        search, held = (s._replace(label=a) for s, a in zip((search, held), said, strict=True))
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
        judge = dataclasses.replace(registry.on_cpu(entry), **MORE.get(entry.name, {}))
        if judge.oracle:
            continue
        try:
            registry.admit(judge, model, clean)
            found.append(judge)
        except BadInput as error:
            others[entry.name] = str(error)
    return found, others


def examined(
    model: Model, key: jax.Array, judge: Judge, variables: Variables, search: Split, held: Split
) -> dict[str, jax.Array]:
    """What one seed of a judge says of a net, and what its triggers do to the images `held`."""
    verdict = judge(key, model, variables, search)
    parts = ("norms", "margins", "qualified", "success", "neuron", "elevation", "threshold")
    out = {name: verdict.info[name] for name in parts if name in verdict.info}
    out |= {name: getattr(verdict, name) for name in ("index", "infected", "flagged", "p_value")}
    if "success" in out and "qualified" not in out:
        out["qualified"] = out["success"] >= judge.success  # type: ignore[attr-defined]
    found = offered(jax.random.fold_in(key, 1), judge, model, variables, search, verdict)
    if found is not None:
        out |= {**found._asdict(), "moved": moves(model, variables, held, found)}
    return {name: jnp.asarray(value) for name, value in out.items()}


def _pictured(
    model: Model, variables: Variables, search: Split, held: Split, mask: jax.Array,
    pattern: jax.Array,
) -> dict[str, jax.Array]:  # fmt: skip
    """What a trigger does to the net: the mean activation of each channel at a site, `[C]`, and
    the entropies of blends with other images (Strip's), of images without and with it.
    """
    clean = unit(held.image)
    stamped = stamp(Trigger(mask, pattern), clean)
    site = next((s for s in ("conv_last", "penultimate", *model.sites) if s in model.sites), None)
    found = {"image": clean[:SHOWN], "stamped": stamped[:SHOWN]}
    for name, x in (("clean", clean), ("trojan", stamped)):
        bits = entropies(
            jax.random.key(0), model, variables, x, search.image, BLENDS, blend="average"
        )
        found[f"entropy_{name}"] = bits.mean(1)
        if site is not None:
            act = model.apply(variables, x).acts[site]
            found[f"act_{name}"] = act.mean(range(act.ndim - 1))
    return found


def _screening(
    model: Model, key: jax.Array, variables: Variables, search: Split
) -> dict[str, jax.Array]:
    return screened(key, model, variables, search.image, ROUNDS)._asdict()


def _stimulating(
    model: Model, key: jax.Array, variables: Variables, search: Split
) -> dict[str, jax.Array]:
    """Which label each neuron lifts (see `Abs`), and its site."""
    judge = Abs(**Abs.presets["cpu"])
    rows = seeds(key, jnp.asarray(search.label), judge.images)
    image, label = unit(search.image[rows]), search.label[rows]
    found, site = judge.stimulate(model, variables, image, label)
    return {**found._asdict(), "site": jnp.asarray(site)}


def leaders_of(steps: Mapping[str, Mapping[str, np.ndarray]]) -> list[int]:
    """The labels that the screenings bring forward: those of the smallest patches; and, as a
    backdoor with a large trigger is no small patch, those that the first neurons of each site lift,
    and those that are won by the widest margins.
    """
    order = steps["screen-0"]["order"][:LEADERS].tolist()
    margins = steps.get("mm-bd-0", {}).get("margins", np.zeros(0))
    widest = np.argsort(-margins)[:WIDEST].tolist()
    return list(dict.fromkeys([*order, *lifted(steps), *widest]))


def lifted(steps: Mapping[str, Mapping[str, np.ndarray]]) -> list[int]:
    """The labels that the first neurons of each site lift."""
    found: list[int] = []
    if (neurons := steps.get("stimulated-0")) is not None:
        rank = np.where(neurons["suspect"], -neurons["elevation"], np.inf)
        for site in np.unique(neurons["site"]):
            mine = np.flatnonzero((neurons["site"] == site) & neurons["suspect"].astype(bool))
            found += neurons["label"][mine[np.argsort(rank[mine])][:LIFTED]].tolist()
    return list(dict.fromkeys(found))


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
        sweep.make_room(_programs)
        found = Program(fn, model, args)
    _programs[key] = found  # the last used is the last to go
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
        self.lean = False
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

    def made(self, judge: Judge) -> Program:
        """What shows a net to a judge."""
        images = self.images
        args = (_key(0), judge, self.variables, images.search, images.held)
        return program(examined, self.model, *args)

    def needs_of(self, judge: Judge) -> float:
        """About how many seconds a judge needs, once."""
        return self.needs(self.made(judge))

    def shown(self, judge: Judge, variables: Variables) -> dict[str, np.ndarray]:
        """What the first seed of a judge says of another net of this architecture."""
        return self.made(judge)(_key(0), judge, variables, self.images.search, self.images.held)

    def keep(self, name: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Keeps what a step found."""
        kept = {key: np.asarray(value) for key, value in arrays.items()}
        if self.folder is not None:
            with own.renamed(self.folder / "steps" / f"{name}.npz", zipfile.is_zipfile) as path:
                schema.write_arrays(path, kept, "arrays", packed=True)
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
        self.keep(name, found(*args) | {"seconds": time.monotonic() - start, "lean": self.lean})
        return True

    def ask(self, judge: Judge, found: Program, seed: int, reserve: float = 0.0) -> bool:
        """A seed of a judge as a step, see `step`; `found`: its program."""
        name = str(registry.name_of(judge))
        what = f"{name}, seed {seed}" if seed else name
        args = (_key(seed), judge, self.variables, self.images.search, self.images.held)
        return self.step(f"{name}-{seed}", what, found, *args, reserve=reserve)


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed)


def picture(work: Work, found: Found | None) -> None:
    """What the page shows of the leading trigger, as a step."""
    if found is None:
        return
    same = work.steps.get("pictures-0", {})
    if "mask" in same and np.array_equal(same["mask"], found.mask):
        return
    held = work.images.held
    order = np.random.default_rng(0).permutation(len(held.label))
    others = [*order[np.asarray(held.label)[order] != found.label], *order]  # its own come last
    some = held[np.asarray(others[:SHOWN_BY])]
    args = (work.variables, work.images.search, some, found.mask, found.pattern)
    made = program(_pictured, work.model, *args)(*args)
    shown = {"label": np.asarray(found.label), "judge": np.asarray(found.judge)}
    work.keep("pictures-0", made | shown | {"mask": found.mask, "pattern": found.pattern})


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
        judge, found = _planned(work, judge, tried)
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
            step = f"{name}-{seed}"
            fresh = step not in work.steps
            if work.ask(judge, found, seed, reserve) and fresh:
                _spaced(work, step, judge)


def budgeted(work: Work, tried: Sequence[Judge]) -> list[Judge]:
    """The judges, with no more than `LEAN` has where all of them once would take too long; as it
    was begun, so it goes on.
    """
    begun = [bool(arrays["lean"]) for arrays in work.steps.values() if "lean" in arrays]
    work.lean = begun[0] if begun else sum(map(work.needs_of, tried)) > work.seconds
    found = []
    for judge in tried:
        for path, most in LEAN.get(str(registry.name_of(judge)), {}).items() if work.lean else ():
            *parents, field = path.split(".")
            now = getattr(functools.reduce(getattr, parents, judge), field)
            judge = registry.replace(judge, path.split("."), min(now, most))
        found.append(judge)
    return found


def _planned(work: Work, judge: Judge, tried: Sequence[Judge]) -> tuple[Judge, Program]:
    """A judge and its program; where its search over all labels would take most of the time, it is
    for those alone that a screening brings forward.
    """
    search = work.images.search
    found, classes = work.made(judge), work.model.classes
    if not searches(judge) or classes < 3 * LEADERS:
        return judge, found
    begun = work.steps.get(f"{registry.name_of(judge)}-0")  # as it was begun, so it goes on
    whole = work.needs(found) < WHOLE * work.seconds and "screen-0" not in work.steps
    if whole if begun is None else "searched" not in begun:
        return judge, found
    screen = program(_screening, work.model, _key(0), work.variables, search)
    what = f"screening of {classes} labels"
    if not work.step("screen-0", what, screen, _key(0), work.variables, search):
        return judge, found
    if Abs().places(work.model):
        neurons = program(_stimulating, work.model, _key(0), work.variables, search)
        what = "stimulation of all neurons"
        work.step("stimulated-0", what, neurons, _key(0), work.variables, search)
    for other in tried:
        if isinstance(other, MmBd):  # it needs no leaders, and brings some
            work.ask(other, work.made(other), 0)
    leaders = sorted(leaders_of(work.steps))
    steps = LONGER * getattr(judge, "steps", 1)
    fields: dict[str, Any] = {"labels": tuple(leaders), "steps": steps}
    judge = dataclasses.replace(judge, **fields)
    return judge, work.made(judge)


def _spaced(work: Work, step: str, judge: Judge) -> None:
    """The p-value of a search that was for the leaders of a screening alone."""
    labels, arrays = getattr(judge, "labels", None), work.steps[step]
    if labels is None or "screen-0" not in work.steps:
        return
    least, norms = smallest(arrays), arrays["norms"][list(labels)]
    p_value = np.nan if len(norms) < 4 else 1.0
    if least is not None:  # smaller ones whose trigger does not work count nowhere
        sizes = norms[np.isfinite(norms) & (norms >= arrays["norms"][least])]
        p_value = nulls.by_spacings(sizes) if len(sizes) >= 4 else np.nan
    work.keep(step, arrays | {"p_value": p_value, "searched": np.asarray(labels)})


# --- The door ---

PARTS = "steps", "references"
"""Folders of an audit."""


@door
def audit(
    net: str | Path | Loaded,
    dataset: str | Path | Source,
    *,
    minutes: Annotated[float, Range(0, 1e6)] = 10.0,
    out: str | Path | None = None,
    alpha: Annotated[float, Range(1e-9, 0.5)] = 0.05,
    reference: Annotated[int, Range(0, 10_000)] = 0,
    tried: Sequence[Judge] | None = None,
    quiet: bool = False,
) -> Audit:
    """Whether a net is backdoored, by all judges that need no attack; see `decide` for the rule.

    `net`: a folder of `bdjax train` or `import`, or a file that `load_net` takes, or what that
    gave; `dataset`: a few hundred clean images, as `bdjax train` takes them; where its classes are
    not the net's, the net labels them. `minutes` of this call: judges for which it is too short are
    listed; the same call goes on from what is kept in `out` (None: nothing is kept). `reference`:
    so many clean nets, and as many backdoored ones, are trained for nulls and power, on top of the
    minutes. `tried`: these judges instead of all.
    """
    if reference == 1:
        raise BadInput("--reference 1: a spread between nets needs 2 or more")
    folder = None if out is None else own.at_home(out)
    if folder is not None:
        own.beside(folder, ("audit.json", "index.html"), PARTS)
    loaded = net if isinstance(net, Loaded) else _loaded(net)
    source = datasets.source(dataset)
    model, variables = loaded.model, loaded.variables
    data = sized(source, model.shape).load()
    called = "net" if isinstance(net, Loaded) else Path(net).name
    sweep.keep_compiled()
    images = images_of(model, variables, data)
    why = "" if images.accuracy is None else strange(images.accuracy, images.held.label)
    if why:  # before the minutes are spent
        sweep.say(f"warning: {why}", False)
    key = _identity(variables, images)
    if folder is not None and _owner(folder) not in (None, key):
        raise BadInput(
            f"{folder} holds the audit of another net, of other images or by another bdjax: give "
            "another --out"
        )
    chosen, others = judges(model, images.search) if tried is None else (list(tried), {})
    for judge in chosen if tried is not None else ():
        registry.admit(judge, model, images.search)
    work = Work(model, variables, images, folder, 60 * minutes, quiet)
    before = sum(float(arrays.get("seconds", 0.0)) for arrays in work.steps.values())
    start = time.monotonic()
    origin = loaded.about.get("origin")
    about = {
        "key": key, "version": __version__, "net": {
            "name": called, "shape": list(model.shape), "classes": model.classes,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {}))),
            "unverified": why or (isinstance(origin, Origin) and origin.unverified) or None,
        },
        "data": {
            "name": images.name, "searched": len(images.search.label),
            "held": len(images.held.label), "labelled": images.labelled,
            "accuracy": images.accuracy, "names": list(images.names),
        },
        "alpha": alpha, "minutes": minutes,
    }  # fmt: skip

    def result() -> Audit:
        spent = before + time.monotonic() - start
        found = _summary(work, chosen, others, about, spent)
        verdict = found["verdict"]
        given = "NET" if isinstance(net, Loaded) else str(net), datasets.word(source)
        return Audit(verdict["word"], verdict["reason"], found, work.steps, folder, given)

    where = "nothing is kept" if folder is None else f"what was finished is kept in {folder}"
    with kept(f"{where}; the same command goes on from there"), Stop() as stop:
        _begin(work, about, chosen, others)
        chosen = budgeted(work, chosen)
        work_through(work, chosen, stop)
        if reference and stop.asked is None:
            seen = {name: judge for judge in chosen
                    if f"{(name := str(registry.name_of(judge)))}-0" in work.steps}  # fmt: skip
            references.calibrate(work, seen, reference, loaded.net, data, stop)
        found = result()
        if folder is not None:
            picture(work, next(iter(triggers(found)), None))
            write(found)
        stop.check()
    return found


def _owner(folder: Path) -> str | None:
    """Whose audit a folder holds."""
    path = folder / "audit.json"
    return schema.read_json(path, "audit")["key"] if path.exists() else None


def _begin(work: Work, about: Mapping[str, Any], chosen: Sequence[Judge], others: Any) -> None:
    """Says whose folder it is before the first step, so that it can be gone on with."""
    if work.folder is not None:
        own.clear(work.folder)
        _write_json(work.folder, _summary(work, chosen, others, about, 0.0))


def _loaded(net: str | Path) -> Loaded:
    path = own.at_home(net)
    if not own.nameable(path) or not path.exists():
        raise BadInput(f"{net}: no such file or folder; give a net")
    return load_net(path)


def _identity(variables: Variables, images: Images) -> str:
    """What decides the numbers of an audit but for its judges: 16 hex digits."""
    digest = hashlib.sha256(repr((__version__, images.labelled)).encode())
    leaves = jax.tree_util.tree_leaves_with_path((variables, images.search, images.held))
    for place, leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(repr((str(place), array.dtype.str, array.shape)).encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]


def write(found: Audit) -> Path:
    """Writes `audit.json` and the page into the audit's folder; returns the page."""
    from bdjax.audit_page import page

    assert found.folder is not None
    _write_json(found.folder, found.about)
    place = found.folder / "index.html"
    with own.renamed(place) as path:
        path.write_text(page(found), encoding="utf-8")
    return place


def _write_json(folder: Path, about: Mapping[str, Any]) -> None:
    with own.renamed(folder / "audit.json") as path:
        path.write_text(schema.dump(about, "audit", indent=1), encoding="utf-8")


def _summary(
    work: Work, chosen: Sequence[Judge], others: Mapping[str, str], about: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """All of `audit.json`."""
    names = about["data"]["names"]
    called = {str(registry.name_of(judge)): judge for judge in chosen}
    done = {
        name: [work.steps[step] for i in range(SEEDS) if (step := f"{name}-{i}") in work.steps]
        for name in called
    }
    done = {name: steps for name, steps in done.items() if steps}
    calibration = references.nulls_of(work.steps, list(done), about["alpha"])
    said = {
        name: [calibration.seed(name, arrays) for arrays in steps] for name, steps in done.items()
    }
    complete = any(searches(called[name]) for name in done)
    verdict = decide(said, about["alpha"], complete, names)
    entries = [
        _entry(work.model, called[name], name, done[name], said[name], names) for name in done
    ]
    skipped = {
        name: work.skipped[f"{name}-0"]
        for name in called if f"{name}-0" in work.skipped and name not in done
    }  # fmt: skip
    missing = [name for name in called if name not in done and name not in skipped]
    left = {**others, **skipped, **dict.fromkeys(missing, "the audit ended before")}
    return {
        **about,
        "verdict": {
            **verdict._asdict(), "complete": complete,
            "name": None if verdict.label is None else class_name(verdict.label, names),
            "suspect": suspect(said, work.steps),
        },
        **calibration.about(),
        "judges": entries,
        "screened": _screen_entry(work.steps, names),
        "not_tried": [{"judge": name, "reason": why} for name, why in left.items()],
        "seconds": round(seconds, 1),
    }  # fmt: skip


def suspect(
    said: Mapping[str, Sequence[Seed]], steps: Mapping[str, Mapping[str, np.ndarray]]
) -> int | None:
    """The label that most seeds of the judge with the smallest p-value put first, whether that is
    small or not: where to look, not whom to accuse. After a screening, one that neurons lift goes
    before, where its trigger is no larger than half of those of the leaders are.
    """
    for arrays in steps.values():
        if "searched" in arrays and (mine := lifted(steps)):
            norms = arrays["norms"]
            least = min(mine, key=lambda k: norms[k])
            if norms[least] <= np.median(norms[steps["screen-0"]["order"][:LEADERS]]):
                return least
    known = {name: p for name, some in said.items() if math.isfinite(p := p_of(some))}
    for name in sorted(known, key=lambda name: known[name]):
        first = Counter(seed.labels[0] for seed in said[name] if seed.labels)
        if first:
            return first.most_common(1)[0][0]
    return None


def p_of(seeds: Sequence[Seed]) -> float:
    """The p-value of a judge's seeds."""
    return combined([seed.p_value for seed in seeds])


def _entry(
    model: Model, judge: Judge, name: str, steps: Sequence[Mapping[str, np.ndarray]],
    said: Sequence[Seed], names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What `audit.json` says of a judge."""
    infected = [bool(arrays["infected"]) for arrays in steps]
    first = steps[0]
    labels = []
    shown = {int(k) for k in first["label"]} if "label" in first else set()
    shown |= set(np.flatnonzero(first["flagged"]).tolist())
    for k in sorted(shown):
        entry: dict[str, Any] = {
            "label": k, "name": class_name(k, names), "flagged": bool(first["flagged"][k]),
            "norm": float(first["norms"][k]) if "norms" in first else None, "moved": None,
            "pixels": None,
        }  # fmt: skip
        best = _best_of(first, k)
        if best is not None:
            mask = first["mask"][best]
            entry |= {"moved": float(first["moved"][best]), "pixels": int(pixels(mask[None])[0])}
            entry["norm"] = float(mask.max(-1).sum()) if entry["norm"] is None else entry["norm"]
        labels.append(entry)
    return {
        "judge": name, "settings": registry.describe(judge),
        "word": "infected" if all(infected) else "undecided" if any(infected) else "no sign",
        "index": float(np.median([float(arrays["index"]) for arrays in steps])),
        "p_value": p_of(said),
        "seeds": [{"p_value": s.p_value, "index": float(a["index"]), "labels": list(s.labels)}
                  for s, a in zip(said, steps, strict=True)],
        "labels": labels, "neuron": _neuron(model, judge, first),
        "seconds": round(sum(float(arrays["seconds"]) for arrays in steps), 2),
    }  # fmt: skip


def _best_of(arrays: Mapping[str, np.ndarray], label: int) -> int | None:
    """The trigger for a label that moves most."""
    if "label" not in arrays:
        return None
    rows = np.flatnonzero((arrays["label"] == label) & arrays["valid"].astype(bool))
    return int(max(rows, key=lambda i: or_least(float(arrays["moved"][i])))) if len(rows) else None


def _neuron(model: Model, judge: Judge, arrays: Mapping[str, np.ndarray]) -> dict | None:
    """The site and the channel of the neuron whose trigger moves most."""
    if "neuron" not in arrays or not arrays["valid"].any():
        return None
    moved = np.where(arrays["valid"], arrays["moved"], -1)
    best = int(np.nan_to_num(moved, nan=-1).argmax())
    number, shapes = int(arrays["neuron"][best]), shapes_of(model)
    for site in judge.places(model):  # type: ignore[attr-defined]
        if number < shapes[site][-1]:
            return {"site": site, "channel": number, "label": int(arrays["label"][best])}
        number -= shapes[site][-1]
    return None


def _screen_entry(steps: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    if "screen-0" not in steps:
        return None
    order = steps["screen-0"]["order"]
    leaders = [class_name(k, names) for k in leaders_of(steps)]
    return {"labels": len(order), "leaders": leaders, "order": [int(k) for k in order[:100]],
            "seconds": round(float(steps["screen-0"]["seconds"]), 1)}  # fmt: skip


def lines(found: Audit) -> Iterator[str]:
    """What the terminal says of an audit."""
    about = found.about
    net, data = about["net"], about["data"]
    if net["unverified"]:
        yield f"UNVERIFIED     {net['unverified']}"
    verdict = about["verdict"]
    yield f"verdict        {verdict['word']}: {verdict['reason']}"
    if verdict["word"] != "infected" and verdict["suspect"] is not None:
        name = class_name(verdict["suspect"], data["names"])
        yield f"suspect        {name}: first among labels, which is no accusation"
    if verdict["p_value"] is not None and not math.isnan(verdict["p_value"]):
        yield (
            f"p              {verdict['p_value']:.2g}, corrected for the number of judges, at most "
            f"{about['alpha']:g} accuses; {null_words(about)}"
        )
    yield f"power          {power_words(about)}"
    if data["accuracy"] is not None:
        yield f"accuracy       {100 * data['accuracy']:.1f} % of {data['held']} held-out images"
    if about["screened"]:
        yield f"screening      of {about['screened']['labels']} labels lead " + ", ".join(
            about["screened"]["leaders"]
        )
    for judge in about["judges"]:
        p = judge["p_value"]
        said = "no p-value" if p is None or math.isnan(p) else f"p {p:.2g}"
        best = leading(judge)
        shown = ""
        if best is not None and best["moved"] is not None:
            shown = (
                f", {best['name']}: {100 * best['moved']:.0f} % of others moved on "
                f"{best['pixels']} pixels"
            )
        seeds = f" ({len(judge['seeds'])} seeds)" if len(judge["seeds"]) > 1 else ""
        text = f"{judge['word']}, {said}{seeds}{shown}, {judge['seconds']:.0f} s"
        yield f"  {judge['judge']:18} {text}"
    for one in about["not_tried"]:
        yield f"  {one['judge']:18} not tried: {one['reason']}"


def leading(judge: Mapping[str, Any]) -> dict[str, Any] | None:
    """The label that a judge points at: flagged, or else the one that its triggers reach best."""
    first = judge["seeds"][0]["labels"][:1]
    return max(
        judge["labels"],
        key=lambda k: (k["flagged"], k["label"] in first, or_least(_nan(k["moved"]))),
        default=None,
    )


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def null_words(about: Mapping[str, Any]) -> str:
    """By what p-values are."""
    if about["null"] == "references":
        return f"the null is that of {about['references']['each']} clean nets"
    why = (about["references"] or {}).get("why")
    return "the null is parametric" + (f": {why}" if why else ", no clean nets were trained")


def power_words(about: Mapping[str, Any]) -> str:
    """What is known of what this audit finds, and accuses wrongly."""
    if about["power"] is None:
        return "not measured (--reference N)"
    power, alarms = about["power"], about["false_alarms"]
    text = (
        f"finds {power['hits']} of {power['n']} planted backdoors "
        f"({100 * power['low']:.0f}–{100 * power['high']:.0f} %)"
    )
    if alarms is not None:
        text += (
            f"; accuses {alarms['hits']} of {alarms['n']} clean nets "
            f"({100 * alarms['low']:.0f}–{100 * alarms['high']:.0f} %)"
        )
    return text
