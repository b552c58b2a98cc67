"""The experiments that come with bdjax, and the rows that they gave: beside the package in a clone,
within it where it was installed.
"""

from pathlib import Path

from bdjax.errors import BadInput, near


def folder() -> Path:
    """Where they lie."""
    package = Path(__file__).resolve().parent
    inside = package / "_experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


def names() -> list[str]:
    """What they are called."""
    return sorted(path.stem for path in folder().glob("*.py"))


def file(experiment: str | Path) -> Path:
    """The file of an experiment that is given by its name, `shamshiri2023`, or by its path."""
    path = Path(experiment)
    if path.is_file() or path.name != str(experiment) or path.suffix:
        return path
    if path.name in names():  # a results folder may be called so
        return folder() / f"{path.name}.py"
    if path.exists():
        return path
    raise BadInput(
        f"no experiment {path}{near(path.name, names())} (`bdjax run --list` shows bdjax's own; "
        "one of yours is a path that ends in .py)"
    )


def results(experiment: str) -> list[Path]:
    """The rows that an experiment of bdjax gave, one a scale: a results file or, where they are
    many, a results folder.
    """
    there = sorted((folder() / "results").glob(f"{experiment}-*"))
    return [path for path in there if path.suffix == ".jsonl" or path.is_dir()]
