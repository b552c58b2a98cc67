"""Studies of every attack under every defense, without writing Python; and the file that such a
study stands for.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdjax.attacks.base import Attack
from bdjax.changes import changed, literal, read, split, varied
from bdjax.datasets import source
from bdjax.defenses.base import Defense
from bdjax.own import beside, explained, renamed
from bdjax.registry import make, name_of
from bdjax.study import SEEDS, Cell, grid
from bdjax.train import Recipe
from bdjax.types import BadInput, whole

FILE = '''"""{title}; {seeds}.

- Written by `bdjax study`.
"""

from bdjax.studies import crossed
from bdjax.datasets import source
from bdjax.registry import make
from bdjax.train import Recipe

TITLE = {title!r}
SCALES = {{"cpu": {count}}}


def cells(scale, seeds):
    return crossed(
        dataset=source({dataset!r}),
        model={model},
        recipe=Recipe(),
        attacks={attacks},
        defenses={defenses},
        seeds=range(seeds or SCALES[scale]),
        settings={settings},
        axes={axes},
    )
'''


def crossed(
    *,
    dataset: Any,
    model: Any,
    attacks: Mapping[str, Attack],
    defenses: Mapping[str, Defense] | None = None,
    recipe: Recipe | None = None,
    seeds: Iterable[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    axes: Mapping[str, Sequence[Any]] | None = None,
) -> list[Cell]:
    """The victims of `attacks` and their clean twin, each without a defense and under each of
    `defenses`, by the names that the table shows; `settings`: `{path: value}` of any field, see
    `changes.changed`; `axes`: `{path: values}`, see `changes.varied`.
    """
    table, recipe = f"{name_of(dataset)}, {name_of(model)}", recipe or Recipe()
    victims, judges = {"clean": None, **attacks}, {"none": None, **(defenses or {})}
    found = []
    for (a, attack), (d, defense) in itertools.product(victims.items(), judges.items()):
        row = a if defense is None else f"{a}: {d}"
        tags = {"attack": a, "defense": d}
        found.append(Cell(table, row, dataset, model, recipe, attack, defense, tags=tags))
    if settings:  # of this study: nothing to be compared with was changed
        found = [dataclasses.replace(cell, changed={}) for cell in changed(found, settings)]
    _apart(settings or {}, axes or {})
    for path, values in (axes or {}).items():
        found = list(varied(found, path, values))
    return list(grid(found, seed=seeds))


def _apart(settings: Mapping[str, Any], axes: Mapping[str, Any]) -> None:
    """Raises `BadInput` where a row would be named by a value that another flag replaces."""
    for one, other in itertools.combinations(axes, 2):
        (part, method, fields), (its, theirs, inner) = split(one), split(other)
        short = min(len(fields), len(inner))
        if (
            part == its
            and fields[:short] == inner[:short]
            and (method == theirs or None in (method, theirs))
        ):
            raise BadInput(f"{one} and {other} vary the same field: give one of them")
    if twice := next((path for path in axes if path in settings), None):
        raise BadInput(f"{twice} is both set and varied: give one of them")


def text_of(
    dataset: str,
    model: str,
    attacks: Sequence[str],
    defenses: Sequence[str] = (),
    seeds: int = 1,
    axes: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> str:
    """The experiment file of a study: methods as `NAME` or `NAME:PRESET`, `settings` as
    `PATH=VALUE`, `axes` as `PATH=VALUE,VALUE`.
    """
    if not attacks:
        raise BadInput("a study needs at least one attack: --attack badnets")
    whole("seeds", seeds, 1, SEEDS)
    for kind, words in (("attack", attacks), ("defense", defenses)):
        if twice := next((word for word in words if words.count(word) > 1), None):
            raise BadInput(f"--{kind} {twice} is given twice")
    source(dataset)
    found = {}
    for path, values in read(axes).items():
        split(path)
        found[path] = [part.strip() for part in values.split(",")]
        if "" in found[path] or any(
            literal(a) == literal(b) for a, b in itertools.combinations(found[path], 2)
        ):
            raise BadInput(f"{path}: its values have to differ and not to be empty: {values}")
    _apart(read(settings), found)
    return FILE.format(
        title=f"{dataset} × {model}: {', '.join(attacks)}"
        + (f" against {', '.join(defenses)}" if defenses else ""),
        seeds="1 seed" if seeds == 1 else f"{seeds} seeds",
        count=seeds,
        dataset=dataset,
        model=_code("model", model),
        attacks=_codes("attack", attacks),
        defenses=_codes("defense", defenses),
        settings=_lines({repr(path): repr(literal(v)) for path, v in read(settings).items()}),
        axes=_lines({repr(path): repr(tuple(map(literal, v))) for path, v in found.items()}),
    )


def keep(text: str, folder: Path) -> Path:
    """Writes the file of a study, `study.py`, into its results folder."""
    beside(folder, ("study.py",))
    with renamed(folder / "study.py") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / "study.py"


def save(text: str, path: Path) -> None:
    """Writes the file of a study to a place of the user's, where there is none yet."""
    if path.suffix != ".py":
        raise BadInput(f"--save {path}: the name of an experiment file ends in .py")
    with explained(path):
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise BadInput(f"--save {path}: it is there already: give another name") from None


def _code(kind: str, word: str) -> str:
    """The call that makes a method, after it was tried."""
    name, colon, preset = word.partition(":")
    make(kind, name, preset if colon else None)
    return f"make({', '.join(map(repr, (kind, name, *([preset] if colon else []))))})"


def _codes(kind: str, words: Sequence[str]) -> str:
    return _lines({repr(word): _code(kind, word) for word in words})


def _lines(items: Mapping[str, str]) -> str:
    inner = "".join(f"            {name}: {value},\n" for name, value in items.items())
    return f"{{\n{inner}        }}" if items else "{}"
