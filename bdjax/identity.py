"""Which run a row is, and by which code it was made.

A run is what decides the numbers: the images, the net, the recipe, the attack, the seed, the
defense, the probe. Where it is shown (`PLACE`) is not part of it, nor a field at the value that
means what was done before the field was there (`registry.leaf(before=…)`).

Code is known by digests of its syntax trees: blind to layout, comments and docstrings, equal on all
versions of Python. A digest is that of a method's file and of all it imports, transitively, but for
third parties, for the modules of `ASIDE`, and for the named `CORE`, which counts for all.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import linecache
import math
import re
import sys
import sysconfig
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bdjax import registry
from bdjax.types import BadInput

Row = Mapping[str, Any]
Stale = Literal["keep", "redo"]
"""What to do with rows and victims that other code made."""
PLACE = ("experiment", "scale", "table", "row", "tags", "set", "reported", "substitute")
"""What of a row says where it is shown, and beside which numbers: no part of the run."""
VICTIM = ("training", "model", "recipe", "attack")
"""The parts of a row's code that made the victim."""
CORE: dict[str, dict[str, tuple[str, ...]]] = {
    "training": {
        "train.py": (),
        "models/layers.py": (),
        "attacks/base.py": (),
        "types.py": ("Split", "Plan"),
        "mesh.py": ("lane_map",),
        "sweep.py": ("_begin", "_epoch", "_whole_training", "bound"),
    },
    "judging": {
        "metrics.py": (),
        "defenses/base.py": (),
        "types.py": ("Verdict", "word"),
        "sweep.py": ("_keys", "_defended", "_measured", "_probed", "_prepare"),
    },
}
"""The core that decides numbers, by file of bdjax: these definitions, and what they use of their
file; all of it where none is named.
"""
ASIDE = {
    *(
        "registry",
        "errors",
        "shipped",
        "types",
        "mesh",
        "own",
        "schema",
        "store",
        "progress",
        "report",
        "plots",
        "figures",
        "latex",
        "trackers",
        "cli",
    ),
    *("experiment", "study", "studies", "changes", "rows", "sweep", "loops", "target", "engine"),
    *("identity", "migrate", "plugins", "poison", "testing", "__init__", "__main__"),
    *("models/conv", "datasets"),
}
"""Modules of bdjax that decide no number, or only by what `CORE` names of them. Images count by
their fingerprint; `models/conv` is held to the native convolution by a test.
"""
NEEDED = {"builtins", "jax", "jaxlib", "flax", "optax", "numpy"}
"""Packages whose functions are known by their version."""


# --- Runs ---


def victim_of(data: str, config: Mapping[str, Any], seed: int) -> str:
    """The content hash of what decides a victim's weights: the fingerprint of its images, and
    `config`, as `registry.describe` gives its parts.
    """
    parts = [plain(config[part], part) for part in ("model", "recipe", "attack")]
    return _hash([data, *parts, plain(seed)])


def run_of(victim: str, config: Mapping[str, Any]) -> str:
    """The content hash of a run: a victim, and what is done to it."""
    probe = [plain(config["probe"])] if config.get("probe") is not None else []
    return _hash([victim, plain(config["defense"], "defense"), *probe])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def plain(described: Any, kind: str | None = None) -> Any:
    """A description without what stays outside of a run, its numbers as float32 has them."""
    if isinstance(described, Mapping):
        if {*described} == {"function"}:  # whether its file is imported, or given as a plugin
            return {"function": _LOADED.sub("", str(described["function"]))}
        method = described.keys() & {"name", "class"}
        old = _before(described, kind) if method else {}
        found = {k: plain(v, kind) for k, v in described.items() if not (method and k == "plugin")}
        return {k: v for k, v in found.items() if k not in old or v != old[k]}
    if isinstance(described, (list, tuple)):
        return [plain(value, kind) for value in described]
    if isinstance(described, float):
        if not math.isfinite(described):
            return None if math.isnan(described) else str(described)  # as files have them
        if abs(described) < np.finfo(np.float32).max:
            described = float(str(np.float32(described)))
        return int(described) if described.is_integer() else described
    return described


_LOADED = re.compile(r"^(plugin|experiment)_(?=\w+\.)")
"""What files that are run as modules have before their names."""


