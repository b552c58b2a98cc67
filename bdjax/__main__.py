"""The entry point. `bdjax --help` and `bdjax status DIR` answer at once: all that needs jax is
imported for the other commands alone.
"""

import ast
import contextlib
import functools
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from bdjax import progress


def overview() -> str:
    """The commands of `bdjax.cli`, each with the first paragraph of its docstring, which is read
    from the source: importing it would import jax.
    """
    body = ast.parse(Path(__file__).with_name("cli.py").read_text(encoding="utf-8")).body
    about = {
        node.name: ast.get_docstring(node) or ""
        for node in body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    (table,) = (
        node.value
        for node in body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.value, ast.Dict)
        and ast.unparse(node.target) == "COMMANDS"
    )
    named = {ast.literal_eval(k): ast.unparse(v) for k, v in zip(table.keys, table.values) if k}
    width, wide = min(shutil.get_terminal_size().columns, 100), max(map(len, named)) + 4
    lines = ["usage: bdjax COMMAND …", ""]
    for command, function in named.items():
        text = " ".join(about[function].partition("\n\n")[0].split())
        first, gap = f"  {command}".ljust(wide), " " * wide
        lines += textwrap.wrap(text, max(width, 40), initial_indent=first, subsequent_indent=gap)
    return "\n".join([*lines, "", "`bdjax COMMAND --help` shows its flags."])


def main(args: Sequence[str] | None = None) -> None:
    """`bdjax.cli.main` tells the exit codes."""
    args = sys.argv[1:] if args is None else args
    if list(args) in (["-h"], ["--help"]):
        progress.ended(lambda: print(overview()))
    elif len(args) == 2 and args[0] == "status" and args[1].strip() and args[1][0] not in "-~":
        progress.ended(functools.partial(progress.status, Path(args[1])))
    else:
        from bdjax import cli

        cli.main(args)


def process() -> None:
    """`main` as a process. What was interrupted ends it: at an orderly exit JAX would wait for the
    program that runs, which may take hours. With Ray, whose cluster would stay behind, nothing runs
    in this process.
    """
    try:
        main()
    except SystemExit as end:
        if end.code in (130, 143) and "ray" not in sys.modules:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(end.code)
        raise


if __name__ == "__main__":
    process()
