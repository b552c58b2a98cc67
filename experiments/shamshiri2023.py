"""Shamshiri & Sohn, "Defense Method Challenges Against Backdoor Attacks in Neural Networks" (2023):
Tables I and II.

    bdjax run experiments/shamshiri2023.py                  # scale cpu: the embedded sample, about
                                                            # ten minutes on 2 cores
    bdjax run experiments/shamshiri2023.py --scale smoke    # every kind of row once, tiny: no
                                                            # result
    bdjax run experiments/shamshiri2023.py --scale paper    # 60,000 images, 3 seeds: 2
                                                            # minutes on an H100 at least, about
                                                            # 14 hours on 2 cores

Reported (ACC / ASR in %): Table I: CNN 98.99 / 99.9 (text: 99.99), FFNN 92 / 97. Table II:
Fine-Pruning 96 / 0.2, LPSF 95 / 0.2, DB-COVIDNet 85 / 6.3. No seeds, no spread.

Where we differ, and why:
- The paper's ACC is measured on training images; we print training and test accuracy, and compare
  the former.
- Fine-Pruning's 96 is below its CNN's 98.99, while LPSF's 95 is above its FFNN's 92: the defenses
  were run on different nets. We run each on both.
- Padding, pools, optimiser, epochs, the FFNN's widths, the target label and the trigger's margin
  are not given. Ours: no padding, as is Keras's default, 2×2 max-pooling after each convolution,
  Adam at 1e-3 and, in the last quarter of the epochs, 1e-4, 2×256 units with links from all earlier
  layers, target 0, a trigger flush in the corner.
- Scale cpu trains for a few epochs on 9,000 images, so its training accuracy is below the paper's.
- The defender's images (10 % of the training set) are held out from the attacker; the paper does
  not say where its come from.
- LPSF and DB-COVIDNet are reconstructions: their papers' full texts could not be obtained. The
  ablations show what decides their rows: the pruned pixels, not the scale-free links; and how many
  members see the trigger.
- No budget, rate or threshold of a row was chosen by its ASR. Fine-Pruning's 0.2 % is not reached
  by pruning: see the curve. What is left after it is the work of fine-tuning, and of its learning
  rate above all.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bdjax import plots
from bdjax.analysis.sensitivity import LRS, Sensitivity, chart
from bdjax.attacks.badnets import BadNets
from bdjax.datasets.public import FashionMnist
from bdjax.datasets.sample import Sample
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.defenses.train.db_covidnet import DbCovidNet
from bdjax.defenses.train.lpsf import Lpsf
from bdjax.models.shamshiri import Cnn, Ffnn
from bdjax.report import percent, verdict
from bdjax.rows import Rows, stacked
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.train import Recipe, stamped
from bdjax.types import class_name

TITLE = "Shamshiri & Sohn (2023): three defenses on Fashion-MNIST"

ONE, TWO, MORE = "Table I", "Table II", "Beyond the paper"
RATES = "Beyond the paper: Fine-Pruning over its learning rate"
PAPER = {
    "CNN": {"acc_train": 0.9899, "asr_all": 0.999},
    "FFNN": {"acc_train": 0.92, "asr_all": 0.97},
    "Fine-Pruning, CNN": {"acc_train": 0.96, "asr_all": 0.002},
    "LPSF, FFNN": {"acc_train": 0.95, "asr_all": 0.002},
    "DB-COVIDNet, CNN": {"acc_train": 0.85, "asr_all": 0.063},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What a scale changes. `epochs`, `members`: of a net, and of one of an ensemble; `seeds` make
    the runs of a row.
    """

    data: Any
    nets: dict[str, Any]
    epochs: dict[str, int]
    members: dict[str, int]
    ensemble: int
    cleanse: NeuralCleanse
    strip: Strip
    seeds: dict[str, int]