def _before(described: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """The fields of a described method that an older version did not have, at what they mean."""
    cls = _class(described, kind)
    fields = () if cls is None else dataclasses.fields(cls)
    return {
        f.name: plain(registry.describe(f.metadata["before"]))
        for f in fields
        if "before" in f.metadata
    }


def _class(described: Mapping[str, Any], kind: str | None) -> type | None:
    if "class" in described:  # of 0.1 without its plugin
        exact = registry._stem(described.get("plugin")), described["class"]
        alike = [key for key in registry._pytrees if key[1] == described["class"]]
        return registry._pytrees.get(exact if exact in alike else (alike or [exact])[0])
    found = [e for e in registry._entries.values() if e.name == described["name"]]
    return next((e.cls for e in found if e.kind == kind), found[0].cls if found else None)


# --- Code ---


def codes(cells: Iterable[Any]) -> dict[str, dict[str, str | None]]:
    """The code at hand that makes the runs of `cells`, by run: digests by part, None where the
    source cannot be had.
    """
    known: dict[Any, str | None] = {}
    core = _core()
    return {
        cell.run_id: core
        | {
            part: known[things] if things in known else known.setdefault(things, digest(things))
            for part in (*VICTIM[1:], "defense", "probe")
            if (things := frozenset(_things(getattr(cell, part))))
        }
        for cell in {cell.run_id: cell for cell in cells}.values()
    }


def _core() -> dict[str, str | None]:
    """The digests of the core."""
    found = {}
    for part, files in CORE.items():
        pieces = [
            (str(ROOT / file), name) for file, names in files.items() for name in names or [""]
        ]
        found[part] = _digest(pieces, follow=False)
    return found


def differs(code: Any, now: Mapping[str, Any]) -> list[str]:
    """The parts of a row's or victim's `code` that are not the code `now` at hand, or whose source
    cannot be had; `[""]` where it has none.
    """
    if not isinstance(code, Mapping) or not code:
        return [""]
    return [
        p for p in {**code, **now} if code.get(p, "") != now.get(p, "") or now.get(p, "") is None
    ]


def ask(folder: Path, rows: Sequence[Row], faults: Sequence[list[str]], others: int) -> None:
    """Raises `BadInput`: the stale `rows`, with what `differs`, and so many victims come from other
    code.
    """
    words: Counter[str] = Counter()
    for row, parts in zip(rows, faults, strict=True):
        names = {"": "no digest kept", "training": "bdjax's training", "judging": "bdjax's judging"}
        words.update({str(names.get(part) or row.get(part) or f"the {part}") for part in parts})
    which = f" ({', '.join(f'{name} {n}' for name, n in words.most_common())})" if rows else ""
    what = [f"{len(rows)} rows{which}"] if rows else []
    what += [f"{others} victims"] if others else []
    raise BadInput(
        f"{folder}: {' and '.join(what)} come from other code than this: give --stale keep to "
        "leave them as they are, or --stale redo to compute them, and nothing else, anew"
    )


def kept(rows: Iterable[Row]) -> set[str]:
    """The runs among `rows` that are not of the code at hand; where a method is not at hand, of
    other code than the latest row that has it, or `kept` by a run that had it.
    """
    rows = sorted(rows, key=lambda r: ("kept" not in r, r.get("written") or 0), reverse=True)
    found = {row["run"] for row in rows if not row.get("code")}
    core = {}
    if len(found) < len({row["run"] for row in rows}):
        registry.entries()  # the code at hand
        core = _core()
    known: dict[Any, str | None] = {}
    for row in rows:
        if row["run"] in found:
            continue
        config, now, absent = row.get("config") or {}, dict(core), False
        for part in (*VICTIM[1:], "defense", "probe"):
            try:
                key: Any = frozenset(_named(config.get(part), part))
                if key and key not in known:
                    known[key] = digest(key)
            except LookupError:
                key, absent = json.dumps([part, _names(config.get(part))]), True
                known.setdefault(key, row["code"].get(part, ""))  # the latest comes first
            now |= {part: known[key]} if key and known[key] != "" else {}
        if differs(row["code"], now) or (absent and row.get("kept")):
            found.add(row["run"])
    return found


def digest(things: Iterable[Any]) -> str | None:
    """The digest of the code of classes and functions; None where its source cannot be had."""
    pieces = [_piece(thing) for thing in things]
    return None if None in pieces else _digest([p for p in pieces if p])


def _things(value: Any) -> Iterator[Any]:
    """The classes and functions outside of the core that a configured method stands on."""
    if isinstance(value, functools.partial):
        yield from _things([value.func, *value.args, *value.keywords.values()])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _own(type(value))
        for field in dataclasses.fields(value):
            yield from _things(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _things(inner)
    elif isinstance(value, Mapping):
        yield from _things(list(value.values()))
    elif callable(value):
        thing = inspect.unwrap(value)
        thing = thing if isinstance(thing, (type, types.FunctionType)) else type(thing)
        yield from filter(_counts, [thing])


def _named(described: Any, kind: str) -> Iterator[Any]:
    """As `_things`, of a description; `LookupError` where something is not at hand."""
    if isinstance(described, list):
        for inner in described:
            yield from _named(inner, kind)
    elif isinstance(described, Mapping):
        if "function" in described:
            yield from filter(_counts, [_function(str(described["function"]))])
        elif described.keys() & {"name", "class"}:
            if (cls := _class(described, kind)) is None:
                raise LookupError(described)
            yield from _own(cls)
        yield from _named(list(described.values()), kind)


def _names(described: Any) -> list[Any]:
    if isinstance(described, list):
        return [_names(inner) for inner in described]
    if isinstance(described, Mapping):
        inner = [_names(value) for value in described.values()]
        return [described.get(key) for key in ("name", "class", "function")] + [
            i for i in inner if i
        ]
    return []


def _function(dotted: str) -> Any:
    """A function that is loaded, by its name; code is never imported for it."""
    parts = dotted.split(".")
    for i in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:i]))
        for part in parts[i:]:
            found = getattr(found, part, None)
        if found is not None:
            return inspect.unwrap(found)
    raise LookupError(dotted)


