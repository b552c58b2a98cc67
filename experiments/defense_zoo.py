"""Every defense against many attacks, on real images: a matrix of what each keeps, removes, finds and costs.

    bdjax data prepare mnist; bdjax data prepare gtsrb       # once
    bdjax run experiments/defense_zoo.py                     # scale cpu: 1 to 2 hours on 2 cores (estimated)
    bdjax run experiments/defense_zoo.py --scale smoke       # a few defenses, tiny: no result
    bdjax run experiments/defense_zoo.py --scale paper       # the papers' settings, whole data sets: for an accelerator

- A table is one attack, its first row the victim as it is. Under a filter of inputs, ACC counts a flagged clean image as
  lost and ASR a flagged stamped one as stopped.
- Scale cpu uses each defense's preset `cpu`. Where a defense fails, its row shows how: a victim that is not flagged is
  left as it was by the repairs of Neural Cleanse (`repaired` 0).
- The defender has a tenth of the images, held out from the attacker, and knows neither trigger nor target. Rows marked
  oracle are given what no defender has.
- Defenses that need what the net has not (a convolution, three classes) are left out.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from bdjax import registry
from bdjax.datasets.public import Gtsrb, Mnist
from bdjax.datasets.sample import Sample
from bdjax.experiment import there
from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.models.layers import build
from bdjax.models.nc_gtsrb import NcGtsrb
from bdjax.models.shamshiri import Cnn
from bdjax.models.strip import StripMnist
from bdjax.sweep import Cell, grid
from bdjax.train import Recipe
from bdjax.types import BadInput

TITLE = "Defense zoo: every defense against many attacks"


CHEAP = ("fine-pruning", "strip", "spectral-signatures", "retraining")
GREY: dict[str, tuple[str, str | None, dict[str, Any]] | None] = {
    "no attack": None,
    "BadNets, 5×5 square": ("badnets", "square", {}),
    "BadNets, all-to-all pattern": ("badnets", "pattern", {"labels": "all-to-all", "rate": 0.5}),
    "Blended, noise key": ("blended", None, {"test_alpha": 0.3}),
    "Multi-trigger, 10 digits → 1 target": ("multi-trigger", "digits-one", {"rate": 0.3}),
    "Entropy manipulation": ("entropy-manipulation", None, {}),
    "Large trigger": ("badnets", "large-trigger", {}),
}  # fmt: skip
COLOR = {
    "Post-it note, random place": ("post-it", None, {"rate": 0.2}),
    "Gotham": ("gotham", None, {"target": 5}),
}
BEFORE = "no defense"
# The victims without attack, one a net, and what they are attacked with.
SCALES: dict[str, tuple[tuple[Cell, dict[str, Any]], ...]] = {
    "smoke": (
        (
            Cell(
                "sample", BEFORE, Sample(train_size=400, test_size=100), Cnn("VALID", hidden=16, features=(4, 4)),
                Recipe(epochs=1, batch=50),
            ),
            {"BadNets, 5×5 square": GREY["BadNets, 5×5 square"]},
        ),
    ),
    "cpu": (
        (
            Cell(
                "MNIST", BEFORE, Mnist(train_size=6_000, test_size=1_000), StripMnist(),
                Recipe(epochs=10, batch=64),
            ),
            GREY,
        ),
        (
            Cell(
                "GTSRB, ten classes", BEFORE, Gtsrb(train_size=6_000, test_size=1_000, top_classes=10),
                Cnn("VALID", hidden=256, features=(16, 32)), Recipe(epochs=10, batch=64),
            ),
            COLOR,
        ),
    ),
    "paper": (
        (Cell("MNIST", BEFORE, Mnist(), BadNetsCnn(pool="max"), Recipe(lr=1e-4, epochs=50, batch=32)), GREY),
        (Cell("GTSRB", BEFORE, Gtsrb(), NcGtsrb(), Recipe(epochs=15, batch=32)), COLOR),
    ),
}  # fmt: skip


def defenses(scale: str, attack: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a table: every registered defense, and the oracle variants where there is an attack."""
    for entry in registry.entries("defense"):
        if scale == "smoke" and entry.name not in CHEAP:
            continue
        presets = getattr(entry.cls, "presets", {})
        yield entry.name, entry.cls(**presets.get("cpu", {}) if scale != "paper" else {})
    if attack is not None and scale != "smoke":
        nc = registry.make("defense", "neural-cleanse", None if scale == "paper" else "cpu")
        yield "nc-unlearning, original trigger", registry.make("defense", "nc-unlearning", nc=nc, original=attack)
        yield "nc-pruning, known target", registry.make("defense", "nc-pruning", nc=nc, label=attack.target)


def cells(scale: str, seeds: int | None = None) -> Iterator[Cell]:
    """For each attack the victim, then every defense that applies."""
    for clean, attacks in SCALES[scale]:
        if not there(clean.dataset):
            continue
        data = clean.dataset.load()
        model = build(clean.model, data.shape, data.classes)
        for title, made in attacks.items():
            attack = None if made is None else registry.make("attack", made[0], made[1], **made[2])
            victim = dataclasses.replace(clean, table=f"{clean.table}: {title}", attack=attack)
            yield from grid(victim, seed=range(seeds or 1))
            for row, defense in defenses(scale, attack):
                try:
                    defense.check(model, data.clean)
                except BadInput:
                    continue
                yield from grid(dataclasses.replace(victim, row=row, defense=defense), seed=range(seeds or 1))