FULL = {"FFNN": Ffnn(links="all"), "CNN": Cnn("VALID")}
SCALES = {
    "smoke": Scale(
        data=Sample(train_size=640, test_size=100),
        nets={"FFNN": Ffnn((32,), "all"), "CNN": Cnn("VALID", hidden=32, features=(4, 8))},
        epochs={"FFNN": 2, "CNN": 2}, members={"FFNN": 1, "CNN": 1}, ensemble=4,
        cleanse=NeuralCleanse(steps=2, batches=2), strip=Strip(n=10, inputs=20),
        seeds={"FFNN": 1, "CNN": 1},
    ),
    "cpu": Scale(
        data=Sample(), nets=FULL,
        epochs={"FFNN": 8, "CNN": 5}, members={"FFNN": 2, "CNN": 1}, ensemble=4,
        cleanse=NeuralCleanse(steps=15, batches=8, seeds=3), strip=Strip(n=20, inputs=500),
        seeds={"FFNN": 3, "CNN": 2},
    ),
    "paper": Scale(
        data=FashionMnist(), nets=FULL,
        epochs={"FFNN": 30, "CNN": 20}, members={"FFNN": 10, "CNN": 10}, ensemble=12,
        cleanse=NeuralCleanse(seeds=3), strip=Strip(inputs=2000), seeds={"FFNN": 3, "CNN": 3},
    ),
}  # fmt: skip


def cells(scale: str, seeds: int | None = None) -> Iterator[Cell]:
    """The rows of both tables, the quick ones first."""
    s = SCALES[scale]

    def row(table: str, row: str, net: str, defense: Any = None, **more: Any) -> Iterator[Cell]:
        epochs = more.pop("epochs", s.epochs[net])
        recipe = Recipe(epochs=epochs, batch=64, drops=((round(0.75 * epochs), 0.1),))
        more = {"attack": BadNets(), "reported": PAPER.get(row, {}), "tags": {"net": net}, **more}
        cell = Cell(table, row, s.data, s.nets[net], recipe, defense=defense, **more)
        return grid(cell, seed=range(seeds or s.seeds[net]))

    # The clean twin is the victim at poison rate 0: one program trains both, and the twin's ASR is
    # known too.
    clean = BadNets(rate=0.0)
    rates = Sensitivity(FinePruning(), LRS)
    for net in s.nets:
        yield from row(ONE, net, net)
        yield from row(ONE, f"{net}, clean twin", net, attack=clean)
        yield from row(TWO, f"Fine-Pruning, {net}", net, FinePruning())
        yield next(row(RATES, net, net, reported={}, probe=rates))
        yield from row(MORE, f"STRIP, {net}", net, s.strip)
        yield from row(MORE, f"Neural Cleanse, {net}", net, s.cleanse)
        yield from row(MORE, f"Neural Cleanse, {net}, clean twin", net, s.cleanse, attack=clean)
        yield from row(TWO, f"LPSF, {net}", net, Lpsf())
        ensemble = DbCovidNet(members=s.ensemble)
        yield from row(TWO, f"DB-COVIDNet, {net}", net, ensemble, epochs=s.members[net])
    for name, ablation in {
        "τ = 0.05": Lpsf(tau=0.05),
        "τ = 0.2": Lpsf(tau=0.2),
        "pruning alone": Lpsf(topology="dense"),
        "scale-free alone": Lpsf(prune=False),
        "random instead of scale-free": Lpsf(topology="random"),
    }.items():
        yield from row(MORE, f"LPSF, FFNN, {name}", "FFNN", ablation)
    unlucky = DbCovidNet(members=s.ensemble, keep=8, design="random")
    name = "DB-COVIDNet, FFNN, no guarantee, 8 of 16 blocks"
    yield from row(MORE, name, "FFNN", unlucky, epochs=s.members["FFNN"])


