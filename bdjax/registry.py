"""One decorated dataclass is a method: its hyper-parameters, its registry entry, its command-line
flags, its row of the README.

Array fields are leaves that a sweep may vmap over; fields made with `static()` are part of the
compile key.
"""

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import numpy as np

from bdjax.types import BadInput

T = TypeVar("T")
KINDS = ("attack", "defense", "model", "dataset")
_CITATION = re.compile(
    r"\((?P<paper>[^()]+?), (?P<year>\d{4})(?:, arXiv:(?P<arxiv>[\w./-]+))?(?:, [^()]*)?\)"
)
_entries: dict[tuple[str, str], "Entry"] = {}
_pytrees: dict[str, type] = {}


class Entry(NamedTuple):
    """A registered method. `paper`, `year`,
    `arxiv` come from the first paragraph of its docstring.
    """

    kind: str
    name: str
    paper: str
    year: int | None
    arxiv: str | None
    file: str
    cls: type

    @property
    def stage(self) -> str:
        """What a defense returns = the folder that it stands in: train, repair, invert, inputs,
        samples or models.
        """
        return self.cls.__module__.split(".")[-2]


def static(default: Any = dataclasses.MISSING, **kwargs) -> Any:
    """A dataclass field that is part of the compile key instead of a leaf."""
    return dataclasses.field(default=default, metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass whose non-static fields are pytree leaves."""
    _pytrees[cls.__name__] = made = jax.tree_util.register_dataclass(
        dataclasses.dataclass(frozen=True)(cls)
    )
    return made


def _register(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    def decorate(cls: type[T]) -> type[T]:
        cls = pytree(cls)
        paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0]
        cite = _CITATION.search(" ".join(paragraph.split()))
        # A file run as a script (an experiment that brings a method of its own) has no place in the
        # package.
        source = Path(inspect.getfile(cls))
        root = Path(__file__).parent.parent
        file = source.relative_to(root).as_posix() if source.is_relative_to(root) else source.name
        paper, year, arxiv = (
            (cite["paper"], int(cite["year"]), cite["arxiv"]) if cite else ("", None, None)
        )
        _entries[kind, name] = Entry(kind, name, paper, year, arxiv, file, cls)
        return cls

    return decorate


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def attack(name: str) -> Callable[[type[T]], type[T]]:
    """Registers an attack under `name`."""
    return _register("attack", name)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def defense(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a defense under `name`; its stage is the folder that it stands in."""
    return _register("defense", name)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def model(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a family of nets under `name`."""
    return _register("model", name)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def dataset(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a source of images under `name`."""
    return _register("dataset", name)


def entries(kind: str | None = None) -> list[Entry]:
    """All registered methods, by kind and name. Imports the modules of that kind on first use."""
    for one in KINDS if kind is None else (kind,):
        package = f"{one}s"
        root = importlib.import_module(f"bdjax.{package}")
        for module in pkgutil.walk_packages(root.__path__, f"bdjax.{package}."):
            importlib.import_module(module.name)
    found = [e for e in _entries.values() if kind in (None, e.kind)]
    return sorted(found, key=lambda e: (KINDS.index(e.kind), e.name))


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error line: which known name was meant."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; the nearest name is '{found[0]}'" if found else ""


def get(kind: str, name: str) -> Entry:
    """The entry `name`; raises `BadInput` with the nearest name."""
    known = {e.name: e for e in entries(kind)}
    if name not in known:
        raise BadInput(
            f"unknown {kind} '{name}'{near(name, known)} (`bdjax list {kind}s` shows all)"
        )
    return known[name]


def make(kind: str, name: str, preset: str | None = None, **fields) -> Any:
    """A configured method: `make("defense", "neural-cleanse", preset="paper", lanes=10)`."""
    cls = get(kind, name).cls
    presets = getattr(cls, "presets", {})
    if preset is not None and preset not in presets:
        raise BadInput(
            f"{kind} '{name}' has no preset '{preset}'; it has: {', '.join(presets) or 'none'}"
        )
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(fields) - known:
        raise BadInput(
            f"{kind} '{name}' has no field '{sorted(unknown)[0]}'; it has: "
            f"{', '.join(sorted(known))}"
        )
    return cls(**(presets[preset] if preset else {}) | fields)


def name_of(method: Any) -> str | None:
    """The registry name of a configured method; None for None."""
    if method is None:
        return None
    return next((e.name for e in _entries.values() if e.cls is type(method)), None)


def is_static(field: dataclasses.Field) -> bool:
    """Whether a field is part of the compile key."""
    return bool(field.metadata.get("static"))


def describe(value: Any, arrays: dict[str, np.ndarray] | None = None) -> Any:
    """The effective configuration as plain JSON values.

    An array of more than 16 values becomes its digest, or, where `arrays` is given, a reference
    into it, so that `revive` can bring the whole back.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: describe(getattr(value, f.name), arrays) for f in dataclasses.fields(value)
        }
        return (
            {"name": name_of(value), **fields}
            if name_of(value)
            else {"class": type(value).__name__, **fields}
        )
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        array = np.asarray(value)
        if (array.size <= 16 and arrays is None) or array.ndim == 0:
            return array.tolist()
        if arrays is None:
            content = hashlib.sha256(array.tobytes()).hexdigest()[:16]
            return f"{array.dtype}{list(array.shape)}:{content}"
        arrays[f"a{len(arrays)}"] = array
        return {"array": f"a{len(arrays) - 1}"}
    if isinstance(value, dict):
        return {str(k): describe(v, arrays) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v, arrays) for v in value]
    if callable(value):
        return {"function": f"{value.__module__}.{getattr(value, '__qualname__', value)}"}
    return value


def revive(kind: str, described: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The method that `describe` wrote down; never runs code from it."""
    if isinstance(described, list):
        return tuple(revive(kind, item, arrays) for item in described)
    if not isinstance(described, dict):
        return described
    if "array" in described:
        return arrays[described["array"]]
    if "function" in described:
        return None  # code is never read back
    fields = {
        k: revive(kind, value, arrays)
        for k, value in described.items()
        if k not in ("name", "class")
    }
    if "class" in described:
        if described["class"] not in _pytrees:
            entries()  # a part that a method's file brings
        return _pytrees[described["class"]](**fields)
    name = described["name"]
    if name not in {e.name for e in entries(kind)}:  # of another kind than what it is a part of
        kind = next((e.kind for e in entries() if e.name == name), kind)
    return make(kind, name, **fields)


def digest(*values: Any) -> str:
    """A content hash of configurations: 16 hex digits."""
    return hashlib.sha256(json.dumps(describe(values), sort_keys=True).encode()).hexdigest()[:16]
