"""Shamshiri & Sohn, "Defense Method Challenges Against Backdoor Attacks in Neural Networks" (2023):
Tables I and II.

    bdjax run experiments/shamshiri2023.py                  # scale cpu: the embedded sample, 8 to 9
                                                            # minutes on 2 cores
    bdjax run experiments/shamshiri2023.py --scale smoke    # every kind of row once, tiny: no
                                                            # result
    bdjax run experiments/shamshiri2023.py --scale paper    # 60,000 images, 3 targets × 5 seeds:
                                                            # for an accelerator

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
  layers, target 0 (scale paper: also 3 and 7), a trigger flush in the corner.
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
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

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
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.train import Recipe, stamped
from bdjax.types import class_name

TITLE = "Shamshiri & Sohn (2023): three defenses on Fashion-MNIST"

ONE, TWO, MORE = "Table I", "Table II", "Beyond the paper"
RATES = "Beyond the paper: Fine-Pruning over its learning rate"


class Scale(NamedTuple):
    """What a scale changes. `epochs`: CNN, FFNN, a CNN as a member, an FFNN as a member; `targets`
    and `seeds` (CNN, FFNN) make the runs of a row.
    """

    data: Any
    epochs: tuple[int, int, int, int]
    cnn: Cnn
    ffnn: Ffnn
    members: int
    cleanse: NeuralCleanse
    strip: Strip
    targets: tuple[int, ...]
    seeds: tuple[int, int]


SCALES = {
    "smoke": Scale(
        Sample(train_size=640, test_size=100), (2, 2, 1, 1),
        Cnn("VALID", hidden=32, features=(4, 8)), Ffnn((32,), "all"), 4,
        NeuralCleanse(steps=2, batches=2), Strip(n=10, inputs=20), (0,), (1, 1),
    ),
    "cpu": Scale(
        Sample(), (5, 8, 1, 2), Cnn("VALID"), Ffnn(links="all"),
        4, NeuralCleanse(steps=15, batches=8, seeds=3), Strip(n=20, inputs=500), (0,), (2, 3),
    ),
    "paper": Scale(
        FashionMnist(), (20, 30, 10, 10), Cnn("VALID"), Ffnn(links="all"),
        12, NeuralCleanse(seeds=3), Strip(inputs=2000), (0, 3, 7), (5, 5),
    ),
}  # fmt: skip


def cells(scale: str, seeds: int | None = None) -> Iterator[Cell]:
    """The rows of both tables, the quick ones first."""
    s = SCALES[scale]
    nets = (("FFNN", s.ffnn, s.epochs[1], s.epochs[3]), ("CNN", s.cnn, s.epochs[0], s.epochs[2]))
    paper = {
        "CNN": {"acc_train": 0.9899, "asr_all": 0.999},
        "FFNN": {"acc_train": 0.92, "asr_all": 0.97},
        "Fine-Pruning, CNN": {"acc_train": 0.96, "asr_all": 0.002},
        "LPSF, FFNN": {"acc_train": 0.95, "asr_all": 0.002},
        "DB-COVIDNet, CNN": {"acc_train": 0.85, "asr_all": 0.063},
    }

    def rows(table, row, net, epochs, defense=None, attacked=True):
        drops = ((round(0.75 * epochs), 0.1),)
        recipe = Recipe(epochs=epochs, batch=64, drops=drops)
        # The clean twin is the victim at poison rate 0: one program trains both, and the twin's ASR
        # is known too.
        attack = BadNets() if attacked else BadNets(rate=0.0)
        base = Cell(table, row, s.data, net, recipe, attack, defense, reported=paper.get(row, {}))
        count = seeds or s.seeds[0 if net is s.cnn else 1]
        return grid(base, seed=range(count), attack__target=s.targets)

    for name, net, epochs, member in nets:
        yield from rows(ONE, name, net, epochs)
        yield from rows(ONE, f"{name}, clean twin", net, epochs, attacked=False)
        yield from rows(TWO, f"Fine-Pruning, {name}", net, epochs, FinePruning())
        rates = next(iter(rows(RATES, name, net, epochs)))
        yield dataclasses.replace(rates, reported={}, probe=Sensitivity(FinePruning(), LRS))
        yield from rows(MORE, f"STRIP, {name}", net, epochs, s.strip)
        yield from rows(MORE, f"Neural Cleanse, {name}", net, epochs, s.cleanse)
        yield from rows(
            MORE, f"Neural Cleanse, {name}, clean twin", net, epochs, s.cleanse, attacked=False
        )
        yield from rows(TWO, f"LPSF, {name}", net, epochs, Lpsf())
        yield from rows(TWO, f"DB-COVIDNet, {name}", net, member, DbCovidNet(members=s.members))
    for tau in (0.05, 0.2):
        yield from rows(MORE, f"LPSF, FFNN, τ = {tau}", s.ffnn, s.epochs[1], Lpsf(tau=tau))
    yield from rows(MORE, "LPSF, FFNN, pruning alone", s.ffnn, s.epochs[1], Lpsf(topology="dense"))
    yield from rows(MORE, "LPSF, FFNN, scale-free alone", s.ffnn, s.epochs[1], Lpsf(prune=False))
    yield from rows(
        MORE,
        "LPSF, FFNN, random instead of scale-free",
        s.ffnn,
        s.epochs[1],
        Lpsf(topology="random"),
    )
    unlucky = DbCovidNet(members=s.members, keep=8, design="random")
    yield from rows(
        MORE, "DB-COVIDNet, FFNN, no guarantee, 8 of 16 blocks", s.ffnn, s.epochs[3], unlucky
    )


def figures(rows: list[dict], store: Store, scale: str) -> Iterator[tuple]:
    """Stamped images; accuracy and ASR by pruned channels; members' votes; entropies; reversed
    triggers.
    """
    import jax

    from bdjax import plots, report

    data = SCALES[scale].data.load()
    first = [int(np.flatnonzero(data.test.label == k)[0]) for k in range(6)]
    clean = data.test.image[first] / np.float32(255)
    names = [class_name(k, data.names) for k in range(6)]
    trojan = stamped(BadNets(), 1, clean, jax.random.key(0))
    yield (
        "stamped",
        "The trigger",
        "The 5×5 white square, flush in the corner, on test images.",
        plots.stamped(clean, trojan, names),
    )

    if (drawn := chart(rows, RATES)) is not None:
        yield "fine-pruning-rates", RATES, "First run. Table II has the one at 0.001.", drawn
    arrays = functools.partial(report.arrays, rows, store)
    for name in ("CNN", "FFNN"):
        if found := arrays(f"Fine-Pruning, {name}"):
            acc, asr = (np.stack([a[key] for _, a in found]) for key in ("acc_curve", "asr_curve"))
            chosen = float(np.mean([r["metrics"]["pruned"] for r, _ in found]))
            caption = (
                "Pruning alone, before fine-tuning: test accuracy and ASR_nt, mean and range over "
                "the runs; the mark is where the "
            )
            caption += "defender's clean images say stop."
            yield (
                f"pruning-{name}",
                f"Fine-Pruning, {name}",
                caption,
                plots.pruning(np.arange(acc.shape[1]), acc, asr, chosen),
            )
        if found := arrays(f"DB-COVIDNet, {name}"):
            votes = found[0][1]
            caption = (
                "First run: the share of clean and of stamped test images for which a member votes "
                "for the target."
            )
            picture = plots.votes(
                votes["votes_clean"], votes["votes_stamped"], votes["sees_trigger"]
            )
            yield f"votes-{name}", f"DB-COVIDNet, {name}: members' votes", caption, picture
        if found := arrays(f"STRIP, {name}"):
            row, scores = found[0]
            caption = (
                f"First run: FAR {100 * row['metrics']['far']:.1f} % at FRR "
                f"{100 * row['metrics']['frr']:.1f} %."
            )
            picture = plots.entropies(
                scores["score_clean"], scores["score_trojan"].ravel(), row["metrics"]["boundary"]
            )
            yield f"strip-{name}", f"STRIP, {name}", caption, picture
        if found := arrays(f"Neural Cleanse, {name}"):
            row, nc = found[0]
            index = f"{row['metrics']['anomaly_index']:.2f}"
            caption = (
                f"First run: anomaly index {index} (flagged above 2); the true target is "
                f"{class_name(row['config']['attack']['target'], data.names)}."
            )
            picture = plots.norms(
                nc["norms"],
                nc["index"],
                nc["flagged"],
                row["config"]["attack"]["target"],
                data.names,
            )
            yield f"norms-{name}", f"Neural Cleanse, {name}: norms", caption, picture
            yield (
                f"triggers-{name}",
                f"Neural Cleanse, {name}: reversed triggers",
                "Mask ⊙ pattern, and L1 of the mask.",
                plots.triggers(nc["mask"], nc["pattern"], nc["norms"], names=data.names),
            )


def trends(rows: list[dict]) -> Iterator[tuple[str, str, str]]:
    """What the paper claims, and what our rows say."""
    from bdjax import report
    from bdjax.report import verdict

    mean = functools.partial(report.mean, rows)
    for net in ("CNN", "FFNN"):
        asr, gap = (
            mean(net, "asr_nt"),
            mean(f"{net}, clean twin", "acc_test") - mean(net, "acc_test"),
        )
        numbers = f"ASR_nt {100 * asr:.1f} %, {100 * gap:+.1f} points of test accuracy lost"
        yield (
            f"BadNets is effective against the {net}",
            verdict(asr > 0.97 and gap < 0.01, asr > 0.9),
            numbers,
        )
    for row in ("Fine-Pruning, CNN", "LPSF, FFNN", "DB-COVIDNet, CNN"):
        before, after = mean(row.split(", ")[1], "asr_nt"), mean(row, "asr_nt")
        numbers = (
            f"ASR_nt {100 * before:.1f} → {100 * after:.1f} %, test accuracy "
            f"{100 * mean(row, 'acc_test'):.1f} %"
        )
        yield (
            f"{row} greatly reduces the attack's success",
            verdict(after < 0.1, after < 0.5 * before),
            numbers,
        )
    row = "LPSF, CNN"
    numbers = (
        f"ASR_nt {100 * mean(row, 'asr_nt'):.1f} %, test accuracy "
        f"{100 * mean(row, 'acc_test'):.1f} %"
    )
    yield (
        "LPSF is weak on a CNN",
        verdict(mean(row, "asr_nt") > 0.5, mean(row, "asr_nt") > 0.1),
        numbers,
    )