def figures(rows: Rows, store: Store, scale: str) -> Iterator[tuple]:
    """Stamped images; accuracy and ASR by pruned channels; members' votes; entropies; reversed
    triggers.
    """
    data = SCALES[scale].data.load()
    first = [int(np.flatnonzero(data.test.label == k)[0]) for k in range(6)]
    clean = data.test.image[first] / np.float32(255)
    trojan = stamped(BadNets(), 1, clean, jax.random.key(0))
    picture = plots.stamped(clean, trojan, [class_name(k, data.names) for k in range(6)])
    caption = "The 5×5 white square, flush in the corner, on test images."
    yield "stamped", "The trigger", caption, picture
    if (drawn := chart(rows, RATES)) is not None:
        yield "fine-pruning-rates", RATES, "First run. Table II has the one at 0.001.", drawn
    for net in ("CNN", "FFNN"):
        if found := rows.where(row=f"Fine-Pruning, {net}").arrays(store):
            acc, asr = stacked(found, "acc_curve", "asr_curve")
            chosen = Rows(row for row, _ in found).mean("pruned")
            caption = (
                "Pruning alone, before fine-tuning: test accuracy and ASR_nt, mean and range over "
                "the runs; the mark is where the defender's clean images say stop."
            )
            picture = plots.pruning(np.arange(acc.shape[1]), acc, asr, chosen)
            yield f"pruning-{net}", f"Fine-Pruning, {net}", caption, picture
        for _, a in rows.where(row=f"DB-COVIDNet, {net}").arrays(store)[:1]:
            caption = (
                "First run: the share of clean and of stamped test images for which a member votes "
                "for the target."
            )
            picture = plots.votes(a["votes_clean"], a["votes_stamped"], a["sees_trigger"])
            yield f"votes-{net}", f"DB-COVIDNet, {net}: members' votes", caption, picture
        for row, a in rows.where(row=f"STRIP, {net}").arrays(store)[:1]:
            m = row["metrics"]
            caption = f"First run: FAR {percent(m['far'])} at FRR {percent(m['frr'])}."
            picture = plots.entropies(a["score_clean"], a["score_trojan"].ravel(), m["boundary"])
            yield f"strip-{net}", f"STRIP, {net}", caption, picture
        for row, a in rows.where(row=f"Neural Cleanse, {net}").arrays(store)[:1]:
            target, name = row["config"]["attack"]["target"], f"Neural Cleanse, {net}"
            caption = (
                f"First run: anomaly index {row['metrics']['anomaly_index']:.2f} (flagged above "
                f"2); the true target is {class_name(target, data.names)}."
            )
            picture = plots.norms(a["norms"], a["index"], a["flagged"], target, data.names)
            yield f"norms-{net}", f"{name}: norms", caption, picture
            picture = plots.triggers(a["mask"], a["pattern"], a["norms"], names=data.names)
            caption = "Mask ⊙ pattern, and L1 of the mask."
            yield f"triggers-{net}", f"{name}: reversed triggers", caption, picture


# --- Claims ---


def attack_works(rows: Rows, net: str) -> tuple[str, str, str]:
    """It succeeds, and costs no accuracy."""
    victim, twin = rows.where(table=ONE, row=net), rows.where(row=f"{net}, clean twin")
    asr, lost = victim.mean("asr_nt"), twin.mean("acc_test") - victim.mean("acc_test")
    numbers = f"ASR_nt {percent(asr)}, {100 * lost:+.1f} points of test accuracy lost"
    says = verdict(asr > 0.97 and lost < 0.01, asr > 0.9)
    return f"BadNets is effective against the {net}", says, numbers


def defense_works(rows: Rows, defense: str, net: str) -> tuple[str, str, str]:
    """It leaves little of the attack's success."""
    before, left = rows.where(table=ONE, row=net), rows.where(row=f"{defense}, {net}")
    was, now, acc = before.mean("asr_nt"), left.mean("asr_nt"), left.mean("acc_test")
    numbers = f"ASR_nt {100 * was:.1f} → {percent(now)}, test accuracy {percent(acc)}"
    claim = f"{defense}, {net} greatly reduces the attack's success"
    return claim, verdict(now < 0.1, now < 0.5 * was), numbers


def lpsf_is_weak(rows: Rows) -> tuple[str, str, str]:
    """On a CNN it leaves the backdoor."""
    left = rows.where(row="LPSF, CNN")
    asr, acc = left.mean("asr_nt"), left.mean("acc_test")
    numbers = f"ASR_nt {percent(asr)}, test accuracy {percent(acc)}"
    return "LPSF is weak on a CNN", verdict(asr > 0.5, asr > 0.1), numbers


def trends(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """What the paper claims, and what our rows say."""
    yield from (attack_works(rows, net) for net in ("CNN", "FFNN"))
    yield defense_works(rows, "Fine-Pruning", "CNN")
    yield defense_works(rows, "LPSF", "FFNN")
    yield defense_works(rows, "DB-COVIDNet", "CNN")
    yield lpsf_is_weak(rows)
