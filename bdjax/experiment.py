"""Runs an experiment file: its cells, then its figures, table and page. A sweep is an experiment
with many cells.

An experiment is a Python file with `TITLE`, `SCALES`, `cells(scale, seeds) -> [Cell]`, and, where
it has them, `figures(rows, store, scale)` (else those of `bdjax.figures`) and `trends(rows)` of
`Rows`, as `report.write` wants them. The list in its docstring ("- …") stands on the page as notes.
"""

import contextlib
import fnmatch
import functools
import inspect
import re
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_type_hints

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bdjax import engine as engines
from bdjax import identity, mesh, plugins, progress, report, shipped
from bdjax import target as targets
from bdjax.changes import changed, read
from bdjax.figures import apart
from bdjax.figures import figures as drawn
from bdjax.identity import Stale
from bdjax.own import explained
from bdjax.plugins import called, executed, raised_in
from bdjax.progress import shown
from bdjax.registry import check_given, digest, door, name_of
from bdjax.rows import Rows
from bdjax.store import Store, read_rows, result_files
from bdjax.study import SEEDS, Cell
from bdjax.sweep import Clock, Runner, at_once, footprint, groups, lanes_of, say
from bdjax.trackers import tracker
from bdjax.types import BadInput, whole


@door
def load(path: str | Path) -> ModuleType:
    """The experiment file as a module; one of bdjax's own by its name, too."""
    path = shipped.file(path)
    module = executed(path, f"experiment_{path.stem}", "experiment")
    for name, form in (("cells", CALLS["cells"]), ("SCALES", ""), ("TITLE", "")):
        if not hasattr(module, name):
            raise BadInput(f"{path} is no experiment: it defines no {name}{form}")
    known = {"SCALES": Iterable[str], "TITLE": str, **dict.fromkeys(CALLS, Callable[..., Any])}
    given = {name: getattr(module, name) for name in known if hasattr(module, name)}
    check_given(str(path), known, given)
    for name in CALLS.keys() & given.keys():
        try:
            inspect.signature(given[name]).bind(*CALLS[name].split(","))
        except TypeError:
            found = called(name, given[name])
            raise BadInput(f"{path}: {found} is to be {name}{CALLS[name]}") from None
    return module


CALLS = {"cells": "(scale, seeds)", "figures": "(rows, store, scale)", "trends": "(rows)"}
"""The functions of an experiment file; it needs the first."""


def listed() -> Table:
    """The experiments that come with bdjax: name, scales, and at which of them their rows lie by,
    title.
    """
    table = Table("name", "scales", "rows at hand", "title", box=None)
    for name in shipped.names():
        module = load(name)
        there = [path.stem.removeprefix(f"{name}-") for path in shipped.results(name)]
        table.add_row(name, ", ".join(module.SCALES), ", ".join(there), module.TITLE)
    return table


