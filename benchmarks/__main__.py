"""`bdjax bench [NAME …]`, or `python -m benchmarks`: compile and run seconds, memory and share of the matmul rate of
training and of every defense as they grow; beside them a lean PyTorch loop where the extra `torch` is installed.
"""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from bdjax import plots, registry, report
from bdjax.experiment import local_devices
from bdjax.registry import near
from bdjax.store import Store, read_rows
from bdjax.sweep import commit, device_name, say
from bdjax.types import BadInput
from benchmarks import measure

SHARED = {"measure", "rivals", "__main__"}
NOTES = (
    "Compile seconds are without any cache. A run is the median of alternating runs of ours, a matrix product and PyTorch; "
    "the share is that of the float32 matmul rate of the same run.",
    "Peak memory is what the compiler planned: arguments, results and scratch.",
    "PyTorch is a lean loop over the same work (benchmarks/rivals.py); ratio = torch / ours.",
)


def names() -> list[str]:
    """The benchmarks: one module each."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in SHARED)


def bench(
    names_: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="names")] = (),
    scale: Literal["smoke", "cpu", "paper"] = "cpu",
    out: Path | None = None,
    repeats: int = 3,
    devices: int | None = None,
    compare: Path | None = None,
    quiet: bool = False,
) -> None:
    """Measure what training and the defenses cost as they grow; goes on where it stopped.

    Args:
        names_: train, neural_cleanse, strip, ensemble …; all if not given.
        scale: Which sizes: smoke, cpu or paper.
        out: Results folder; results/bench-SCALE-COMMIT if not given.
        repeats: How often ours, a matmul and the rival alternate.
        devices: How many devices `devices` spreads over; a CPU counts as that many (8 if not given).
        compare: A folder or results file of an earlier run: print new / old of every case.
        quiet: No progress.
    """
    for name in names_:
        if name not in names():
            raise BadInput(f"unknown benchmark '{name}'{near(name, names())}; there are: {', '.join(names())}")
    if repeats < 1:
        raise BadInput(f"repeats {repeats}: at least one is needed")
    old = None if compare is None else _rows(compare)
    if devices is not None:
        local_devices(devices)
    folder = out or Path("results") / f"bench-{scale}-{commit() or 'installed'}"
    store = Store(folder)
    for name in names_ or names():
        if name == "devices" and devices is None and jax.default_backend() == "cpu":
            # A process has as many CPU devices as it was started with.
            again = [sys.executable, "-m", "benchmarks", "devices", "--scale", scale, "--out", str(folder)]
            subprocess.run([*again, "--repeats", str(repeats), "--devices", "8", *["--quiet"] * quiet], check=True)
            continue
        with store.locked():
            for row in _measured(name, scale, repeats, {row["run"] for row in store.rows()}):
                store.append([row])
                say(report.line(row), quiet)
    rows = store.rows()
    if names_ == ("devices",) and devices is not None:
        return
    report.print_table(rows, Console())
    slopes = [f"{series}: time grows with exponent {slope:.2f}" for series, slope in exponents(rows).items()]
    print("\n".join(slopes))
    page = report.write(
        folder, rows, curves(rows), "What training and the defenses cost", [*NOTES, *slopes],
        command=f"bdjax bench --scale {scale}",
    )  # fmt: skip
    if old is not None:
        compared(rows, old)
    print(f"results: {store.results}\npage: {page}")


def _rows(path: Path) -> list[dict[str, Any]]:
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.exists():
        raise BadInput(f"no results of a benchmark in {path}")
    return read_rows([file])


def _measured(name: str, scale: str, repeats: int, done: set[str]) -> Iterable[dict[str, Any]]:
    """A row for each case of a benchmark that is not done yet."""
    try:
        from benchmarks import rivals
    except ImportError:
        rivals = None
    for case in importlib.import_module(f"benchmarks.{name}").cases(rivals, scale):
        label = f"{case.series.partition(', ')[2]} = {case.size}"
        run = registry.digest(case.series, case.size, scale, device_name())
        if run in done:
            continue
        found = measure.run(case, repeats)
        spent = {"compile": round(found.pop("compile_s"), 3), "run": found.pop("run_s")}
        yield {
            "run": run, "experiment": "bench", "scale": scale, "table": case.series, "row": label, "dataset": None,
            "model": None, "attack": None, "defense": None, "seed": 0, "config": {"repeats": repeats}, "metrics": found,
            "reported": {}, "seconds": spent, "oracle": False, "substitute": None, "device": device_name(),
            "jax": jax.__version__, "torch": None if rivals is None else rivals.torch.__version__, "commit": commit(),
        }  # fmt: skip


def _series(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["metrics"]["size"]):
        found.setdefault(row["table"], []).append(row)
    return found


def exponents(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """For each series of more than one size the slope of log(run seconds) over log(size)."""
    return {
        name: measure.exponent([row["metrics"]["size"] for row in some], [row["seconds"]["run"] for row in some])
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
        yield file, name, "Median and range of the runs.", plots.runtime(lines, name.partition(", ")[2])


def compared(rows: Iterable[dict[str, Any]], old: Iterable[dict[str, Any]]) -> None:
    """Prints new / old of the run seconds of the cases that both have, with the range that the runs allow."""
    earlier = {row["run"]: row for row in old}
    table = Table("case", "old s", "new s", "new / old", "range", box=None)
    for row in rows:
        if before := earlier.get(row["run"]):
            new, then = row["metrics"], before["metrics"]
            ratio = row["seconds"]["run"] / before["seconds"]["run"]
            spread = f"{new['low_s'] / then['high_s']:.2f} – {new['high_s'] / then['low_s']:.2f}"
            both = (f"{r['seconds']['run']:.3f}" for r in (before, row))
            table.add_row(f"{row['table']} = {row['metrics']['size']:g}", *both, f"{ratio:.2f}", spread)
    Console().print(table)


if __name__ == "__main__":
    try:
        tyro.cli(bench)
    except BadInput as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
