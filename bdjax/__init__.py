"""Backdoor attacks and defenses on image classifiers as pure, compiled JAX functions.

`import bdjax` imports nothing else: each public name is imported when it is first asked for, from
where the stub beside this file, which type checkers read, says. A function is behind
`registry.door`, be it here alone: the digest of a file of the core is no matter of checks.
"""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    alias.name: node.module or ""
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bdjax' has no attribute '{name}'")
    if (home := _HOMES[name]) == "bdjax":
        return importlib.import_module(f"bdjax.{name}")
    found = getattr(importlib.import_module(home), name)
    if inspect.isfunction(found) and home != "bdjax.registry" and not hasattr(found, "__wrapped__"):
        found = importlib.import_module("bdjax.registry").door(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
