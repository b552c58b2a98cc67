"""Brings rows of bdjax 0.1 over: `python -m bdjax.migrate RESULTS OUT`.

RESULTS is a results folder or a `results.jsonl`, which stays as it is; OUT a folder that has no
rows yet. A row gets the hash that its run has today, from its configuration, its seed and the
images that its data set has here, and keeps its old one as `was`. Where the images are not at hand
or cannot be read, or where two rows of one run differ in their numbers, a row keeps the hash it
has: no row is lost. None says by which code it was made: all are stale.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdjax import identity, registry
from bdjax.datasets.base import fingerprint
from bdjax.progress import shown
from bdjax.store import Store, read_rows, result_files
from bdjax.types import BadInput


def brought(rows: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """`rows` with the hashes that their runs have today, and why how many of them kept theirs."""
    registry.entries()  # what fields their methods have
    data: dict[str, str | BadInput] = {}
    first: dict[str, Mapping[str, Any]] = {}
    found, left = [], Counter()
    for row in rows:
        config = row.get("config") or {}
        if missing := {"dataset", "model", "recipe", "attack", "defense"} - config.keys():
            left[f"its config has no {min(missing)}"] += 1
            found.append(dict(row))
            continue
        images = data.setdefault(repr(config["dataset"]), _images(config["dataset"]))
        if isinstance(images, BadInput):
            left[str(images)] += 1
            found.append(dict(row))
            continue
        victim = identity.victim_of(images, config, row.get("seed", 0))
        run = identity.run_of(victim, config)
        same = first.setdefault(run, row)
        if _numbers(same) != _numbers(row):
            left["another row of its run has other numbers"] += 1
            found.append(dict(row))
            continue
        found.append({**row, "run": run, "victim": victim, "was": row.get("was", row["run"])})
    return found, left


def _numbers(row: Mapping[str, Any]) -> str:
    return repr((sorted(row["metrics"].items()), row.get("error")))


def _images(config: Any) -> str | BadInput:
    """The fingerprint of a described data set, or why there is none."""
    try:
        source = registry.revive("dataset", config, {})
        registry.validate(source)
        return fingerprint(source.load())
    except BadInput as error:
        return error
    except Exception as error:  # whatever a description that is none of ours makes `revive` raise
        return BadInput(f"its data set cannot be read: {' '.join(str(error).split())[:100]}")


def migrate(source: Path, out: Path) -> list[str]:
    """Writes the rows of `source`, and the arrays beside them, to `out`; says what became of
    them.
    """
    files = result_files(source) if source.is_dir() else [source]
    if not files:
        raise BadInput(f"{source} has no results.jsonl")
    store = Store(out)
    store.ready()
    if store.rows():
        raise BadInput(f"{out} has rows: give a folder that has none")
    rows, left = brought(read_rows(files))
    arrays = Store(files[0].parent)
    store.append(rows)
    for row in {row["run"]: row for row in reversed(rows)}.values():
        if kept := arrays.arrays(row.get("was", row["run"])):
            store.save_arrays(row["run"], kept)
    new = len(rows) - sum(left.values())
    lines = [f"{len(rows)} rows, {new} under the hashes of today ({len(store.rows())} in {out})"]
    return [*lines, *(f"{n} keep theirs: {why}" for why, n in left.most_common())]


def main(args: Sequence[str]) -> None:
    """Exit codes as `bdjax`: 0, or 2 and one line."""
    try:
        if len(args) != 2:
            raise BadInput("give a results folder, or its results.jsonl, and a new folder")
        print("\n".join(map(shown, migrate(*map(Path, args)))))
    except BadInput as error:
        print(f"bdjax: {shown(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
