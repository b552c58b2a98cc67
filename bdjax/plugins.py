"""Methods from outside the package: files, modules, what `BDJAX_PLUGINS` names, and installed
packages that have an entry point of the group `bdjax.plugins`.

>>> load_plugins("my_net.py", "my_package.attacks")

Nothing is imported because a file of results or a checkpoint names it.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import shlex
import sys
import traceback
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType, ModuleType, NoneType, UnionType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from bdjax import own, registry
from bdjax.own import explained
from bdjax.registry import Entry, all_or_nothing, near
from bdjax.types import BadInput, Repaired, Scores, Suspects, Verdict, shown

GROUP, VARIABLE = "bdjax.plugins", "BDJAX_PLUGINS"
_MODULE = re.compile(r"\w+(\.\w+)*")
_files: dict[Path, bytes] = {}
"""What was loaded, and what it held then."""
_words: list[str] = []
_standing = False


def load_plugins(*plugins: str | Path) -> list[Entry]:
    """Registers the methods of files (`my_net.py`) and of modules that Python finds by their names
    (`my_package.attacks`); returns them. What is loaded already, and has not changed, stays.
    """
    found = []
    for word in map(str, plugins):
        path = own.at_home(word)  # which refuses what no system can name, a module neither
        with all_or_nothing():
            here = _file(path) if _is_file(word) else _module(word)
        found += here
        _words.extend([word] if word not in _words else [])
    return found


def _is_file(word: str) -> bool:
    return word.endswith(".py") or os.path.basename(word) != word


def modules() -> tuple[str, ...]:
    """Of what was loaded here, the modules by name."""
    return tuple(word for word in _words if not _is_file(word))


def flags() -> str:
    """What a command needs so that it has the plugins that were loaded here."""
    return "".join(f" --plugin {shlex.quote(word)}" for word in _words)


def standing() -> None:
    """Loads what `BDJAX_PLUGINS` and installed packages name, once. The user's own list has to be
    right; a package that is broken is left out, and a line says so.
    """
    global _standing
    if _standing:
        return
    _standing = True  # a plugin may ask for the methods that are there
    try:
        load_plugins(*filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)))
    except BaseException as error:
        _standing = False
        if isinstance(error, BadInput):
            raise BadInput(f"{VARIABLE}: {error}") from error
        raise
    from bdjax.progress import shown

    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            with all_or_nothing():
                before = registry.brought()
                with raised_in(point.value, begun=False):
                    point.load()
                _checked(before, point.module)
        except BadInput as error:
            owner = point.dist.name if point.dist else "an unknown package"
            line = f"bdjax: the plugin '{point.name}' of {owner} is left out: {error}"
            print(shown(line), file=sys.stderr, flush=True)


def _file(path: Path) -> list[Entry]:
    place = Path(os.path.realpath(path))  # resolve() raises on a loop of links
    if twin := next((p for p in _files if p.name == place.name and p != place), None):
        raise BadInput(f"two plugins are called {place.name}: {twin} and {place}; rename one")
    before = registry.brought()
    with explained(path, "read"):
        text = place.read_bytes() if place.is_file() else None
    if text is not None and _files.get(place) == text:
        return [entry for entry in before if entry.source == str(place)]
    executed(path, f"plugin_{place.stem}", "plugin")
    found = _checked(before, str(place), str(path))
    _files[place] = text or b""
    return found


def _module(name: str) -> list[Entry]:
    if not _MODULE.fullmatch(name):
        raise BadInput(f"'{name}' is no plugin: give a file that ends in .py, or a module")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # as `python -m` has it, but behind all else
    importlib.invalidate_caches()  # it may be new
    before = registry.brought()
    try:
        with raised_in(name, begun=False):
            importlib.import_module(name)
    except BadInput as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise
        file = f"; the file is --plugin {name}.py" if Path(f"{name}.py").is_file() else ""
        raise BadInput(f"no plugin {name}: Python finds no module {missing}{file}") from None
    return _checked(before, name)


def _checked(before: list[Entry], where: str, shown_as: str | None = None) -> list[Entry]:
    """The methods that a plugin brought, now or (a module) when it was first imported."""
    found = [
        entry
        for entry in registry.brought()
        if entry not in before or f"{entry.cls.__module__}.".startswith(f"{where}.")
    ]
    if not found:
        raise BadInput(
            f"{shown_as or where} is no plugin: it registers no method of its own (a class under "
            "@attack, @defense, @model or @dataset of bdjax.registry)"
        )
    for entry in found:
        try:
            registry.hints(entry.cls)
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadInput(f"{shown_as or where}: {entry.kind} '{entry.name}': {what}") from error
    return found


def executed(path: Path, name: str, what: str) -> ModuleType:
    """The Python file at `path`, run as the module `name`; `what` it should be, for an error
    line. Where it raises, nothing of it stays registered.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder: give the {what}'s file")
    if not path.is_file():
        folder = path.parent
        others = [p.as_posix() for p in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        raise BadInput(f"no {what} file {path}{near(path.as_posix(), others)}")
    if path.suffix != ".py":
        raise BadInput(f"{path} is no {what} file: its name does not end in .py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    with explained(path, "read"):
        text = path.read_bytes()
    sys.modules[name] = module  # dataclasses look their module up there
    with raised_in(path, begun=False), all_or_nothing():
        try:
            code = compile(text, spec.origin, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:  # ValueError: it holds a null byte
            reason = " ".join(str(error).split())
            raise SyntaxError(reason) from error
        exec(code, vars(module))
    return module


@contextmanager
def raised_in(where: str | Path, *, begun: bool = True) -> Iterator[None]:
    """Turns what a user's file, or module, raises into one line that says where; a `BadInput` of
    one that has `begun`, of a cell, say, speaks for itself.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if begun and isinstance(error, BadInput):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, SyntaxError):
            raise BadInput(f"{where} is not Python: {' '.join(str(error).split())}") from error
        what = str(error) if isinstance(error, BadInput) else what[:300]
        raise BadInput(f"{_place(error, where)}: {what}") from error


def _place(error: BaseException, where: str | Path) -> str:
    """The line of a user's file that raised; of a module that of the file being imported."""
    frames = traceback.extract_tb(error.__traceback__)
    here = [f for f in frames if os.path.abspath(f.filename) == os.path.abspath(where)]
    if here:
        return f"{where}, line {here[-1].lineno}"
    made = [f for f in frames if f.name == "<module>" and os.path.isfile(f.filename)]
    return f"{where}: {made[-1].filename}, line {made[-1].lineno}" if made else str(where)


# --- What a method does ---

NEEDED = {
    "attack": ("trigger", "stamp", "train"),
    "defense": ("once", "__call__"),
    "dataset": ("read",),
}
"""Of these a method defines one at least."""
NAMED = {"model", "recipe", "data", "clean", "y", "classes"}
"""What the bases check by its name, of the calls `BY_NAME`."""
BY_NAME = {"__call__", "prepare", "train", "plan"}
MEASURED = {"acc_test", "acc_train", "asr_all", "asr_nt"}
"""What bdjax measures of each net that a defense leaves."""


def hold(cls: type, kind: str, name: str) -> None:
    """Holds a plugin's class to what it overrides of bdjax's: its methods are called alike, and
    return what is annotated there. Each mistake is one line, at the call if not before.
    """
    what = f"{kind} '{name}'"
    house = [vars(base) for base in cls.__mro__ if registry.plugin_of(base) is None]
    promised = {
        hook: promise
        for base in house  # the last is the one that says most of it
        for hook, promise in base.items()
        if isinstance(promise, FunctionType) and (hook == "__call__" or hook[0] != "_")
    }
    own_kind = [base for base in house if base.get("__module__") == "bdjax.defenses.base"]
    taken = {metric.name for base in own_kind for metric in base.get("measures", ())} | MEASURED
    needed = [hook for hook in NEEDED.get(kind, ()) if hook in promised]
    if needed and all(getattr(cls, hook) is promised[hook] for hook in needed):
        call = called(needed[0], promised[needed[0]])
        raise BadInput(f"{what} lacks what it does: define {call}")
    for hook, promise in promised.items():
        owner = next(base for base in cls.__mro__ if hook in vars(base))
        mine = vars(owner)[hook]
        known = registry.plugin_of(owner) is None or (owner is not cls and owner in registry._names)
        if not known:
            mine = _method(f"{what}: {hook}", mine)
            _alike(what, hook, mine, promise)
            whose = f"{what} of {Path(registry._source(cls)).name}"
            setattr(cls, hook, _held(whose, kind, hook, mine, promise, taken))


def _method(what: str, mine: Any) -> Callable:
    """A method as a function of `self` and the rest: of what is under `jax.jit`, say, or static."""
    if isinstance(mine, FunctionType):
        return mine
    if not callable(mine) or not isinstance(inner := inspect.unwrap(mine), FunctionType):
        raise BadInput(f"{what} is to be a method, not {shown(type(mine).__name__)}")

    @functools.wraps(inner)
    def method(self, *args, **kwargs):
        return mine.__get__(self, type(self))(*args, **kwargs)

    if isinstance(mine, staticmethod):
        own = inspect.signature(inner)
        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        method.__signature__ = own.replace(parameters=[me, *own.parameters.values()])  # type: ignore[attr-defined]
    return method


def called(hook: str, method: Callable) -> str:
    """How a method is called, without annotations."""
    parts = inspect.signature(method).parameters.values()
    bare = [part.replace(annotation=inspect.Parameter.empty) for part in parts]
    return hook + str(inspect.Signature(bare))


def _alike(what: str, hook: str, mine: Callable, promise: Callable) -> None:
    """Raises `BadInput` where a method cannot be called as the one that it overrides."""
    wanted = inspect.signature(promise).parameters
    own = inspect.signature(mine)
    named = [name for name, one in wanted.items() if one.kind is one.KEYWORD_ONLY]
    try:
        own.bind(*(name for name in wanted if name not in named), **dict.fromkeys(named))
        fits = hook not in BY_NAME or NAMED & {*wanted} <= {*own.parameters}
    except TypeError:
        fits = False
    if not fits:
        raise BadInput(f"{what}: {called(hook, mine)} is to be {called(hook, promise)}")


def _held(
    what: str, kind: str, hook: str, mine: Callable, promise: Callable, taken: Container[str]
) -> Callable:
    """A method of a plugin behind the check of what it returns, and of what its code raises; a
    defense reports none of the metrics that are `taken`.
    """
    place, names = inspect.unwrap(mine).__code__.co_filename, inspect.signature(promise)

    @functools.wraps(mine)
    def held(*args, **kwargs):
        try:
            result = mine(*args, **kwargs)
        except (BadInput, jax.errors.JaxRuntimeError):  # a device's memory is no mistake
            raise
        except (Exception, SystemExit) as error:  # an exit code would be taken for a verdict
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == place]
            said = kind == "model" and isinstance(error, Exception)  # by what builds the net
            if said or not lines:
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise BadInput(f"{what}, line {lines[-1]}: {why}") from error
        hint = _returned(promise)
        if hint is NoneType:
            return result
        try:
            if kind == "defense":
                info = result if hook == "report" else getattr(result, "info", None)
                _named(info, taken if hook in ("__call__", "once", "report") else ())
                result = _arrays(result)
            fault = _fault(hint, result)
            given = names.bind(*args, **kwargs).arguments
            fault = fault or _shape_fault(hook, result, given)
        except TypeError as error:
            fault = f" {error}"
        if fault:
            raise BadInput(f"{what}: the result of {hook}: {fault.lstrip(' .')}")
        return result

    return held


@functools.cache
def _returned(promise: Callable) -> Any:
    return typing.get_type_hints(promise, include_extras=True).get("return", Any)


def _named(info: Any, taken: Container[str]) -> None:
    """Raises `TypeError` where a part of what is reported has no name, or one that is `taken`."""
    for name, value in info.items() if isinstance(info, dict) else ():
        if not isinstance(name, str):
            raise TypeError(f"it reports {registry._word(value)} under {name!r}, which is no name")
        if name in taken:
            raise TypeError(f"it reports '{name}', which bdjax measures itself: name it otherwise")
        _named(value, ())


def _arrays(result: Any) -> Any:
    """What a defense reports, as arrays: a number may stand for one. Raises `TypeError` where a
    part is neither.
    """
    if not isinstance(result, (Repaired, Verdict, Scores, Suspects, dict)):
        return result

    def one(path: Any, leaf: Any) -> jax.Array:
        with suppress(TypeError, ValueError, OverflowError):
            made = jax.numpy.asarray(leaf)
            real = (np.integer, np.floating, np.bool_)
            if any(jax.numpy.issubdtype(made.dtype, kind) for kind in real):
                return made
        name = jax.tree_util.keystr(path).lstrip(".")
        raise TypeError(f"{name} {registry._word(leaf)} is not a number or an array")

    return jax.tree_util.tree_map_with_path(one, result)


def _fault(hint: Any, value: Any) -> str | None:
    """As that of the registry, of what is traced and of the parts of a tuple too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        hint = Sequence[args]  # a tuple does as well
    elif origin is tuple and isinstance(value, list):
        value = tuple(value)
    kinds = args if origin in (typing.Union, UnionType) else (hint,)
    if isinstance(value, Tracer) and not {jax.Array, Any} & {*kinds}:
        return f" {registry._word(value)} is not of class {getattr(hint, '__name__', hint)}"
    if fault := registry._fault(hint, value, within=False):
        return fault
    if not isinstance(value, tuple):
        return None
    if not hasattr(value, "_fields"):
        parts = (_fault(type(part), part) for part in value if hasattr(part, "_fields"))
        return next(filter(None, parts), None)
    known = typing.get_type_hints(type(value), include_extras=True)
    faults = ((name, _fault(known[name], getattr(value, name))) for name in known)
    return next((f".{name}{fault}" for name, fault in faults if fault), None)


MASKS = {"flagged", "removed", "infected"}


def _shape_fault(hook: str, result: Any, given: Mapping[str, Any]) -> str | None:
    """What is wrong with the shapes of a result, whose letters `bdjax.types` says."""
    whole: Any = result
    wanted: dict[str, Any] = {}
    if isinstance(result, Scores):
        several = np.shape(given["x"])[:1]
        wanted = {"score": several, "flagged": several, "boundary": ()}
    elif isinstance(result, Suspects):
        several = np.shape(given["data"].plan.label)
        wanted = {"score": several, "removed": several}
    elif isinstance(result, Verdict):
        wanted = {"index": (), "infected": (), "flagged": (given["model"].classes,)}
    elif hook in ("trigger", "stamp"):
        wanted = {"": np.shape(given["x"])}
    elif hook == "layers":
        wanted = {"": (np.shape(given["x"])[0], given["classes"])}
    for name, shape in wanted.items():
        has = np.shape(getattr(whole, name) if name else whole)
        if has != shape:
            return f"{name or 'it'} has shape {list(has)}, not {list(shape)}"
    for name in MASKS & wanted.keys():
        if not np.issubdtype(kind := getattr(whole, name).dtype, np.bool_):
            return f"{name} is {kind}, not bool"
    if hook in ("trigger", "stamp") and not jax.numpy.issubdtype(whole.dtype, np.floating):
        return f"it is {whole.dtype}: give floating-point pixels from 0 to 1"
    return None