@door
def run(
    study: str | Path | Iterable[Cell],
    scale: str = "cpu",
    out: str | Path | None = None,
    seeds: int | None = None,
    quiet: bool = False,
    lanes: int | str | None = None,
    *,
    shard: str | None = None,
    hosts: str = "off",
    engine: str | None = None,
    devices: int | None = None,
    resume: bool = True,
    dry_run: bool = False,
    target: str | None = None,
    live: bool = False,
    changes: Sequence[str] = (),
    only: str | None = None,
    stale: Stale | None = None,
    log: str | None = None,
) -> Rows:
    """Runs a study: an experiment file, one of bdjax's own by its name, or cells; returns its rows.
    What was finished by an earlier run is not done again.

    >>> rows = bdjax.run(grid(cell, seed=range(5)), out="results/mine")

    `lanes`: a number or "auto"; `shard`: "i/n"; `hosts`: "off", "auto" or "ADDR,N,I"; `engine`:
    "ray" or "ray:ADDRESS", see `bdjax.engine`; `devices`: how many of this process's, or that a
    task of the engine takes; `resume=False` refuses a folder that has rows; `dry_run` prints what
    would be done, `target` on which devices, see `bdjax.target`; `live`: a table instead of bars;
    `changes`: fields of the cells that are set
    otherwise, `PATH=VALUE` each, see `bdjax.changes`; `only`: the cells whose table or row this
    pattern of a shell fits; `stale`: what to do with rows and victims that other code made, see
    `Runner`; `log`: where else finished rows go, see `bdjax.trackers`.
    """
    width = lanes_of(lanes)
    if target is not None and not dry_run:
        raise BadInput("--target is of devices that are not at hand: give --dry-run, too")
    part = None if shard is None else part_of(shard)
    if hosts != "off":
        if part is not None:
            raise BadInput("--hosts shards by itself: leave --shard away")
        part = join(hosts)
    if engine is not None and part is not None:
        raise BadInput("--engine deals the work out by itself: leave --shard and --hosts away")
    filed = isinstance(study, (str, Path))
    path = shipped.file(study) if filed else Path("cells")
    module = load(path) if filed else _module(study)
    # What a script's own cells raise is that script's to see.
    blamed = functools.partial(raised_in, path) if filed else contextlib.nullcontext
    if scale not in module.SCALES:
        raise BadInput(f"{path} has no scale '{scale}'; it has: {', '.join(module.SCALES)}")
    if seeds is not None:
        whole("seeds", seeds, 1, SEEDS)
    aim = None if target is None else aimed(target, devices)
    share = None if engine is None else engines.joined(engine, devices)
    places = local_devices(devices) if share is None else share.places
    if aim is not None:
        places = aim.devices
        if aim.hosts > 1 and part is not None:
            raise BadInput(f"the {aim.hosts} hosts of {target} share the work: leave --shard away")
        part = (0, aim.hosts) if aim.hosts > 1 else part
    settings = read(changes)
    name = f"{path.stem}-{scale}" + (f"-{digest(settings)[:8]}" if settings else "")
    folder = Path("results") / name if out is None else Path(out)
    if not dry_run:
        Store(folder, part).ready()
        report.ready(folder, "report.json")
    with explained(folder, "read"):
        earlier = read_rows(result_files(folder))
    if earlier and not resume:
        raise BadInput(
            f"{folder} has {len(earlier)} rows: give another --out, or leave --no-resume away to "
            "go on"
        )
    if old := sum("victim" not in row for row in earlier):
        say(f"{old} rows of bdjax 0.1 lie there under other hashes: `python -m bdjax.migrate "
            f"{folder} NEW` brings them over", quiet)  # fmt: skip
    with blamed():
        made = list(module.cells(scale, seeds))
    if odd := [cell for cell in made if not isinstance(cell, Cell)]:
        raise BadInput(f"{path}: cells gives {shown(type(odd[0]).__name__)}, not Cell")
    if not made:
        raise BadInput(f"{path} has no cells at scale {scale}: there is nothing to run")
    if only is not None:
        made = among(made, only)
    if settings:
        made = changed(made, settings)
    cells = list({(cell.run_id, cell.table, cell.row): cell for cell in made}.values())
    # Two files of one name have one folder, and so have a file and what it was before.
    others = {row["run"] for row in earlier} - {cell.run_id for cell in cells}
    if others and only is None:
        say(f"{len(others)} rows in {folder} are of no cell of {path}: they stay, its page leaves "
            "them out; --out keeps experiments apart", quiet)  # fmt: skip
    if dry_run:
        with contextlib.nullcontext() if aim is None else mesh.aiming(aim.platform):
            done = plan(cells, earlier, places, width, part, stale)
        if aim is not None:
            kept = Runner(Store(folder), path.stem, quiet=True, stale=stale)
            found = targets.rehearse(
                cells, aim, width, part, lambda cell: cell.run_id in done, kept._usable
            )
            rehearsed(*targets.report(found, aim))
        return Rows()

    if mesh.OLD and places[0].platform == "cpu" and not quiet:
        newer = f"Python 3.12 or newer takes a newer jax than {jax.__version__}"
        progress.say_once(f"{newer}, which is about 1.5 times as fast on a CPU")

    told = None if log is None else tracker(log, Store(folder, part), path.stem)
    store, console = Store(folder, part), Console()
    # Seconds go on counting where an earlier part of the run, or of this shard, left off.
    boards = progress.boards(folder) if earlier else []
    label = "" if part is None else "{}/{}".format(*part)
    clock = Clock(progress.spent(board for board in boards if board["shard"] == label))
    others = progress.spent(board for board in boards if board["shard"] != label)
    on = f"the same command{'' if resume else ' without --no-resume'} goes on from there"
    with progress.kept(f"what was finished is kept in {folder}; {on}"):

        def finished(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                say(f"  {report.line(row)}", quiet)
            if told is not None:
                told(rows, runner.curves)

        options: dict[str, Any] = {"devices": places}
        if share is not None:
            options = {"share": share, "file": path if filed else None}
        runner = (Runner if share is None else engines.Driver)(
            store, path.stem, scale, width, quiet=quiet, on_rows=finished, clock=clock,
            live=live and not quiet, stale=stale, complete=filed and only is None, **options
        )  # fmt: skip
        rows = Rows(runner.run(cells), folder)
        if told is not None and runner.board.facts["rows"] == runner.board.facts["before"]:
            say(f"no row is new: {log} is told of none", quiet)
        if runner.unfit:
            raise BadInput(runner.complaint())
        if len(rows) < len(cells):
            print(f"results: {shown(store.results)}\nshard {shard or part} is done; {len(rows)} of "
                  f"{len(cells)} rows are there, the page is written by the shard that ends "
                  "last")  # fmt: skip
            return rows
        Store(folder).append(store.rows())  # what the shards have
        begun = time.monotonic()
        report.print_table(rows, console)
        typed = shlex.quote(Path(study).as_posix()) if filed else ""
        more = "".join(f" --set {shlex.quote(f'{k}={v}')}" for k, v in settings.items())
        more += plugins.flags()
        more += "" if only is None else f" --only {shlex.quote(only)}"
        with blamed():
            figures = pictures(path, module, rows, store, scale, lambda: cells)
        with raised_in(path, begun=False):
            trends = claims(module, rows)
        clock.add("report", begun)
        mine = clock.whole()
        runner.board.tell(seconds=mine)
        runner.board.write()
        seconds = progress.spent([{"seconds": mine}, {"seconds": others}])
        page = report.write(
            folder, rows, figures, title=module.TITLE, notes=notes(module), trends=trends,
            seconds=seconds,
            command=f"bdjax {'sweep' if live else 'run'} {typed} --scale {scale}{more}"
            if filed else "bdjax.run(cells)",
        )  # fmt: skip
        say(
            "seconds by stage: "
            + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
            quiet,
        )
        print(shown(f"results: {folder / 'results.jsonl'}") + f"\npage: {shown(page)}")
        return rows


def _module(cells: Any) -> Any:
    """Cells of a notebook or script, as an experiment."""
    some = [cells] if isinstance(cells, Cell) else cells
    return SimpleNamespace(TITLE="Cells", SCALES={"cpu": 1}, cells=lambda scale, seeds: some)


def among(cells: Sequence[Cell], only: str) -> list[Cell]:
    """The cells whose table, row, or `table: row` the pattern `only` fits: `MNIST*`."""

    def fits(cell: Cell) -> bool:
        names = (cell.table, cell.row, f"{cell.table}: {cell.row}")
        return any(fnmatch.fnmatchcase(name.lower(), only.lower()) for name in names)

    if not (found := [cell for cell in cells if fits(cell)]):
        tables = ", ".join(f"'{name}'" for name in dict.fromkeys(cell.table for cell in cells))
        raise BadInput(f"no table and no row is called '{only}'; the tables are {tables}")
    return found


def claims(module: ModuleType, rows: Iterable[report.Row]) -> list[report.Trend]:
    """The experiment's claims, by its valid rows alone (`report.valid`); one with a number that
    nobody measured, NaN or "0 of 0", is open.
    """
    if not hasattr(module, "trends"):
        return []
    found = _made(report.Trend, "trends", module.trends(report.valid(rows)))
    return [_open(trend) if UNKNOWN.search(trend.numbers) else trend for trend in found]


NAN = r"(?i:\bnan\b)%?"
UNKNOWN = re.compile(rf"{NAN}|\b0 of 0\b")
"""A number that nobody measured, as claims print it."""


def _open(trend: report.Trend) -> report.Trend:
    known = re.search(r"(?<![A-Za-z])\d", UNKNOWN.sub("", trend.numbers))
    numbers = re.sub(NAN, "–", trend.numbers)
    return trend._replace(
        verdict="open", numbers=numbers if known else "not measured by any of these rows"
    )


def pictures(
    path: Path, module: ModuleType, rows: Rows, store: Store, scale: str,
    cells: Callable[[], Iterable[Cell]],
) -> list[report.Figure]:  # fmt: skip
    """The experiment's own figures; those of every study where it has no `figures`."""
    if not hasattr(module, "figures"):
        return drawn(rows, store, cells())
    with raised_in(path, begun=False):
        return apart(_made(report.Figure, "figures", module.figures(rows, store, scale)))


def _made(kind: type, name: str, found: Any) -> list[Any]:
    """What a function of an experiment gives, as the named tuples `kind`: plain ones will do."""
    parts = get_type_hints(kind)
    form, made = f"{kind.__name__}({', '.join(parts)})", []
    for one in found if isinstance(found, Iterable) else [found]:
        if not isinstance(one, (tuple, list)) or len(one) != len(parts):
            raise BadInput(f"{name} gives {shown(one)[:80]}, not a list of {form}")
        check_given(name, parts, dict(zip(parts, one, strict=True)))
        made.append(kind(*one))
    return made


def at_hand(dataset: Any) -> bool:
    """Whether a data set is at hand; where it is not, a line says so, and an experiment leaves its
    rows out.
    """
    try:
        return bool(dataset.load())
    except BadInput as error:
        print(f"left out: {shown(error)}")
        return False


def notes(module: ModuleType) -> list[str]:
    """The points of an experiment's docstring, a line each."""
    return [" ".join(point.split()) for point in (module.__doc__ or "").split("\n- ")[1:]]


def part_of(shard: str) -> tuple[int, int]:
    """`i/n` as (i, n)."""
    i, slash, n = shard.partition("/")
    if not slash:
        raise BadInput(f"shard '{shard}' is not of the form i/n, such as 0/4")
    index, count = whole("shard", i, 0), whole("shards", n, 1)
    if index >= count:
        raise BadInput(f"shard {shard}: the {count} shards are 0/{count} to {count - 1}/{count}")
    return index, count


def join(hosts: str) -> tuple[int, int] | None:
    """Starts `jax.distributed` and returns which shard this process is; None where it is the only
    one.

    The hosts wait for each other here alone. Then the connection is closed: work is never sent, and
    a host that dies would take the others with it.
    """
    address, _, rest = hosts.partition(",")
    try:
        if hosts == "auto":
            jax.distributed.initialize()
        else:
            count, _, index = rest.partition(",")
            jax.distributed.initialize(address, whole("hosts", count, 1), whole("host", index, 0))
        jax.local_devices()
        jax.distributed.shutdown()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise BadInput(
            f"--hosts {hosts}: {reason} (give off, auto or ADDRESS:PORT,COUNT,INDEX)"
        ) from error
    return (jax.process_index(), jax.process_count()) if jax.process_count() > 1 else None


def local_devices(count: int | None) -> Sequence[Any]:
    """The first `count` devices of this process; a CPU counts as that many."""
    if count is not None:
        whole("devices", count, 1, DEVICES)
        with contextlib.suppress(RuntimeError):  # too late: JAX has started
            jax.config.update("jax_num_cpu_devices", count)
    found = jax.local_devices()
    if count is not None and count > len(found):
        raise BadInput(f"devices {count}: this process has {len(found)}")
    return found[:count]


def aimed(target: str, devices: int | None) -> targets.Target:
    """The target of a dry run; of these only a CPU counts as more than one device."""
    if devices is not None and target != "cpu":
        raise BadInput(f"{target} says how many devices there are: leave --devices away")
    if devices is not None:
        local_devices(devices)
    return targets.find(target)


def plan(
    cells: list[Cell],
    rows: list[dict[str, Any]],
    devices: Sequence[Any],
    lanes: int | str | None,
    shard: Any,
    stale: Stale | None = None,
) -> set[str]:
    """Prints what a run would do: cells, groups, memory, and the time that like rows took. Trains
    nothing; returns which runs are done.
    """
    code, old = identity.codes(cells), set()
    for row in rows:
        if row["run"] in code and identity.differs(row.get("code"), code[row["run"]]):
            old.add(row["run"])
    done = {row["run"] for row in rows} - (old if stale == "redo" else set())
    took: dict[Any, list[float]] = {}
    for row in rows:
        if "error" not in row:
            took.setdefault(tuple(row[part] for part in PARTS), []).append(row["seconds"]["run"])
    made = groups(cells, at_once(devices, lanes), shard)
    table = Table(*PARTS, "cells", "to do", "groups", "MB of a group", "expected", box=None)
    kinds = {
        tuple(name_of(getattr(cell, part)) for part in PARTS): None
        for group in made
        for cell in group
    }
    known, unknown, memory = 0.0, 0, [footprint(group, devices, lanes) / 1e6 for group in made]
    for kind in kinds:
        mine = [
            [cell for cell in group if tuple(name_of(getattr(cell, p)) for p in PARTS) == kind]
            for group in made
        ]
        alike = [cell for group in mine for cell in group]
        left = sum(cell.run_id not in done for cell in alike)
        seconds = left * statistics.fmean(took[kind]) if kind in took else None
        known, unknown = known + (seconds or 0), unknown + (left if seconds is None else 0)
        size = max(size for size, group in zip(memory, mine, strict=True) if group)
        words = [str(len(alike)), str(left), str(sum(map(bool, mine))), f"{size:.0f}"]
        words.append("?" if seconds is None else progress.duration(seconds))
        table.add_row(*(Text(shown(word)) for word in (*(name or "none" for name in kind), *words)))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    count, victims = sum(map(len, made)), len({cell.victim_id for group in made for cell in group})
    print(f"{count} cells, {victims} victims, {len(made)} groups on {len(devices)} × "
          f"{devices[0].device_kind}{'' if shard is None else ', shard {}/{}'.format(*shard)}; "
          f"{count - sum(c.run_id in done for g in made for c in g)} to do")  # fmt: skip
    if old:
        print(f"{len(old)} rows come from other code: --stale {stale or 'keep or --stale redo'}")
    print(
        f"memory of a device: {max(memory, default=0):.0f} MB at least (data, training states, "
        "activations of a batch)"
    )
    print(
        f"expected: {progress.duration(known)}, from the rows that are there, without compiling"
        + (f"; unknown for {unknown} cells: no like row is there yet" if unknown else "")
    )
    return done


def rehearsed(rows: Iterable[Sequence[str]], lines: Iterable[str]) -> None:
    """Prints what `target.report` found."""
    made = Table(*targets.HEADS, box=None)
    for row in rows:
        made.add_row(*(Text(shown(word)) for word in row))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(made)
    print("\n".join(map(shown, lines)))


PARTS = ("dataset", "model", "attack", "defense")
DEVICES = 1_024
"""The most devices that one run takes: a CPU that counts as many grows with them."""
