"""`bdjax bench [NAME …]`, or `python -m benchmarks`: compile and run seconds, memory and share of
the matmul rate of training and of every defense as they grow; beside them a lean PyTorch loop where
the extra `torch` is installed.
"""

import contextlib
import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bdjax import plots, registry, report, schema
from bdjax.experiment import local_devices
from bdjax.progress import Stop, kept, shown
from bdjax.registry import near
from bdjax.store import Store, read_rows
from bdjax.sweep import device_name
from bdjax.types import BadInput, Metric, whole
from benchmarks import devices as devices_
from benchmarks import measure

registry.declare(
    __name__,
    Metric("size"),
    Metric("low_s", "s", "low", "least"),
    Metric("high_s", "s", "low", "most"),
    Metric("rate", "sizes a second", "high"),
    Metric("peak_mb", "MB", "low", "peak"),
    Metric("matmul_share", "share", "high", hint="of the float32 matmul rate of the same run"),
    Metric("torch_s", "s", "low", "PyTorch"),
    Metric("ratio", "", "high", "PyTorch / ours"),
    Metric("times_inference", "", "low", "plain inferences of the same images"),
)
SHARED = {"measure", "rivals", "sides", "__main__"}
APART = {"pod", "accelerator", "peers"}
"""Benchmarks that are no cases of growing size, and run alone, each with a `rows(scale, done)`,
`HEADS` and a `line(row)`.
"""
TITLE = "What training and the defenses cost"
HEADS = ("compile s", "ours s", "a second", "peak MB", "matmul", "torch s", "ratio")
NOTES = (
    "Compile seconds are without any cache. A run is the median of alternating runs of ours, a "
    "matrix product and PyTorch; the share is that of the float32 matmul rate of the same run.",
    "Peak memory is what the compiler planned: arguments, results and scratch.",
    "PyTorch is a lean loop over the same work (benchmarks/rivals.py); ratio = torch / ours.",
)


def names() -> list[str]:
    """The benchmarks: one module each."""
    found = {m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])}
    return sorted(found - SHARED)


def bench(
    names_: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="names")] = (),
    scale: Literal["smoke", "cpu", "paper"] = "cpu",
    out: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    repeats: int | None = None,
    devices: int | None = None,
    compare: Path | None = None,
    backdoorbench: Path | None = None,
    python: Path | None = None,
    only: str | None = None,
) -> None:
    """Measure what training and the defenses cost as they grow.

    Args:
        names_: train, neural_cleanse, strip, ensemble …; all but those that run alone (pod,
            accelerator, peers) if not given.
        scale: Which sizes: smoke, cpu or paper.
        out: Results folder with a page of curves; goes on where it stopped. Nothing is kept if not
            given.
        json_: One JSON object a line: case, ours_s, rival_s, ratio, matmul_share, device, and more.
        repeats: How often ours, a matmul and the rival alternate, 3 times if not given; peers are
            also begun as often.
        devices: How many devices `devices` spreads over; a CPU counts as that many (8 if not
            given).
        compare: A folder or results file of an earlier run: prints new / old of every case.
        backdoorbench: For peers: a checkout of BackdoorBench, to compare with.
        python: For peers: the interpreter that has them; this one if not given.
        only: For peers: the comparisons whose title this pattern fits, such as "ART*".
    """
    for name in names_:
        if name not in names():
            raise BadInput(
                f"unknown benchmark '{name}'{near(name, names())}; there are: {', '.join(names())}"
            )
    count = 3 if repeats is None else whole("repeats", repeats, 1)
    options = {"backdoorbench": backdoorbench, "python": python, "only": only}
    options = {name: value for name, value in options.items() if value is not None}
    if options and {*names_} != {"peers"}:
        raise BadInput(f"{', '.join(f'--{name}' for name in options)} is for peers alone")
    if apart := sorted(APART & {*names_}):
        others = {"compare": compare, "devices": devices}
        others |= {"repeats": repeats} if "pod" in apart else {}
        if odd := [f"--{name}" for name, value in others.items() if value is not None]:
            raise BadInput(f"{', '.join(odd)} is not for {', '.join(apart)}")
        options |= {} if "pod" in apart else {"repeats": count}
        return _apart(names_, scale, out, json_, **options)
    old = None if compare is None else _rows(compare)
    if out is not None:
        Store(out).ready()
        report.ready(out, "report.json")
    if devices is not None:
        local_devices(devices)
    with contextlib.ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bdjax-")))
        store, made, stop = Store(folder), [], Stop()
        for part in (_kept(out), store.locked(), stop):
            stack.enter_context(part)
        if not json_:
            print(f"{'case':36}" + "".join(f"{head:>10}" for head in HEADS), flush=True)
        for name in names_ or [name for name in names() if name not in APART]:
            for row in _alone(name, scale, count, store, devices, stop):
                store.append([row])
                made.append(row)
                text = json.dumps(schema.finite(flat(row))) if json_ else shown(line(row))
                print(text, flush=True)
                stop.check()
    if json_:
        return
    slopes = [
        f"{series}: time grows with exponent {slope:.2f}"
        for series, slope in exponents(made).items()
    ]
    print("\n".join(["", *slopes]))
    if out is not None:
        command = f"bdjax bench --scale {scale}"
        page = report.write(
            out, store.rows(), curves(store.rows()), TITLE, [*NOTES, *slopes], command=command
        )
        print(f"results: {store.results}\npage: {page}")
    if old is not None:
        compared(made, old)