@functools.cache
def _own(cls: type) -> list[type]:
    """A class and its bases, but for those of third parties and of the core."""
    top = cls.__module__.partition(".")[0]
    return [
        base
        for base in cls.__mro__
        if base is cls or base.__module__.partition(".")[0] == top or not _third(base)
        if _counts(base)
    ]


def _third(thing: Any) -> bool:
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    if file is None:
        return thing.__module__ != "__main__"
    return any(Path(file).is_relative_to(sysconfig.get_path(p)) for p in _INSTALLED) and not Path(
        file
    ).is_relative_to(ROOT)


def _counts(thing: Any) -> bool:
    """Whether a class or function is outside of the core, of `ASIDE` and of what bdjax needs."""
    if thing.__module__.partition(".")[0] in NEEDED:
        return False
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return file is None or _followed(Path(file))


# --- Files, cells of a notebook, and what they import ---

ROOT = Path(__file__).parent
_INSTALLED = ("stdlib", "purelib", "platlib")
_BLIND = {"ctx", "kind", "type_comment", "type_ignores"}
_BODIES = {"body", "orelse", "finalbody"}


class _Statement(NamedTuple):
    """A statement of a module: its `dump`, the names it binds and uses, and its imports, `(level,
    module, name)` each.
    """

    dump: str
    binds: frozenset[str]
    uses: frozenset[str]
    imports: tuple[tuple[int, str, str], ...]


Piece = tuple[str, str]
"""A file, or cell of a notebook, and a name in it; "": all of it."""


def _piece(thing: Any) -> Piece | None:
    """Where a class or function stands; None where its source cannot be had.

    An experiment, script or notebook holds more than methods: of these it is the definition and
    what that uses.
    """
    module = sys.modules.get(thing.__module__)
    name = thing.__qualname__.partition(".")[0]
    file = getattr(module, "__file__", None)
    if file is None:
        made = [thing] if inspect.isfunction(thing) else vars(thing).values()
        places = [
            f.__code__.co_filename
            for f in map(inspect.unwrap, filter(inspect.isfunction, made))
            if f.__qualname__.startswith(thing.__qualname__)
        ]
        return next(((p, name) for p in places if any(name in s.binds for s in _read(p))), None)
    if not file.endswith(".py") or not Path(file).is_file():
        return None
    if thing.__module__ != "__main__" and not hasattr(module, "cells"):
        return file, ""
    for statement in _read(file):
        if name in statement.binds:
            return file, name
    return file, ""  # a lambda within a call, or what was put there from outside


