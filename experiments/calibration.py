"""How often judges accuse clean nets: the paper's rule, index > 2, beside p ≤ .05.

    bdjax sweep experiments/calibration.py                  # scale cpu: 40 nets, embedded images
    bdjax sweep experiments/calibration.py --scale smoke    # every kind of cell, tiny: no result
    bdjax sweep experiments/calibration.py --scale paper    # 400 nets: an hour on an H100

- Every net is clean and has seeds of its own: weights, order of the images, draws of the search.
- Neural Cleanse runs three seeds of its search on a net. "One seed" is the first of them alone.
- Intervals are Clopper and Pearson's, at 95 %, over nets.
- A claim on p-values counts as shown unless the whole interval lies above .05.
- Their null has all labels alike. Where one label is the easiest on every net, by nature, both
  rules accuse it: the captions have what one seed gives.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from bdjax import report
from bdjax.datasets.sample import Sample
from bdjax.defenses.base import Judge
from bdjax.defenses.invert.deep_inspect import DeepInspect
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.models.shamshiri import Cnn, Ffnn
from bdjax.rows import Rows
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.train import Recipe

TITLE = "Calibration: verdicts on clean nets"
LEVEL = 0.05


class Scale(NamedTuple):
    """What a scale changes."""

    data: Any
    nets: dict[str, Any]
    recipe: Recipe
    seeds: int
    judges: dict[str, Judge]


SCALES = {
    "smoke": Scale(
        Sample(train_size=300, test_size=100), {"FFNN": Ffnn((16,))}, Recipe(epochs=1, batch=32), 3,
        {"Neural Cleanse": NeuralCleanse(steps=2, batches=2, seeds=2)},
    ),
    "cpu": Scale(
        Sample(), {"FFNN": Ffnn((64,)), "CNN": Cnn(features=(4, 8), hidden=32)},
        Recipe(epochs=8, batch=64), 20,
        {"Neural Cleanse": NeuralCleanse(**NeuralCleanse.presets["cpu"], seeds=3),
         "DeepInspect": DeepInspect(**DeepInspect.presets["cpu"])},
    ),
    "paper": Scale(
        Sample(), {"FFNN": Ffnn(), "CNN": Cnn("VALID")}, Recipe(epochs=15, batch=64), 200,
        {"Neural Cleanse": NeuralCleanse(seeds=3), "DeepInspect": DeepInspect(seeds=3)},
    ),
}  # fmt: skip


def cells(scale: str, seeds: int | None = None) -> Iterator[Cell]:
    """One table for each kind of net; `seeds` nets of it."""
    s = SCALES[scale]
    for table, net in s.nets.items():
        for row, judge in {"no defense": None, **s.judges}.items():
            cell = Cell(table, row, s.data, net, s.recipe, defense=judge)
            yield from grid(cell, seed=range(seeds or s.seeds))


def share(hits: Any) -> tuple[float, str]:
    """The lower end of the interval of a share of nets, and the share in words."""
    hits = np.asarray(hits)
    low, high = stats.binomtest(int(hits.sum()), hits.size).proportion_ci()
    return float(low), f"{hits.sum():.0f} of {hits.size} ({100 * low:.0f}–{100 * high:.0f} %)"


def judged(rows: Rows) -> dict[tuple[str, str], Rows]:
    """By kind of net and judge, its rows."""
    return Rows(row for row in rows.done if row["defense"]).by("table", "row")


def figures(rows: Rows, store: Store, scale: str) -> Iterator[tuple]:
    """How many p-values lie below each level: on the diagonal where the null holds."""
    from bdjax import plots

    level = np.linspace(0, 1, 101)
    for (table, row), found in judged(rows).items():
        if not (kept := found.arrays(store)):
            continue
        p_value, infected = (
            np.array([np.ravel(a.get(f"seeds.{n}", r["metrics"][n]))[0] for r, a in kept], float)
            for n in ("p_value", "infected")
        )
        drawn = {"one seed": (p_value[:, None] <= level).mean(0), "the null": level}
        yield report.Figure(
            f"p-{table}-{row}".lower().replace(" ", "-"),
            f"{row} on clean nets, {table}",
            f"Share of nets with a p-value of at most that. One seed: index > 2 on "
            f"{share(infected)[1]} nets, p ≤ {LEVEL} on {share(p_value <= LEVEL)[1]}.",
            plots.curves(level, drawn, None, "p-value", "share of nets"),
        )


def trends(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """What each rule accuses, over the seeds of the search."""
    for (table, row), found in judged(rows).items():
        infected, undecided, p_value = (
            np.array([r["metrics"].get(name, 0) for r in found], float)
            for name in ("infected", "undecided", "p_value")
        )
        one = f"some seed of {share(infected + undecided)[1]}, every seed of {share(infected)[1]}"
        low, text = share(p_value <= LEVEL)
        yield (
            f"{row}, {table}: index > 2 on some seed accuses more than {100 * LEVEL:g} % of clean "
            "nets",
            report.verdict(share(infected + undecided)[0] > LEVEL, False),
            one,
        )
        yield (
            f"{row}, {table}: p ≤ {LEVEL} accuses no more than {100 * LEVEL:g} % of clean nets",
            report.verdict(low <= LEVEL, False),
            text,
        )
