"""A sweep on a Ray cluster: one task a group of the plan, dealt out as workers become free, and
begun again where one is lost. Which runs where is Ray's to decide; nothing is scheduled here.

The driver has the plan, the folder and its lock, and alone writes into it. A worker computes a
group with the same `Runner`, in a folder of its own, and what lands there is sent to the driver:
rows with their arrays, victims, what defenses have prepared. A row is acknowledged when it is on
the driver's disk. What another has made, a task that was lost among them, is asked for before it is
made: nobody waits for one that is silent, and whoever makes it makes the same.

A group is computed as the plan has it, whatever was there before, so that its programs, and hence
its numbers, are those of a run that was never broken.
"""

import asyncio
import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import pickle
import re
import signal
import socket
import statistics
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax import identity, own, plugins
from bdjax.checkpoints import old_checkpoint, old_victims
from bdjax.datasets.base import Source, give
from bdjax.own import renamed
from bdjax.progress import HEARTBEAT, Board, Stop
from bdjax.registry import name_of
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.sweep import Runner, Trained, at_once, groups, say
from bdjax.types import BadInput, Model, whole

ENGINE = re.compile(r"ray(?::(.+))?")
RETRIES = 10
"""How often a group is begun again."""
SILENT = 10 * HEARTBEAT
"""Seconds after which nobody waits for a worker that says nothing."""
KEPT = {"victims": old_victims, "prepared": old_checkpoint}
"""The parts of a results folder that workers make for each other."""
BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
"""How so many TPU chips of a host lie."""


def ray() -> Any:
    """Ray; `BadInput` where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise BadInput(f"--engine ray needs Ray: pip install 'bdjax[ray]' ({error})") from error


# --- The cluster ---


class Place(NamedTuple):
    """A device of a worker, as far as the driver plans with it."""

    platform: str
    device_kind: str


class Share(NamedTuple):
    """What a task takes: so many devices of a platform, and what Ray is asked for them."""

    platform: str
    devices: int
    options: dict[str, Any]

    @property
    def places(self) -> list[Place]:
        """Its devices."""
        return [Place(self.platform, self.platform)] * self.devices

    def on(self, node: Mapping[str, Any]) -> bool:
        """Whether a node of `ray.nodes()` lives and has room for a task."""
        name = {"tpu": "TPU", "gpu": "GPU", "cpu": "CPU"}[self.platform]
        asked = self.options["num_cpus"] if name == "CPU" else self.devices
        return node["Alive"] and node["Resources"].get(name, 0) >= asked


def joined(engine: str, devices: int | None = None) -> Share:
    """Connects to the cluster of `ray:ADDRESS`, or to one that `ray` finds or starts on this
    machine; what a task takes there. From here on JAX is on the CPU in this process: a driver must
    not take a TPU from its workers.
    """
    named = ENGINE.fullmatch(engine)
    if named is None:
        raise BadInput(f"--engine {engine}: give ray or ray:ADDRESS")
    if devices is not None:
        whole("devices", devices, 1)
    jax.config.update("jax_platforms", "cpu")
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")  # of a cluster that is started here
    if not ray().is_initialized():
        before = signal.getsignal(signal.SIGTERM)  # Ray puts its own in the place
        try:
            if head := re.fullmatch(r"(?:ray://)?(.+):(\d{1,5})", named[1] or ""):
                # Ray would try for minutes.
                socket.create_connection((head[1], int(head[2])), timeout=10).close()
            ray().init(named[1], log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError, OverflowError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(f"--engine {engine}: {reason}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
    if (now := jax.default_backend()) != "cpu":
        raise BadInput(f"JAX is on the {now} in this process: --engine needs a new one")
    return share(ray().nodes(), devices)


def share(nodes: Sequence[Mapping[str, Any]], devices: int | None = None) -> Share:
    """What a task takes of a cluster, by the nodes that Ray knows: all TPU chips of a host, else
    one GPU, else all CPUs of a node, of the smallest one where they differ; or so many `devices`.
    """
    found = {
        name: [
            int(count)
            for node in nodes
            if node["Alive"] and (count := node["Resources"].get(name, 0)) >= 1
        ]
        for name in ("TPU", "GPU", "CPU")
    }
    if found["TPU"]:
        count = devices or min(found["TPU"])
        made = Share("tpu", count, {"num_cpus": 1, "resources": {"TPU": count}})
    elif found["GPU"]:
        made = Share("gpu", devices or 1, {"num_cpus": 1, "num_gpus": devices or 1})
    elif found["CPU"]:
        made = Share("cpu", devices or 1, {"num_cpus": min(found["CPU"])})
    else:
        raise BadInput("no node of the Ray cluster has a CPU, GPU or TPU for tasks: start one")
    if not any(map(made.on, nodes)):
        raise BadInput(f"devices {devices}: no node of the Ray cluster has so many")
    return made


class Mail:
    """An actor beside the driver: what workers ask, until the driver has answered."""

    def __init__(self) -> None:
        self.letters: asyncio.Queue = asyncio.Queue()
        self.open: dict[int, asyncio.Future] = {}
        self.numbers = itertools.count()

    async def ask(self, letter: tuple) -> list[Any]:
        """The driver's answer, in a list."""
        number, answer = next(self.numbers), asyncio.get_running_loop().create_future()
        self.open[number] = answer
        self.letters.put_nowait((number, letter))
        return await answer

    async def take(self) -> list[tuple[int, tuple]]:
        """What was asked since, at least one."""
        found = [await self.letters.get()]
        while not self.letters.empty():
            found.append(self.letters.get_nowait())
        return found

    async def answer(self, number: int, value: list[Any]) -> None:
        """Gives an answer to whoever asked."""
        self.open.pop(number).set_result(value)


