"""From cells to rows: cells that differ in numbers alone are stacked and run as one compiled
program.

A `study.Cell` names a victim (dataset × model × recipe × attack × seed) and what is done to it. The
victim of several defenses is trained once, in chunks that are checkpointed, and kept by the hash of
its configuration. Rows are on disk as soon as their group ends; a run that was interrupted goes on
where it stopped. Processes that share the work by victims (`Store.shard`) never talk to each other:
their rows are merged by whoever reads them.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import operator
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import identity, mesh, metrics, own, registry, schema
from bdjax.checkpoints import load_tree, old_checkpoint, old_victims, save_tree, write_tree
from bdjax.datasets import data_dir, fingerprint
from bdjax.datasets.base import Source, trainable
from bdjax.defenses.base import (
    Defense,
    Judge,
    SampleFilter,
    Training,
    judge,
    measure,
    split_scalars,
    targets_flagged,
)
from bdjax.loops import Loops, forget
from bdjax.models.layers import build
from bdjax.own import renamed
from bdjax.poison import makes_images
from bdjax.progress import Board, Progress, Stop, shown
from bdjax.store import Store, placed, recall, remember
from bdjax.study import Cell, Probe
from bdjax.train import (
    Recipe,
    advance,
    begin,
    evaluate,
    measuring_key,
    poisoned_set,
    poisoning_key,
    predict,
)
from bdjax.types import (
    Attack,
    BadInput,
    Dataset,
    Judgement,
    Model,
    Split,
    Splits,
    Unlabelled,
    Victim,
    Word,
    class_name,
    whole,
    word,
)

CHECKPOINT_EVERY = 30.0
"""Seconds of training between two checkpoints."""
SEEN, LASTING = 32, 3e13
"""Images a step, and the flops of a search that takes minutes on two cores."""
GROUP = 8, 64
"""How many victims a CPU and an accelerator take at a time: their rows are written before the next
ones are begun.
"""
NAMED = 16
"""The most labels that a row names."""
RANKED = 100
"""Labels from which on a first ranking is printed before a long search for triggers."""
PROGRAMS = 64
"""Compiled programs kept; fewer where they are `crowded`."""
ARCHITECTURES = 2
"""Architectures whose programs are kept: a process that works through many does not grow with each.
"""


def stack(items: Sequence[Any]) -> Any:
    """Pytrees of one structure as one pytree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *items)


def take(items: Any, index: Any) -> Any:
    """The item, or items, at `index` of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], items)


def compile_key(*values: Any) -> Any:
    """Equal where one program serves: the structure (static fields) and the shapes and types of the
    leaves.
    """
    leaves, structure = jax.tree.flatten(values)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _pieces(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    """`items` in pieces of about the same size, at most `most`: few sizes, few programs."""
    size = -(-len(items) // -(-len(items) // most)) if items else 1
    return (items[i : i + size] for i in range(0, len(items), size))


def groups(
    cells: Iterable[Cell], most: int, shard: tuple[int, int] | None = None
) -> list[list[Cell]]:
    """The cells of at most `most` victims that one program trains, with all that is done to them;
    each run once.

    Shard (i, n) has every n-th victim of all, counted through the programs.
    """
    found, seen = [], 0
    for alike in _grouped({cell.run_id: cell for cell in cells}.values(), _training):
        mine: dict[str, list[Cell]] = {}
        for cell in alike:
            mine.setdefault(cell.victim_id, []).append(cell)
        first, step = (0, 1) if shard is None else ((shard[0] - seen) % shard[1], shard[1])
        seen += len(mine)
        for names in _pieces(list(mine)[first::step], most):
            found.append([cell for name in names for cell in mine[name]])
    return found


def _training(cell: Cell) -> Any:
    return cell.dataset, cell.model, compile_key(cell.recipe, cell.attack)


def _kind(cell: Cell) -> Any:
    return cell.dataset, cell.model


def _judging(cell: Cell) -> Any:
    return compile_key(cell.defense, cell.probe)


def lanes_of(given: Any) -> Any:
    """Lanes as they are given: None, "auto" or a number, in digits too; `BadInput` for all else."""
    if given is None or (isinstance(given, str) and given == "auto"):
        return given
    try:
        return whole("lanes", given, 1)
    except BadInput as error:
        raise BadInput(f"{error}, nor auto") from None


def at_once(devices: Sequence[Any], lanes: int | str | None = None) -> int:
    """The most runs that are held on the devices at a time."""
    return len(devices) * max(
        GROUP[devices[0].platform != "cpu"], lanes if isinstance(lanes, int) else 1
    )


def footprint(cells: Sequence[Cell], devices: Sequence[Any], lanes: int | str | None = None) -> int:
    """Bytes that training a group takes on a device at least: the data, the states of its runs, and
    the activations at the sites of the lanes' batches.
    """
    data, recipe = cells[0].dataset.load(), cells[0].recipe
    model = build(cells[0].model, data.shape, data.classes)
    state = jax.eval_shape(lambda: begin(jax.random.key(0), model, recipe))
    x = jax.ShapeDtypeStruct((min(recipe.batch, len(data.train.label)), *data.shape), np.float32)
    acts = jax.eval_shape(lambda v, x: model.apply(v, x).acts, state.variables, x)
    runs = -(-len({cell.victim_id for cell in cells}) // len(devices))
    lanes = min(runs, lanes if isinstance(lanes, int) else mesh.default_lanes(runs))

    size = mesh.bytes_of
    return size((data.train, data.clean, data.test)) + runs * size(state) + lanes * size(acts)


class Clock:
    """Seconds spent, by stage: data, compile, train, defend, report."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})  # those of the parts before this one
        self.begun = time.monotonic() - self.seconds.pop("total", 0.0)

    def add(self, stage: str, since: float) -> None:
        """Books the time from `since` until now."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - since

    def whole(self) -> dict[str, float]:
        """Seconds by stage, and in all."""
        return {**self.seconds, "total": time.monotonic() - self.begun}

    def split(self, before: dict[str, float] | None = None, cells: int = 1) -> dict[str, float]:
        """Seconds of compiling, and of anything else for one of `cells`, since `before`."""
        compiling = self.seconds.get("compile", 0.0)
        found = {"compile": compiling, "run": (sum(self.seconds.values()) - compiling)}
        if before is None:
            return found
        return {
            "compile": found["compile"] - before["compile"],
            "run": (found["run"] - before["run"]) / cells,
        }


class Again(Exception):
    """A program did not fit into the device's memory; it was given fewer lanes."""


class Unfit(Exception):
    """A program does not fit into the device's memory with a single lane."""


class Trained(NamedTuple):
    """A trained victim, on the host: the attack as it is fired, and the net. `loss` is that of the
    last epoch.
    """

    attack: Any
    variables: Any
    loss: float