def _digest(pieces: Iterable[Piece], follow: bool = True) -> str:
    todo, seen = list(pieces), set()
    dumps: dict[str, dict[int, str]] = {}
    while todo:
        piece = todo.pop()
        if piece in seen:
            continue
        seen.add(piece)
        place, name = piece
        statements = _read(place)
        found = dumps.setdefault(place, {})
        known = False
        for i, statement in enumerate(statements):
            if name and name not in statement.binds and "*" not in statement.binds:
                continue
            known |= name in statement.binds
            if i in found:
                continue
            found[i] = statement.dump
            if name:
                todo += [(place, used) for used in statement.uses]
            if follow:
                for one in statement.imports:
                    todo += _imported(place, *one)
        if name and not known and follow:
            todo += _global(place, name, found)
    whole = ["\n".join(found[i] for i in sorted(found)) for found in dumps.values()]
    return hashlib.sha256("\0".join(sorted(whole)).encode()).hexdigest()[:16]


def _global(place: str, name: str, found: dict[int, str]) -> list[Piece]:
    """What a name means in a notebook, where another cell gave it a meaning."""
    if Path(place).is_file():
        return []
    value = vars(sys.modules["__main__"]).get(name)
    if isinstance(value, types.ModuleType):
        return _within(value.__name__, "")
    if isinstance(value, (type, types.FunctionType)):
        if value.__module__ != "__main__":
            return _within(value.__module__, "")
        return [] if (piece := _piece(value)) is None else [piece]
    if isinstance(value, (bool, int, float, str, tuple)):
        found[-1 - len(found)] = f"{name} = {value!r}"
    return []


def _imported(place: str, level: int, module: str, name: str) -> list[Piece]:
    """The files that `from module import name` at `place` brings, outside of the core: those of
    bdjax, and those beside an own file, of its package or folder.
    """
    path = Path(place)
    if level:
        base = path.parents[level - 1]
        if not base.is_relative_to(ROOT):
            return _file(base.joinpath(*module.split(".")), name)
        inner = [ROOT.name, *base.relative_to(ROOT).parts, *filter(None, module.split("."))]
        return _within(".".join(inner), name)
    if module.partition(".")[0] == ROOT.name:
        return _within(module, name)
    if not path.is_file() or path.is_relative_to(ROOT):
        return []
    top = path.parent
    while (top / "__init__.py").exists():
        top = top.parent
    first = path.relative_to(top).with_suffix("").parts[0]
    if (
        any(top == Path(sysconfig.get_path(p)) for p in _INSTALLED)
        and module.split(".")[0] != first
    ):
        return []
    return _file(top.joinpath(*module.split(".")), name)


def _file(path: Path, name: str) -> list[Piece]:
    places = [path / f"{name}.py", path / name / "__init__.py"] if name else []
    places += [path / "__init__.py", path.with_name(f"{path.name}.py")]
    return [(str(p), "") for p in [p for p in places if p.is_file()][:1]]


def _within(module: str, name: str) -> list[Piece]:
    """The file of bdjax that has `name`, which a package may have from elsewhere."""
    parts = module.split(".")
    if parts[0] != ROOT.name:
        return []
    path = ROOT.joinpath(*parts[1:])
    if name and path.is_dir() and not _file(path / name, ""):
        origin = getattr(getattr(sys.modules.get(module), name, None), "__module__", None)
        if isinstance(origin, str) and origin != module:
            return _within(origin, "")
    return [piece for piece in _file(path, name) if _followed(Path(piece[0]))]


@functools.cache
def _followed(path: Path) -> bool:
    """Whether what a method imports from the file `path` counts as its code."""
    path = path.resolve()
    if not path.is_relative_to(ROOT):
        return True
    inner = path.relative_to(ROOT)
    name = inner.with_suffix("").as_posix()
    core = any(inner.as_posix() in files for files in CORE.values())
    return not (core or name in ASIDE or inner.parts[0] in ASIDE)


def _read(place: str) -> tuple[_Statement, ...]:
    """The statements of a file or of a cell of a notebook."""
    path = Path(place)
    if path.is_file():
        stat = path.stat()
        return _parsed(place, (stat.st_mtime_ns, stat.st_size))
    return _parsed(place, "".join(linecache.getlines(place)))


@functools.lru_cache(maxsize=4096)
def _parsed(place: str, content: Any) -> tuple[_Statement, ...]:
    try:
        tree = ast.parse(content if isinstance(content, str) else Path(place).read_bytes())
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"{place} is not Python: {' '.join(str(error).split())}") from error
    found = [_walked(node) for part in tree.body for node in _each(part)]
    roots = {ROOT.name} | {  # which another cell may have imported
        alias.asname or ROOT.name
        for _, nodes in found
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == ROOT.name or (alias.name.startswith(f"{ROOT.name}.") and not alias.asname)
    }
    statements = [_statement(dump, nodes, roots) for dump, nodes in found]
    # The order of imports is layout.
    brought = [one for one in statements if one.dump.startswith("(Import")]
    rest = [one for one in statements if not one.dump.startswith("(Import")]
    return (*sorted(brought, key=lambda one: one.dump), *rest)