# --- What is sent ---


class Setup(NamedTuple):
    """What all groups of a sweep have in common. `file`: the experiment's; `plugins`: those that
    are files; `modules`: those that are none.
    """

    sweep: str
    experiment: str
    scale: str
    lanes: Any
    stale: identity.Stale | None
    share: Share
    jax: str
    flags: str | None
    file: tuple[str, bytes] | None
    plugins: tuple[tuple[str, bytes], ...]
    modules: tuple[str, ...]


class Sender(pickle.Pickler):
    """Pickles cells; instead of a data set it writes its number in `sources`, and notes it."""

    def __init__(self, file: Any, sources: dict[Source, int]) -> None:
        super().__init__(file, protocol=5)
        self.sources, self.used = sources, set()

    def persistent_id(self, obj: Any) -> int | None:
        """The number of a data set."""
        if not isinstance(obj, Source):
            return None
        number = self.sources.setdefault(obj, len(self.sources))
        self.used.add(number)
        return number


class Receiver(pickle.Unpickler):
    """Reads what a `Sender` wrote, given its data sets by number."""

    def __init__(self, file: Any, sources: Mapping[int, Source]) -> None:
        super().__init__(file)
        self.sources = sources

    def persistent_load(self, pid: Any) -> Source:
        """The data set of a number."""
        return self.sources[pid]


def packed(path: Path) -> dict[str, np.ndarray]:
    """The files of a folder that bdjax wrote, by name."""
    return {
        file.relative_to(path).as_posix(): np.fromfile(file, np.uint8)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != own.FILES
    }


def unpack(path: Path, files: Mapping[str, np.ndarray]) -> None:
    """Writes a folder that was `packed`."""
    names = [Path(name) for name in files]
    if not re.fullmatch("[0-9a-f]{16}", path.name) or any(
        ".." in name.parts or name.is_absolute() for name in names
    ):
        raise BadInput(f"{path.name}: bdjax has not packed this")
    with renamed(path, KEPT[path.parent.name]) as temporary:
        for name, content in zip(names, files.values(), strict=True):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            content.tofile(temporary / name)


# --- The driver ---


@dataclasses.dataclass(eq=False)
class Task:
    """A group, and how far it is. `begun`: when, each time, and on which node; `heard`: when it
    last said something; `ended`: when, 0 before.
    """

    cells: list[Cell]
    done: set[str]
    begun: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    heard: float = 0.0
    worker: str = ""
    doing: str = ""
    ended: float = 0.0

    @property
    def runs(self) -> bool:
        """Whether a worker has it, or had it when it was last heard of."""
        return bool(self.begun) and not self.ended


