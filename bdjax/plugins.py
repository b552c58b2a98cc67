"""Methods from outside the package: files, modules, what `BDJAX_PLUGINS` names, and installed
packages that have an entry point of the group `bdjax.plugins`.

>>> load_plugins("my_net.py", "my_package.attacks")

Nothing is imported because a file of results or a checkpoint names it.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from bdjax import own, registry
from bdjax.own import explained
from bdjax.registry import Entry, all_or_nothing, near
from bdjax.types import BadInput

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
        file = word.endswith(".py") or os.path.basename(word) != word
        path = own.at_home(word)
        with all_or_nothing():
            here = _file(path) if file else _module(word)
        found += here
        _words.extend([word] if word not in _words else [])
    return found


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
