"""`python -m benchmarks pod`: what a sweep costs on a pod whose hosts are taken away, dealt out
beforehand (`--shard`) and as workers become free (`--engine ray`).

A simulation of 64 hosts with 4 devices each. A group takes the seconds that its cells took in the
committed rows of the experiments. How soon a worker starts, and how soon the group of a lost host
begins again, is measured on a cluster of this machine (extra `ray`); the model is held against two
sweeps there, one undisturbed, one with a worker killed.
"""

import collections
import contextlib
import heapq
import importlib
import itertools
import math
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bdjax import engine, registry
from bdjax.attacks.badnets import BadNets
from bdjax.datasets.sample import Sample
from bdjax.models.shamshiri import Ffnn
from bdjax.store import Store, read_rows
from bdjax.study import Cell
from bdjax.sweep import CHECKPOINT_EVERY
from bdjax.train import Recipe
from bdjax.types import Metric
from benchmarks import measure

registry.declare(
    __name__,
    Metric("hours", "h", "low"),
    Metric("efficiency", "share", "high", hint="useful work / time that hosts were there"),
    Metric("tail_hours", "h", "low", "tail", hint="from the first host without work to the end"),
    Metric("lost", "share", "low", hint="of all work, what was done in vain"),
    Metric("taken", "", None, "hosts taken"),
    Metric("predicted_s", "s", None, "predicted"),
)
HOSTS, DEVICES = 64, 4
HOUR = 3600.0
DRAWS = {"smoke": 2, "cpu": 20, "paper": 20}
SWEEPS = {"small": 4, "large": 64}
"""How many groups of each kind there are."""
LIVES = {
    "none taken": (math.inf, 0.0),
    "each taken every 24 h, back in 10 min": (24 * HOUR, HOUR / 6),
    "each taken every 4 h, back in 10 min": (4 * HOUR, HOUR / 6),
    "each taken every 24 h, started again by hand after 4 h": (24 * HOUR, 4 * HOUR),
}
"""Mean seconds until a host is taken away, and seconds until it is back."""
EPOCHS = {"smoke": (1, 2, 3, 4), "cpu": (60, 50, 40, 30, 25, 20, 15, 12, 10, 8, 6, 4)}
"""The groups of the sweep on this machine: one for each number."""


class Stage(NamedTuple):
    """A piece of a group's work that is kept when it is done; training has checkpoints before."""

    seconds: float
    training: bool


Group = tuple[Stage, ...]


class World(NamedTuple):
    """`start`: seconds until a new worker computes; `notice`: until the group of a lost host waits
    for another one; `life` and `away`: see `LIVES`; `shared`: all see the checkpoints.
    """

    hosts: int = HOSTS
    start: float = 0.0
    notice: float = 0.0
    life: float = math.inf
    away: float = 0.0
    shared: bool = True


class Outcome(NamedTuple):
    """Seconds until all is done, and from the first host without work until then; what was done,
    and in vain, in seconds of a host; how many were taken; the time that hosts were there.
    """

    seconds: float
    tail: float
    useful: float
    vain: float
    taken: int
    held: float

    @property
    def metrics(self) -> dict[str, float]:
        """As rows have them."""
        return {
            "hours": self.seconds / HOUR, "efficiency": self.useful / self.held,
            "tail_hours": self.tail / HOUR, "lost": self.vain / (self.useful + self.vain),
            "taken": self.taken,
        }  # fmt: skip