class Wanted(NamedTuple):
    """A question for what another task may be making."""

    number: int
    task: Task
    part: str
    names: tuple[str, ...]


LATER = object()
"""The answer comes later."""


@dataclasses.dataclass
class Driver(Runner):
    """Runs cells on the Ray cluster to which this process is connected. `share`: what a task takes;
    `file`: the experiment file that defines the cells.
    """

    share: Share = dataclasses.field(kw_only=True)
    file: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.places: list[Any] = self.share.places
        self.device = self.share.platform
        self.tasks: list[Task] = []
        self.owners: dict[str, dict[str, Cell]] = {}
        self.sources: dict[Source, int] = {}
        self.data: list[Any] = []
        self.makers: dict[Any, tuple[Task, int]] = {}
        self.waiting: list[Wanted] = []
        self.alive: set[str] = set()

    def groups(self, cells: Iterable[Cell]) -> list[list[Cell]]:
        """The cells as tasks take them."""
        return groups(cells, at_once(self.places, self.lanes))

    def _fits(self, group: Sequence[Cell]) -> None:
        """It is the workers' memory: they look."""

    def _groups(self, pending: list[list[Cell]]) -> None:
        todo, expected = {c.run_id for c in itertools.chain(*pending)}, lengths(self.store.rows())
        self.tasks, self.owners = [], {}
        for group in self.planned:
            left = [cell for cell in group if cell.run_id in todo]
            needing = [cell for cell in group if cell.stage != "train"]
            # With all its victims at hand a group is computed in the pieces of the first time.
            if left and not all(map(self._usable, needing)):
                group, needing = left, [cell for cell in left if cell.stage != "train"]
            owners = {cell.victim_id: cell for cell in reversed(needing)}
            owners = {cell.victim_id: owners[cell.victim_id] for cell in needing}
            self.owners |= dict.fromkeys(owners, owners)
            if left:
                self.tasks.append(Task(group, {cell.run_id for cell in group} - todo))
        # Others ask for clean twins; then the long ones.
        self.tasks.sort(key=lambda t: (t.cells[0].attack is not None, -expected(t.cells, todo)))
        failed = self._dealt()
        self.stop.check()
        if failed:
            raise failed[0]

    def _dealt(self) -> list[BaseException]:
        """Has Ray do all tasks; what was raised by those that could not be done."""
        engine, failed = ray(), []
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        here = strategies.NodeAffinitySchedulingStrategy(
            engine.get_runtime_context().get_node_id(), soft=False
        )
        mail = (
            engine.remote(Mail)
            .options(num_cpus=0, max_concurrency=100_000, scheduling_strategy=here)
            .remote()
        )
        deal = engine.remote(work).options(
            **self.share.options,
            max_retries=RETRIES,
            retry_exceptions=[OSError, jax.errors.JaxRuntimeError],
        )
        setup = engine.put(self._setup())
        running = {deal.remote(mail, setup, i): task for i, task in enumerate(self.tasks)}
        letters, looked = mail.take.remote(), 0.0
        try:
            while running:
                if engine.wait([letters], timeout=1.0)[0]:
                    for number, (index, what, *more) in engine.get(letters):
                        self._hear(mail, number, self.tasks[index], what, more)
                    letters = mail.take.remote()
                refs = list(running)
                for ref in engine.wait(refs, num_returns=len(refs), timeout=0)[0]:
                    task = running.pop(ref)
                    task.ended = time.monotonic()
                    if (error := self._ended(task, ref)) is not None:
                        failed.append(error)
                if time.monotonic() - looked > HEARTBEAT:
                    self._look(mail)
                    looked = time.monotonic()
                for ref, task in running.items() if self.stop.asked else ():
                    if not task.begun:
                        engine.cancel(ref)
        finally:
            for ref in running:
                engine.cancel(ref, force=True)
            self._look(mail)
            self.board.tell(tasks=0, workers={})
            engine.kill(mail)
        return failed

    def _setup(self) -> Setup:
        files = tuple((path.name, text) for path, text in plugins._files.items())
        file = None if self.file is None else (self.file.name, self.file.read_bytes())
        return Setup(
            os.urandom(8).hex(), self.experiment, self.scale, self.lanes, self.stale, self.share,
            jax.__version__, os.environ.get("XLA_FLAGS"), file, files, plugins.modules(),
        )  # fmt: skip

    def _hear(self, mail: Any, number: int, task: Task, what: str, more: Sequence[Any]) -> None:
        """Answers what a worker asks."""
        task.heard = time.monotonic()
        try:
            found = getattr(self, f"_on_{what}")(task, number, *more)
        except ray().exceptions.RayError:  # what it sent was lost with it
            return
        if found is not LATER:
            mail.answer.remote(number, [found])  # a reference stays one within a list
        self._settle(mail)

    def _settle(self, mail: Any) -> None:
        """Answers those whose wait is over."""
        waiting, self.waiting = self.waiting, []
        for wanted in waiting:
            if (found := self._wanted(wanted)) is LATER:
                self.waiting.append(wanted)
            else:
                mail.answer.remote(wanted.number, [found])

    def _on_begin(self, task: Task, number: int, node: str, worker: str, device: str) -> Any:
        """A worker begins with a group: what it needs for that; None: it is to leave it."""
        task.begun.append((task.heard, node))
        task.worker, task.doing, self.device = worker, "", device
        self.alive.add(node)
        if self.stop.asked is not None or len(task.begun) > RETRIES + 1:
            return None
        clean = self._twins_of(task.cells)
        some = [self.shown[cell.run_id] for cell in task.cells]
        sender = Sender(box := io.BytesIO(), self.sources)
        try:
            sender.dump((some, clean))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise BadInput(f"a cell cannot be sent to a worker: {error}") from error
        if b"__main__" in (text := box.getvalue()):
            raise BadInput(
                "a method of a script or notebook cannot be sent to a worker: put it into a file "
                "of its own and give that as a plugin"
            )
        for source in list(self.sources)[len(self.data) :]:
            self.data.append(ray().put((source, source.load())))
        owner = Path(self.store.lock.lock_file).with_suffix(".owner").absolute()
        return {
            "cells": text, "data": {number: self.data[number] for number in sender.used},
            "done": task.done, "codes": {cell.run_id: self._codes(cell) for cell in task.cells},
            "counts": {cell.victim_id: self.counts.get(cell.victim_id) for cell in task.cells},
            "owner": (str(owner), owner.read_text() if owner.exists() else None),
        }  # fmt: skip

    def _twins_of(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """The groups of the clean twins with which victims among `cells` are compared, a cell for
        each victim.
        """
        twins = [c.twin.victim_id for c in cells if c.attack is not None and c.stage is None]
        found = [self.owners[name] for name in twins if name in self.twins and name in self.owners]
        return list({id(owners): list(owners.values()) for owners in found}.values())

    def _on_rows(self, task: Task, number: int, rows: list[dict[str, Any]], arrays: Any) -> None:
        """Rows are finished; those that were there before stay."""
        mine = {cell.run_id for cell in task.cells} - task.done
        new = [row for row in rows if row["run"] in mine]
        found = ray().get(arrays) if new else {}
        for run in mine & found.keys():
            with renamed(self.store.folder / "arrays" / f"{run}.npz", zipfile.is_zipfile) as path:
                found[run].tofile(path)
        if new:
            self._written(new)
            task.done |= {row["run"] for row in new}

    def _on_want(self, task: Task, number: int, part: str, names: tuple[str, ...]) -> Any:
        """What a worker needs may be there, or in the making, or its to make."""
        wanted = Wanted(number, task, part, names)
        if (found := self._wanted(wanted)) is LATER:
            self.waiting.append(wanted)
        return found

    def _wanted(self, wanted: Wanted) -> Any:
        _, task, part, names = wanted
        if part == "victims":
            held = [self._usable(self.owners[name][name]) for name in names]
            paths = [None if one is None else one[0] for one in held]
        else:
            paths = [self.store.folder / part / name for name in names]
            paths = [path if path.exists() else None for path in paths]
        if None in paths:
            maker, begun = self.makers.get((part, names), (task, 0))
            lives = len(maker.begun) == begun and self._lives(maker)
            if maker is not task and lives and time.monotonic() - maker.heard < SILENT:
                return LATER
            self.makers[part, names] = task, len(task.begun)
        return ray().put({path.name: packed(path) for path in {*paths} if path is not None})

    def _lives(self, task: Task) -> bool:
        """Whether a worker has it, and its node is there."""
        return task.runs and task.begun[-1][1] in self.alive

    def _on_made(
        self, task: Task, number: int, part: str, names: tuple[str, ...], files: Any
    ) -> None:
        """A worker has made what was its to make, or could not."""
        for name, content in ray().get(files).items():
            if not (path := self.store.folder / part / name).exists():
                unpack(path, content)
                if part == "victims":
                    self._kept(path)
        if self.makers.get((part, names), (None, 0))[0] is task:
            del self.makers[part, names]

    def _on_beat(self, task: Task, number: int, doing: str) -> bool:
        """A worker lives; whether it is to stop."""
        task.doing = doing
        return self.stop.asked is not None

    def _on_lanes(
        self, task: Task, number: int, name: str, measured: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The lanes of a program, the same for all workers."""
        if measured is not None and self._recalled(name)["tried"] < measured["tried"]:
            self._remembered(name, measured)
        return self._recalled(name)

    def _ended(self, task: Task, ref: Any) -> BaseException | None:
        """Books a task that has ended; what it raised."""
        found, error, engine = None, None, ray()
        try:
            found = engine.get(ref)
        except engine.exceptions.TaskCancelledError:
            pass
        except engine.exceptions.RayTaskError as raised:
            error = raised.cause or raised
        except engine.exceptions.RayError as raised:
            error = raised
        if found is not None:
            self.unfit += [cell for cell in task.cells if cell.run_id in found["unfit"]]
            for stage, seconds in found["seconds"].items():
                self.clock.seconds[stage] = self.clock.seconds.get(stage, 0.0) + seconds
            self.board.count(group=1)
            return None
        if self.stop.asked:
            return None
        if isinstance(error, BadInput):
            raise error
        lost = error is None or isinstance(error, engine.exceptions.RayError)
        row, left = task.cells[0].row, len(task.cells) - len(task.done)
        if lost:
            why = f" ({type(error).__name__})" if error is not None else ""
            error = BadInput(
                f"{left} runs ('{row}' …) were begun {len(task.begun)} times, and each time their "
                f"worker was lost{why}; all else is done, the same command tries them again"
            )
        say(f"failed: {left} runs ('{row}' …): {error}", self.quiet)
        return error

    def _look(self, mail: Any) -> None:
        """Sees which nodes live, tells the board, and lets nobody wait for what was lost."""
        nodes = ray().nodes()
        self.alive = {node["NodeID"] for node in nodes if node["Alive"]}
        now = [task for task in self.tasks if self._lives(task)]
        self.board.tell(
            nodes=sum(map(self.share.on, nodes)), tasks=len(now),
            retries=sum(max(0, len(task.begun) - 1) for task in self.tasks),
            devices=f"{self.share.devices} × {self.device} a task",
            workers={task.worker: task.doing for task in now},
        )  # fmt: skip
        self._settle(mail)


def lengths(rows: Iterable[Mapping[str, Any]]) -> Any:
    """`expected(cells, todo)`: the seconds that those of `cells` in `todo` take by the rows of like
    cells; of a kind of which there is none, as much as the mean.
    """
    took: dict[Any, list[float]] = {}
    for row in rows:
        if "error" not in row:
            kind = tuple(row[part] for part in ("dataset", "model", "attack", "defense"))
            took.setdefault(kind, []).append(row["seconds"]["run"])
    known = {kind: statistics.fmean(seconds) for kind, seconds in took.items()}
    mean = statistics.fmean(known.values()) if known else 1.0

    def expected(cells: Iterable[Cell], todo: set[str]) -> float:
        kinds = (
            tuple(name_of(part) for part in (c.dataset, c.model, c.attack, c.defense))
            for c in cells
            if c.run_id in todo
        )
        return sum(known.get(kind, mean) for kind in kinds)

    return expected


# --- The worker ---


class Link:
    """A task's line to the driver. Other threads than the main one wait for answers: while that
    waits, Ray gives the task's CPUs to another one.
    """

    def __init__(self, mail: Any, index: int) -> None:
        self.mail, self.index, self.threads = mail, index, ThreadPoolExecutor(2)

    def ask(self, what: str, *more: Any) -> Any:
        """The driver's answer."""
        return self.get(self.mail.ask.remote((self.index, what, *more)))[0]

    def get(self, ref: Any) -> Any:
        """An object of the cluster."""
        return self.threads.submit(ray().get, ref).result()


class Post(Store):
    """The folder of a task, whose rows and arrays go to the driver."""

    def __init__(self, folder: Path, link: Link) -> None:
        super().__init__(folder)
        self.link = link

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Returns when they are on the driver's disk."""
        rows = list(rows)
        files = {row["run"]: self.folder / "arrays" / f"{row['run']}.npz" for row in rows}
        found = {run: np.fromfile(f, np.uint8) for run, f in files.items() if f.exists()}
        self.link.ask("rows", rows, ray().put(found))


class Told(Board):
    """Tells the driver what a worker does, and hears whether it is to stop."""

    def __init__(self, link: Link, stop: Stop) -> None:
        super().__init__()
        self.link, self.stop = link, stop

    def write(self) -> None:
        """A heartbeat."""
        if self.link.ask("beat", self.facts.get("doing", "")):
            self.stop.asked = signal.SIGTERM


@dataclasses.dataclass
class Worker(Runner):
    """Computes groups for a driver, one after the other: their programs stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources: dict[int, Source] = {}
        self.clean: list[list[Cell]] = []
        self.done: set[str] = set()
        self.outlived: list[Path] = []
        self.link: Link

    def compute(self, link: Link, about: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
        """What is left to say of a group when all its rows are with the driver; None where that has
        it stopped.
        """
        self.link, self.store, self.stop = link, Post(folder, link), Stop()
        owner, text = Path(about["owner"][0]), about["owner"][1]
        with contextlib.suppress(OSError):
            if owner.read_text() == text:  # the driver's folder is seen from here: for checkpoints
                (owner.parent / "partial").mkdir(exist_ok=True)
                (folder / "partial").symlink_to(owner.parent / "partial")
        for number in about["data"].keys() - self.sources.keys():
            self.sources[number], data = link.get(about["data"][number])
            give(self.sources[number], data)
        places, self.clean = Receiver(io.BytesIO(about["cells"]), self.sources).load()
        self.shown = {some[-1].run_id: some for some in places}
        cells = [some[-1] for some in places]
        self.codes = identity.codes(cells)
        if self.codes != about["codes"]:
            raise BadInput(
                f"{socket.gethostname()} has other code than the driver: install the same there"
            )
        self.twins = {cell.victim_id for group in self.clean for cell in group}
        self.counts = {name: count for name, count in about["counts"].items() if count is not None}
        self.done, self.unfit, self.outlived = about["done"], [], []
        self.members, self.made, self.written = None, {}, set()
        before = dict(self.clock.seconds)
        self._fits(cells)
        with Told(link, self.stop) as self.board:
            try:
                self._group(cells)
            except KeyboardInterrupt:
                return None
        spent = {k: v - before.get(k, 0.0) for k, v in self.clock.seconds.items()}
        return {"unfit": {cell.run_id for cell in self.unfit}, "seconds": spent}

    @contextlib.contextmanager
    def _once(self, part: str, names: Sequence[str]) -> Iterator[None]:
        """Inside, what others have made of this part is in the folder, and what is made there
        becomes theirs.
        """
        for name, files in self.link.get(self.link.ask("want", part, (*names,))).items():
            if not (path := self.store.folder / part / name).exists():
                unpack(path, files)
        self.members, before = None, self._folders(part)
        try:
            yield
        finally:
            new = {path.name: packed(path) for path in self._folders(part) - before}
            self.link.ask("made", part, (*names,), ray().put(new))
            while self.outlived:
                super()._trained_out(self.outlived.pop())

    def _trained_out(self, checkpoint: Path) -> None:
        """Its checkpoint goes when the driver has the victims: this process may die before."""
        self.outlived.append(checkpoint)

    def _folders(self, part: str) -> set[Path]:
        return {
            path for path in self.store.folder.glob(f"{part}/*") if not path.name.startswith(".")
        }

    def _victims(
        self, cells: Sequence[Cell], model: Model, shared: Any
    ) -> tuple[dict[str, Trained], dict[str, float]]:
        if all(map(self._usable, cells)):
            return super()._victims(cells, model, shared)
        with self._once("victims", list(dict.fromkeys(cell.victim_id for cell in cells))):
            return super()._victims(cells, model, shared)

    def _clean(self, cells: Sequence[Cell], model: Model, shared: Any) -> Mapping[str, Trained]:
        wanted, found = {cell.victim_id for cell in cells}, {}
        for group in self.clean:
            if wanted & {cell.victim_id for cell in group}:
                found |= self._victims(group, model, shared)[0]
        return found

    def _prepared(self, cells: Sequence[Cell], model: Model, shared: Any) -> list[Any]:
        with contextlib.ExitStack() as stack:
            if cells[0].defense is not None and "prepare" in cells[0].defense.hooks:
                for path in sorted({self._preparation(cell) for cell in cells}):
                    if not path.exists():
                        stack.enter_context(self._once("prepared", [path.name]))
            return super()._prepared(cells, model, shared)

    def _judged(self, cells: Sequence[Cell], *args: Any, **kwargs: Any) -> tuple[dict, Any]:
        if all(cell.run_id in self.done for cell in cells):
            return {}, None
        return super()._judged(cells, *args, **kwargs)

    def _recalled(self, name: str) -> dict[str, Any]:
        return self.link.ask("lanes", name)

    def _remembered(self, name: str, lanes: dict[str, Any]) -> dict[str, Any]:
        return self.link.ask("lanes", name, lanes)


_worker: tuple[Setup, Worker] | None = None
"""The worker of this process: one for a sweep."""


def work(mail: Any, setup: Setup, index: int) -> dict[str, Any] | None:
    """A task of Ray: computes a group of the driver's plan."""
    global _worker
    context = ray().get_runtime_context()
    base = Path(context.get_temp_dir()) / context.get_session_name() / "bdjax"
    base.mkdir(exist_ok=True)
    own.clear(base)
    if _worker is None or _worker[0] != setup:
        _worker = setup, worker(setup, base)
    link, name = Link(mail, index), f"{socket.gethostname()} {os.getpid()}"
    about = link.ask("begin", context.get_node_id(), name, _worker[1].device)
    if about is None:
        return None
    with own.saving(base) as place:
        return _worker[1].compute(link, about, place / "new")


def worker(setup: Setup, base: Path) -> Worker:
    """What computes the groups of a sweep in this process, on its devices."""
    from bdjax.experiment import local_devices

    host, (platform, count, _) = socket.gethostname(), setup.share
    if jax.__version__ != setup.jax:
        raise BadInput(
            f"{host} has jax {jax.__version__}, the driver {setup.jax}: install the same there"
        )
    if setup.flags is not None:
        os.environ["XLA_FLAGS"] = setup.flags
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if platform == "tpu":  # for itself, whatever slice the host is part of
        alone = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": BOUNDS.get(count)}
        alone["TPU_VISIBLE_CHIPS"] = ",".join(map(str, range(count)))
        for name, value in alone.items():
            os.environ.setdefault(name, str(value))
    devices = local_devices(count if platform == "cpu" else None)[:count]
    if (len(devices), devices[0].platform) != (count, platform):
        raise BadInput(
            f"{host}: a task takes {count} × {platform}, JAX finds {len(devices)} × "
            f"{devices[0].platform} there"
        )
    os.environ.pop(plugins.VARIABLE, None)  # the driver sends those too
    folder = Path(tempfile.mkdtemp(dir=base, prefix="files-"))
    # Apart: an experiment and a plugin may have one name.
    (place := folder / "plugins").mkdir()
    for name, text in setup.plugins:
        (place / name).write_bytes(text)
    plugins.load_plugins(*(place / name for name, _ in setup.plugins), *setup.modules)
    if setup.file is not None:
        path = folder / setup.file[0]
        path.write_bytes(setup.file[1])
        plugins.executed(path, f"experiment_{path.stem}", "experiment")
    return Worker(
        Store(folder), setup.experiment, setup.scale, setup.lanes, devices, quiet=True,
        stale=setup.stale,
    )  # fmt: skip