def _each(node: ast.stmt) -> Iterator[ast.stmt]:
    """A statement, each name of an import by itself; nothing where it does nothing."""
    if isinstance(node, ast.Import):
        yield from (ast.Import([alias]) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (ast.ImportFrom(node.module, [alias], node.level) for alias in node.names)
    elif not _silent(node):
        yield node


def _walked(node: ast.AST) -> tuple[str, list[ast.AST]]:
    """A statement as text, and the nodes that are in it."""
    out: list[str] = []
    nodes: list[ast.AST] = []
    _dump(node, out.append, nodes.append)
    return " ".join(out), nodes


def _statement(dump: str, nodes: Sequence[ast.AST], roots: set[str]) -> _Statement:
    binds, uses, imports = set(), set(), []
    # What a function or class binds within itself is its own.
    local = isinstance(nodes[0], _DEFINED)
    for node in nodes:
        if isinstance(node, ast.Name):
            uses.add(node.id)
            if isinstance(node.ctx, ast.Store) and not local:
                binds.add(node.id)
        elif isinstance(node, _DEFINED):
            binds |= {node.name} if node is nodes[0] or not local else set()
        elif isinstance(node, ast.Import):
            imports += [(0, alias.name, "") for alias in node.names]
            binds |= set() if local else {a.asname or a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports += [(node.level, node.module or "", alias.name) for alias in node.names]
            binds |= set() if local else {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            chain = _chain(node)
            if isinstance(node.ctx, ast.Store) and not local:
                binds |= set(chain[:1])  # it changes what that is
            if len(chain) > 1 and chain[0] in roots:
                imports.append((0, ".".join([ROOT.name, *chain[1:-1]]), chain[-1]))
    binds |= uses if isinstance(nodes[0], ast.Expr) else set()  # a call may change all of them
    return _Statement(dump, frozenset(binds), frozenset(uses), tuple(imports))


_DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _chain(node: ast.expr) -> list[str]:
    """`a.b[i].c` as its names; empty for anything else."""
    parts = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        parts += [node.attr] if isinstance(node, ast.Attribute) else []
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _silent(node: Any) -> bool:
    """Whether a statement does nothing to a number: a docstring, `...`, `pass`, what is declared of
    metrics (`types.Metric`).
    """
    value = node.value if isinstance(node, ast.Expr) else None
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "declare"
    if isinstance(node, ast.Assign):
        return [_chain(target) for target in node.targets] == [["measures"]]
    return isinstance(node, ast.Pass) or isinstance(value, ast.Constant)


def canonical(tree: ast.AST) -> str:
    """A syntax tree as a text that is equal for equal code on all versions of Python: without
    positions, empty fields and statements that do nothing.
    """
    return _walked(tree)[0]


def _dump(node: Any, put: Callable[[str], Any], see: Callable[[ast.AST], Any]) -> None:
    if not isinstance(node, ast.AST):
        # `repr` escapes what a version's Unicode tables do not know.
        put(ascii(node) if isinstance(node, (str, bytes)) else repr(node))
        return
    see(node)
    put(f"({type(node).__name__}")
    for name in node._fields:
        value = getattr(node, name, None)
        if name in _BLIND or (value is None and not isinstance(node, ast.Constant)):
            continue
        if isinstance(value, ast.JoinedStr) and name == "format_spec" and not _joined(value.values):
            continue
        if isinstance(value, list):
            if isinstance(node, ast.JoinedStr):
                value = _joined(value)
            elif name in _BODIES:
                value = [inner for inner in value if not _silent(inner)]
            if value:
                put(f"{name}[")
                for inner in value:
                    _dump(inner, put, see)
                put("]")
        else:
            put(name)
            _dump(value, put, see)
    put(")")


def _joined(parts: Sequence[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string; versions of Python cut its plain text in different ways."""
    found: list[ast.expr] = []
    for part in parts:
        if isinstance(part, ast.Constant) and found and isinstance(found[-1], ast.Constant):
            found[-1] = ast.Constant(str(found[-1].value) + str(part.value))
        elif not isinstance(part, ast.Constant) or part.value != "":
            found.append(part)
    return found
