"""One decorated dataclass is a method: its hyper-parameters, its registry entry, its command-line
flags.

Array fields are leaves that a sweep may vmap over; fields made with `static()` are part of the
compile key. A method is bdjax's own, or that of a plugin: any file, module or notebook outside the
package (`bdjax.plugins`).
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.core import Tracer

from bdjax import own
from bdjax.errors import near
from bdjax.types import BadInput, Key, Metric, Range, concrete, shown

T = TypeVar("T")
F = TypeVar("F", bound=Callable)
KINDS = ("attack", "defense", "model", "dataset")
_CITATION = re.compile(
    r"\((?P<paper>[^()]+?), (?P<year>\d{4})(?:, arXiv:(?P<arxiv>[\w./-]+))?(?:, [^()]*)?\)"
)
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_RESERVED = {"name", "class", "plugin", "array", "function", "text"}
"""Keys that `describe` writes beside the fields."""
_HOME = Path(__file__).resolve().parent
_entries: dict[tuple[str, str], "Entry"] = {}
_pytrees: dict[tuple[str, str], type] = {}
"""By plugin, as `_stem` gives it, and name."""
_metrics: dict[str, tuple[Metric, type | str]] = {}
"""What is declared of each metric, and by which class or module."""


class Entry(NamedTuple):
    """A registered method. `paper`, `year`, `arxiv` come from the first paragraph of its docstring;
    `plugin` is None for bdjax's own, else see `plugin_of`; `source`: its file, or notebook.
    """

    kind: str
    name: str
    paper: str
    year: int | None
    arxiv: str | None
    file: str
    plugin: str | None
    cls: type
    source: str


def door(fn: F) -> F:
    """`fn` behind a check of what it is given against its annotations: `BadInput` where that is of
    another kind; what is traced passes. A missing or unknown argument stays Python's `TypeError`.
    """
    signature = inspect.signature(fn)
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
    # One annotation for all of these.
    some = kinds.get(inspect.Parameter.VAR_POSITIONAL, "")
    named = kinds.get(inspect.Parameter.VAR_KEYWORD, "")

    @functools.wraps(fn)
    def guarded(*args, **kwargs):
        given, known = dict(signature.bind(*args, **kwargs).arguments), _annotations(fn)
        if some in known:
            known = {**known, some: tuple[known[some], ...]}
        more = given.pop(named, {})
        check_given(fn.__name__, known, given)
        if named in known:
            check_given(fn.__name__, dict.fromkeys(more, known[named]), more)
        return fn(*args, **kwargs)

    return typing.cast(F, guarded)


@functools.cache
def _annotations(fn: Callable) -> dict[str, Any]:
    found = typing.get_type_hints(fn, include_extras=True)
    # As the core says it, where another annotation would be other code.
    return {n: Key if (n, hint) == ("key", jax.Array) else hint for n, hint in found.items()}


def check_given(where: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `BadInput` where a value of `given` is not what the annotation of its name says."""
    for name, value in given.items():
        if name in known and (fault := _fault(known[name], value, within=False)):
            raise BadInput(f"{where}: {name}{fault}")


def static(default: Any = dataclasses.MISSING, **kwargs) -> Any:
    """A dataclass field that is part of the compile key instead of a leaf; `kwargs` as those of
    `leaf`.
    """
    return leaf(default, static=True, **kwargs)


