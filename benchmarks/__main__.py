"""`python -m benchmarks [NAME …] [--json]`: ours against a lean PyTorch loop (extra `torch`), alternating, medians."""

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Annotated

import tyro

from bdjax.registry import near
from bdjax.sweep import device_name

SHARED = {"measure", "rivals", "__main__"}


def names() -> list[str]:
    """The benchmarks: one module each."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in SHARED)


def main(
    names_: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="names")] = (),
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    repeats: int = 5,
) -> None:
    """Run benchmarks.

    Args:
        names_: train, neural_cleanse, strip, ensemble …; all if not given.
        json_: One JSON object a line: case, ours_s, rival_s, ratio, matmul_share, device, item_s.
        repeats: How often ours, the rival and a matmul alternate.
    """
    for name in names_:
        if name not in names():
            print(f"benchmarks: unknown benchmark '{name}'{near(name, names())}", file=sys.stderr)
            sys.exit(2)
    try:
        from benchmarks import rivals
    except ImportError:
        rivals = None
        print("no torch (extra `torch`): no rivals", file=sys.stderr)
    from benchmarks import measure

    if not json_:
        print(f"{'case':34} {'ours s':>9} {'torch s':>9} {'ratio':>6} {'matmul share':>12} {'s an item':>9}")
    for name in names_ or names():
        for case in importlib.import_module(f"benchmarks.{name}").cases(rivals):
            result = measure.run(case, device_name(), repeats)
            if json_:
                print(json.dumps(result._asdict()), flush=True)
            else:
                shown = [("-" if v is None else f) for v, f in (
                    (result.rival_s, f"{result.rival_s or 0:.3f}"), (result.ratio, f"{result.ratio or 0:.2f}"),
                    (result.matmul_share, f"{100 * (result.matmul_share or 0):.0f} %"), (result.item_s, f"{result.item_s or 0:.3f}"),
                )]  # fmt: skip
                print(
                    f"{result.case:34} {result.ours_s:9.3f} {shown[0]:>9} {shown[1]:>6} {shown[2]:>12} {shown[3]:>9}",
                    flush=True,
                )


if __name__ == "__main__":
    tyro.cli(main)
