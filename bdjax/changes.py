"""Fields of an experiment's cells, changed by name: `attack.rate=0.05`,
`defense[fine-pruning].recipe.lr=1e-4`.

A path begins with a part of a cell, of one method alone where its name stands in brackets. A change
is made in the cells that have the field and read it.
"""

import ast
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

import jax
import numpy as np

from bdjax import registry
from bdjax.study import Cell
from bdjax.types import BadInput

PARTS = ("dataset", "model", "recipe", "attack", "defense", "probe")
_PATH = re.compile(r"(?P<part>\w+)(\[(?P<method>[\w.-]+)\])?(?P<fields>(\.\w+)+)")


def read(settings: Iterable[str]) -> dict[str, str]:
    """`PATH=VALUE` words as `{path: text}`."""
    found: dict[str, str] = {}
    for word in settings:
        path, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not text or not _PATH.fullmatch(path):
            raise BadInput(
                f"'{word}' is not of the form PATH=VALUE, such as attack.rate=0.05 or "
                "'defense[fine-pruning].recipe.lr=1e-4'"
            )
        if path in found:
            raise BadInput(f"{path} is set twice")
        found[path] = text
    return found


def changed(cells: Iterable[Cell], settings: Mapping[str, Any]) -> list[Cell]:
    """The cells with each `{path: value}` set where a cell has the field, a value as such or in the
    words of a command line. `Cell.changed` says what was set.

    Raises `BadInput` where no cell has a field or reads it, and where two cells become one.
    """
    cells = list(cells)
    poisoned = any(_has(cell, RATE) and _get(cell, RATE) for cell in cells)
    found = []
    for cell in cells:  # a twin that is clean by a rate of 0 stays clean beside what is poisoned
        twin = poisoned and _has(cell, RATE) and not _get(cell, RATE)
        mine = {path: v for path, v in settings.items() if not (twin and _is_rate(path))}
        found.append(_changed(cell, mine))
    for path in settings:
        if not any(path in cell.changed for cell in found):
            raise BadInput(_unknown(cells, settings, path))
    before: dict[tuple[str, str], Cell] = {}
    for old, new in zip(cells, found, strict=True):
        twin = before.setdefault((new.table, new.run_id), old)  # tables may share a run
        if twin.run_id != old.run_id:
            names = " and ".join(f"'{c.table}: {c.row}', seed {c.seed}" for c in (twin, old))
            raise BadInput(
                f"{', '.join(new.changed)}: {names} would become one run; change one of them "
                "alone, such as by defense[NAME].FIELD, or leave the other out by --only"
            )
    return found


def varied(cells: Iterable[Cell], path: str, values: Sequence[Any]) -> Iterator[Cell]:
    """Each cell that has the field `path`, and reads it, with each of `values`, named in its row
    and its tags; other cells as they are.
    """
    cells = list(cells)
    having = [_has(cell, path) and not _idle(cell, path) for cell in cells]
    if not any(having):
        raise BadInput(_unknown(cells, {}, path))
    for cell, has in zip(cells, having, strict=True):
        for value in values if has else ():
            new = _set(cell, path, value)
            shown = _shown(_get(new, path))
            tags = {**cell.tags, path: shown}
            yield dataclasses.replace(new, row=f"{cell.row}, {path} {shown}", tags=tags)
        if not has:
            yield cell