@dataclasses.dataclass
class Runner:
    """Runs cells into a store. `devices` as in `mesh.over_runs`, `lanes` too, or "auto": measured
    for each program; `on_rows` is told of each finished group; `live`: a table instead of bars.
    """

    store: Store
    experiment: str
    scale: str = "cpu"
    lanes: int | Literal["auto"] | None = None
    devices: Sequence[jax.Device] | None = None  # type: ignore[valid-type]
    quiet: bool = False
    on_rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None
    clock: Clock = dataclasses.field(default_factory=Clock)
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict)
    live: bool = False
    stale: identity.Stale | None = None
    """What to do with rows and victims that other code made; None: `run` asks by `BadInput`."""
    complete: bool = False
    """The cells are all of the experiment: where they do not say so, a row is shown no more."""
    board: Board = dataclasses.field(default_factory=Board)
    stop: Stop = dataclasses.field(default_factory=Stop)
    unlabelled: bool = False
    """The defender's and the test images have no labels: nothing is measured that takes them."""
    widths: dict[Any, int] = dataclasses.field(default_factory=dict)
    """The lanes of programs that were measured, or did not fit."""
    unfit: list[Cell] = dataclasses.field(default_factory=list)
    """What does not fit into the device's memory."""

    def __post_init__(self) -> None:
        keep_compiled()
        self.device = device_name()
        self.lanes = lanes_of(self.lanes)
        known = {name: hint for name, hint in registry.hints(Runner).items() if name != "lanes"}
        registry.check_given("a runner", known, {name: getattr(self, name) for name in known})
        self.places = list(self.devices or jax.local_devices()[:1])
        self.members: dict[str, list[tuple[Path, int, Any]]] | None = None
        self.codes: dict[str, dict[str, Any]] = {}
        self.made: dict[str, Any] = {}
        self.written: set[Path] = set()
        self.shown: dict[str, list[Cell]] = {}
        self.models: list[Model] = []  # the last used at the end
        self.counts: dict[str, dict[str, int]] = {}
        self.twins: set[str] = set()
        self.mine: set[str] = set()
        self.others: dict[str, Trained] = {}
        self.said: set[str] = set()
        self.last: tuple[Any, Any] = (None, None)
        # The last program of each stage: its lanes, and whether it was under `mesh.patches`.
        self.laid: dict[str, tuple[int, bool]] = {}
        self.planned: list[list[Cell]] = []
        self.size = 0  # how many runs side by side the plan has, done ones among them
        self.narrowed: set[Any] = set()
        self.patched: set[Any] = set()
        self.loops = Loops(self.stop)
        self.halved = False
        # The loss by epoch of the victims that were trained here, by name: NaN before a checkpoint.
        self.curves: dict[str, np.ndarray] = {}

    @registry.door
    def run(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """The finished rows of all `cells`, those of earlier runs and other shards included, in the
        order of `cells`: one for each place where a run is shown.
        """
        cells = list(cells)
        registry.check_given("a runner", {"cells": Sequence[Cell]}, {"cells": cells})
        cells = list({(c.run_id, c.table, c.row): c for c in cells}.values())
        self.shown = {}
        for cell in cells:
            self.shown.setdefault(cell.run_id, []).append(cell)
        self.codes = identity.codes(cells)
        with self.store.locked():
            mine = self.planned = self.groups(cells)
            done = self._done(itertools.chain(*mine))
            pending = [
                left
                for group in mine
                if (left := [cell for cell in group if cell.run_id not in done])
            ]
            for cell in itertools.chain(*pending):
                self._checked(cell)
            for group in pending:
                self._fits(group)
            pending = self._in_order(cells, mine, pending)
            total = sum(map(len, mine))
            finished = total - sum(map(len, pending))
            shard = "" if self.store.shard is None else "{}/{}".format(*self.store.shard)
            self.board = Board(
                self.store.progress, self.live, experiment=self.experiment, scale=self.scale,
                shard=shard, total=total, rows=finished, before=finished, groups=len(mine),
                group=len(mine) - len(pending), doing="",
                failed=len({r["run"] for r in self.store.rows() if "error" in r} & done),
                devices=f"{len(self.places)} × {self.device}", seconds=self.clock.whole(),
            )  # fmt: skip
            with self.stop, self.board:
                self._groups(pending)
        rows = {row["run"]: row for row in self.store.rows()}
        return [{**rows[c.run_id], **self._place(c)} for c in cells if c.run_id in rows]

    def _in_order(
        self, cells: Sequence[Cell], mine: Sequence[list[Cell]], pending: Sequence[list[Cell]]
    ) -> list[list[Cell]]:
        """The groups of `mine` that are `pending` in the order in which they are run: clean twins
        come before the victims that are compared with them.
        """
        self.twins = {cell.victim_id for cell in cells if cell.attack is None}
        self.mine = {cell.victim_id for cell in itertools.chain(*mine)}
        kinds = list(dict.fromkeys(_kind(group[0]) for group in pending))
        return sorted(pending, key=lambda g: (kinds.index(_kind(g[0])), g[0].attack is not None))

    def _groups(self, pending: list[list[Cell]]) -> None:
        for group in pending:
            self._group(group)
            self.board.count(group=1)

    def _fits(self, group: Sequence[Cell]) -> None:
        """Raises `BadInput` where not one victim of a group can be trained on these devices."""
        name = f"training {registry.name_of(group[0].model)}"
        mesh.fits(name, footprint(group[:1], self.places, 1), self.places[0])

    def _place(self, cell: Cell) -> dict[str, Any]:
        return {"experiment": self.experiment, "scale": self.scale, **cell.place}

    def _done(self, cells: Iterable[Cell]) -> set[str]:
        """Which of these runs need not be computed; rows that are shown in other places now than
        they were, or kept, are written once more. Asks where other code made rows or victims.
        """
        cells, rows = list(cells), {}
        for row in self.store.rows():
            rows.setdefault(row["run"], []).append(row)
        faults = {c.run_id: identity.differs(rows[c.run_id][0].get("code"), self.codes[c.run_id])
                  for c in cells if c.run_id in rows}  # fmt: skip
        old = [run for run, found in faults.items() if found]
        done = {run for run in faults if self.stale != "redo" or run not in old}
        if self.stale is None:
            left = {c.victim_id: c for c in cells if c.run_id not in done and c.stage != "train"}
            others = [c for c in left.values() if self._members(c) and not self._same(c)]
            if old or others:
                given = [rows[run][0] for run in old]
                identity.ask(self.store.folder, given, [faults[r] for r in old], len(others))
        moved = []
        for run in filter(done.__contains__, faults):
            before = [placed(row) for row in rows[run]]
            places = [self._place(cell) for cell in self.shown[run]]
            here = {name: places[0][name] for name in ("experiment", "scale")}
            kept = [
                place for place in before
                if place in places or not self.complete or not here.items() <= place.items()
            ]  # fmt: skip
            places = kept + [place for place in places if place not in before]
            other = {"kept": True} if faults[run] else {}  # for reports that lack a method
            if places != before or ("kept" in rows[run][0]) != bool(other):
                outside = (*identity.PLACE, "kept")
                row = {k: v for k, v in rows[run][0].items() if k not in outside} | other
                moved += [{**row, **place, "written": time.time()} for place in places]
        if moved:
            self.store.append(moved)
        return done

    def _members(self, cell: Cell) -> list[tuple[Path, int, Any]]:
        """Where the victim of a cell is kept, and by which code it was made. A checkpoint holds the
        victims of a group, stacked; a file says which.
        """
        if self.members is None:
            self.members = {}
            for path in (self.store.folder / "victims").glob("*/members.json"):
                held = _held(path)
                for i, name in enumerate(held["victims"]):
                    found = (path.parent, i, held.get("code"))
                    self.members.setdefault(name, []).append(found)
        return self.members.get(cell.victim_id, [])

    def _kept(self, path: Path) -> None:
        """Takes note of victims that were written to `path` just now."""
        held = _held(path / "members.json")
        for i, name in enumerate(held["victims"]):
            if self.members is not None:
                self.members.setdefault(name, []).append((path, i, held.get("code")))
        self.written.add(path)

    def _usable(self, cell: Cell) -> tuple[Path, int, Any] | None:
        """The victim of a cell that is to be used: one of the code at hand or, unless those are to
        be made anew, of other code.
        """
        found = self._same(cell) or (self._members(cell) if self.stale != "redo" else [])
        return found[0] if found else None

    def _same(self, cell: Cell) -> list[tuple[Path, int, Any]]:
        """Where a cell's victim of the code at hand is kept."""
        now = self._code(cell)
        return [
            one for one in self._members(cell)
            if one[0] in self.written or not identity.differs(one[2], now)
        ]  # fmt: skip

    def _codes(self, cell: Cell) -> dict[str, Any]:
        """The code at hand, as it was when this began."""
        if cell.run_id not in self.codes:
            self.codes |= identity.codes([cell])
        return self.codes[cell.run_id]

    def _code(self, cell: Cell) -> dict[str, Any]:
        """The code at hand that trains a cell's victim."""
        return {p: c for p, c in self._codes(cell).items() if p in identity.VICTIM}

    def groups(self, cells: Iterable[Cell]) -> list[list[Cell]]:
        """This process's cells, as they are run."""
        return groups(cells, at_once(self.places, self.lanes), self.store.shard)

    def victim(self, cell: Cell) -> tuple[Model, Any, Any]:
        """The model, the attack as it is fired, and the variables of a cell's victim; trained if it
        is not there yet.
        """
        model, shared = self._data(cell)
        victims, _ = self._victims([cell], model, shared)
        if cell.victim_id not in victims:
            raise BadInput(self.complaint())
        attack, variables, _ = jax.tree.map(jnp.asarray, victims[cell.victim_id])
        return model, attack, variables

    def defend(
        self, cell: Cell, model: Model, variables: Any, trained: int | None = None
    ) -> tuple[dict[str, Any], Any]:
        """The row of `cell` for a given victim, and the repaired variables where its defense
        repairs. `trained`: the seed of the victim's training, the cell's if not given.
        """
        self._checked(cell, model, trained)
        built, shared = self._data(cell)
        none = {"compile": 0.0, "run": 0.0}
        replaces = cell.stage == "train"  # it has no victim, but that one's recipe and images
        try:
            with self.stop:
                if not replaces and not self.unlabelled:
                    item = self._stacked([variables])
                    (acc,) = np.asarray(self._ran("evaluate", _accuracy, model, shared, item))[:1]
                    warn(acc, **_test(cell))
                self._first_ranking(cell, model, shared, variables)
                victims = None if replaces else [(cell.attack, variables)]
                model = built if replaces else model
                return self._judged([cell], model, shared, victims, none, True, trained)
        except Unfit as error:
            self.unfit.append(cell)
            raise BadInput(self.complaint()) from error

    def _first_ranking(self, cell: Cell, model: Model, shared: Any, variables: Any) -> None:
        """Prints which labels lead after a short search, where the whole one has many to try."""
        judge = cell.defense
        if model.classes < RANKED or judge is None or "rank" not in judge.hooks:
            return
        items = self._stacked([(jax.random.key(cell.seed), judge, variables)])
        norms = np.asarray(self._ran("defend", _rank, model, shared, *items))[0]
        order = np.argsort(norms)[: np.isfinite(norms).sum()]
        names = cell.dataset.load().names
        leaders = ", ".join(f"{class_name(k, names)} ({norms[k]:.3g})" for k in order[:10])
        say(
            f"first ranking of {len(order)} labels by the norm of a short search, median "
            f"{np.median(norms[order]):.3g}: {leaders}, …",
            self.quiet,
        )

    def _checked(self, cell: Cell, model: Model | None = None, trained: int | None = None) -> None:
        """Raises `BadInput` where the cell cannot be run, on `model` where its net is given, and
        counts what its attack poisons under the seed of the training: once for a victim.
        """
        check(cell, model)
        if cell.attack is None or cell.victim_id in self.counts:
            return
        data = cell.dataset.load()
        key = poisoning_key(jax.random.key(cell.seed if trained is None else trained))
        found = cell.attack.count(key, jnp.asarray(data.train.label), data.classes)
        self.counts[cell.victim_id] = found
        if found["poisoned"] < found["asked"]:
            line = (
                f"{registry.name_of(cell.attack)}: {found['asked']} rows are to be poisoned, there "
                f"are {found['poisoned']} for it: all of them are"
            )
            if line not in self.said:
                say(line, False)
            self.said.add(line)

    def complaint(self) -> str:
        """One line on what does not fit."""
        return f"{self.too_large(self.device)}; take smaller batches or a larger device"

    def too_large(self, device: str) -> str:
        """What does not fit."""
        kinds = {
            f"{registry.name_of(c.defense) or 'training'} on {registry.name_of(c.model)}"
            for c in self.unfit
        }
        what = f"{len(self.unfit)} runs do not fit into the memory of {device} even one at a time"
        return f"{what}: {', '.join(sorted(kinds))}"

    def _data(self, cell: Cell) -> tuple[Model, Any]:
        start = time.monotonic()
        data = cell.dataset.load()
        if fingerprint(data) != cell.data:
            raise BadInput(f"{data.name}: its files changed while this ran: start again")
        if self.last[0] is not data:
            train, *others = (
                Split(jnp.asarray(s.image), jnp.asarray(s.label))
                for s in (data.train, data.clean, data.test)
            )
            if self.unlabelled:
                others = [split._replace(label=Unlabelled()) for split in others]
            splits = Splits(train, *others)
            self.last = data, self._placed(splits, jnp.zeros(1))[0]
        self.clock.add("data", start)
        model = build(cell.model, data.shape, data.classes)
        self._at_hand(model)
        return model, self.last[1]

    def _at_hand(self, model: Model) -> None:
        """Makes `model` the architecture at hand, and drops what an earlier one left behind: its
        programs, and what JAX keeps of the small ones that ran beside them.
        """
        self.models = [*(m for m in self.models if m is not model), model]
        if len(self.models) > ARCHITECTURES:
            old = self.models.pop(0)
            for kept in (self.programs, self.widths):
                for key in [key for key in kept if key[-1] is old]:
                    del kept[key]
            self.narrowed &= self.widths.keys()
            self.patched &= self.widths.keys()
            jax.clear_caches()
            _trim()

    def _group(self, cells: list[Cell]) -> None:
        self.halved, self.laid = False, {}
        model, shared = self._data(cells[0])
        none = {"compile": 0.0, "run": 0.0}
        # Victims first, then what needs them; defenses that replace training come last, as they
        # need no victim.
        needing = [cell for cell in cells if cell.stage != "train"]
        victims, seconds = self._victims(needing, model, shared) if needing else ({}, none)
        self.stop.check()
        fitting = [cell for cell in needing if cell.victim_id in victims]
        self.unfit += [cell for cell in needing if cell.victim_id not in victims]
        for alike in _grouped(fitting, _judging):
            whole = [cell for cell in alike if np.isfinite(victims[cell.victim_id].loss)]
            if lost := [cell for cell in alike if not np.isfinite(victims[cell.victim_id].loss)]:
                self._failed(lost, "training diverged: the loss is not finite")

            def judged(piece: Sequence[Cell]) -> None:
                self._judged(
                    piece, model, shared, [victims[cell.victim_id][:2] for cell in piece], seconds
                )

            most, size = self._together(alike)
            for piece in _pieces(whole, most):
                with self._sized(size):
                    self.unfit += self._halved(piece, judged)
                self.stop.check()
        self.halved = False
        for alike in _grouped((c for c in cells if c.stage == "train"), _judging):
            most, size = self._together(alike)
            for piece in _pieces(alike, most):
                with self._sized(size):
                    self.unfit += self._halved(
                        piece, lambda piece: self._judged(piece, model, shared, None, none)
                    )
                self.stop.check()

    def _planned(self, cell: Cell) -> list[Cell]:
        """The group of the plan that a cell is in, with what of it is done."""
        return next((g for g in self.planned if any(c.run_id == cell.run_id for c in g)), [])

    def _together(self, cells: Sequence[Cell]) -> tuple[int, int]:
        """How many of `cells`, judged alike, one program judges; and, where they go side by side,
        how many the plan has there. What is done leaves places that others fill, so that a run that
        goes on has the programs, and the digits, of one that was never broken.
        """
        first = cells[0]
        group = [c for c in self._planned(first) if c.stage == first.stage] or cells
        count = sum(_judging(cell) == _judging(first) for cell in group)
        most = self._side_by_side(count)
        return most, min(count, most) if most > len(self.places) else 0

    @contextlib.contextmanager
    def _sized(self, size: int) -> Iterator[None]:
        """Inside, fewer items than `size` are filled up."""
        before, self.size = self.size, size
        try:
            yield
        finally:
            self.size = before

    def _side_by_side(self, runs: int) -> int:
        """How many of so many runs are judged by one program: what runs at a time, so that rows are
        written, and a kill costs, victim by victim where one comes after another.
        """
        lanes = self.lanes if isinstance(self.lanes, int) else mesh.default_lanes(runs)
        return min(len(self.places) * lanes, at_once(self.places, self.lanes))

    def _halved(self, cells: Sequence[Cell], work: Callable[[Sequence[Cell]], Any]) -> list[Cell]:
        """Does `work` for `cells`, in halves where all are too many for the device's memory; what
        does not fit alone.
        """
        try:
            work(cells)
            return []
        except Unfit:
            if len(cells) == 1:
                say(f"out of memory with a single run: {cells[0].row} is left out", self.quiet)
                return [cells[0]]
        middle, self.halved, self.size = len(cells) // 2, True, 0
        say(
            f"out of memory with one lane: {len(cells)} runs go on as {middle} and "
            f"{len(cells) - middle}",
            self.quiet,
        )
        return self._halved(cells[:middle], work) + self._halved(cells[middle:], work)

    def _victims(
        self, cells: Sequence[Cell], model: Model, shared: Any
    ) -> tuple[dict[str, Trained], dict[str, float]]:
        """The victims of `cells` by name, without those that do not fit; and seconds a victim.
        Those that are not there yet are trained, all in one program.
        """
        owner = {cell.victim_id: cell for cell in reversed(cells)}
        names = list(dict.fromkeys(cell.victim_id for cell in cells))
        seconds = {"compile": 0.0, "run": 0.0}
        before = self.clock.split()
        found: dict[str, Trained] = {}

        def train(missing: Sequence[Cell]) -> None:
            trained, losses = self._trained(missing, model, shared)
            names, code = [cell.victim_id for cell in missing], self._code(missing[0])
            path = self.store.folder / "victims" / registry.digest(names, code)
            about = {"victims": names, "code": code, "how": self._how()}
            about |= {"halved": True} if self.halved else {}
            with renamed(path, old_victims) as temporary:
                temporary.mkdir()
                write_tree(temporary / "arrays", (trained, losses))
                (temporary / "members.json").write_text(schema.dump(about, "members"))
            self._trained_out(self._partial(missing))
            self._kept(path)

        if missing := [owner[name] for name in names if self._usable(owner[name]) is None]:
            with self._sized(self._trains(missing)):
                self._halved(missing, train)
            seconds = self.clock.split(before, len(missing))
        one = jax.eval_shape(lambda: (_untrained(cells[0], model, shared), jnp.zeros(())))
        places = {name: held for name in names if (held := self._usable(owner[name])) is not None}
        for path in dict.fromkeys(path for path, _, _ in places.values()):
            about = _held(path / "members.json")
            self.halved |= about.get("halved", False)
            how = about.get("how") or {}
            patched = how.get("patches", ())
            self.laid |= {k: (n, k in patched) for k, n in how.get("lanes", {}).items()}
            held = about["victims"]
            some = [len(held)]
            like = jax.tree.map(
                lambda leaf, some=some: jax.ShapeDtypeStruct((*some, *leaf.shape), leaf.dtype), one
            )
            both, losses = load_tree(path / "arrays", like)
            for i, name in enumerate(held):
                if name in places and places[name][:2] == (path, i):
                    self.made[name] = places[name][2]
                    attack, variables = take(both, i)
                    found[name] = Trained(attack, variables, float(losses[i]))
        return found, seconds

    def _trains(self, cells: Sequence[Cell]) -> int:
        """How many victims the plan trains side by side with those of `cells`; 0 where they go one
        after another.
        """
        group = self._planned(cells[0]) or cells
        count = len({cell.victim_id for cell in group if cell.stage != "train"})
        return count if self._side_by_side(count) > len(self.places) else 0

    def _trained_out(self, checkpoint: Path) -> None:
        """A training's victims are kept: it needs its checkpoint no more."""
        own.remove(checkpoint, old_checkpoint)

    def _partial(self, cells: Sequence[Cell]) -> Path:
        names = [cell.victim_id for cell in cells]
        # Two shards may train the same clean twin.
        names += [self.store.suffix] if self.store.suffix else []
        names += [str(self.size)] if self.size else []
        return self.store.folder / "partial" / registry.digest(names, self._code(cells[0]))

    def _trained(self, cells: Sequence[Cell], model: Model, shared: Any) -> tuple[Any, np.ndarray]:
        """The victims of `cells`, `(attack, variables)` stacked, and their losses."""
        label = f"training {len(cells)} × {registry.name_of(cells[0].model)}"
        label += "" if cells[0].attack is None else f" ({registry.name_of(cells[0].attack)})"
        self.board.tell(doing=label)
        items = self._stacked(
            [(jax.random.key(cell.seed), cell.recipe, bound(cell, shared)) for cell in cells]
        )
        if cells[0].attack is not None and cells[0].attack.trains:
            say(f"{label}: one program, no progress before its end", self.quiet)
            victims, losses = self._ran("train", _whole_training, model, shared, *items)
        else:
            while True:
                try:
                    states, losses = self._epochs(cells, label, model, shared, items)
                    break
                except (
                    Again
                ):  # The states were given away: they are read back from the last checkpoint.
                    continue
            victims = (items[2], states.variables)
        return take(jax.device_get(victims), slice(len(cells))), np.asarray(losses)[: len(cells)]

    def _epochs(
        self, cells: Sequence[Cell], label: str, model: Model, shared: Any, items: Any
    ) -> tuple[Any, Any]:
        """Trains, one program an epoch, from the last checkpoint on; writes one every half minute,
        while it goes on.
        """
        epochs, folder = cells[0].recipe.epochs, self._partial(cells)
        states = self._ran("train", _begin, model, shared, *items)
        losses = jnp.zeros(len(jax.tree.leaves(items)[0]))
        if folder.exists():
            states, losses = load_tree(folder, (states, losses))
            states, losses = self._placed(shared, (states, losses))[1]
        first = int(np.asarray(states.epoch)[0])
        curves = np.full((epochs, len(losses)), np.nan)
        saved, writing = time.monotonic(), None
        with (
            ThreadPoolExecutor(1) as writer,
            Progress(epochs - first, label, self.quiet or self.board.live) as bar,
        ):
            for epoch in range(first, epochs):
                states, losses = self._call(
                    "train", _epoch, model, shared, *items, states, donate=(len(items) + 1,)
                )
                curves[epoch] = np.asarray(losses)
                note = f"loss {curves[epoch].mean():.3f}"
                bar.step(note)
                doing = f"{label}, epoch {epoch + 1}/{epochs}, {note}"
                self.board.tell(doing=doing, seconds=self.clock.whole())
                last, ending = epoch + 1 == epochs, self.stop.asked is not None
                if not last and (ending or time.monotonic() - saved > CHECKPOINT_EVERY):
                    if writing is not None:
                        writing.result()
                    # Copied from the device now, as the next epoch reuses the memory; written while
                    # it runs.
                    writing = writer.submit(save_tree, folder, jax.device_get((states, losses)))
                    saved = time.monotonic()
                    if ending:
                        writing.result()
                        say(f"{label}: saved after epoch {epoch + 1} of {epochs}", self.quiet)
                        self.stop.check()
            if writing is not None:
                writing.result()
        self.curves |= {cell.victim_id: curves[:, i] for i, cell in enumerate(cells)}
        return states, losses

    def _stacked(self, items: Sequence[Any]) -> Any:
        """The items on the devices, with copies of the last one up to the plan's `size`."""
        count = max(len(items), self.size)
        more = count - len(items) + -count % len(self.places)
        return self._placed((), stack([*items, *[items[-1]] * more]))[1]

    def _placed(self, shared: Any, items: Any) -> tuple[Any, Any]:
        return mesh.place(shared, items, self.places)

    def _call(
        self,
        stage: str,
        fn: Callable,
        model: Model,
        shared: Any,
        *items: Any,
        donate: tuple[int, ...] = (),
    ) -> Any:
        """`fn(model, shared, *item)` of all items, compiled once for all groups that it serves.
        Raises `Again` where it did not fit and has fewer lanes now.
        """
        # Last the architecture at hand, which a defense may have wrapped in another one.
        kept = self.loops.place is not None
        key = (fn, model, compile_key(shared, items), kept, *self.models[-1:])
        each = -(-len(jax.tree.leaves(items)[0]) // len(self.places))
        try:
            program = self.programs.pop(key, None)
            if program is None:
                make_room(self.programs)
                lanes = self.widths.get(key) or self._lanes(key, each, fn, model, shared, items)
                start = time.monotonic()
                with mesh.patches(key in self.patched):
                    program = compiled(fn, model, shared, items, lanes, self.places, donate)
                self.clock.add("compile", start)
            self.programs[key] = program  # the last used is the last to go
            self.halved |= key in self.narrowed
            start = time.monotonic()
            out = jax.block_until_ready(program(shared, *items))
            if self.loops.stopped:
                say("saved as far as it was: the same command goes on from there", self.quiet)
                self.stop.check()
        except jax.errors.JaxRuntimeError as error:
            self._narrow(key, each, fn, error)
        self.clock.add(stage, start)
        self.laid[stage] = self._width(key, each), key in self.patched
        return out

    def _width(self, key: Any, each: int) -> int:
        """The lanes with which a program of `each` runs a device is, or was tried to be, run."""
        lanes = self.lanes if isinstance(self.lanes, int) else mesh.default_lanes(each)
        return min(self.widths.get(key) or lanes, each)

    def _narrow(self, key: Any, each: int, fn: Callable, error: Exception) -> NoReturn:
        if not out_of_memory(error):
            raise error
        lanes = self._width(key, each)
        self.programs.pop(key, None)
        if lanes == 1:
            raise Unfit from error
        self.widths[key] = lanes // 2
        self.narrowed.add(key)
        name = fn.__name__.strip("_")
        say(
            f"out of memory: {name} goes on with {lanes // 2} lanes a device instead of {lanes}",
            self.quiet,
        )
        raise Again from error

    def _lanes(
        self, key: Any, each: int, fn: Callable, model: Model, shared: Any, items: Any
    ) -> int | None:
        """The lanes of a program; under "auto" measured once for a device kind, as is whether
        `mesh.patches` is faster with them, and remembered in the user's cache.
        """
        if self.lanes != "auto":
            return self.lanes
        if each == 1 or mesh.default_lanes(each) == 1:
            return 1
        shapes = [(leaf.shape[1:], str(leaf.dtype)) for leaf in jax.tree.leaves(items)]
        text = re.sub(
            " at 0x[0-9a-f]+",
            "",
            repr((model, jax.tree.structure(items), shapes, compile_key(shared))),
        )
        name = (
            f"{device_name()}, jax {jax.__version__}, {fn.__name__.strip('_')} "
            f"{registry.digest(text)}"
        )
        known = self._recalled(name)
        if known["lanes"] == known["tried"] < each:  # more lanes than were ever at hand
            start = time.monotonic()

            @functools.cache
            def seconds(lanes: int, by_patches: bool = False) -> float:
                some = mesh.place((), take(items, slice(lanes)), self.places[:1])[1]
                try:
                    with mesh.patches(by_patches):
                        program = compiled(fn, model, shared, some, lanes, self.places[:1])
                    begun = time.monotonic()
                    jax.block_until_ready(program(shared, *some))
                    return (time.monotonic() - begun) / lanes
                except jax.errors.JaxRuntimeError as error:
                    if lanes == 1 or not out_of_memory(error):
                        raise
                    return math.inf

            def held(lanes: int) -> float:
                return bytes_with(lanes, fn, model, shared, items, self.places)

            first = mesh.fitting(held, mesh.room(self.places[0]) or 0, each)
            lanes = mesh.widest(seconds, each, max(first, 1))
            # One lane's kernels are no grouped convolution.
            by_patches = lanes > 1 and seconds(lanes, True) < 0.9 * seconds(lanes)
            known = {"lanes": lanes, "tried": each, "patches": by_patches}
            known = self._remembered(name, known)
            say(
                f"{fn.__name__.strip('_')}: {lanes} lanes are fastest on {device_name()}"
                + (", convolutions as products of patches" if by_patches else ""),
                self.quiet,
            )
            self.clock.add("probe", start)
        if known.get("patches"):
            self.patched.add(key)
        self.widths[key] = min(known["lanes"], each)
        return self.widths[key]

    def _recalled(self, name: str) -> dict[str, Any]:
        return recall("lanes").get(name, {"lanes": 0, "tried": 0})

    def _remembered(self, name: str, lanes: dict[str, Any]) -> dict[str, Any]:
        remember("lanes", name, lanes)
        return lanes

    def _ran(self, stage: str, fn: Callable, model: Model, shared: Any, *items: Any) -> Any:
        """The outputs of `fn` for all items."""
        while True:
            try:
                return self._call(stage, fn, model, shared, *items)
            except Again:
                continue

    def _judged(
        self,
        cells: Sequence[Cell],
        model: Model,
        shared: Any,
        victims: Any,
        seconds: Any,
        keep: bool = False,
        trained: int | None = None,
    ) -> tuple[dict[str, Any], Any]:
        """Applies one defense (or none) to the victims of `cells`, `(attack, variables)` each, and
        writes the rows.

        Returns the first row and, with `keep`, the first repaired variables.
        """
        stage, defense = cells[0].stage, cells[0].defense
        before = self.clock.split()
        self.laid = {k: n for k, n in self.laid.items() if k == "train" and victims is not None}
        label = (
            f"{registry.name_of(cells[0].defense) or 'no defense'} on {len(cells)} × "
            f"{registry.name_of(cells[0].model)}"
        )
        self.board.tell(doing=label)
        defenses = self._prepared(cells, model, shared)
        self.stop.check()
        victims = victims or [(bound(cell, shared), None) for cell in cells]
        keys, known = zip(*(_keys(cell, trained) for cell in cells))
        recipes = [cell.recipe for cell in cells]
        items = zip(keys, defenses, victims, recipes, known, strict=True)
        keys, defenses, (attacks, variables), recipes, known = self._stacked(list(items))
        found, arrays, judged, repaired, searching = {}, {}, model, None, None
        if defense is not None:
            say(label, self.quiet or self.board.live)
            parts = {"variables": variables, "attack": attacks, "recipe": recipes, "key": known}
            # One program serves the victims of all attacks, where neither the defense nor its
            # report looks at the attack.
            needs = {*defense.needs, *(["attack"] if "report" in defense.hooks else [])}
            parts = {name: part if name in needs else None for name, part in parts.items()}
            items = (keys, defenses, parts)
            with self.loops.within(searching := self._searching(cells, model)):
                found, arrays, repaired = self._ran("defend", _defended, model, shared, *items)
            if repaired is not None:
                variables, judged = repaired, defense.wrap(model)
        # What passes a filter is measured there.
        if stage != "inputs" and not self.unlabelled:
            measured = self._ran("evaluate", _measured, judged, shared, keys, attacks, variables)
            found, arrays = {**measured[0], **found}, {**measured[1], **arrays}
        if cells[0].probe is not None:
            probes = self._stacked([cell.probe for cell in cells])
            probed = self._ran(
                "evaluate", _probed, judged, shared, keys, probes, attacks, variables
            )
            found, arrays = {**found, **probed[0]}, {**arrays, **probed[1]}
        found, arrays = jax.device_get((found, arrays))
        if "flagged" in arrays and cells[0].attack is not None:
            flagged = arrays["flagged"][: len(cells)]  # the rest is padding
            aims = np.stack([_targets(cell, model.classes) for cell in cells])
            found["target_flagged"] = targets_flagged(flagged, aims)
        spent = self.clock.split(before, len(cells))
        if stage is None:
            spent = {name: value + seconds[name] for name, value in spent.items()}
        twins = {} if stage is not None else self._twins(cells, model, shared, keys, attacks)
        rows = []
        for i, cell in enumerate(cells):
            if arrays:
                self.store.save_arrays(cell.run_id, take(arrays, i))
            measured = {name: np.asarray(value[i]).item() for name, value in found.items()}
            row = self._row(cell, measured, spent)
            if "flagged" in arrays:
                row["labels"] = _labels(cell, arrays["flagged"][i])
            rows.append(row | ({"twin": twins[cell.run_id]} if cell.run_id in twins else {}))
        self._written(rows)
        if searching is not None:
            forget(searching)
        return rows[0], take(repaired, 0) if keep and repaired is not None else None

    def _searching(self, cells: Sequence[Cell], model: Model) -> Path | None:
        """Where a long search of one victim on one device is kept; None for what is not one."""
        (cell, *more), judges = cells, (p for p in nested(cells[0].defense) if isinstance(p, Judge))
        if more or len(self.places) > 1 or not any(lasts(judge, model) for judge in judges):
            return None
        name = registry.digest("search", cell.run_id, self._code(cell))
        return self.store.folder / "partial" / name

    def _twins(
        self, cells: Sequence[Cell], model: Model, shared: Any, keys: Any, attacks: Any
    ) -> dict[str, dict[str, Any]]:
        """What the attacks of victims do to their clean twins, where these are among the cells that
        are run: accuracy and success by row.
        """
        if attacks is None:
            return {}
        twins = [cell.twin for cell in cells]
        mine = [i for i, twin in enumerate(twins) if twin.victim_id in self.twins]
        if not mine:
            return {}
        try:
            nets = self._clean([twins[i] for i in mine], model, shared)
        except Unfit:
            return {}
        mine = [i for i in mine if (net := nets.get(twins[i].victim_id)) and np.isfinite(net.loss)]
        if not mine:
            return {}
        items = [(take((keys, attacks), i), nets[twins[i].victim_id].variables) for i in mine]
        (keys, attacks), variables = self._stacked(items)
        found, _ = self._ran("evaluate", _measured, model, shared, keys, attacks, variables)
        found = {name: np.asarray(found[name]) for name in ("acc_test", "asr_all", "asr_nt")}
        return {
            cells[i].run_id: {"victim": twins[i].victim_id}
            | {k: v[n].item() for k, v in found.items()}
            for n, i in enumerate(mine)
        }

    def _clean(self, cells: Sequence[Cell], model: Model, shared: Any) -> Mapping[str, Trained]:
        """The clean victims of `cells`. One that another shard trains and writes is trained here
        too, and kept in memory: shards never wait for each other.
        """
        here = [cell for cell in cells if cell.victim_id in self.mine]
        found = self._victims(here, model, shared)[0] if here else {}
        others = {c.victim_id: c for c in cells if c.victim_id not in self.mine}
        if missing := [cell for name, cell in others.items() if name not in self.others]:
            with self._sized(0):
                (attack, variables), losses = self._trained(missing, model, shared)
            self._trained_out(self._partial(missing))
            for i, cell in enumerate(missing):
                net = Trained(attack, take(variables, i), float(losses[i]))
                self.others[cell.victim_id] = net
        return {**found, **{name: self.others[name] for name in others}}

    def _prepared(self, cells: Sequence[Cell], model: Model, shared: Any) -> list[Defense | None]:
        """The cells' defenses with what they learn before they see a victim: once for a data set
        and an architecture, whatever the victims' seeds.
        """
        defense = cells[0].defense
        if defense is None or "prepare" not in defense.hooks:
            return [cell.defense for cell in cells]
        paths = [self._preparation(cell) for cell in cells]
        for path, cell in dict(zip(paths, cells, strict=True)).items():
            if not path.exists():
                made = take(self._ran("defend", _prepare, model, shared, stack([cell.defense])), 0)
                try:
                    save_tree(path, made)
                except BadInput:  # Another shard was quicker.
                    if not path.exists():
                        raise
        like = jax.eval_shape(lambda d: _prepare(model, shared, d), defense)
        return [load_tree(path, like) for path in paths]

    def _preparation(self, cell: Cell) -> Path:
        """Where what a cell's defense has prepared is kept."""
        name = registry.digest(
            cell.data,
            identity.plain(cell.config["model"]),
            identity.plain(cell.config["defense"]),
            [self._codes(cell).get(part) for part in ("training", "judging", "model", "defense")],
        )
        return self.store.folder / "prepared" / name

    def _failed(self, cells: list[Cell], reason: str) -> None:
        self._written(
            [
                {**self._row(cell, {}, {"compile": 0.0, "run": 0.0}), "error": reason}
                for cell in cells
            ]
        )

    def _written(self, rows: list[dict[str, Any]]) -> None:
        self.store.append(rows)
        self.board.tell(seconds=self.clock.whole())
        self.board.count(rows=len(rows), failed=sum("error" in row for row in rows))
        self.on_rows(rows)

    def _row(self, cell: Cell, found: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        names = {
            part: registry.name_of(getattr(cell, part))
            for part in ("dataset", "model", "attack", "defense")
        }
        first, *others = self.shown.get(cell.run_id, [cell])
        code = self._codes(cell) | ({} if cell.stage == "train" else self._made(cell))
        return {
            "run": cell.run_id, **self._place(first), "also": [self._place(c) for c in others],
            **names, "seed": cell.seed, "config": cell.config,
            "metrics": found, "verdict": said(found), "victim": cell.victim_id,
            **({"plan": plan} if (plan := self.counts.get(cell.victim_id)) else {}),
            **({} if self.unlabelled else {"test": _test(cell)}),
            **({"halved": True} if self.halved else {}),
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "oracle": bool(cell.defense is not None and cell.defense.oracle),
            "device": device_name(), "jax": jax.__version__, "commit": commit(), "code": code,
            "how": self._how(),
            "written": time.time(),
        }  # fmt: skip

    def _how(self) -> dict[str, Any]:
        """By what the digits of what was computed last may differ."""
        lanes = {stage: lanes for stage, (lanes, _) in self.laid.items()}
        patches = [stage for stage, (_, patched) in self.laid.items() if patched]
        return {**mesh.how(), "lanes": lanes, **({"patches": patches} if patches else {})}

    def _made(self, cell: Cell) -> dict[str, Any]:
        """By which code a cell's victim was made: None where it does not say."""
        code = self.made.get(cell.victim_id, self._code(cell))
        return dict.fromkeys(self._code(cell)) if code is None else code


def compiled(
    fn: Callable,
    model: Model,
    shared: Any,
    items: Any,
    lanes: int | None,
    devices: Any,
    donate: tuple[int, ...] = (),
) -> Any:
    """`fn(model, shared, *item)` over the leading axis of `items`, as a program of `devices`."""
    return traced(fn, model, shared, items, lanes, devices, donate).lower().compile()


def traced(
    fn: Callable,
    model: Model,
    shared: Any,
    items: Any,
    lanes: int | None,
    devices: Any,
    donate: tuple[int, ...] = (),
) -> jax.stages.Traced:
    """What `compiled` compiles."""
    spread = mesh.over_runs(
        lambda shared, item: fn(model, shared, *item), lanes=lanes, devices=devices
    )
    program = jax.jit(lambda shared, *items: spread(shared, items), donate_argnums=donate)
    with mesh.aiming(devices[0].platform):
        return program.trace(shared, *items)


def nested(value: Any) -> Iterator[Any]:
    """The methods and other dataclasses in a tree, each before those that are within it."""

    def found(leaf: Any) -> bool:
        return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)

    for leaf in filter(found, jax.tree.leaves(value, is_leaf=found)):
        yield leaf
        yield from nested(list(vars(leaf).values()))


def lasts(judge: Judge, model: Model) -> bool:
    """Whether a judge may take minutes: by the flops of the model and the fields that count work,
    as if each of its steps saw `SEEN` images.
    """
    fields = (operator.attrgetter(name)(judge) for name in judge.budget_fields)
    times = math.prod(int(np.max(value)) for value in fields if np.ndim(value) == 0)
    searches = 3 * SEEN * times * model.classes * judge.seeds
    return _flops(model) * searches > LASTING


@functools.lru_cache(maxsize=ARCHITECTURES)
def _flops(model: Model) -> float:
    """Those of the logits of an image, as the compiler counts them."""
    image = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    cost = jax.jit(lambda v, x: model.apply(v, x).logits).lower(variables, image).cost_analysis()
    return (cost or {}).get("flops", 0.0)


def bytes_with(lanes: int, *program: Any) -> float:
    """Bytes a device that a program holds with so many lanes: `compiled` for it, infinite where the
    compiler finds that it does not fit. `program`: what `compiled` takes but for the lanes.
    """
    fn, model, shared, items, *rest = program
    try:
        return mesh.held(compiled(fn, model, shared, items, lanes, *rest))
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return math.inf


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache: the next run of a study starts at once."""
    if jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(data_dir() / "compiled"))
    # What cannot be kept (jaxlib 0.12 fails on some large ones) is compiled again: nothing is lost.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")


def make_room(programs: dict[Any, Any]) -> None:
    """Drops the programs that were used longest ago until one more can be compiled."""
    while len(programs) >= PROGRAMS or crowded():
        if not programs:  # they are of what JAX itself keeps
            jax.clear_caches()
            return
        del programs[next(iter(programs))]


def crowded() -> bool:
    """Whether this process has more than half of the memory maps that Linux allows it. A program of
    a residual net has up to 2,000 of some 65,530; where none is left, the compiler crashes.
    """
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps) > most // 2
    except OSError:  # another system
        return False


def out_of_memory(error: Exception) -> bool:
    """Whether a program failed because it does not fit into the device's memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def check(cell: Cell, model: Model | None = None) -> None:
    """Raises `BadInput` where the cell cannot be run, on `model` where its net is given."""
    data = cell.dataset.load()
    if model is None:
        if cell.recipe.epochs:  # a net that comes as it is needs no images of each class
            trainable(cell.dataset, data)
        model = build(cell.model, data.shape, data.classes)
    fits(model, data)
    registry.admit(cell.recipe, len(data.train.label))
    if cell.attack is not None:
        registry.admit(cell.attack, data.shape, data.classes)
    if cell.defense is not None:
        registry.admit(cell.defense, model, data.clean)
    if (
        cell.attack is not None
        and isinstance(cell.defense, (Training, SampleFilter))
        and makes_images(cell.attack, jnp.asarray(data.train.label), data.classes)
    ):
        attack, defense = map(registry.name_of, (cell.attack, cell.defense))
        raise BadInput(
            f"{attack} makes the images that it trains on for a net that it is given: there is no "
            f"training set for {defense}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled(Source):
    """A data set in memory, in the place of its source."""

    data: Any = None

    def load(self) -> Dataset:
        """The data set."""
        return self.data


def labelled(dataset: Any, model: Model, variables: Any, how: Literal["net", "none"]) -> Labelled:
    """A data set with the net's own answers for labels, or with nothing said by them (0), and with
    the net's classes.
    """
    data = dataset.load()
    splits = {}
    for name in ("train", "clean", "test"):
        split = getattr(data, name)
        if tuple(split.image.shape[1:]) != tuple(model.shape):
            break  # `fits` says so
        label = np.zeros(len(split.image), np.int32)
        if how == "net":
            label = answers(model, variables, split.image)
        if label.min() < 0:
            raise BadInput("the net gives some images no label: its answers are not numbers")
        splits[name] = split._replace(label=label)
    names = data.names if data.classes == model.classes else ()
    return Labelled(data=data._replace(**splits, classes=model.classes, names=names))


def answers(model: Model, variables: Any, image: Any) -> np.ndarray:
    """The labels that a net gives `image: [N, H, W, C]`, -1 where its logits are not numbers."""
    return np.asarray(_answers(model, variables, image))


@functools.partial(jax.jit, static_argnums=0)
def _answers(model: Model, variables: Any, image: Any) -> jax.Array:
    return metrics.labels(predict(model, variables, image))


def takes(model: Model, data: Dataset) -> None:
    """Raises `BadInput` where a data set's images are not those that a net takes."""
    if tuple(model.shape) != tuple(data.shape):
        raise BadInput(
            f"the net takes images of {'×'.join(map(str, model.shape))}, those of {data.name} are "
            f"{'×'.join(map(str, data.shape))}: give it data of its own kind"
        )


def fits(model: Model, data: Dataset) -> None:
    """Raises `BadInput` where a net and a data set differ in their images or classes."""
    takes(model, data)
    if model.classes != data.classes:
        raise BadInput(
            f"the net has {model.classes} classes, {data.name} has {data.classes}: give it data of "
            "its own classes, or say how to label them: --labels net or --labels none"
        )


def bound(cell: Cell, shared: Any) -> Any:
    """The cell's attack with the images that it takes from the training set."""
    return None if cell.attack is None else cell.attack.bind(shared.train)


def _targets(cell: Cell, classes: int) -> np.ndarray:
    """The labels that the cell's attack aims at: `[K]` bool."""
    if cell.attack is None:
        return np.zeros(classes, bool)
    return np.asarray(cell.attack.targets(classes))


def _labels(cell: Cell, flagged: np.ndarray) -> dict[str, list[str]]:
    """The labels that a judge flags and those that the attack aims at, by name; all of them where
    it aims at all.
    """
    names, aimed = cell.dataset.load().names, _targets(cell, len(flagged))
    found = {"flagged": flagged, "target": aimed}
    named = {
        part: [class_name(int(k), names) for k in np.flatnonzero(some)[:NAMED]]
        for part, some in found.items()
    }
    return named | ({"target": ["all"]} if aimed.all() else {})


def warn(acc: float, n: int, majority: float) -> None:
    """A line where an accuracy on `n` test images says nothing; see `metrics.chance`."""
    if acc <= metrics.chance(majority, n):
        line = (
            f"warning: the net is right on {100 * acc:.1f} % of the test images, which is chance: "
            f"the largest class has {100 * majority:.1f} %"
        )
        say(line, False)


def say(line: str, quiet: bool) -> None:
    """A plain line about what is being done."""
    if not quiet:
        print(shown(line), file=sys.stderr, flush=True)


# --- The programs: each is mapped over runs. ---


def _keys(cell: Cell, trained: int | None = None) -> tuple[jax.Array, jax.Array]:
    """The keys of judging a cell's victim, and of its training by the seed `trained`."""
    key = jax.random.key(cell.seed)
    known = key if trained is None else jax.random.key(trained)
    return key if cell.stage == "samples" else measuring_key(key), known


def _untrained(cell: Cell, model: Model, data: Splits) -> Any:
    variables = model.init(jax.random.key(0))
    if cell.attack is None:
        return None, variables
    attack = jax.tree.map(jnp.asarray, bound(cell, data))
    if not attack.trains:
        return attack, variables
    attack, variables, _ = attack.train(jax.random.key(0), model, cell.recipe, data.train)
    return attack, variables


def _begin(
    model: Model, data: Splits, key: jax.Array, recipe: Recipe, attack: Attack | None
) -> Any:
    return begin(jax.random.fold_in(key, 0), model, recipe)


def _epoch(
    model: Model, data: Splits, key: jax.Array, recipe: Recipe, attack: Attack | None, state: Any
) -> Any:
    train = poisoned_set(poisoning_key(key), data.train, attack, model.classes)
    state, curves = advance(jax.random.fold_in(key, 3), state, model, recipe, train, epochs=1)
    return state, curves.loss[0]


def _whole_training(
    model: Model, data: Splits, key: jax.Array, recipe: Recipe, attack: Attack
) -> Any:
    fired, variables, curves = attack.train(key, model, recipe, data.train)
    return (fired, variables), curves.loss[-1]


def _defended(model: Model, data: Splits, key: jax.Array, defense: Any, parts: Any) -> Judgement:
    return judge(key, Victim(model, **parts), defense, data, measured=False)


def _measured(
    model: Model, data: Splits, key: jax.Array, attack: Attack | None, variables: Any
) -> tuple[dict, dict]:
    return measure(key, Victim(model, variables, attack), data)


def _accuracy(model: Model, data: Splits, variables: Any) -> jax.Array:
    return evaluate(jax.random.key(0), model, variables, data.test)["acc"]


def _probed(
    model: Model, data: Splits, key: jax.Array, probe: Probe, attack: Attack | None, variables: Any
) -> tuple[dict, dict]:
    return split_scalars(
        probe(jax.random.fold_in(key, 3), model, variables, attack, data.clean, data.test)
    )


def _prepare(model: Model, data: Splits, defense: Any) -> Any:
    return defense.prepare(jax.random.key(0), model, data.clean)


def _rank(model: Model, data: Splits, key: jax.Array, judge: Judge, variables: Any) -> Any:
    return judge.rank(jax.random.fold_in(key, 1), model, variables, data.clean)


def _held(path: Path) -> dict[str, Any]:
    """Which victims lie beside a `members.json`, and what code made them."""
    return schema.read_json(path, "members")


def said(found: Mapping[str, Any]) -> Word | None:
    """A judge's word by its metrics; None where nothing was judged."""
    return word(found["infected"], found.get("undecided")) if "infected" in found else None


def _test(cell: Cell) -> dict[str, Any]:
    """How many test images there are, and the share of the largest class among them: what a net
    has at least that always answers the same.
    """
    label = np.asarray(cell.dataset.load().test.label)
    return {"n": len(label), "majority": float(np.bincount(label).max() / len(label))}


def _trim() -> None:
    """Gives the system back what was freed: glibc keeps it, hundreds of megabytes after a few
    compilations.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def device_name() -> str:
    """The kind of device in words: `cpu (2 cores)`, `NVIDIA H200`, `TPU v5e`."""
    device = jax.local_devices()[0]
    return f"cpu ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind


def commit() -> str | None:
    """The project's commit, None outside of its repository."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