def simulate(
    lines: Sequence[Sequence[Group]], world: World, seed: int = 0, kills: Sequence[float] = ()
) -> Outcome:
    """`lines`: the groups in the order in which they are taken, one line for all hosts, or one a
    host. `kills`: when each host is taken first, instead of by chance.
    """
    rng, count = random.Random(seed), itertools.count()
    queues = [collections.deque(line) for line in lines]

    def lives(now: float) -> float:
        return now + rng.expovariate(1 / world.life) if world.life < math.inf else math.inf

    ends = list(kills) or [lives(0.0) for _ in range(world.hosts)]
    fresh, idle, away = [True] * world.hosts, [], []
    useful = vain = last = 0.0
    first, left = math.inf, sum(map(len, lines))
    # A host that looks for a group at a time; -1: a group that was lost is in the line again.
    events: list[Any] = [(0.0, next(count), host, None) for host in range(world.hosts)]
    while left or (events and events[0][0] < last):
        now, _, host, back = heapq.heappop(events)
        if host == -1:
            queues[0].append(back)
            for waiting in idle:
                heapq.heappush(events, (now, next(count), waiting, None))
            idle = []
            continue
        if ends[host] <= now:  # while it had nothing to do
            away.append((ends[host], ends[host] + world.away))
            again = max(now, away[-1][1])
            ends[host], fresh[host] = lives(again), True
            heapq.heappush(events, (again, next(count), host, None))
            continue
        line = queues[host % len(queues)]
        if not line:
            first = min(first, now)
            idle.append(host)
            continue
        group, now = line.popleft(), now + (world.start if fresh[host] else 0.0)
        fresh[host] = False
        while group and now + group[0].seconds <= ends[host]:
            now, useful, group = now + group[0].seconds, useful + group[0].seconds, group[1:]
        if not group:
            left, last = left - 1, max(last, now)
            heapq.heappush(events, (now, next(count), host, None))
            continue
        done, kept = max(0.0, ends[host] - now), 0.0
        if group[0].training and world.shared:
            kept = done - done % CHECKPOINT_EVERY
        useful, vain = useful + kept, vain + done - kept
        group = (group[0]._replace(seconds=group[0].seconds - kept), *group[1:])
        if len(queues) > 1:
            line.appendleft(group)
        else:
            heapq.heappush(events, (ends[host] + world.notice, next(count), -1, group))
        again = ends[host] + world.away
        away.append((ends[host], again))
        ends[host], fresh[host] = lives(again), True
        heapq.heappush(events, (again, next(count), host, None))
    gone = sum(max(0.0, min(back, last) - min(end, last)) for end, back in away)
    taken = sum(end < last for end, _ in away)
    tail = max(0.0, last - min(first, last))
    return Outcome(last, tail, useful, vain, taken, world.hosts * last - gone)


def committed() -> list[Group]:
    """A group for each victim of the committed experiments: its training, then its defenses."""
    kinds: dict[str, dict[str, list[float]]] = {}
    for file in sorted((Path(__file__).parents[1] / "experiments" / "results").rglob("*.jsonl")):
        for row in {row["run"]: row for row in read_rows([file])}.values():
            if "error" not in row and (config := row.get("config")):
                parts = ("dataset", "model", "recipe", "attack")
                victim = registry.digest(*(config[part] for part in parts))
                work = registry.digest(config["defense"]) if config["defense"] else ""
                spent = kinds.setdefault(victim, {}).setdefault(work, [])
                spent.append(row["seconds"]["run"])
    return [
        tuple(Stage(statistics.fmean(spent), not work) for work, spent in sorted(kind.items()))
        for kind in kinds.values()
    ]


def length(group: Group) -> float:
    """Its seconds."""
    return sum(stage.seconds for stage in group)


def dealt(kinds: Sequence[Group], each: int) -> dict[str, list[list[Group]]]:
    """`each` groups of every kind, in the lines of three ways to deal them out."""
    free = [group for group in kinds for _ in range(each)]
    random.Random(0).shuffle(free)
    # Every n-th victim of all: of each kind the same share for every host, in pieces of a group.
    pieces, parts = math.ceil(each / HOSTS), each / HOSTS
    share = [
        tuple(stage._replace(seconds=stage.seconds * parts / pieces) for stage in group)
        for group in kinds
        for _ in range(pieces)
    ]
    return {
        "beforehand": [share] * HOSTS,
        "as free": [sorted(free, key=length, reverse=True)],
        "as free, lengths unknown": [free],
    }


# --- What is measured ---


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[tuple[Any, engine.Share]]:
    """A real cluster of so many one-CPU nodes on this machine."""
    engine.ray()
    made = importlib.import_module("ray.cluster_utils").Cluster()
    size = {"object_store_memory": 200 << 20}
    made.add_node(num_cpus=0, include_dashboard=False, **size)
    for _ in range(nodes):
        made.add_node(num_cpus=1, **size)
    try:
        yield made, engine.joined(f"ray:{made.address}")
    finally:
        engine.ray().shutdown()
        made.shutdown()


def swept(
    share: engine.Share, epochs: Sequence[int], act: Callable[[engine.Driver], None] | None = None
) -> tuple[engine.Driver, float]:
    """A sweep of a group for each of `epochs`, and when it began; `act` is called meanwhile."""
    cells = [
        Cell("T", f"{n} epochs", Sample(), Ffnn((128,)), Recipe(epochs=n, batch=32), BadNets())
        for n in epochs
    ]
    with tempfile.TemporaryDirectory(prefix="bdjax-") as folder:
        driver = engine.Driver(Store(folder), "pod", quiet=True, share=share)
        if act is not None:
            threading.Thread(target=act, args=(driver,), daemon=True).start()
        begun = time.monotonic()
        rows = driver.run(cells)
        assert len(rows) == len(cells)
        return driver, begun


