"""A zoo of clean and of backdoored nets: what does each judge, and the audit, detect of them?

    bdjax data prepare mnist                          # once; without it half of it is left out
    bdjax run experiments/audit_zoo.py                # scale cpu: 30 + 30 nets, 1 h on 2 cores
    bdjax run experiments/audit_zoo.py --scale smoke  # every kind of cell, tiny: no result
    bdjax run experiments/audit_zoo.py --scale paper  # 300 + 300 nets: hours on 2 cores

A benchmark of detectors: a judge of your own is one more line of `SCALES`.

- The nets are those of two data sets, three architectures and two recipes, each with its own seed;
  no two backdoors of a kind share a target. `ZOO` is the digest of what makes those of the embedded
  images; the test of this file holds it to that. Nothing is tuned on them.
- Of the attacks some are made to pass the audit: a key over the whole image, a backdoor for all
  labels at once, one for some source classes alone, and `Evasive`, whose training loss punishes
  what the judges look at. An attack that does not work on its net (ASR below 80 %) is left out.
- "Detected" is a judge's own rule, on its first seed; the audit's word is by its one rule, with
  parametric nulls, over three seeds of Neural Cleanse. It is counted as detected where it says
  *infected*; *undecided* stands beside it.
- Detected by the right label means: the audit's label is one of the attack's targets.
- Intervals are Wilson's, at 95 %, over nets.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import mesh, metrics, registry, report
from bdjax.attacks.activation_matching import relative_gap
from bdjax.attacks.badnets import BadNets
from bdjax.attacks.blended import Blended
from bdjax.audits import examined
from bdjax.datasets.public import Mnist
from bdjax.datasets.sample import Sample
from bdjax.defenses.base import Judge
from bdjax.defenses.invert.abs import Abs
from bdjax.defenses.invert.deep_inspect import DeepInspect
from bdjax.defenses.invert.mesa import Mesa
from bdjax.defenses.invert.mm_bd import MmBd
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.models.mntd import Mntd
from bdjax.experiment import at_hand
from bdjax.models.layers import default_site
from bdjax.models.shamshiri import Cnn, Ffnn
from bdjax.registry import defense, pytree, static
from bdjax.rows import Rows
from bdjax.rule import Seed, decide, seed_of
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.train import Recipe, cross_entropy, fit, poisoned_set, poisoning_key, stamped
from bdjax.types import BadInput, Size, Verdict, Weight

TITLE = "Audit zoo: what judges and the audit detect"
ALPHA, WORKS = 0.05, 0.8


@pytree
class Evasive(BadNets):
    """A backdoor whose training loss punishes what judges look at: half of its trigger must not
    work (so that no small patch does, against Neural Cleanse and its kin), and a stamped image must
    look inside the net as it did (against ABS).

    L = ℓ(poisoned batch) + `parts`·ℓ(images with a random half of the trigger, their own labels) +
    `weight`·E‖φ(x') − φ(x)‖² / E‖φ(x) − E φ(x)‖², φ the activation of the last convolution.
    """

    parts: Weight = 1.0
    weight: Weight = 0.05

    def train(self, key, model, recipe, data, variables=None):
        site = default_site(model)

        def loss(model, variables, x, label, weight, key):
            key_stamp, key_half, key_model = jax.random.split(key, 3)
            fired = stamped(self, 1, x, key_stamp, train=True)
            fresh = (jnp.abs(fired - x).max((1, 2, 3)) > 0).astype(jnp.float32)  # not poisoned
            half = jax.random.bernoulli(key_half, 0.5, (x.shape[0], *x.shape[1:3], 1))
            both = jnp.concatenate([x, fired, jnp.where(half, fired, x)])
            out = model.apply(variables, both, train=True, key=key_model)
            n = x.shape[0]

            def known(logits):
                own = out._replace(logits=logits)
                return model._replace(apply=lambda *_, **__: own)

            value, own = cross_entropy(known(out.logits[:n]), variables, x, label, weight, key)
            part, _ = cross_entropy(
                known(out.logits[2 * n :]), variables, x, label, weight * fresh, key
            )
            gap = relative_gap(out.acts[site][:n], out.acts[site][n : 2 * n])
            return value + self.parts * part + self.weight * gap, own

        poisoned = poisoned_set(poisoning_key(key), data, self, model.classes)
        variables, curves = fit(key, model, recipe, poisoned, variables=variables, loss=loss)
        return self, variables, curves


@defense("audit-zoo")
class Panel(Judge):
    """What each of `judges` says of a net, and what its triggers do, as an audit has it; `draws`
    seeds of the first one, one of the others.

    Half of the clean images are searched with, by the others triggers are measured. The verdict is
    that of the first judge and seed; `info`: of each judge what `audits.examined` gives, by seed.
    """

    judges: tuple[Judge, ...] = ()
    draws: Size = static(1)

    def check(self, model, clean):
        super().check(model, clean)
        if not self.judges:
            raise BadInput("the panel of the audit zoo has no judges")

    def once(self, key, model, variables, clean):
        search, held = clean[::2], clean[1::2]
        info = {}
        for i, judge in enumerate(self.judges):

            def one(seed, judge=judge):
                said = examined(model, jax.random.key(seed), judge, variables, search, held)
                return {k: v for k, v in said.items() if k not in ("mask", "pattern", "elevation")}

            seeds = jnp.arange(self.draws if i == 0 else 1)
            info[registry.name_of(judge)] = mesh.lane_map(one, seeds, 1)
        first = {k: v[0] for k, v in info[registry.name_of(self.judges[0])].items()}
        index, infected, flagged = (first[name] for name in ("index", "infected", "flagged"))
        return Verdict(index, infected, flagged, info, first["p_value"])


CLEAN = "clean"
ATTACKS: dict[str, Any] = {
    "3×3 square": BadNets(size=3),
    "four pixels": BadNets(shape="pattern", size=3, row=-2, col=-2),
    "quarter of the image": BadNets(size=0.5, color=(0.6,)),
    "any place": BadNets(size=4, random_place=True, rate=0.2),
    "noise key": Blended(alpha=0.3, test_alpha=0.3),
    "all-to-all": BadNets(shape="pattern", size=3, row=-2, col=-2, labels="all-to-all", rate=0.4),
    "source-specific": BadNets(size=4, labels="source-specific", cover=0.1),
    "evasive": Evasive(size=6),
}  # fmt: skip
HARD = ("noise key", "all-to-all", "source-specific", "evasive")
"""Those made to pass the audit."""


class Kind(NamedTuple):
    """Nets of one data set, architecture and recipe."""

    name: str
    data: Any
    model: Any
    recipe: Recipe


class Scale(NamedTuple):
    """What a scale changes: of each kind and attack `each` nets, and so many clean ones."""

    kinds: tuple[Kind, ...]
    each: int
    judges: tuple[Judge, ...]
    seeds: int
    mntd: Judge
    attacks: Sequence[Sequence[str]]


SGD = Recipe(lr=0.05, epochs=10, batch=64, optimizer="sgd")
ADAM = Recipe(epochs=8, batch=64)
CLOTHES = Sample(train_size=6000, test_size=1000)
DIGITS = Mnist(train_size=6000, test_size=1000)
SMALL = Cnn("VALID", hidden=64, features=(8, 16))
KINDS = (
    Kind("clothes, dense", CLOTHES, Ffnn((64,)), ADAM),
    Kind("clothes, convolutions", CLOTHES, SMALL, SGD),
    Kind("digits, dense", DIGITS, Ffnn((48, 32)), SGD),
    Kind("digits, convolutions", DIGITS, Cnn(hidden=32, features=(6, 12)), ADAM),
)
EVERY = tuple(ATTACKS)
"""Of the second data set's nets one attack less each: 8 + 8 + 7 + 7 are 30."""
MOST = (EVERY, EVERY, EVERY[1:], (*EVERY[:1], *EVERY[2:]))
CPU = (
    NeuralCleanse(**NeuralCleanse.presets["cpu"]),
    DeepInspect(**DeepInspect.presets["cpu"]),
    MmBd(**MmBd.presets["cpu"]),
    Abs(**Abs.presets["cpu"]),
    Mesa(**{**Mesa.presets["cpu"], "epochs": 3}, betas=(0.8,)),
)
SCALES = {
    "smoke": Scale(
        (Kind("clothes, dense", Sample(train_size=400, test_size=100), Ffnn((16,)),
              Recipe(epochs=1, batch=32)),),
        1,
        (NeuralCleanse(steps=2, batches=2), MmBd(starts=2, steps=2),
         Abs(images=6, top=2, per_site=1, steps=2)), 2,
        Mntd(shadows=2, validation=2, recipe=Recipe(epochs=1, batch=20),
             meta=Recipe(epochs=1, batch=1)),
        (EVERY,),
    ),
    "cpu": Scale(KINDS, 1, CPU, 3, Mntd(**Mntd.presets["cpu"]), MOST),
    "paper": Scale(
        KINDS, 10, (NeuralCleanse(), DeepInspect(), MmBd(), Abs(), Mesa()), 3, Mntd(), MOST
    ),
}  # fmt: skip
ZOO = "10f3310da860c735"
"""The digest of what makes the nets of the embedded images at scale cpu."""


def cells(scale: str, seeds: int | None = None) -> Iterator[Cell]:
    """Each net, as it is, before the judges of the audit, and before MNTD, which learns once for a
    kind.
    """
    s = SCALES[scale]
    panel, number = Panel(judges=s.judges, draws=s.seeds), itertools.count()
    for k, (kind, attacks) in enumerate(zip(s.kinds, s.attacks, strict=True)):
        if not at_hand(kind.data):
            continue
        # no target twice for an attack
        wanted = [(name, 3 * k + EVERY.index(name) + i)
                  for name in attacks for i in range(seeds or s.each)]  # fmt: skip
        for name, target in (*[(CLEAN, 0)] * len(wanted), *wanted):
            attack = None if name == CLEAN else aimed(ATTACKS[name], target % 10)
            seed = next(number)
            cell = Cell(kind.name, name, kind.data, kind.model, kind.recipe, attack, seed=seed)
            for judge in (None, panel, s.mntd):
                yield registry.replace(cell, ("defense",), judge)


def aimed(attack: Any, target: int) -> Any:
    """The attack with a target of its own, and sources other than that."""
    attack = registry.replace(attack, ("target",), target)
    if attack.labels == "source-specific":
        sources = tuple((target + k) % 10 for k in (1, 3, 5, 7))
        attack = registry.replace(attack, ("sources",), sources)
    return attack


def zoo() -> str:
    """The digest of what makes the nets of the embedded images at scale cpu: images, nets,
    recipes, attacks, seeds.
    """
    return registry.digest(
        sorted({c.victim_id for c in cells("cpu") if c.table.startswith("clothes")})
    )


Said = Mapping[str, tuple[bool, list[Seed]]]
"""Of each judge whether its own rule holds on its first seed, and what its seeds say."""


class Seen(NamedTuple):
    """A net: its kind and attack; what the audit says, and of which label; which judges detect it;
    whether the backdoor works, and the label is right.
    """

    kind: str
    attack: str
    word: str
    right: bool
    judges: dict[str, bool]
    works: bool


def said_of(rows: Rows, store: Store) -> dict[str, Said]:
    """What the judges of the audit say of each net, by run: from the arrays of `store`."""
    found = {}
    for row, arrays in Rows(r for r in rows.done if r["defense"] == "audit-zoo").arrays(store):
        steps: dict[str, dict[str, Any]] = {}
        for name, value in arrays.items():
            judge, dot, part = name.partition(".")
            if dot and judge != "seeds":
                steps.setdefault(judge, {})[part] = value
        found[row["run"]] = {
            judge: (bool(step["infected"][0]), [
                seed_of({k: v[i] for k, v in step.items()}) for i in range(len(step["index"]))
            ])
            for judge, step in steps.items()
        }  # fmt: skip
    return found


def written(said: dict[str, Said]) -> Iterator[str]:
    """A line of JSON for each net, of what the rule needs: p, labels, and the share that the
    triggers of these move.
    """
    for run, judges in said.items():
        lines = {
            judge: [own, [[s.p_value if math.isfinite(s.p_value) else None, list(s.labels),
                           [s.moved.get(k) for k in s.labels]] for s in seeds]]
            for judge, (own, seeds) in judges.items()
        }  # fmt: skip
        yield json.dumps({run: lines})


def kept(scale: str) -> dict[str, Said]:
    """What is committed of `said_of`, beside the rows: `python experiments/audit_zoo.py FOLDER`."""
    file = Path(__file__).parent / "results" / f"audit_zoo-{scale}.said"
    found: dict[str, Said] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        for run, judges in json.loads(line).items():
            found[run] = {
                judge: (own, [
                    Seed(math.nan if p is None else p, tuple(labels),
                         {k: v for k, v in zip(labels, moved, strict=True) if v is not None})
                    for p, labels, moved in seeds
                ])
                for judge, (own, seeds) in judges.items()
            }  # fmt: skip
    return found


def seen(rows: Rows, store: Store | None) -> list[Seen]:
    """The nets, by their rows; without a store by what is committed."""
    done = [row for row in rows.done if row["defense"] in ("audit-zoo", "mntd")]
    mntd = {r["victim"]: r["metrics"]["infected"] == 1 for r in done if r["defense"] == "mntd"}
    said = said_of(rows, store) if store else kept(done[0]["scale"]) if done else {}
    found = []
    for row in done:
        if row["run"] not in said:
            continue
        judges = {judge: own for judge, (own, _) in said[row["run"]].items()}
        if row["victim"] in mntd:
            judges["mntd"] = mntd[row["victim"]]
        seeds = {judge: some for judge, (_, some) in said[row["run"]].items()}
        verdict = decide(seeds, ALPHA, True)
        attack = (row["config"] or {}).get("attack") or {}
        right = verdict.label is not None and (
            attack.get("labels") == "all-to-all" or attack.get("target") == verdict.label
        )
        works = row["attack"] is None and row["row"] == CLEAN
        works = works or row["metrics"]["asr_nt"] >= WORKS
        found.append(Seen(row["table"], row["row"], verdict.word, right, judges, works))
    return [net for net in found if net.works]


def rate(hits: Sequence[bool]) -> tuple[float, float, str]:
    """The interval of a share of nets, and the share in words."""
    low, high = map(float, metrics.interval(jnp.asarray(np.array(hits, bool))))
    return low, high, f"{sum(hits)} of {len(hits)} ({100 * low:.0f}–{100 * high:.0f} %)"


def detectors(nets: Sequence[Seen]) -> dict[str, Any]:
    """How each detector is asked: the judges by their own rules, the audit by its own."""
    judges = dict.fromkeys(judge for net in nets for judge in net.judges)
    asked: dict[str, Any] = {"audit": lambda net: net.word == "infected"}
    return asked | {judge: lambda net, j=judge: net.judges.get(j, False) for judge in judges}


def figures(rows: Rows, store: Store, scale: str) -> Iterator[tuple]:
    """Which detector sees which attack."""
    from bdjax import plots

    nets = seen(rows, store)
    if not nets:
        return
    names = [name for name in (CLEAN, *ATTACKS) if any(net.attack == name for net in nets)]
    asked = detectors(nets)
    shares = [[np.mean([sees(net) for net in nets if net.attack == name]) for name in names]
              for sees in asked.values()]  # fmt: skip
    yield report.Figure(
        "detected", "Share of nets that each detector accuses",
        "The first column are false alarms; judges by their own rules, the audit by its one rule.",
        plots.heat_map(shares, names, list(asked), percent=True),
    )  # fmt: skip


def trends(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """Detection and false alarms of each detector, with intervals, and by attack."""
    nets = seen(rows, None if rows.folder is None else Store(rows.folder))
    clean = [net for net in nets if net.attack == CLEAN]
    infected = [net for net in nets if net.attack != CLEAN]
    if not clean or not infected:
        return
    for name, sees in detectors(nets).items():
        alarms, caught = ([sees(net) for net in some] for some in (clean, infected))
        by = []
        for attack in ATTACKS:
            some = [sees(net) for net in infected if net.attack == attack]
            by += [f"{attack} {sum(some)}/{len(some)}"] if some else []
        numbers = f"detected {rate(caught)[2]}, false alarms {rate(alarms)[2]}; {', '.join(by)}"
        if name == "audit":
            open_ = (
                [net.word == "undecided" for net in infected],
                [net.word == "undecided" for net in clean],
            )
            right = [net.right for net in infected if net.word == "infected"]
            numbers += (
                f"; undecided {sum(open_[0])} infected, {sum(open_[1])} clean; right label "
                f"{sum(right)} of {len(right)}"
            )
        good = rate(caught)[0] > rate(alarms)[1]
        yield (
            f"{name} accuses more of the infected nets than of the clean ones",
            report.verdict(good, bool(np.mean(caught) > np.mean(alarms))), numbers,
        )  # fmt: skip
    hard = [net.word == "infected" for net in infected if net.attack in HARD]
    if hard:
        yield (
            "the audit does not see most of the attacks that were made to pass it",
            report.verdict(bool(np.mean(hard) < 0.5), False), rate(hard)[2],
        )  # fmt: skip


if __name__ == "__main__":
    folder = sys.argv[1]
    for line in written(said_of(Rows(report.load(folder).rows), Store(folder))):
        print(line)
