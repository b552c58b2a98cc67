"""Rows of results, asked for by what they are of.

>>> Rows(rows).where(defense="strip", attack__rate=0.1).mean("far")
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdjax import schema
from bdjax.errors import BadInput, near
from bdjax.progress import say_once

Row = Mapping[str, Any]
"""A finished cell as `results.jsonl` has it."""
FIELDS = (
    "experiment", "scale", "table", "row", "dataset", "model", "attack", "defense", "seed",
    "victim", "substitute",
)  # fmt: skip
"""What a row is asked for by, beside its tags and its configuration."""


class Rows(Sequence[Row]):
    """Rows in order, and questions to them. A key is a tag of a row, else a field of it (`FIELDS`),
    else a path into its configuration by dots: `attack.rate`, as a keyword `attack__rate`.
    `folder`: the results folder that they are of, where there is one.
    """

    def __init__(self, rows: Iterable[Row] = (), folder: Path | None = None) -> None:
        self._rows, self.folder = list(rows), folder
        self._whole = self._rows  # of which these are a part

    def _part(self, rows: Iterable[Row]) -> "Rows":
        made = Rows(rows, self.folder)
        made._whole = self._whole
        return made

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __getitem__(self, index: Any) -> Any:
        found = self._rows[index]
        return self._part(found) if isinstance(index, slice) else found

    def where(self, **asked: Any) -> "Rows":
        """The rows that have all these values: `where(net="CNN", defense=None, attack__rate=0.1)`.
        None also fits what a row has not, whatever a tag calls its absence.

        Keys are taken in order. `BadInput` names the nearest one where no row that is left by then
        has a key.
        """
        rows = self._rows
        for key, value in asked.items():
            path = key.replace("__", ".")
            if rows and not any(has(row, path) for row in rows):
                known = (name for row in rows for name in paths(row))
                raise BadInput(f"no row has a '{path}'{near(path, dict.fromkeys(known))}")
            absent = value is None and path in FIELDS
            rows = [
                row
                for row in rows
                if _same(lookup(row, path), value) or (absent and row.get(path) is None)
            ]
        return self._part(rows)

    def by(self, *keys: str) -> dict[Any, "Rows"]:
        """The rows by their value of a key, or of several as a tuple, as these first appear;
        lists as text.
        """
        found: dict[Any, list[Row]] = {}
        for row in self._rows:
            values = tuple(_word(lookup(row, key)) for key in keys)
            found.setdefault(values[0] if len(keys) == 1 else values, []).append(row)
        return {value: self._part(rows) for value, rows in found.items()}

    @property
    def done(self) -> "Rows":
        """Without the rows that failed."""
        return self._part(row for row in self._rows if not row.get("error"))

    def values(self, metric: str) -> list[float]:
        """A metric of each row that has it; it may be infinite. `BadInput` names the nearest one
        where neither these rows nor those that they are a part of have it, and nobody declares it.
        """
        found = [row["metrics"].get(metric) for row in self._rows if not row.get("error")]
        if not any(value is not None for value in found):
            known = dict.fromkeys(name for row in self._whole for name in row["metrics"])
            if known and metric not in known:
                from bdjax.registry import declared  # which needs jax

                if declared(metric) is None:
                    raise BadInput(f"no row has the metric '{metric}'{near(metric, known)}")
        return [float(value) for value in found if measured(value)]

    def mean(self, metric: str) -> float:
        """The mean of a metric; NaN where no row has it, or where it is ∞ in some and −∞ in
        others.
        """
        found = self.values(metric)
        if not all(map(math.isfinite, found)):
            return sum(found)
        return statistics.fmean(found) if found else math.nan

    def std(self, metric: str) -> float:
        """The sample standard deviation of a metric; NaN of fewer than two values, or infinite
        ones.
        """
        found = self.values(metric)
        known = len(found) > 1 and all(map(math.isfinite, found))
        return statistics.stdev(found) if known else math.nan

    def arrays(self, store: Any) -> list[tuple[Row, dict[str, Any]]]:
        """The finished rows, each with its arrays in the `store`; without those whose arrays were
        not kept with the rows.
        """
        return [(row, found) for row in self.done if (found := store.arrays(row["run"]))]

    def figures(self) -> list[Any]:
        """Pictures of the rows as `report.Figure`s, which hold Matplotlib's; see
        `bdjax.figures`.
        """
        from bdjax.figures import figures
        from bdjax.store import Store

        if self.folder is None:
            raise BadInput("rows of no results folder have no pictures: run them, or give one")
        return figures(self, Store(self.folder))

    def frame(self) -> Any:
        """A pandas frame, a line a row: metrics, fields, tags, and the configuration by dots."""
        try:
            import pandas  # type: ignore[import-not-found]
        except ImportError:
            raise BadInput("a frame needs pandas: pip install 'bdjax[frame]'") from None
        named = [{path: _word(lookup(row, path)) for path in paths(row)} for row in self._rows]
        return pandas.DataFrame([row["metrics"] | of for of, row in zip(named, self._rows)])


def result_files(folder: Path) -> list[Path]:
    """The results files of a folder, that of an unsharded run first; a results file is its own."""
    if folder.suffix == ".jsonl" and folder.is_file():
        return [folder]
    return [
        path
        for path in (folder / "results.jsonl", *sorted(folder.glob("results-*-of-*.jsonl")))
        if path.exists()
    ]


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of results files: of each run the line that was written last, once for each place
    where it is shown. What was measured is a float, NaN where it was not. A torn last line is left
    out; so are odd rows, of which one line tells.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        *lines, last = schema.content(path, schema.KINDS["row"].most).split(b"\n")
        odd = []
        for number, line in enumerate([*lines, last], 1):
            try:
                row = schema.understood(line, "row")
                if row["run"] not in found or written(row) > written(found[row["run"]]):
                    found[row["run"]] = row
            except schema.Newer as error:
                raise BadInput(f"{path}: row {number} {error}") from None
            except BadInput as error:
                if number <= len(lines):
                    odd.append(f"line {number}: {error}")
        if odd:
            say_once(
                f"{len(odd)} of {len(lines)} rows of {path} are odd and left out ({odd[0][:200]})"
            )
    rows = [(row, row.pop("also", [])) for row in found.values()]
    return [{**row, **place} for row, also in rows for place in ({}, *also)]


def written(row: Mapping[str, Any]) -> float:
    """When a row was written; 0.1 did not say."""
    return row.get("written") or 0.0


def stacked(found: Iterable[tuple[Row, Mapping[str, Any]]], *names: str) -> list[np.ndarray]:
    """The arrays of these names that `Rows.arrays` gave, of all rows: `[R, ...]` each."""
    return [np.stack(some) for some in zip(*([arrays[n] for n in names] for _, arrays in found))]


def lookup(row: Row, path: str) -> Any:
    """A tag of a row, a field, or its configuration by dots; None where it has none."""
    tags = row.get("tags") or {}
    if path in tags:
        return tags[path]
    if path in row and not isinstance(row[path], Mapping):
        return row[path]
    value: Any = row.get("config")
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def has(row: Row, path: str) -> bool:
    """Whether `lookup` finds something in a row, be it None."""
    return path in FIELDS or lookup(row, path) is not None or path in paths(row)


def paths(row: Row) -> dict[str, None]:
    """What a row can be asked for: its fields, its tags and its configuration, by dots."""
    fields = (key for key, value in row.items() if not isinstance(value, Mapping))
    return dict.fromkeys([*fields, *(row.get("tags") or {}), *_inner(row.get("config") or {})])


def _inner(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _inner(inner, f"{path}.{name}".lstrip("."))
    else:
        yield path


def _same(value: Any, asked: Any) -> bool:
    """Whether two values are equal; numbers as far as a float32 tells."""
    if isinstance(value, bool) or isinstance(asked, bool):
        return value is asked
    if isinstance(value, (int, float)) and isinstance(asked, (int, float)):
        return math.isclose(value, asked, rel_tol=1e-6)
    return value == (list(asked) if isinstance(asked, tuple) else asked)


def _word(value: Any) -> Any:
    """A value that can stand in a table or be a key; lists as text."""
    return json.dumps(value) if isinstance(value, (list, Mapping)) else value


def measured(value: Any) -> bool:
    """Whether a metric is a number, be it infinite; NaN and None are what was not measured."""
    return isinstance(value, (int, float)) and not math.isnan(value)