def leaf(
    default: Any = dataclasses.MISSING,
    *,
    before: Any = dataclasses.MISSING,
    static: bool = False,
    **kwargs,
) -> Any:
    """A dataclass field that an older version of its class did not have. `before`: the value that
    means what was done then; with it a run is the run that it was, see `bdjax.identity`.
    """
    about = {"static": True} if static else {}
    about |= {} if before is dataclasses.MISSING else {"before": before}
    return dataclasses.field(default=default, metadata=about, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass whose non-static fields are pytree leaves."""
    made = _leaves(cls)
    _pytrees[_stem(plugin_of(made)), made.__name__] = made
    return made


def _leaves(cls: type[T]) -> type[T]:
    cls = dataclasses.dataclass(frozen=True)(cls)
    if taken := _RESERVED & {field.name for field in dataclasses.fields(cls)}:  # type: ignore[arg-type]
        raise BadInput(
            f"{cls.__name__}: a field cannot be called '{min(taken)}', which descriptions use"
        )
    declare(cls, *vars(cls).get("measures", ()))
    return _node(cls)


def _node(cls: type[T]) -> type[T]:
    """`cls` as a pytree whose structure is that of no other class.

    Not by `register_dataclass`: there (jax 0.10 to 0.12) the structures of two classes are equal
    where their static fields and leaves are, so that jit may run, with one, what it compiled for
    the other.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    moving = [field.name for field in fields if not is_static(field)]
    fixed = [field.name for field in fields if is_static(field)]
    paths = [jax.tree_util.GetAttrKey(name) for name in moving]

    def flat(value: Any) -> tuple[tuple, tuple]:
        return tuple(getattr(value, n) for n in moving), tuple(getattr(value, n) for n in fixed)

    def keyed(value: Any) -> tuple[tuple, tuple]:
        leaves, kept = flat(value)
        return tuple(zip(paths, leaves)), kept

    def built(kept: tuple, leaves: Iterable[Any]) -> T:
        return cls(**dict(zip(moving, leaves)), **dict(zip(fixed, kept)))

    jax.tree_util.register_pytree_with_keys(cls, keyed, built, flat)
    return cls


def _source(cls: type) -> str:
    """The file that a class stands in; a notebook has none, its cells are all of one module."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return str(Path(file).resolve()) if file else cls.__module__


@functools.cache
def plugin_of(cls: type) -> str | None:
    """Where a class comes from that is not bdjax's own, as `--plugin` takes it: its module where
    Python finds that by its name, else the name of its file, without the folder; `__main__` in a
    notebook. None for bdjax's own.
    """
    source, module = Path(_source(cls)), cls.__module__
    # An installed bdjax has its experiments within it; what they are is the same as in a clone.
    if source.is_relative_to(_HOME) and not source.is_relative_to(_HOME / "_experiments"):
        return None
    place = source.parent if source.name == "__init__.py" else source.with_suffix("")
    parts = tuple(module.split("."))
    importable = module != "__main__" and place.parts[-len(parts) :] == parts
    return module if importable or not source.is_absolute() else source.name


def _stem(plugin: str | None) -> str:
    """What a plugin is called however it was given: `my_net.py` may be imported as `my_net`."""
    return (plugin or "").removesuffix(".py").rpartition(".")[2]


def declare(giver: type | str, *found: Metric) -> None:
    """Declares metrics, whose keys mean the same wherever they occur: `BadInput` where another
    class, or module, than `giver` declares one otherwise. The same one may think better of it, as
    when a cell of a notebook is run again.
    """
    for metric in found:
        what = f"metric '{metric.name}' of {_place(giver)}"
        if metric.better not in ("high", "low", None) or metric.name.count("*") > 1:
            raise BadInput(
                f"{what}: `better` is 'high', 'low' or None, and a name has one * at most"
            )
        known, other = _metrics.get(metric.name, (metric, giver))
        if known != metric and _place(other) != _place(giver):
            raise BadInput(f"{what} is declared otherwise by {_place(other)}; give it another name")
    _metrics.update({metric.name: (metric, giver) for metric in found})


def declared(name: str) -> Metric | None:
    """What is declared of the metric `name`, by itself, else by the longest pattern that it fits;
    None where nothing is.
    """
    if name not in _metrics:
        _import_measures()
    if name in _metrics:
        return _metrics[name][0]
    for known in sorted(_metrics, key=len, reverse=True):
        before, star, after = known.partition("*")
        if star and len(name) > len(known) - 1 and name.startswith(before) and name.endswith(after):
            metric, inner = _metrics[known][0], name[len(before) : len(name) - len(after)]
            return metric._replace(name=name, label=metric.label.replace("*", inner))
    return None


def _place(giver: type | str) -> str:
    return giver if isinstance(giver, str) else f"{giver.__qualname__} in {_source(giver)}"


def _register(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "none":
        words = "small letters, digits and single hyphens, and not 'none'"
        raise BadInput(f'@{kind} takes a name of {words}, such as @{kind}("my-{kind}")')

    def decorate(cls: type[T]) -> type[T]:
        if kind == "defense" and not hasattr(cls, "stage"):
            raise BadInput(
                f"defense '{name}' is of no kind: derive {cls.__qualname__} from Training, Repair, "
                "Inversion, Judge, InputFilter or SampleFilter of bdjax.defenses.base"
            )
        cls = _leaves(cls)
        plugin, source = plugin_of(cls), _source(cls)
        if plugin is not None:
            _import_own(kind)  # so that a clash is the plugin's mistake, whichever came first
        earlier = _entries.get((kind, name))
        mine = f"{cls.__qualname__} in {source}"
        if earlier and (theirs := f"{earlier.cls.__qualname__} in {earlier.source}") != mine:
            # else a file or a cell of a notebook that is run again
            raise BadInput(f"two {kind}s are called '{name}': {theirs} and {mine}; rename one")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        none = dataclasses.MISSING
        for field in fields.values():
            if field.init and field.default is none and field.default_factory is none:
                raise BadInput(f"{kind} '{name}': its field '{field.name}' needs a default")
        for preset, values in getattr(cls, "presets", {}).items():
            if unknown := set(values) - set(fields):
                words = f"the preset '{preset}' sets '{min(unknown)}', which is no field"
                raise BadInput(f"{kind} '{name}': {words}")
        if plugin is not None:
            from bdjax import plugins

            plugins.hold(cls, kind, name)
        paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0]
        cite = _CITATION.search(" ".join(paragraph.split()))
        paper, year, arxiv = (
            (cite["paper"], int(cite["year"]), cite["arxiv"]) if cite else ("", None, None)
        )
        root = _HOME.parent
        file = Path(source).name if plugin else Path(source).relative_to(root).as_posix()
        _entries[kind, name] = Entry(kind, name, paper, year, arxiv, file, plugin, cls, source)
        _names[cls] = name
        return cls

    return decorate


_names: dict[type, str] = {}
"""Of every class that was registered, also one that a cell of a notebook, run again, replaced."""


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Takes back what plugins registered within the block, where it raises."""
    before: tuple[dict, dict] = (dict(_entries), dict(_pytrees))
    metrics = dict(_metrics)
    try:
        yield
    except BaseException:
        for table, kept in zip((_entries, _pytrees), before):
            for key, value in list(table.items()):
                cls = value.cls if isinstance(value, Entry) else value
                if value is not kept.get(key) and plugin_of(cls) is not None:
                    del table[key]
                    if cls.__module__ != "__main__":  # so that it can be tried again
                        sys.modules.pop(cls.__module__, None)
        _entries.update(before[0])
        _pytrees.update(before[1])
        for name, (_, giver) in list(_metrics.items()):
            if name not in metrics and isinstance(giver, type) and plugin_of(giver) is not None:
                del _metrics[name]
        raise


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def attack(name: str) -> Callable[[type[T]], type[T]]:
    """Registers an attack under `name`."""
    return _register("attack", name)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def defense(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a defense under `name`, a class of one of the kinds of `defenses.base`."""
    return _register("defense", name)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def model(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a family of nets under `name`."""
    return _register("model", name)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def dataset(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a source of images under `name`."""
    return _register("dataset", name)


def _import_own(kind: str) -> None:
    _import_all(f"bdjax.{kind}s")


def _import_all(package: str) -> None:
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        importlib.import_module(module.name)


@functools.cache
def _import_measures() -> None:
    for package in ("bdjax.attacks", "bdjax.defenses", "bdjax.analysis"):
        _import_all(package)


def entries(kind: str | None = None) -> list[Entry]:
    """All registered methods, by kind and name. Imports the modules of that kind on first use, and
    the plugins that `BDJAX_PLUGINS` and installed packages name (`plugins.standing`).
    """
    from bdjax import plugins

    if kind is not None and (not isinstance(kind, str) or kind not in KINDS):
        raise BadInput(f"kind {_word(kind)} is not one of {', '.join(KINDS)}")
    for one in KINDS if kind is None else (kind,):
        _import_own(one)
    plugins.standing()
    found = [e for e in _entries.values() if kind in (None, e.kind)]
    return sorted(found, key=lambda e: (KINDS.index(e.kind), e.name))


def brought() -> list[Entry]:
    """The methods of plugins that are registered so far."""
    return [entry for entry in _entries.values() if entry.plugin is not None]


@door
def get(kind: str, name: str) -> Entry:
    """The entry `name`; raises `BadInput` with the nearest name."""
    known = {e.name: e for e in entries(kind)}
    if name not in known:
        raise BadInput(
            f"unknown {kind} '{name}'{near(name, known)} (`bdjax list {kind}s` shows all; one of "
            "your own needs its --plugin)"
        )
    return known[name]


@door
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
    made = cls(**(presets[preset] if preset else {}) | fields)
    validate(made)
    return made


def on_cpu(entry: Entry) -> Any:
    """A registered method in its preset `cpu`, or with its defaults where it has none."""
    preset = "cpu" if "cpu" in getattr(entry.cls, "presets", {}) else None
    return make(entry.kind, entry.name, preset)


def validate(method: Any) -> None:
    """Raises `BadInput` where a field of a method, recipe or model family, or of one within it, has
    a value outside its range, or of another kind than its annotation says. What is traced passes.
    """
    if dataclasses.is_dataclass(method) and (fault := fault_within(method)):
        raise BadInput(f"{name_of(method) or type(method).__name__}: {fault}")


def admit(method: Any, *where: Any) -> None:
    """`validate`, and the method's own `check(*where)` where nothing in it is traced: the door of
    all functions that take a method.
    """
    validate(method)
    if concrete(method):
        with jax.ensure_compile_time_eval():  # a check computes with values, within jit too
            method.check(*where)


def unread(method: Any, path: Sequence[str]) -> str | None:
    """Why the field at `path` (a field, or that of a part) has no effect as `method` is set, as the
    end of a line; None where it has one.

    A class says so in `used_if`: {field: {other: values}}, one line of its kind being read where
    each `other` field has one of its values, `...` standing for any but None; None: never read.
    """
    first, *rest = path
    conditions: dict[str, Any] = {}
    for cls in reversed(type(method).__mro__):
        conditions |= vars(cls).get("used_if", {})
    wanted = conditions.get(first, {})
    if wanted is None:
        return f"{name_of(method) or type(method).__name__} does not read it"
    for other, values in wanted.items():
        now = getattr(method, other)
        given = now if isinstance(now, tuple) else (now,)
        if now is None if values is ... else not any(value in values for value in given):
            words = "set" if values is ... else " or ".join(map(str, values))
            return f"it is read only with {other} {words}, which is {now}"
    part = getattr(method, first, None)
    return unread(part, rest) if rest and dataclasses.is_dataclass(part) else None


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, with their ranges."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def ranges(hint: Any) -> list[tuple[set[type], Range | None]]:
    """The numbers within an annotation: of which types, and in which range."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        inner = [kinds for kinds, _ in ranges(args[0])]
        limit = next((note for note in args[1:] if isinstance(note, Range)), None)
        return [(set().union(*inner), limit)] if inner else []
    if origin in (typing.Union, types.UnionType):
        plain = {arg for arg in args if arg in _NUMBERS}
        rest = [found for arg in args if arg not in _NUMBERS for found in ranges(arg)]
        return ([(plain, None)] if plain else []) + rest
    if origin is tuple:
        return [found for arg in args if arg is not Ellipsis for found in ranges(arg)]
    return [({hint}, None)] if hint in _NUMBERS else []


_NUMBERS = (float, int, jax.Array, np.ndarray)


def fault_within(value: Any) -> str | None:
    """What is wrong with a field of a dataclass, its name first; None where nothing is."""
    for name, hint in hints(type(value)).items():
        if fault := _fault(hint, getattr(value, name)):
            return f"{name}{fault}"
    return None


def _fault(hint: Any, value: Any, within: bool = True) -> str | None:
    """What is wrong with a value, as what follows its name in an error line; `within`: or with a
    part of it, where it is a dataclass.
    """
    if isinstance(value, (Tracer, jax.ShapeDtypeStruct)) and hint != Key:
        return None
    if hint is Any and not within:
        return None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == Key:
        return _key_fault(value)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        numbers = {arg for arg in args if arg in _NUMBERS}
        rest = [arg for arg in args if arg is not types.NoneType and arg not in numbers]
        rest = [arg for arg in rest if arg is not Path or str not in args]
        if rest:
            faults = [_fault(arg, value, within) for arg in rest]
            faults += [_number_fault(numbers, None, value)] if numbers else []
            if Path in args and isinstance(value, (str, Path)):
                return own.name_fault(value)
            known = [fault for fault in faults if fault is not None]
            if len(known) < len(faults):
                return None
            # A part that is wrong says more than the whole does.
            whole = f" {_word(value)} is not "
            inner = [fault for fault in known if not fault.startswith(whole)]
            kinds = dict.fromkeys(fault.removeprefix(whole) for fault in known)
            return inner[0] if inner else whole + " or ".join(kinds)
    if origin is Annotated and not ranges(hint):
        return _fault(args[0], value, within)
    if kinds := ranges(hint) if origin is not tuple else []:
        return _number_fault(*kinds[0], value)
    if origin is Literal:
        known = ", ".join(map(str, args))
        return (
            None
            if isinstance(value, str) and value in args
            else f" {_word(value)} is not one of {known}"
        )
    if origin is tuple:
        if not isinstance(value, tuple):
            return f" {_word(value)} is not a tuple"
        each = args[:1] * len(value) if args[-1:] == (Ellipsis,) else args
        if len(each) != len(value):
            return f" {_word(value)} has {len(value)} values, not {len(each)}"
        for i, fault in enumerate(map(_fault, each, value)):
            if fault:
                return f"[{i}]{fault}" if fault.startswith(".") else fault
        return None
    if hint is bool:
        return None if isinstance(value, (bool, np.bool_)) else f" {_word(value)} is not a bool"
    if hint is str:
        return None if isinstance(value, str) else f" {_word(value)} is not a string"
    if origin in (Mapping, Sequence, Iterable):
        return _several_fault(origin, args, value)
    if hint is Path and isinstance(value, Path):
        return own.name_fault(value)
    if getattr(hint, "_is_protocol", False):
        lacks = isinstance(value, type) or not all(hasattr(value, name) for name in _parts(hint))
        return f" {_word(value)} is no {hint.__name__}" if lacks else None
    if origin is Callable and (not callable(value) or isinstance(value, type)):
        return f" {_word(value)} is not a function"
    cls: Any = hint if isinstance(hint, type) else origin  # of dict[…], list[…]
    known = isinstance(cls, type) and hint is not Any and origin is not Callable
    if known and not isinstance(value, cls):
        return f" {_word(value)} is not of class {cls.__name__}"
    if within and dataclasses.is_dataclass(value) and not isinstance(value, type):
        fault = fault_within(value)
        return fault and f".{fault}"
    return None


@functools.cache
def _parts(protocol: type) -> set[str]:
    """What a protocol asks for, by name."""
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    names = {name for base in bases for name in (*vars(base), *inspect.get_annotations(base))}
    return {name for name in names if not name.startswith("_") or name == "__call__"}


def _key_fault(value: Any) -> str | None:
    if not isinstance(value, (jax.Array, jax.ShapeDtypeStruct)) or not jax.numpy.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        return f" {_word(value)} is no key: give jax.random.key(0), or one split off"
    return None if value.shape == () else f" is {value.size} keys: give one of them"


def _several_fault(origin: Any, args: Sequence[Any], value: Any) -> str | None:
    """What is wrong with what should be a mapping, a list or what can be looped over."""
    word = {Mapping: "a mapping", Sequence: "a list"}.get(origin, "a list")
    array = isinstance(value, (jax.Array, np.ndarray))
    fits = value.ndim > 0 if array else isinstance(value, origin)
    if not fits or isinstance(value, (str, bytes)) or (array and args[0] is not Any):
        return f" {_word(value)} is not {word}"
    if array or not isinstance(value, Collection):  # what a generator yields is seen later
        return None
    parts = value.values() if isinstance(value, Mapping) and origin is Mapping else value
    faults = (_fault(args[-1], part, within=False) for part in parts)
    return next((fault for fault in faults if fault), None)


def _number_fault(kinds: set[type], limit: Range | None, value: Any) -> str | None:
    array = isinstance(value, (jax.Array, np.ndarray))
    whole = int in kinds and float not in kinds
    if array or isinstance(value, np.generic):
        kind = getattr(value.dtype, "kind", "key")  # keys of jax.random have none
        allowed = jax.Array in kinds or (value.ndim == 0 and isinstance(value, np.generic))
        # bfloat16 and its like are of kind V
        number = allowed and kind in ("iu" if whole else "iufbV" if kinds <= _ARRAYS else "iufV")
    else:
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        number = number and not kinds <= _ARRAYS
    if not number:
        words = "an array" if kinds <= _ARRAYS else "a whole number" if whole else "a number"
        return f" {_word(value)} is not {words}"
    fault = limit and limit.fault(value)
    return fault and f" {fault}"


_ARRAYS = {jax.Array, np.ndarray}


def _word(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value.dtype}{list(value.shape)}"
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def name_of(method: Any) -> str | None:
    """The registry name of a configured method; None for None."""
    return _names.get(type(method))


def replace(base: Any, path: Sequence[str], value: Any) -> Any:
    """`base` with the field at `path` set to `value`."""
    first, *rest = path
    if not dataclasses.is_dataclass(base) or isinstance(base, type):
        raise BadInput(f"{_word(base)} is no cell, method or recipe: it has no field '{first}'")
    if not hasattr(base, first):
        raise BadInput(f"{type(base).__name__} has no field '{first}'")
    return dataclasses.replace(
        base, **{first: replace(getattr(base, first), rest, value) if rest else value}
    )


def is_static(field: dataclasses.Field) -> bool:
    """Whether a field is part of the compile key."""
    return bool(field.metadata.get("static"))


def describe(value: Any, arrays: dict[str, np.ndarray] | None = None) -> Any:
    """The effective configuration as plain JSON values.

    What is not bdjax's own names its `plugin`. An array of more than 16 values, and a text of more
    than 4,096 letters, becomes its digest, or, where `arrays` is given, a reference into it, so
    that `revive` can bring the whole back.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: describe(getattr(value, f.name), arrays) for f in dataclasses.fields(value)
        }
        name, plugin = name_of(value), plugin_of(type(value))
        said = {"name": name} if name else {"class": type(value).__name__}
        return said | ({"plugin": plugin} if plugin else {}) | fields
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        array = np.asarray(value)
        if (array.size <= 16 and arrays is None) or array.ndim == 0:
            return array.tolist()
        if arrays is None:
            content = hashlib.sha256(array.tobytes()).hexdigest()[:16]
            return f"{array.dtype}{list(array.shape)}:{content}"
        arrays[f"a{len(arrays)}"] = array
        return {"array": f"a{len(arrays) - 1}"}
    if isinstance(value, str) and len(value) > 4096:
        held = describe(np.frombuffer(value.encode(), np.uint8), arrays)
        return {"text": held["array"]} if isinstance(held, dict) else held
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
    if "text" in described:
        return arrays[described["text"]].tobytes().decode()
    if "function" in described:
        return None  # code is never read back
    fields = {
        k: revive(kind, value, arrays)
        for k, value in described.items()
        if k not in ("name", "class", "plugin")
    }
    if "class" in described:
        key = _stem(described.get("plugin")), described["class"]
        if key not in _pytrees:
            entries()  # a part that a method's file brings
        cls = _pytrees[key]
        known = hints(cls)
        for name, value in fields.items():  # an array of no dimension is written as a number
            kinds = ranges(known[name]) if name in known and isinstance(value, float) else []
            if kinds and kinds[0][0] <= _ARRAYS:
                fields[name] = np.asarray(value, np.float32)
        return cls(**fields)
    name = described["name"]
    if name not in {e.name for e in entries(kind)}:  # of another kind than what it is a part of
        kind = next((e.kind for e in entries() if e.name == name), kind)
    return make(kind, name, **fields)


def require(kinds: Mapping[str, str], described: Mapping[str, Any]) -> list[str]:
    """Raises `BadInput` where something in `described` is of plugins that are not there, naming
    them; `kinds`: of which kind its parts are. Returns lines that tell of methods that come from
    elsewhere here. Imports nothing by what it reads.
    """
    known, lacking, elsewhere = entries(), dict[str, list[str]](), list[str]()

    def look(kind: str | None, value: Any) -> None:
        if isinstance(value, list):
            for one in value:
                look(kind, one)
        elif isinstance(value, dict):
            if (plugin := value.get("plugin")) is not None:
                name = value.get("name", value.get("class"))
                if not isinstance(plugin, str) or not _PLUGIN.fullmatch(plugin):
                    raise BadInput(f"it names '{shown(plugin)}', which is no plugin")
                if not isinstance(name, str):
                    raise BadInput(f"it names '{shown(name)}', which is no method of {plugin}")
                if "name" not in value:
                    if (_stem(plugin), name) not in _pytrees:
                        lacking.setdefault(plugin, [f"the class {name}"])
                elif (here := there(kind, name)) is None:
                    lacking.setdefault(plugin, []).append(f"the {kind or 'method'} '{name}'")
                elif _stem(here.plugin) != _stem(plugin):
                    place = here.plugin or "bdjax"
                    elsewhere.append(f"'{name}' is that of {place} here, it was that of {plugin}")
            for one in value.values():  # a part may be of another kind than what it is a part of
                look(None, one)

    def there(kind: str | None, name: str) -> Entry | None:
        return next((e for e in known if e.name == name and kind in (None, e.kind)), None)

    for part, kind in kinds.items():
        look(kind, described.get(part))
    if lacking:
        whose = [
            f"{', '.join(dict.fromkeys(words))} of "
            f"{'a notebook' if plugin == '__main__' else plugin}"
            for plugin, words in lacking.items()
        ]
        flags = [f"--plugin {shlex.quote(p)}" for p in lacking if p != "__main__"]
        do = [f"give {' '.join(flags)}"] if flags else []
        do += ["run its cells first"] if "__main__" in lacking else []
        raise BadInput(f"this net needs {' and '.join(whose)}: {' and '.join(do)}")
    return elsewhere


_PLUGIN = re.compile(r"[^/\\\x00-\x1f]+\.py|\w+(\.\w+)*")


def digest(*values: Any) -> str:
    """A content hash of configurations: 16 hex digits. It is the same wherever a method lies."""
    text = json.dumps(_placeless(describe(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _placeless(described: Any) -> Any:
    if isinstance(described, dict):
        return {k: _placeless(v) for k, v in described.items() if k != "plugin"}
    return [_placeless(v) for v in described] if isinstance(described, list) else described
