"""Every defense against many attacks, on real images: a matrix of what each keeps, removes, finds
and costs.

    bdjax data prepare mnist; bdjax data prepare gtsrb       # once
    bdjax run experiments/defense_zoo.py                     # scale cpu: 4 1/2 hours on 2 cores,
                                                             # measured in parts beside other runs
    bdjax run experiments/defense_zoo.py --scale smoke       # a few defenses, tiny: no result
    bdjax run experiments/defense_zoo.py --scale paper       # the papers' settings, whole data
                                                             # sets: 1.5 hours on an H100 at
                                                             # least

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
  attacked net of every seed infected, each on three seeds of its search, and no clean net of the
  same images. It works in part where ASR_nt is halved for that price, where the seeds disagree (?),
  or where a clean net is called infected too.
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
from collections.abc import Iterator
from typing import Any, NamedTuple

from bdjax import plots, registry
from bdjax.analysis.sensitivity import LRS, Sensitivity, chart
from bdjax.datasets.public import FashionMnist, Gtsrb, Mnist
from bdjax.datasets.sample import Sample
from bdjax.defenses.base import Judge
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.experiment import at_hand
from bdjax.models.badnets_cnn import BadNetsCnn
from bdjax.models.layers import build
from bdjax.models.nc_gtsrb import NcGtsrb
from bdjax.models.shamshiri import Cnn
from bdjax.models.strip import StripMnist
from bdjax.report import verdict
from bdjax.rows import Row, Rows, measured
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.train import Recipe
from bdjax.types import BadInput, word

TITLE = "Defense zoo: every defense against many attacks"

BEFORE, RATES = "no defense", "Fine-Pruning over its learning rate"
CHEAP = ("fine-pruning", "strip", "spectral-signatures", "retraining")
REPAIRS = ("nc-filter", "nc-pruning", "nc-unlearning")


# --- Victims ---


def made(name: str, preset: str | None = None, **fields: Any) -> Any:
    """An attack by its name."""
    return registry.make("attack", name, preset, **fields)


NONE: dict[str, Any] = {"no attack": None}
GREY = NONE | {
    "BadNets, 5×5 square": made("badnets", "square"),
    "BadNets, 5×5 square, rate 2 %": made("badnets", "square", rate=0.02),
    "BadNets, 5×5 square, rate 1 %": made("badnets", "square", rate=0.01),
    "BadNets, all-to-all pattern": made("badnets", "pattern", labels="all-to-all", rate=0.5),
    "Blended, noise key": made("blended", test_alpha=0.3),
    "Multi-trigger, 10 digits → 1 target": made("multi-trigger", "digits-one", rate=0.3),
    "Entropy manipulation": made("entropy-manipulation"),
}
CLOTHES = NONE | {"Large trigger": made("badnets", "large-trigger")}
COLOR = NONE | {
    "Post-it note, random place": made("post-it", rate=0.2),
    "3×3 square, random place": made(
        "badnets", size=3, random_place=True, color=(1.0, 1.0, 0.0), rate=0.2
    ),
    "Gotham": made("gotham", target=5),
}
SIGNS = NONE | {"BadNets, 4×4 square": made("badnets", "nc", target=33)}


class Net(NamedTuple):
    """A net without attack, and what it is attacked with: `images` names its data set, with what it
    was cut to.
    """

    images: str
    data: Any
    model: Any
    recipe: Recipe
    attacks: dict[str, Any]

    def table(self, attack: str) -> str:
        """The table of an attack on it."""
        return f"{self.images}: {attack}"


SMALL, PAPER = Cnn("VALID", hidden=256, features=(16, 32)), BadNetsCnn(pool="max")
LONG = Recipe(lr=1e-4, epochs=50, batch=32)
SCALES = {
    "smoke": (
        Net("sample", Sample(train_size=400, test_size=100),
            Cnn("VALID", hidden=16, features=(4, 4)), Recipe(epochs=1, batch=50),
            {"BadNets, 5×5 square": GREY["BadNets, 5×5 square"]}),
    ),
    "cpu": (
        Net("MNIST", Mnist(train_size=6_000, test_size=1_000), StripMnist(),
            Recipe(epochs=10, batch=64), GREY),
        Net("Fashion-MNIST", Sample(train_size=6_000, test_size=1_000), StripMnist(),
            Recipe(epochs=10, batch=64), CLOTHES),
        Net("GTSRB, ten classes", Gtsrb(train_size=6_000, test_size=1_000, top_classes=10), SMALL,
            Recipe(epochs=10, batch=64), COLOR),
        Net("GTSRB, 43 classes", Gtsrb(train_size=10_000, test_size=1_000), SMALL,
            Recipe(epochs=8, batch=64, drops=((6, 0.1),)), SIGNS),
    ),
    "paper": (
        Net("MNIST", Mnist(), PAPER, LONG, GREY),
        Net("Fashion-MNIST", FashionMnist(), PAPER, LONG, CLOTHES),
        Net("GTSRB", Gtsrb(), NcGtsrb(), Recipe(epochs=15, batch=32), COLOR | SIGNS),
    ),
}  # fmt: skip
SEEDS = {"smoke": 1, "cpu": 3, "paper": 1}
VICTIMS = {
    net.table(attack): (net.images, attack)
    for nets in SCALES.values()
    for net in nets
    for attack in net.attacks
}
"""The data set of a table, and the attack."""
# Victims of one paper: the defenses that are run on them; every one on all others.
ONLY = {
    "MNIST: BadNets, 5×5 square, rate 1 %": (
        "activation-clustering", "spectral-signatures", "spectral-signatures, ε = 20 %",
    ),
    "GTSRB, 43 classes: no attack": ("neural-cleanse",),
    "GTSRB, 43 classes: BadNets, 4×4 square": ("neural-cleanse", *REPAIRS),
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
        cls: Any = entry.cls
        yield entry.name, cls(**preset)
        if entry.name == "spectral-signatures" and attack is not None:
            yield "spectral-signatures, ε = 20 %", cls(remove=0.3)
        if entry.name == "linf-pruning":
            yield "linf-pruning, excess", cls(**{**preset, "rule": "excess", "inputs": "syn"})
        if entry.name in REPAIRS:
            yield f"{entry.name}, smallest norm", cls(**preset, pick="smallest")
    if attack is not None and scale != "smoke":
        nc = registry.make("defense", "neural-cleanse", None if scale == "paper" else "cpu")
        original = registry.make("defense", "nc-unlearning", nc=nc, original=attack)
        yield "nc-unlearning, original trigger", original
        told = registry.make("defense", "nc-pruning", nc=nc, label=attack.target)
        yield "nc-pruning, known target", told


def cells(scale: str, seeds: int | None = None) -> Iterator[Cell]:
    """For each attack the victim, then every defense that applies."""
    for net in (net for net in SCALES[scale] if at_hand(net.data)):
        data = net.data.load()
        model = build(net.model, data.shape, data.classes)
        for name, attack in net.attacks.items():
            table = net.table(name)
            victim = Cell(table, BEFORE, net.data, net.model, net.recipe, attack,
                          tags={"images": net.images, "against": name})  # fmt: skip
            found = [victim]
            if attack is not None and table not in ONLY:
                preset = FinePruning.presets["cpu"] if scale != "paper" else {}
                probe = Sensitivity(FinePruning(**preset), LRS)
                found.append(dataclasses.replace(victim, table=RATES, row=table, probe=probe))
            for row, defense in defenses(scale, attack):
                if row in ONLY.get(table, (row,)) and applies(defense, model, data.clean):
                    found.append(dataclasses.replace(victim, row=row, defense=defense))
            for cell in found:
                yield from grid(cell, seed=range(seeds or SEEDS[scale]))


def applies(defense: Any, model: Any, clean: Any) -> bool:
    """Whether a defense can be run on a net."""
    try:
        defense.check(model, clean)
    except BadInput:
        return False
    return True


# --- What a defense did ---


def matrix(rows: Rows) -> tuple[list[str], dict[str, dict[str, Row]]]:
    """The attacks, and for each defense by attack its row over the seeds."""
    shown = Rows(row for row in rows.done if row["table"] != RATES)
    found = {
        name: {table: over(seeds) for table, seeds in of.by("table").items()}
        for name, of in shown.by("row").items()
    }
    return list(found.get(BEFORE, {})), found


def over(seeds: Rows) -> Row:
    """A row of the means over seeds; a verdict that is not that of each is undecided. `accused`: of
    how many of the `nets` it says infected.
    """
    names = dict.fromkeys(name for row in seeds for name in row["metrics"])
    means = {name: seeds.mean(name) for name in names}
    if "infected" in means:
        accused = sum(row["metrics"].get("infected") == 1 for row in seeds)
        means |= {"accused": accused, "nets": len(seeds)}
    said = {word(row["metrics"].get("infected"), row["metrics"].get("undecided")) for row in seeds}
    if len(said) > 1:
        means |= {"infected": 0.0, "undecided": 1.0}
    return {**seeds[0], "metrics": means}


def short(row: Row) -> str:
    """A row in a word: verdict and index, or ACC and ASR_nt."""
    m = row["metrics"]

    def share(name: str) -> str:
        return f"{100 * m[name]:.0f}" if measured(m.get(name)) else "–"

    if "infected" in m:
        said = word(m["infected"], m.get("undecided"))
        return f"{ {'infected': '✓', 'undecided': '?'}.get(said, '✗') } {m['anomaly_index']:.1f}"
    return f"{share('acc_test')} / {share('asr_nt')}"


def works(row: Row, before: Row, alarm: bool) -> tuple[bool, bool]:
    """Whether a defense works on a victim, and whether it does in part. `alarm`: it calls a clean
    net infected.
    """
    now, was = row["metrics"], before["metrics"]
    if "infected" in now:
        said = word(now["infected"], now.get("undecided"))
        return said == "infected" and not alarm, said != "no sign"
    set_to = row.get("config", {}).get("defense", {})
    kept = now["acc_test"] >= was["acc_test"] - 0.05 - set_to.get("frr", set_to.get("fpr", 0.0))
    return kept and now["asr_nt"] <= 0.2, kept and now["asr_nt"] <= was["asr_nt"] / 2


def figures(rows: Rows, store: Store, scale: str) -> Iterator[tuple]:
    """ASR and accuracy under the defenses that change them, by attack; ASR over Fine-Pruning's
    learning rate.
    """
    tables, found = matrix(rows)
    changing = [
        name
        for name, line in found.items()
        if "infected" not in next(iter(line.values()))["metrics"]
    ]
    cells = rows.by("row", "table")
    for metric, title in (("asr_nt", "ASR left"), ("acc_test", "accuracy left")):
        shown = [table for table in tables if cells[BEFORE, table].values(metric)]
        if changing and shown:
            values = [
                [cells.get((name, table), Rows()).mean(metric) for table in shown]
                for name in changing
            ]
            picture = plots.heat_map(values, shown, changing, label=title, percent=True)
            caption = "Mean over seeds. Empty: does not apply."
            yield f"matrix-{metric}", f"Defense × attack: {title}", caption, picture
    if (drawn := chart(rows, RATES)) is not None:
        caption = "The matrix has the one at 0.001. Chosen by none of these: see `FinePruning`."
        yield "fine-pruning-rates", RATES, caption, drawn


def trends(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """Each defense works against one attack at least."""
    tables, found = matrix(rows)
    attacked = [table for table in tables if rows.where(table=table, row=BEFORE).values("asr_nt")]
    for name, line in found.items():
        if name != BEFORE:
            yield it_works(name, line, found[BEFORE], attacked)


def it_works(
    name: str, line: dict[str, Row], before: dict[str, Row], attacked: list[str]
) -> tuple[str, str, str]:
    """Against how many of the attacks, and with which false alarms."""
    alarms = {
        VICTIMS[table][0]: "{accused} of {nets}".format(**row["metrics"])
        for table, row in line.items()
        if table not in attacked and row["metrics"].get("accused")
    }
    did = {
        table: works(line[table], before[table], VICTIMS[table][0] in alarms)
        for table in attacked
        if table in line
    }
    good = [table for table, (whole, _) in did.items() if whole]
    part = [table for table, (_, some) in did.items() if some and table not in good]
    numbers = f"{len(good)} of {len(did)}"
    if alarms:
        counts = (f"{count} of {images}" for images, count in sorted(alarms.items()))
        numbers += f", clean nets accused: {' and '.join(counts)}"
    for what, of in (("", good), ("in part ", part)):
        if of:
            numbers += f"; {what}" + ", ".join(f"{table} ({short(line[table])})" for table in of)
    return f"{name} works", verdict(bool(good), bool(part)), numbers
