"""Every defense against many attacks, on real images: a matrix of what each keeps, removes, finds
and costs.

    bdjax data prepare mnist; bdjax data prepare gtsrb       # once
    bdjax run experiments/defense_zoo.py                     # scale cpu: 2 to 3 hours on 2 cores,
                                                             # measured in parts beside other runs
    bdjax run experiments/defense_zoo.py --scale smoke       # a few defenses, tiny: no result
    bdjax run experiments/defense_zoo.py --scale paper       # the papers' settings, whole data
                                                             # sets: for an accelerator

- A table is one attack, its first row the victim as it is. Under a filter of inputs, ACC counts a
  flagged clean image as lost and ASR a flagged stamped one as stopped.
- Scale cpu uses each defense's preset `cpu`. Where a defense fails, its row shows how: a victim
  that is not flagged is left as it was by the repairs of Neural Cleanse (`repaired` 0).
- The defender has a tenth of the images, held out from the attacker, and knows neither trigger nor
  target. Rows marked oracle are given what no defender has.
- Under a judge of samples ACC and ASR are those of a net that is trained again without the
  suspects.
- A defense works where it leaves an ASR_nt of 20 % or less for 5 points of accuracy or less, a
  filter for 5 more than the false rejections that it is set to; a judge of nets, where it calls the
  attacked net infected on each of three seeds of its search and the clean net of the same images
  not. It works in part where ASR_nt is halved for that price, where the seeds disagree (?), or
  where the clean net is called infected too.
- Rates of 2 and 1 % are for the judges of samples: with 10 % half of the target's images are
  poisoned, and they look for a minority. Spectral signatures are told a bound ε of its share in a
  class: 10 %, to which only a rate of 1 % keeps, or 20 %, to which 2 % keeps as well. The 3×3
  square at random places is the kind of trigger that MESA is for; 43 classes and the 4×4 square are
  Neural Cleanse's own.
- Each repair of Neural Cleanse makes a search of its own, with other draws than the row
  `neural-cleanse`, and repairs the labels that it flags; rows "smallest norm" take the label of the
  smallest norm, outlier or not, as for a net that is known to be infected.
- Chosen after a look at these victims' results: the fifth of the images that sets the boundary of
  input-anomaly, the rows "ε = 20 %" and "smallest norm", and the victims with 1 %, the 3×3 square
  and 43 classes. What the rows replaced or stand beside had failed.
- One number decides what Fine-Pruning leaves, the learning rate of its fine-tuning: the last table
  has ASR_nt over it, each victim's row beside the victim's own ACC and ASR.
- Defenses that need what the net has not (a convolution, three classes) are left out. The victims
  with a rate of 1 % and with 43 classes meet only the defenses that they stand here for.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from bdjax import registry, report
from bdjax.analysis.sensitivity import LRS, Sensitivity, chart
from bdjax.datasets.public import FashionMnist, Gtsrb, Mnist
from bdjax.datasets.sample import Sample
from bdjax.defenses.base import Judge
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.experiment import there
from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.models.layers import build
from bdjax.models.nc_gtsrb import NcGtsrb
from bdjax.models.shamshiri import Cnn
from bdjax.models.strip import StripMnist
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.train import Recipe
from bdjax.types import BadInput, word

TITLE = "Defense zoo: every defense against many attacks"


CHEAP = ("fine-pruning", "strip", "spectral-signatures", "retraining")
GREY: dict[str, tuple[str, str | None, dict[str, Any]] | None] = {
    "no attack": None,
    "BadNets, 5×5 square": ("badnets", "square", {}),
    "BadNets, 5×5 square, rate 2 %": ("badnets", "square", {"rate": 0.02}),
    "BadNets, 5×5 square, rate 1 %": ("badnets", "square", {"rate": 0.01}),
    "BadNets, all-to-all pattern": ("badnets", "pattern", {"labels": "all-to-all", "rate": 0.5}),
    "Blended, noise key": ("blended", None, {"test_alpha": 0.3}),
    "Multi-trigger, 10 digits → 1 target": ("multi-trigger", "digits-one", {"rate": 0.3}),
    "Entropy manipulation": ("entropy-manipulation", None, {}),
}  # fmt: skip
CLOTHES = {"no attack": None, "Large trigger": ("badnets", "large-trigger", {})}
ANYWHERE = {"size": 3, "random_place": True, "color": (1.0, 1.0, 0.0), "rate": 0.2}
COLOR = {
    "no attack": None,
    "Post-it note, random place": ("post-it", None, {"rate": 0.2}),
    "3×3 square, random place": ("badnets", None, ANYWHERE),
    "Gotham": ("gotham", None, {"target": 5}),
}
SIGNS = {"no attack": None, "BadNets, 4×4 square": ("badnets", "nc", {"target": 33})}
REPAIRS = ("nc-filter", "nc-pruning", "nc-unlearning")
# Victims of one paper: the defenses that are run on them; every one on all others.
ONLY = {
    "MNIST: BadNets, 5×5 square, rate 1 %": (
        "activation-clustering",
        "spectral-signatures",
        "spectral-signatures, ε = 20 %",
    ),
    "GTSRB, 43 classes: no attack": ("neural-cleanse",),
    "GTSRB, 43 classes: BadNets, 4×4 square": ("neural-cleanse", *REPAIRS),
}
BEFORE = "no defense"
RATES = "Fine-Pruning over its learning rate"
# The victims without attack, one a net, and what they are attacked with.
SCALES: dict[str, tuple[tuple[Cell, dict[str, Any]], ...]] = {
    "smoke": (
        (
            Cell(
                "sample", BEFORE, Sample(train_size=400, test_size=100),
                Cnn("VALID", hidden=16, features=(4, 4)),
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
                "Fashion-MNIST", BEFORE, Sample(train_size=6_000, test_size=1_000), StripMnist(),
                Recipe(epochs=10, batch=64),
            ),
            CLOTHES,
        ),
        (
            Cell(
                "GTSRB, ten classes", BEFORE,
                Gtsrb(train_size=6_000, test_size=1_000, top_classes=10),
                Cnn("VALID", hidden=256, features=(16, 32)), Recipe(epochs=10, batch=64),
            ),
            COLOR,
        ),
        (
            Cell(
                "GTSRB, 43 classes", BEFORE, Gtsrb(train_size=10_000, test_size=1_000),
                Cnn("VALID", hidden=256, features=(16, 32)),
                Recipe(epochs=8, batch=64, drops=((6, 0.1),)),
            ),
            SIGNS,
        ),
    ),
    "paper": (
        (Cell("MNIST", BEFORE, Mnist(), BadNetsCnn(pool="max"),
              Recipe(lr=1e-4, epochs=50, batch=32)), GREY),
        (Cell("Fashion-MNIST", BEFORE, FashionMnist(), BadNetsCnn(pool="max"),
              Recipe(lr=1e-4, epochs=50, batch=32)), CLOTHES),
        (Cell("GTSRB", BEFORE, Gtsrb(), NcGtsrb(), Recipe(epochs=15, batch=32)), COLOR | SIGNS),
    ),
}  # fmt: skip


def defenses(scale: str, attack: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a table: every registered defense, and the oracle variants where there is an
    attack.
    """
    for entry in registry.entries("defense"):
        if scale == "smoke" and entry.name not in CHEAP:
            continue
        preset = getattr(entry.cls, "presets", {}).get("cpu", {}) if scale != "paper" else {}
        if issubclass(entry.cls, Judge):
            preset = {**preset, "seeds": 3}
        made: Any = entry.cls
        yield entry.name, made(**preset)
        if entry.name == "spectral-signatures" and attack is not None:
            yield "spectral-signatures, ε = 20 %", made(remove=0.3)
        if entry.name == "linf-pruning":
            excess = {**preset, "rule": "excess", "inputs": "syn"}
            yield "linf-pruning, excess", made(**excess)
        if entry.name in REPAIRS:
            yield f"{entry.name}, smallest norm", made(**preset, pick="smallest")
    if attack is not None and scale != "smoke":
        nc = registry.make("defense", "neural-cleanse", None if scale == "paper" else "cpu")
        yield (
            "nc-unlearning, original trigger",
            registry.make("defense", "nc-unlearning", nc=nc, original=attack),
        )
        yield (
            "nc-pruning, known target",
            registry.make("defense", "nc-pruning", nc=nc, label=attack.target),
        )


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
            if attack is not None and victim.table not in ONLY:
                preset = FinePruning.presets["cpu"] if scale != "paper" else {}
                probe = Sensitivity(FinePruning(**preset), LRS)
                rates = dataclasses.replace(victim, table=RATES, row=victim.table, probe=probe)
                yield from grid(rates, seed=range(seeds or 1))
            for row, defense in defenses(scale, attack):
                if row not in ONLY.get(victim.table, (row,)):
                    continue
                try:
                    defense.check(model, data.clean)
                except BadInput:
                    continue
                yield from grid(
                    dataclasses.replace(victim, row=row, defense=defense), seed=range(seeds or 1)
                )