def running(driver: engine.Driver, count: int) -> engine.Task:
    """The first of `count` tasks, when so many are computed."""
    while len(found := [task for task in list(driver.tasks) if task.runs]) < count:
        time.sleep(0.01)
    return found[0]


class Measured(NamedTuple):
    """A sweep of this machine: seconds, and those that the model says."""

    name: str
    seconds: float
    predicted: float


def measured(scale: str) -> tuple[float, float, list[Measured]]:
    """`start` and `notice` of a `World` on this machine, and two sweeps."""
    epochs = EPOCHS.get(scale, EPOCHS["cpu"])
    killed, removed = [], []
    with cluster(2) as (_, share):
        swept(share, epochs)  # compiles
        calm, calm_begun = swept(share, epochs)
        span = max(task.ended for task in calm.tasks) - calm_begun

        def kill(driver: engine.Driver) -> None:
            time.sleep(span / 3)
            task = running(driver, 2)
            killed.append((time.monotonic(), task.begun[-1][1]))
            os.kill(int(task.worker.split()[1]), signal.SIGKILL)

        hurt, hurt_begun = swept(share, epochs, kill)
    with cluster(3) as (made, share):

        def remove(driver: engine.Driver) -> None:
            node = running(driver, 2).begun[-1][1]
            time.sleep(1)
            removed.append(time.monotonic())
            (lost,) = (one for one in made.worker_nodes if one.node_id == node)
            made.remove_node(lost, allow_graceful=False)

        short, _ = swept(share, [max(epochs), max(epochs) - 1], remove)
    ((at, node),) = killed
    times = [begun for task in hurt.tasks for begun in task.begun]
    again = min(when for when, where in times if where == node and when > at) - at
    (retried,) = (task for task in short.tasks if len(task.begun) > 1)
    groups = [(Stage(task.ended - task.begun[-1][0], False),) for task in calm.tasks]
    found = []
    for name, driver, begun, kills in (
        ("undisturbed", calm, calm_begun, ()),
        ("a worker killed", hurt, hurt_begun, (at - hurt_begun, math.inf)),
    ):
        first = min(task.begun[0][0] for task in driver.tasks) - begun
        world = World(2, first, away=again - first)
        took = max(task.ended for task in driver.tasks) - begun
        found.append(Measured(name, took, simulate([groups], world, kills=kills).seconds))
    return again, retried.begun[1][0] - removed[0], found


# --- Rows ---

HEADS = ("s", "predicted", "hours", "efficiency", "tail h", "in vain", "taken")


def line(row: dict[str, Any]) -> str:
    """A row as people read it, under `HEADS`."""
    found, measured = row["metrics"], row["seconds"]["run"]
    cells = [f"{measured:.1f}" if measured else ""]
    cells += [
        f"{scale * found[name]:.{digits}f}{unit}" if name in found else ""
        for name, scale, digits, unit in (
            ("predicted_s", 1, 1, ""), ("hours", 1, 2, ""), ("efficiency", 100, 0, " %"),
            ("tail_hours", 1, 2, ""), ("lost", 100, 1, " %"), ("taken", 1, 0, ""),
        )
    ]  # fmt: skip
    return f"{row['table']}: {row['row']}".ljust(100) + "".join(f"{cell:>12}" for cell in cells)


def rows(scale: str, done: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was measured on this machine, then the simulated pods: all of it, whatever is `done`."""
    start, notice, sweeps = measured(scale)
    for name, seconds, predicted in sweeps:
        found = {"predicted_s": predicted, "start_s": start, "notice_s": notice}
        spent = {"compile": 0.0, "run": seconds}
        yield measure.row("pod", "Two workers of this machine", name, scale, found, spent, {})
    kinds = committed()
    for size, each in SWEEPS.items():
        ways = dealt(kinds, each)
        for taken, (life, away) in LIVES.items():
            world = World(start=start, notice=notice, life=life, away=away)
            cases = [(way, lines, world) for way, lines in ways.items()]
            cases += [("as free, no shared folder", ways["as free"], world._replace(shared=False))]
            for way, lines, here in cases:
                drawn = [simulate(lines, here, seed) for seed in range(DRAWS[scale])]
                found = {
                    name: statistics.fmean(one.metrics[name] for one in drawn)
                    for name in drawn[0].metrics
                }
                about = {"groups": sum(map(len, ways["as free"])), "draws": len(drawn)}
                about |= {"hosts": HOSTS, "devices": DEVICES, **here._asdict()}
                table, spent = f"Pod, {size} sweep, {taken}", {"compile": 0.0, "run": 0.0}
                yield measure.row("pod", table, way, scale, found, spent, about)
