"""Runs an experiment file: its cells, then its figures, table and page.

An experiment is a Python file with `TITLE`, `SCALES`, `cells(scale, seeds) -> [Cell]`, and, where it has them,
`figures(rows, store, scale)` and `trends(rows)` as `report.write` wants them, and `NOTES`, lines for the page.
"""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from bdjax.registry import near
from bdjax.store import Store
from bdjax.sweep import Clock, Runner, say
from bdjax.types import BadInput


def load(path: str | Path) -> ModuleType:
    """The experiment file as a module."""
    path = Path(path)
    if not path.is_file():
        others = [p.as_posix() for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise BadInput(f"no experiment file {path}{near(path.as_posix(), others)}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise BadInput(f"{path} is not Python: {error}") from error
    if not hasattr(module, "cells"):
        raise BadInput(f"{path} is no experiment: it defines no cells(scale, seeds)")
    return module


def run(
    path: str | Path,
    scale: str = "cpu",
    out: str | Path | None = None,
    seeds: int | None = None,
    quiet: bool = False,
    lanes: int | None = None,
) -> list[dict[str, Any]]:
    """Runs the experiment at `path`; returns its rows. What was finished by an earlier run is not done again."""
    import jax
    from rich.console import Console

    from bdjax import report

    module = load(path)
    if scale not in module.SCALES:
        raise BadInput(f"{path} has no scale '{scale}'; it has: {', '.join(module.SCALES)}")
    if seeds is not None and seeds < 1:
        raise BadInput(f"seeds {seeds}: at least one is needed")
    store = Store(out or Path("results") / f"{Path(path).stem}-{scale}")
    console = Console()
    start = time.monotonic()
    clock = Clock()

    def finished(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            say(f"  {report.line(row)}", quiet)

    runner = Runner(
        store,
        Path(path).stem,
        scale,
        lanes=lanes,
        devices=jax.local_devices(),
        quiet=quiet,
        on_rows=finished,
        clock=clock,
    )
    rows = runner.run(list(module.cells(scale, seeds)))
    begun = time.monotonic()
    report.print_table(rows, console)
    figures = module.figures(rows, store, scale) if hasattr(module, "figures") else []
    trends = module.trends(rows) if hasattr(module, "trends") else []
    clock.add("report", begun)
    seconds = clock.seconds | {"total": time.monotonic() - start}
    page = report.write(
        store.folder, rows, figures, title=module.TITLE, notes=getattr(module, "NOTES", ()), trends=trends, seconds=seconds,
        command=f"bdjax run {Path(path).as_posix()} --scale {scale}",
    )  # fmt: skip
    say("seconds by stage: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()), quiet)
    print(f"results: {store.results}\npage: {page}")
    return rows