# --- What a defense did ---


def matrix(rows: list[dict]) -> tuple[list[str], dict[str, dict[str, dict]]]:
    """The attacks, and for each defense by attack its row of the first seed."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if "error" not in row and row["table"] != RATES:
            found.setdefault(row["row"], {}).setdefault(row["table"], row)
    return list(found.get(BEFORE, {})), found


def images(table: str) -> str:
    """The data set of a table, with what it was cut to."""
    return table.split(": ")[0]


def short(row: dict) -> str:
    """A row in a word: verdict and index, or ACC and ASR_nt."""
    m = row["metrics"]

    def share(name: str) -> str:
        return f"{100 * m[name]:.0f}" if report.measured(m.get(name)) else "–"

    if "infected" in m:
        said = word(m["infected"], m.get("undecided"))
        return f"{ {'infected': '✓', 'undecided': '?'}.get(said, '✗') } {m['anomaly_index']:.1f}"
    return f"{share('acc_test')} / {share('asr_nt')}"


def works(row: dict, before: dict, alarm: bool) -> tuple[bool, bool]:
    """Whether a defense works on a victim, and whether it does in part. `alarm`: it calls the clean
    net infected.
    """
    now, was = row["metrics"], before["metrics"]
    if "infected" in now:
        said = word(now["infected"], now.get("undecided"))
        return said == "infected" and not alarm, said != "no sign"
    set_to = row.get("config", {}).get("defense", {})
    kept = now["acc_test"] >= was["acc_test"] - 0.05 - set_to.get("frr", set_to.get("fpr", 0.0))
    return kept and now["asr_nt"] <= 0.2, kept and now["asr_nt"] <= was["asr_nt"] / 2


def figures(rows: list[dict], store: Store, scale: str) -> Iterator[tuple]:
    """ASR and accuracy under the defenses that change them, by attack; ASR over Fine-Pruning's
    learning rate.
    """
    from bdjax import plots

    tables, found = matrix(rows)
    changing = {
        name: line
        for name, line in found.items()
        if "infected" not in next(iter(line.values()))["metrics"]
    }
    for metric, title in (("asr_nt", "ASR left"), ("acc_test", "accuracy left")):
        shown = [t for t in tables if not math.isnan(report.mean(rows, BEFORE, metric, t))]
        if changing and shown:
            values = [[report.mean(rows, name, metric, t) for t in shown] for name in changing]
            picture = plots.heat_map(values, shown, list(changing), label=title, percent=True)
            yield (
                f"matrix-{metric}",
                f"Defense × attack: {title}",
                "Mean over seeds. Empty: does not apply.",
                picture,
            )
    if (drawn := chart(rows, RATES)) is not None:
        caption = "The matrix has the one at 0.001. Chosen by none of these: see `FinePruning`."
        yield "fine-pruning-rates", RATES, caption, drawn


def trends(rows: list[dict]) -> Iterator[tuple[str, str, str]]:
    """Each defense works against one attack at least."""
    tables, found = matrix(rows)
    attacked = [
        table for table in tables if not math.isnan(report.mean(rows, BEFORE, "asr_nt", table))
    ]
    for name, line in found.items():
        if name == BEFORE:
            continue
        alarms = {
            images(t) for t in line if t not in attacked and line[t]["metrics"].get("infected")
        }
        did = {
            t: works(line[t], found[BEFORE][t], images(t) in alarms) for t in attacked if t in line
        }
        good = [table for table, (whole, _) in did.items() if whole]
        part = [table for table, (_, some) in did.items() if some and table not in good]
        numbers = (
            f"{len(good)} of {len(did)}"
            + f", a false alarm on {' and '.join(sorted(alarms))}" * bool(alarms)
        )
        for what, tables_of in (("", good), ("in part ", part)):
            if tables_of:
                numbers += f"; {what}" + ", ".join(
                    f"{table} ({short(line[table])})" for table in tables_of
                )
        yield f"{name} works", report.verdict(bool(good), bool(part)), numbers
