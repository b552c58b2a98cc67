"""What is left of a backdoor after each repair, over the number that decides it most.

    bdjax sweep experiments/sensitivity.py                  # scale cpu: embedded images, 2 cores
    bdjax sweep experiments/sensitivity.py --scale smoke    # every kind of cell, tiny: no result

- Every registered repair that names such a number (`sensitive`), with its preset `cpu`: at a tenth,
  a third, one, three and ten times its value, as far as these lie in its range.
- It looks at test images: for a figure, not for a choice. Defaults follow a source where a paper or
  released code has one, else they are said to be ours in the docstring.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bdjax import registry
from bdjax.analysis.sensitivity import Sensitivity, chart, sensitive
from bdjax.attacks.badnets import BadNets
from bdjax.datasets.sample import Sample
from bdjax.defenses.base import Repair
from bdjax.models.shamshiri import Cnn
from bdjax.rows import Rows
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.train import Recipe

TITLE = "Repairs over the number that decides most"
FACTORS = (0.1, 1 / 3, 1.0, 3.0, 10.0)
ATTACKS = {"5×5 square": BadNets(), "all-to-all": BadNets(labels="all-to-all")}


class Scale(NamedTuple):
    """What a scale changes."""

    data: Sample
    model: Cnn
    recipe: Recipe
    seeds: int


SCALES = {
    "smoke": Scale(
        data=Sample(train_size=200, test_size=100), model=Cnn(hidden=8, features=(4, 4)),
        recipe=Recipe(epochs=1), seeds=1,
    ),
    "cpu": Scale(
        data=Sample(), model=Cnn(hidden=64, features=(8, 16)), recipe=Recipe(epochs=8), seeds=1
    ),
}  # fmt: skip


def cells(scale: str, seeds: int | None) -> Iterator[Cell]:
    """A victim of each attack; the probes of each repair on it."""
    s = SCALES[scale]
    for attack, configured in ATTACKS.items():
        twin = Cell("Victims", "clean twin", s.data, s.model, s.recipe)
        victim = Cell("Victims", attack, s.data, s.model, s.recipe, configured)
        probed = [
            Cell(
                name, attack, s.data, s.model, s.recipe, configured,
                probe=Sensitivity(repair, values(repair)), tags={"attack": attack},
            )
            for name, repair in repairs().items()
        ]  # fmt: skip
        yield from grid([twin, victim, *probed], seed=range(seeds or s.seeds))


def repairs() -> dict[str, Repair]:
    """The repairs that name the number that decides most, by `name: number`."""
    found = {}
    for entry in registry.entries("defense"):
        if issubclass(entry.cls, Repair) and entry.cls.sensitive is not None:
            repair = registry.on_cpu(entry)
            found[f"{entry.name}: {repair.sensitive}"] = repair
    return found


def values(repair: Repair) -> tuple[float, ...]:
    """Of the number that decides most, around the default."""
    default: Any = repair
    for field in sensitive(repair).split("."):
        default = getattr(default, field)
    share = not sensitive(repair).endswith(".lr")
    return tuple(round(default * f, 6) for f in FACTORS if not share or default * f <= 1)


def figures(rows: Rows, store: Store, scale: str) -> Iterator[tuple]:
    """A heat map for each repair."""
    for name in repairs():
        if (picture := chart(rows, name, name.partition(": ")[2])) is not None:
            slug = name.partition(":")[0]
            yield slug, f"ASR left by {slug}", "Mean over the seeds; test images.", picture