def _shown(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(registry.describe(value))


def _changed(cell: Cell, settings: Mapping[str, Any]) -> Cell:
    paths = [path for path in settings if _has(cell, path)]
    while True:
        new = _all_set(cell, {path: settings[path] for path in paths})
        if not (idle := [path for path in paths if _idle(new, path)]):
            what = {path: _shown(_get(new, path)) for path in paths}
            return dataclasses.replace(new, changed={**cell.changed, **what})
        paths = [path for path in paths if path not in idle]


RATE = "attack.rate"


def _is_rate(path: str) -> bool:
    """Also of one attack: `attack[badnets].rate`."""
    part, _, fields = split(path)
    return (part, fields) == ("attack", ["rate"])


def _all_set(cell: Cell, settings: Mapping[str, Any]) -> Cell:
    """The cell with those of the fields that it has set, read or not."""
    for path, value in settings.items():
        cell = _set(cell, path, value) if _has(cell, path) else cell
    return cell


def split(path: str) -> tuple[str, str | None, list[str]]:
    """The part of a cell, the one method that is meant (None: any), and the fields within."""
    match = _PATH.fullmatch(path)
    if match is None or match["part"] not in PARTS:
        raise BadInput(
            f"'{path}' names no field of a cell: it begins with one of {', '.join(PARTS)}"
        )
    return match["part"], match["method"], match["fields"].split(".")[1:]


def _get(cell: Cell, path: str) -> Any:
    part, _, fields = split(path)
    value = getattr(cell, part)
    for field in fields:
        value = getattr(value, field)
    return value


def _has(cell: Cell, path: str) -> bool:
    part, method, fields = split(path)
    value = getattr(cell, part)
    if method is not None and registry.name_of(value) != method:
        return False
    for field in fields:
        if not dataclasses.is_dataclass(value) or field not in _names(value):
            return False
        value = getattr(value, field)
    return True


def _names(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)]


def _idle(cell: Cell, path: str) -> str | None:
    """Why a field is not read by the method that it is a field of; None where it is."""
    part, _, fields = split(path)
    return registry.unread(getattr(cell, part), fields)


def _set(cell: Cell, path: str, value: Any) -> Cell:
    part, _, fields = split(path)
    holder = getattr(cell, part)
    for field in fields[:-1]:
        holder = getattr(holder, field)
    hint, old = registry.hints(type(holder))[fields[-1]], getattr(holder, fields[-1])
    if "Callable" in str(hint) and isinstance(value, str) and value.lower() != "none":
        raise BadInput(f"{path} is a function, which can be given from Python only")
    new = literal(value) if isinstance(value, str) else value
    if any(get_origin(one) is tuple for one in (hint, *get_args(hint))):
        new = (new,) if isinstance(new, (str, int, float)) else new
    if dataclasses.is_dataclass(old) and new is not None and not dataclasses.is_dataclass(new):
        raise BadInput(
            f"{path} is a {type(old).__name__}: set one of its fields, "
            f"{', '.join(f'{path}.{name}' for name in _names(old))}"
        )
    if isinstance(new, int) and not isinstance(new, bool) and _float(hint):
        new = float(new)  # as a default has it: numbers of one type share a program
    try:
        return registry.replace(cell, [part, *fields], new)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _float(hint: Any) -> bool:
    kinds = {kind for found, _ in registry.ranges(hint) for kind in found}
    return float in kinds and int not in kinds


def literal(text: str) -> Any:
    """A number, tuple, true, false, none, or else the text itself."""
    known = {"none": None, "true": True, "false": False}
    if text.lower() in known:
        return known[text.lower()]
    try:
        return _tuples(ast.literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _unknown(cells: Sequence[Cell], settings: Mapping[str, Any], path: str) -> str:
    """Why `path` changes no cell."""
    if having := [cell for cell in cells if _has(cell, path)]:
        reason = _idle(_all_set(having[0], settings), path)
        return f"{path} has no effect: {reason}"
    part, method, _ = split(path)
    methods = {registry.name_of(getattr(cell, part)) for cell in cells} - {None}
    if method is not None and method not in methods:
        return f"no cell has the {part} '{method}'{registry.near(method, map(str, methods))}"
    known = set()
    for cell in cells:
        for name in PARTS if method is None else [part]:
            value = getattr(cell, name)
            if method is None or registry.name_of(value) == method:
                head = name if method is None else f"{name}[{method}]"
                known |= {f"{head}.{inner}" for inner in _paths(value)}
    return f"no cell has a field {path}{registry.near(path, sorted(known))}"


def _paths(value: Any) -> Iterator[str]:
    if not dataclasses.is_dataclass(value):
        return
    for name in _names(value):
        yield name
        inner = getattr(value, name)
        if not isinstance(inner, (jax.Array, np.ndarray)):
            yield from (f"{name}.{path}" for path in _paths(inner))
