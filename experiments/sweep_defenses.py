"""Three defenses against BadNets, by poison rate, target and seed: 50 small victims, 200 cells.

    bdjax sweep experiments/sweep_defenses.py                  # scale cpu: the embedded sample, 2
                                                               # cores
    bdjax sweep experiments/sweep_defenses.py --scale smoke    # every kind of cell, tiny: no result
    bdjax sweep experiments/sweep_defenses.py --scale paper    # 60,000 images, a CNN, 2,000 cells:
                                                               # 2 hours on an H100 at least
    bdjax sweep experiments/sweep_defenses.py --dry-run        # what it would do
    bdjax report results/sweep_defenses-cpu --metric asr_nt --x attack.rate --y row

- Victims of poison rate 0 are clean: what a defense costs where there is nothing to repair, and its
  false alarms.
- A row is a mean over targets and seeds.
- Neural Cleanse repairs nothing: what it says is the anomaly index.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from bdjax import report
from bdjax.attacks.badnets import BadNets
from bdjax.datasets.public import FashionMnist
from bdjax.datasets.sample import Sample
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.models.shamshiri import Cnn, Ffnn
from bdjax.rows import Rows
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.train import Recipe

TITLE = "A sweep: three defenses by poison rate, target and seed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What a scale changes."""

    data: Any
    net: Any
    recipe: Recipe
    rates: tuple[float, ...] = (0.0, 0.003, 0.01, 0.03, 0.1)
    targets: tuple[int, ...]
    seeds: int
    strip: Strip
    cleanse: NeuralCleanse


SCALES = {
    "smoke": Scale(
        data=Sample(train_size=300, test_size=100), net=Ffnn((16,)),
        recipe=Recipe(epochs=2, batch=32), rates=(0.0, 0.1), targets=(0, 4), seeds=1,
        strip=Strip(n=5, inputs=20), cleanse=NeuralCleanse(steps=2, batches=2),
    ),
    "cpu": Scale(
        data=Sample(), net=Ffnn(), recipe=Recipe(epochs=8, batch=64), targets=(0, 2, 4, 6, 8),
        seeds=2, strip=Strip(n=20, inputs=500),
        cleanse=NeuralCleanse(steps=15, batches=8, seeds=3),
    ),
    "paper": Scale(
        data=FashionMnist(), net=Cnn("VALID"), recipe=Recipe(epochs=20, batch=128),
        targets=tuple(range(10)), seeds=10, strip=Strip(inputs=2000),
        cleanse=NeuralCleanse(seeds=3),
    ),
}  # fmt: skip


def cells(scale: str, seeds: int | None = None) -> Iterator[Cell]:
    """One table a poison rate; the victims' own rows first."""
    s = SCALES[scale]
    defenses = {"no defense": None, "Fine-Pruning": FinePruning(), "STRIP": s.strip,
                "Neural Cleanse": s.cleanse}  # fmt: skip
    for rate in s.rates:
        table, attack = f"Poison rate {100 * rate:g} %", BadNets(rate=rate)
        for row, defense in defenses.items():
            cell = Cell(table, row, s.data, s.net, s.recipe, attack, defense)
            yield from grid(cell, attack__target=s.targets, seed=range(seeds or s.seeds))


def figures(rows: Rows, store: Store, scale: str) -> Iterator[tuple]:
    """Accuracy and success rate over the poison rate, with and without a defense; the anomaly
    index.
    """
    repaired = [row for row in rows if row["defense"] != "neural-cleanse"]
    for metric, shown in (("asr_nt", repaired), ("acc_test", repaired), ("anomaly_index", rows)):
        yield from report.pivot_figures(shown, "attack.rate", "row", metric)