def _kept(out: Path | None) -> AbstractContextManager[None]:
    return kept(
        "nothing is kept without --out; the same command begins anew"
        if out is None
        else f"the cases that were printed are kept in {out}; the same command goes on from there"
    )


def _apart(
    names_: Sequence[str], scale: str, out: Path | None, json_: bool, **options: Any
) -> None:
    """Runs a benchmark of its own kind."""
    if len(names_) > 1:
        raise BadInput(
            f"{', '.join(sorted(APART & {*names_}))} runs alone: name no other benchmark"
        )
    module = importlib.import_module(f"benchmarks.{names_[0]}")
    store = None if out is None else Store(out)
    if store is not None:
        store.ready()
    done = {} if store is None else {row["run"]: row for row in store.rows()}
    if not json_:
        print(" " * 100 + "".join(f"{head:>12}" for head in module.HEADS), flush=True)
    with _kept(out), contextlib.nullcontext() if store is None else store.locked(), Stop() as stop:
        for row in module.rows(scale, done, **options):
            text = json.dumps(schema.finite(row)) if json_ else shown(module.line(row))
            print(text, flush=True)
            if store is not None and done.get(row["run"]) is not row:
                store.append([row])
            stop.check()


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row as scripts read it."""
    found = row["metrics"]
    return {
        "case": f"{row['table']} = "
                f"{found['size']}", "ours_s": row["seconds"]["run"],
                "rival_s": found.get("torch_s"),
        "ratio": found.get("ratio"), "matmul_share": found.get("matmul_share"),
        "device": row["device"], "compile_s": row["seconds"]["compile"],
        **{k: v for k, v in found.items() if k not in ("ratio", "matmul_share", "torch_s")},
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as people read it."""
    found, spent = row["metrics"], row["seconds"]
    share = found.get("matmul_share")
    cells = [
        f"{spent['compile']:.1f}",
        f"{spent['run']:.3f}",
        f"{found['rate']:.3g}",
        f"{found['peak_mb']:.0f}",
    ]
    cells += [f"{100 * share:.0f} %" if report.measured(share) else "–"]
    cells += [
        f"{found[name]:.{digits}f}" if name in found else "–"
        for name, digits in (("torch_s", 3), ("ratio", 2))
    ]
    extra = "".join(f"  {v:.2f} × one {k[6:]}" for k, v in found.items() if k.startswith("times_"))
    return (
        f"{row['table']} = {found['size']}".ljust(36)
        + "".join(f"{cell:>10}" for cell in cells)
        + extra
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    file = path / "results.jsonl" if path.is_dir() else path
    rows = read_rows([file]) if file.exists() else []
    if not (found := [row for row in rows if {"size", "low_s", "high_s"} <= row["metrics"].keys()]):
        raise BadInput(f"no results of a benchmark in {path}")
    return found


def _alone(
    name: str, scale: str, repeats: int, store: Store, devices: int | None, stop: Stop
) -> Iterator[dict[str, Any]]:
    """The rows of a benchmark; `devices` in a process of its own: a process has the CPU devices it
    was started with.
    """
    if name == "devices" and devices is None and jax.default_backend() == "cpu":
        again = [
            sys.executable,
            "-m",
            "benchmarks",
            "devices",
            "--scale",
            scale,
            "--repeats",
            str(repeats),
        ]
        with tempfile.TemporaryDirectory(prefix="bdjax-") as folder:
            again += ["--devices", "8", "--json", "--out", folder]
            part = Store(folder)
            part.append(store.rows())  # it goes on from them
            ended = subprocess.run(again, stdout=subprocess.DEVNULL).returncode
            stop.check()
            if ended:
                raise BadInput(f"the benchmark of devices ended with code {ended}")
            yield from (row for row in part.rows() if row["table"] == devices_.SERIES)
    else:
        yield from _measured(name, scale, repeats, {row["run"]: row for row in store.rows()})


def _measured(
    name: str, scale: str, repeats: int, done: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row for each case of a benchmark."""
    rivals = measure.rivals()
    for case in importlib.import_module(f"benchmarks.{name}").cases(rivals, scale):
        run = registry.digest(case.series, case.size, scale, device_name())
        if run in done:
            yield done[run]
            continue
        found = measure.run(case, repeats)
        spent = {"compile": round(found.pop("compile_s"), 3), "run": found.pop("run_s")}
        yield measure.row(
            "bench", case.series, f"{case.series.partition(', ')[2]} = {case.size}", scale, found,
            spent, {"repeats": repeats}, run=run,
            torch=None if rivals is None else rivals.torch.__version__,
        )  # fmt: skip


def _series(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["metrics"]["size"]):
        found.setdefault(row["table"], []).append(row)
    return found


def exponents(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """For each series of more than one size the slope of log(run seconds) over log(size)."""
    return {
        name: measure.exponent([row["metrics"]["size"] for row in some],
                               [row["seconds"]["run"] for row in some])
        for name, some in _series(rows).items() if len(some) > 1
    }  # fmt: skip


def curves(rows: Iterable[dict[str, Any]]) -> Iterable[tuple]:
    """Seconds over size, ours and PyTorch's: a figure for each series."""
    for name, some in _series(rows).items():
        if len(some) < 2:
            continue
        size, found = [row["metrics"]["size"] for row in some], [row["metrics"] for row in some]
        low, high = ([m[f"{end}_s"] for m in found] for end in ("low", "high"))
        lines = {"bdjax": (size, [low, [row["seconds"]["run"] for row in some], high])}
        if all("torch_s" in m for m in found):
            lines["PyTorch"] = (size, [m["torch_s"] for m in found])
        file = "".join(c if c.isalnum() else "-" for c in name.lower())
        yield (
            file,
            name,
            "Median and range of the runs.",
            plots.runtime(lines, name.partition(", ")[2]),
        )


def compared(rows: Iterable[dict[str, Any]], old: Iterable[dict[str, Any]]) -> None:
    """Prints new / old of the run seconds of the cases that both have, with the range that the runs
    allow.
    """
    earlier = {row["run"]: row for row in old}
    table = Table("case", "old s", "new s", "new / old", "range", box=None)
    for row in rows:
        if before := earlier.get(row["run"]):
            new, then = row["metrics"], before["metrics"]
            ratio = row["seconds"]["run"] / before["seconds"]["run"]
            spread = f"{new['low_s'] / then['high_s']:.2f} – {new['high_s'] / then['low_s']:.2f}"
            both = (f"{r['seconds']['run']:.3f}" for r in (before, row))
            table.add_row(
                Text(shown(f"{row['table']} = {row['metrics']['size']:g}")),
                *both,
                f"{ratio:.2f}",
                spread,
            )
    Console().print(table)


if __name__ == "__main__":
    from bdjax.cli import main

    main(["bench", *sys.argv[1:]])
