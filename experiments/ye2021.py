"""Ye, Bamigbade & Babushkin, "Comparative Analysis of Defenses against the Backdoor Attacks on Deep
Neural Networks" (2021).

    bdjax run experiments/ye2021.py                  # scale cpu: 22 people, small grids, about 8
                                                     # minutes on 2 cores
    bdjax run experiments/ye2021.py --scale smoke    # clothes instead of faces, one net: no result
    bdjax run experiments/ye2021.py --scale paper    # all people, full grids: a minute on an H100
                                                    # at least, 3 hours on 2 cores; there the
                                                    # published net's rows without a search, 12
                                                    # minutes (--only "Published net: STRIP" …)

Faces are the user's own: put faces_train.npz and faces_test.npz (`image` [N, 55, 47, 3], `label`)
into the data folder (`BDJAX_DATA_DIR`); with lab3_bd_weights.h5 of CSAW-HackML-2020 beside them the
published net is examined too. What is not there is left out.

Reported (clean accuracy CCA / ASR in %, for nets whose CCA had been 93 to 98): Figure 1: B 42 to 56
/ 88 to 100, STRIP 19 to 20 / 20 to 35 (89 / 10 for the published net), B′ 83 to 85 / 0 to 4, G 38
to 50 / 0 to 4, G′ 76 to 79 / 0 to 4. Table I: CCA / ASR of learning rate × channels; their values
stand beside ours. No seeds, no spread.

Where we differ, and why:
- The paper reads pixels as 0 to 255, but four of its five nets had been trained on 0 to 1: the
  contest's own script divides by 255, the paper's code does not, and its CCA of 42 % for the
  sunglasses net is the contest's 97.9 %. We train on 0 to 1 and run everything twice: pixels 255
  times too large, as the paper, and right. Metrics without a net's name in the tables of goodnets
  are those of the victim as it was trained, and under all its triggers.
- Substitute: the nets and YouTube's aligned faces cannot be had. Ours are DeepIDs trained on LFW's
  aligned faces; at scale cpu of the 22 people with 30 or more photographs, and for few epochs.
- Substitute: the trigger of the net anonymous_1 is unknown. We take lipstick alone, whose reported
  ASR, 91.5 %, is the net's. The multi-trigger net is one net with three triggers and three targets;
  its three rows share it.
- B′ has 4 of 60 channels pruned and B0 has 2, as in the authors' code, which counts double on its
  way to 10 % and 3 %. "As their code" also gives the pruned convolution its old weights back after
  each channel, as that does.
- The authors fine-tune each channel for 10 epochs of 11,547 images in batches of 32, 3,600 steps;
  scale cpu has 2 epochs of 319 in batches of 8, 78 steps: less is unlearnt.
- What was tried before, on one sunglasses victim and looking at test ASR: at 1e-3, 20 and 60 steps
  of 32 and 156 of 8 a channel left ASR at 100 % with wrong pixels, 74 to 98 % with right ones. At
  3e-3, 60 steps, it was below 1 % with right pixels and accuracy stayed; with wrong ones accuracy
  fell to 43 % and ASR stayed at 92 %. Therefore rows at 3e-3 were added, for both: they show that a
  rate exists, not that a defender would have found it. Batches of 8 were kept.
- STRIP's boundary is a quantile of clean inputs' entropies. The paper's was placed by looking at
  poisoned ones.
- The published net was trained on pixels of 0 to 255. It knows none of LFW's people, so its
  accuracy cannot be measured on them: CCA is the share of faces whose answer stays that of the
  undefended net, and the defender's images carry those answers as labels. Those are few images for
  many answers, so fine-tuning costs more of them than it cost the authors. Its rows with pixels 255
  times too small show what the mistake that this net invites would do.
- Neural Cleanse searches the first few of the published net's 1283 labels at scale cpu. In a first
  trial (12 labels, 75 batches) its λ never left 0 and it missed the target, index 1.15; the
  schedule now starts above 0, for that reason. The target's trigger is the smallest in all nine
  searches, and an outlier among the eight in four; the three draws of no seed agree.
- Beyond the paper the published net is repaired by the trigger that this search finds: its last
  layer forgets it (`last-layer-unlearning`), beside a fine-tuning that unlearns it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import metrics, plots
from bdjax.attacks.base import Attack
from bdjax.attacks.lipstick import Lipstick
from bdjax.attacks.multi_trigger import MultiTrigger
from bdjax.attacks.sunglasses import Sunglasses
from bdjax.channels import prune
from bdjax.datasets import data_dir
from bdjax.datasets.files import Faces
from bdjax.datasets.sample import Sample
from bdjax.defenses.base import Defense, judge
from bdjax.defenses.inputs.goodnet import quarantine
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.reversed import fire
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.defenses.repair.last_layer import LastLayerUnlearning
from bdjax.defenses.repair.nc_unlearning import NcUnlearning
from bdjax.experiment import at_hand
from bdjax.models.deepid import DeepId
from bdjax.models.keras_h5 import load_keras_weights
from bdjax.models.layers import build
from bdjax.registry import pytree, static
from bdjax.report import verdict
from bdjax.rows import Row, Rows
from bdjax.store import Store
from bdjax.study import Cell, grid
from bdjax.sweep import stack, take
from bdjax.train import Curves, Recipe, batched, evaluate, predict, stamped, unit
from bdjax.types import Array, Metric, Model, Splits, Victim

TITLE = "Ye et al. (2021): Fine-Pruning, STRIP and goodnets on backdoored face nets"

RAW, RIGHT, SMALL = 255.0, 1.0, 1 / 255
READ = {RAW: "pixels 255 times too large", RIGHT: "pixels right"}
SLUGS = {RAW: "raw", RIGHT: "right"}
REPAIRS = {
    **dict.fromkeys(("k", "B0", "B′"), "Fine-Pruning"),
    "weight": "forgetting in the last layer",
    "fine-tuned": "unlearning by fine-tuning",
}
"""What repairs the published net, by how the names of the nets that it leaves begin."""
STRIPPED, GRID = "Figure 1a", "Figure 1b, c; Table I"
LAB3, MORE = "Published net", "Beyond the paper"
LAB3_SMALL = "Published net, pixels 255 times too small"
NETS = "B", "B0", "B′", "G", "G′"
LR = 1e-3
"""The learning rate of Figure 1."""
FAST = 3e-3
"""Not a rate of the paper: see the notes."""
SITE, WEIGHTS = "pool_3", "lab3_bd_weights.h5"


# --- What is measured ---


def read(model: Model, scale: Array | float) -> Model:
    """`model` when pixels come `scale` times as large as it was trained on."""
    return model._replace(
        apply=lambda variables, x, **options: model.apply(variables, scale * x, **options)
    )


@pytree
class Only(Attack):
    """One trigger, `kind`, of an attack that may have several."""

    attack: Attack = Attack()
    kind: Array | int = 1

    def stamp(self, kind, x, key, *, train=True):
        return self.attack.stamp(jnp.where(kind > 0, self.kind, 0), x, key, train=train)

    def success(self, kind, y, classes):
        return self.attack.success(jnp.asarray(self.kind), y, classes)


@pytree
class Filtered:
    """What passes the input filter `defense`, on every `every`-th test image, under the trigger
    `kind` alone.
    """

    defense: Defense
    scale: Array | float = RIGHT
    kind: Array | int = 1
    every: int = static(1)

    def __call__(self, key, model, variables, attack, clean, test):
        victim = Victim(read(model, self.scale), variables, Only(attack=attack, kind=self.kind))
        found = judge(key, victim, self.defense, Splits(test, clean, test[:: self.every]))
        return found.metrics | found.arrays


@pytree
class FinePruned:
    """`acc`, and `asr_NAME` for each of `triggers`, of the nets with each of `counts` channels
    pruned: `k1`, `k2` …, but B with none, B0 with `light` and B′ with `strong`; and of the goodnets
    G(B, B′) and G′(B0, B′).

    Arrays: how the channels of B and B′ fire, `before.clean: [C]`, `after.NAME: [C]` and so on;
    `activation_left`: the share that B′ has of B's activation by stamped images.
    """

    measures = (
        Metric("*.acc", "share", "high", "* ACC"),
        *(
            Metric(f"*.asr_{trigger}", "share", "low", f"* ASR {trigger}")
            for trigger in ("sunglasses", "lipstick", "eyebrows")
        ),
        Metric("activation_left", hint="B′'s activation by stamped images over B's"),
    )

    repair: FinePruning
    scale: Array | float = RIGHT
    triggers: tuple[str, ...] = static(("sunglasses",))
    counts: tuple[int, ...] = static((0, 2, 4))
    light: int = static(2)
    strong: int = static(4)

    def __call__(self, key, model, variables, attack, clean, test):
        model, site = read(model, self.scale), self.repair.site
        assert site is not None
        order, _ = self.repair.rank(model, variables, clean)
        last = max(self.counts)
        _, (_, stages) = self.repair.one_at_a_time(
            key, model, variables, clean, order, last, lambda net: net
        )
        before = prune(variables, site, jnp.ones(order.shape[0]))
        nets = stack([take(stages, k - 1) if k else before for k in self.counts])
        kinds = range(1, attack.triggers + 1)
        images = jnp.stack(
            [unit(test.image), *(stamped(attack, kind, test.image, key) for kind in kinds)]
        )
        label = jnp.asarray(test.label)
        aimed = [attack.success(jnp.asarray(kind), label, model.classes) for kind in kinds]

        def look(net):
            def piece(x, i):
                out = model.apply(net, x[i])
                return out.logits, out.acts[site].reshape(i.shape[0], -1, order.shape[0]).mean(1)

            logits, fired = jax.lax.map(
                lambda x: batched(functools.partial(piece, x), x.shape[0], 250), images
            )
            return logits, fired.mean(1)

        def rates(answers):
            hits = [
                metrics.attack_success(answers[kind], aimed[kind - 1], label).all for kind in kinds
            ]
            asr = {f"asr_{name}": hit for name, hit in zip(self.triggers, hits, strict=True)}
            return {"acc": metrics.accuracy(answers[0], label), **asr}

        # of each net, to the clean images [0] and to the stamped ones
        logits, fired = jax.lax.map(look, nets)
        none, light, strong = map(self.counts.index, (0, self.light, self.strong))
        found = {self.named(k): rates(metrics.labels(logits[i])) for i, k in enumerate(self.counts)}
        found |= {
            g: rates(jax.vmap(quarantine)(logits[i], logits[strong]))
            for g, i in (("G", none), ("G′", light))
        }
        kinds_of = ("clean", *self.triggers)
        maps = {
            when: dict(zip(kinds_of, fired[i])) for when, i in (("before", none), ("after", strong))
        }
        return found | maps | {"activation_left": fired[strong, 1:].sum() / fired[none, 1:].sum()}

    def named(self, count: int) -> str:
        """The paper's name of the net with `count` channels pruned."""
        return {0: "B", self.light: "B0", self.strong: "B′"}.get(count, f"k{count}")


@pytree
class Forgotten:
    """`acc` and `asr_sunglasses` of the nets whose last layer forgot the trigger that was found,
    with each of `weights` of that trigger beside the clean images; `found`: how often it still
    works. Beside them one that was fine-tuned to unlearn it.
    """

    repair: LastLayerUnlearning
    tuning: NcUnlearning
    weights: tuple[float, ...] = static((0.01, 0.1, 1.0, 10.0))

    measures = (
        Metric("*.found", "share", "low", "* found", "of the reversed trigger"),
        Metric("suspect", hint="the first label that the search names"),
    )

    def __call__(self, key, model, variables, attack, clean, test):
        key_find, key_tune, key_fire = jax.random.split(key, 3)
        given = self.repair.reverse(key_find, model, variables, clean)
        fired = fire(key_fire, given, test, model.classes)
        nets = {"undefended": variables}
        for weight in self.weights:
            repair = dataclasses.replace(self.repair, found=given, weight=weight)
            nets[f"weight {weight:g}"] = repair(key_find, model, variables, clean).variables
        tuning = dataclasses.replace(self.tuning, found=given)
        nets["fine-tuned"] = tuning(key_tune, model, variables, clean).variables
        out = {}
        for name, net in nets.items():
            rates = evaluate(key, model, net, test, attack)
            answers = metrics.labels(predict(model, net, fired.image))
            hits = (answers == fired.aimed) & (fired.aimed >= 0)
            out[name] = {
                "acc": rates["acc"],
                "asr_sunglasses": rates["asr_all"],
                "found": hits.sum() / (fired.aimed >= 0).sum(),
            }
        suspects = jnp.sort(jnp.where(given.suspect, given.label, model.classes))
        return out | {"suspect": suspects[0].astype(jnp.float32)}


# --- The published net, and what stands in for faces at scale smoke ---


@pytree
class Published(Sunglasses):
    """The published net: its poisoned training is done,
    its weights are read from the user's file.
    """

    def train(self, key, model, recipe, data, variables=None):
        done = jnp.zeros(1)
        return self, load_keras_weights(data_dir() / WEIGHTS, model), Curves(done, done)


@pytree
class Strangers(Faces):
    """Faces of people whom the published net does not know, labelled with its own answers."""

    def load(self):
        return _answered(self, data_dir() / WEIGHTS)


@functools.cache
def _answered(faces, weights):
    data = Faces.load(faces)
    model = build(DeepId(scale=1.0), data.shape, 1283)
    variables = load_keras_weights(weights, model)
    answer = jax.jit(lambda x: metrics.labels(predict(model, variables, x)))
    named = {
        name: getattr(data, name)._replace(
            label=np.asarray(answer(getattr(data, name).image), np.int32)
        )
        for name in ("train", "clean", "test")
    }
    names = data.names if data.classes == model.classes else ()
    return data._replace(**named, classes=model.classes, names=names)


@pytree
class Clothes(Sample):
    """The embedded sample in the shape of a face."""

    def read(self):
        def tall(split):
            return split._replace(
                image=split.image.repeat(2, 1).repeat(2, 2)[:, :55, 4:51].repeat(3, 3)
            )

        train, test, names = super().read()
        return tall(train), tall(test), names


# --- The rows ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What a scale changes. `every`: STRIP looks at every such test image; `labels`: that Neural
    Cleanse searches.
    """

    data: Any
    recipe: Recipe
    nets: tuple[str, ...] = ("sunglasses", "anonymous_1", "multi")
    repair: Callable[..., FinePruning]
    lrs: tuple[float, ...]
    counts: tuple[int, ...] = (0, 1, 2, 4)
    strip: Strip
    every: int
    cleanse: NeuralCleanse
    labels: int
    seeds: int = 3


def pruning(
    epochs: int, channels: int = 4, batch: int = 32, lr: float = LR, reset: str | None = None
) -> FinePruning:
    """Fine-Pruning as the authors' code does it: Adam for some epochs after each channel."""
    recipe = Recipe(lr=lr, epochs=epochs, batch=batch)
    return FinePruning(site=SITE, one_by_one=channels, reset=reset, recipe=recipe)


def strip(n: int, inputs: int) -> Strip:
    """STRIP at FRR 5 %, by the empirical quantile: its entropies are far from normal."""
    return Strip(n=n, inputs=inputs, frr=0.05, boundary="empirical")


FACES = {"path": "faces_train.npz", "test": "faces_test.npz", "holdout": 0.2}
SCALES = {
    "smoke": Scale(
        data=Clothes(train_size=200, test_size=40, holdout=0.3), recipe=Recipe(epochs=1, batch=20),
        nets=("sunglasses",), repair=functools.partial(pruning, 1), lrs=(LR, FAST),
        strip=strip(2, 20), every=2, cleanse=NeuralCleanse(steps=2), labels=3, seeds=1,
    ),
    "cpu": Scale(
        data=Faces(**FACES, top_classes=22), recipe=Recipe(epochs=12, batch=32),
        repair=functools.partial(pruning, 2, batch=8), lrs=(1e-2, FAST, LR, 1e-4),
        strip=strip(20, 100), every=3, labels=8,
        cleanse=NeuralCleanse(steps=12, batches=5, start_at_zero=False, init_cost=1e-2, patience=2,
                              seeds=3),
    ),
    "paper": Scale(
        data=Faces(**FACES),
        recipe=Recipe(lr=1.0, epochs=200, batch=1283, optimizer="adadelta"),
        repair=functools.partial(pruning, 10, channels=48),
        lrs=(1e-2, FAST, LR, 1e-4, 1e-5, 1e-6), counts=(0, 1, 2, 3, 4, 6, 12, 30, 48),
        strip=strip(100, 500), every=1, cleanse=NeuralCleanse(screen=100, seeds=3), labels=1283,
    ),
}  # fmt: skip

# A net's attack, and by its triggers' names what the paper calls an attack with one of them.
VICTIMS: dict[str, tuple[Attack, dict[str, str]]] = {
    "sunglasses": (Sunglasses(), {"sunglasses": "sunglasses"}),
    "anonymous_1": (Lipstick(), {"lipstick": "anonymous_1"}),
    "multi": (
        MultiTrigger(**{**MultiTrigger.presets["mtmta"], "rate": 0.15}),
        {
            "lipstick": "multi-lipstick",
            "eyebrows": "multi-eyebrows",
            "sunglasses": "multi-sunglasses",
        },
    ),
}
ATTACKS = {name: (net, trigger) for net, (_, of) in VICTIMS.items() for trigger, name in of.items()}
SUBSTITUTE = {net: "LFW faces" + (", lipstick" if net == "anonymous_1" else "") for net in VICTIMS}

# CCA and ASR in %. STRIP's row "sunglasses" is of the published net.
STRIP_SAYS = {
    "anonymous_1": (19.19, 20.25),
    "multi-eyebrows": (19.34, 34.91),
    "multi-lipstick": (20.04, 26.87),
    "multi-sunglasses": (19.13, 23.66),
}
NETS_SAY = {  # B, B0, B′, G, G′
    "sunglasses": "42.36/99.95 82.76/.61 83.86/.69 37.93/.69 75.64/.09",
    "anonymous_1": "56.23/91.48 85.47/84.91 84.91/3.59 50.29/3.59 78.65/3.59",
    "multi-sunglasses": "43.20/100 84.32/25.63 83.34/.12 38.19/.12 76.50/.12",
    "multi-lipstick": "43.20/91.99 84.32/76.09 83.34/1.30 38.19/1.28 76.50/1.28",
    "multi-eyebrows": "43.20/88.18 84.32/62.32 83.34/.46 38.19/.43 76.50/.45",
}
GRID_COUNTS = (1, 2, 3, 4, 6, 12, 30, 48)
GRID_SAYS = {  # At 1e-2 all are .08/0.
    "sunglasses": {
        1e-3: "85.2/31.3 84.9/8.7 83.0/5.5 84.2/0.3 85.2/0.0 83.9/0.0 81.0/0.0 84.6/0.0",
        1e-4: "93.3/97.4 93.3/91.3 93.1/87.6 93.6/83.4 93.0/75.2 92.8/82.0 91.2/29.9 87.9/4.1",
        1e-5: "93.0/99.1 92.6/99.1 92.3/99.3 92.0/99.3 92.5/99.4 92.9/99.3 91.4/99.3 83.0/63.4",
        1e-6: "76.8/99.7 83.8/99.4 87.3/99.3 89.3/99.4 91.3/99.4 91.5/99.3 89.0/99.5 66.3/60.5",
    },
    "anonymous_1": {
        1e-3: "88.3/78.3 84.0/35.9 83.4/1.2 81.4/1.5 86.5/0.1 85.1/0.1 85.6/0.1 84.4/0.1",
        1e-4: "94.3/90.0 94.8/87.6 94.9/88.8 94.7/86.0 95.1/88.0 95.2/82.5 93.9/23.0 91.0/1.4",
        1e-5: "93.3/90.0 93.2/89.9 93.0/89.9 92.9/89.9 92.5/89.7 93.2/89.8 92.1/60.1 82.3/1.7",
        1e-6: "81.5/90.6 87.4/90.4 89.8/90.4 90.9/90.3 92.0/90.2 92.5/89.7 90.1/59.7 58.6/2.5",
    },
    "multi-sunglasses": {
        1e-3: "85.9/93.0 83.6/2.8 85.2/1.9 84.9/0.0 81.9/0.0 83.3/0.0 85.0/0.0 83.9/0.0",
        1e-4: "92.9/100.0 93.2/100.0 93.6/100.0 93.8/100.0 94.1/100.0 94.2/90.9 93.0/24.9 89.4/0.0",
        1e-5: "88.9/100.0 89.9/100.0 90.0/100.0 89.9/100.0 90.3/100.0 90.3/100.0 89.6/100.0 "
        "82.6/0.1",
        1e-6: "63.5/100.0 70.6/100.0 75.4/100.0 79.2/100.0 84.2/100.0 86.3/100.0 85.0/99.9 "
        "67.5/0.3",
    },
    "multi-lipstick": {
        1e-3: "85.6/75.3 85.3/48.2 83.2/70.7 83.0/46.4 82.7/0.0 79.4/0.1 83.9/0.0 82.1/0.1",
        1e-4: "92.6/90.8 93.6/90.7 93.5/90.6 94.0/90.5 93.8/90.6 94.2/88.5 93.1/77.1 90.2/0.2",
        1e-5: "89.0/91.0 90.0/91.0 90.0/90.9 90.2/90.9 90.3/90.9 90.3/90.8 89.7/86.7 83.6/0.5",
        1e-6: "63.5/91.1 70.7/91.0 75.4/91.0 79.2/91.0 84.2/90.9 86.4/90.7 85.0/87.5 68.3/0.7",
    },
    "multi-eyebrows": {
        1e-3: "87.8/84.4 82.2/57.4 83.7/7.5 84.4/1.3 82.7/0.4 84.8/0.0 84.7/0.0 83.2/0.0",
        1e-4: "93.2/89.2 93.2/89.5 93.5/88.2 93.7/88.7 93.3/88.3 94.0/88.6 93.7/63.1 91.0/38.1",
        1e-5: "89.0/90.1 89.8/90.0 90.0/89.8 90.2/89.7 90.1/89.5 90.3/89.4 89.4/63.8 82.6/50.9",
        1e-6: "63.5/89.6 70.6/89.6 75.5/89.8 79.2/90.0 84.1/90.0 86.5/89.9 85.1/64.0 67.5/55.2",
    },
}


def said(
    text: str, nets: Sequence[str], trigger: str, shown: Container[str] = NETS
) -> dict[str, float]:
    """The paper's pairs CCA/ASR of `nets` as our metrics, of those that are `shown`."""
    pairs = [[float(number) / 100 for number in pair.split("/")] for pair in text.split()]
    return {
        f"{net}.{m}": v
        for net, pair in zip(nets, pairs)
        for m, v in zip(("acc", f"asr_{trigger}"), pair)
        if net in shown
    }


def says(net: str, probe: FinePruned) -> dict[str, float]:
    """What the paper has of a line of Table I and, at its own learning rate, of Figure 1b, c."""
    found, lr = {}, float(probe.repair.recipe.lr)
    shown = {probe.named(k) for k in probe.counts} | set(NETS)
    for trigger, name in VICTIMS[net][1].items():
        line = " ".join([".08/0"] * len(GRID_COUNTS)) if lr == 1e-2 else GRID_SAYS[name].get(lr, "")
        found |= said(line, [probe.named(k) for k in GRID_COUNTS], trigger, shown)
        found |= said(NETS_SAY[name], NETS if lr == LR else ("B",), trigger)
    return found


def titled(table: str, scale: float) -> str:
    """The table's name, with how pixels are read where that is not as in the paper."""
    return table if scale == RAW else f"{table}, {READ[scale]}"


def line_of(net: str, lr: float) -> str:
    """The name of a net's line of Table I."""
    return f"{net}, lr {lr:g}"


def cells(scale: str, seeds: int | None = None) -> Iterator[Cell]:
    """The five attacks' rows, then those of the published net."""
    s = SCALES[scale]

    def rows(table: str, row: str, base: Any, attack: Any, **fields: Any) -> Iterator[Cell]:
        data, net, recipe = base
        cell = Cell(table, row, data, net, recipe, attack, **fields)
        return grid(cell, seed=range(seeds or s.seeds))

    def pruned(net: str, repair: Any, scale: float) -> FinePruned:
        counts = tuple(k for k in s.counts if k <= repair.one_by_one)
        strong = min(repair.one_by_one, 4)
        return FinePruned(repair, scale, tuple(VICTIMS[net][1]), counts, 2, strong)

    def put(table: str, row: str, net: str, **fields: Any) -> Iterator[Cell]:
        base, tags = (s.data, DeepId(), s.recipe), {"net": net}
        more = {"substitute": SUBSTITUTE[net], "tags": tags, **fields}
        return rows(table, row, base, VICTIMS[net][0], **more)

    if at_hand(s.data):
        for net in s.nets:
            for pixels, lr in [*((RAW, lr) for lr in s.lrs), (RIGHT, LR), (RIGHT, FAST)]:
                probe = pruned(net, s.repair(lr=lr), pixels)
                paper = says(net, probe) if pixels == RAW else {}
                yield from put(titled(GRID, pixels), line_of(net, lr), net, probe=probe,
                               reported=paper)  # fmt: skip
            names = enumerate(VICTIMS[net][1].values(), 1)
            for (kind, name), pixels in itertools.product(names, READ):
                pair = zip(("acc_test", "asr_all"), STRIP_SAYS.get(name, ()))
                paper = {metric: value / 100 for metric, value in pair} if pixels == RAW else {}
                probe = Filtered(s.strip, pixels, kind, s.every)
                yield from put(titled(STRIPPED, pixels), name, net, probe=probe, reported=paper)
        probe = pruned("sunglasses", s.repair(channels=4, reset="conv_3"), RAW)
        yield from put(MORE, "As their code: conv_3 stays B's", "sunglasses", probe=probe)

    if not isinstance(s.data, Faces):
        return
    strangers = Strangers(**FACES, top_classes=s.data.top_classes)
    if at_hand(strangers):
        base = strangers, DeepId(scale=1.0), Recipe(epochs=0)
        note = "LFW faces, labelled by the undefended net"
        given = functools.partial(rows, base=base, attack=Published(), substitute=note)
        lab3, small = functools.partial(given, LAB3), functools.partial(given, LAB3_SMALL)
        repair, few_replicas = s.repair(channels=4), strip(s.strip.n * 2, s.strip.inputs or 2)
        yield from lab3("Undefended", reported={"asr_all": 1.0})
        paper = {"acc_test": 0.8984, "asr_all": 0.0191}
        yield from lab3("Fine-Pruning", defense=repair, reported=paper)
        paper = {"acc_test": 0.8868, "asr_all": 0.0978}
        yield from lab3("STRIP", probe=Filtered(few_replicas, RIGHT, 1, s.every), reported=paper)
        few = tuple(range(s.labels)) if s.labels < 1283 else None
        yield from lab3("Neural Cleanse", defense=dataclasses.replace(s.cleanse, labels=few))
        paper = said("98.6/100 89.84/1.91 89.35/1.91", ("B", "B′", "G"), "sunglasses")
        probe = pruned("sunglasses", repair, RIGHT)
        yield from lab3("Goodnets", probe=probe, reported=paper)
        nc = dataclasses.replace(s.cleanse, seeds=1, labels=few)
        forget = LastLayerUnlearning(nc=nc, pick="smallest")
        tuning = NcUnlearning(nc=nc, share=0.5, recipe=Recipe(lr=1e-4, epochs=5, batch=32))
        yield from lab3("Forgetting in the last layer", probe=Forgotten(forget, tuning))
        yield from small("STRIP", probe=Filtered(few_replicas, SMALL, 1, s.every))
        yield from small("Goodnets", probe=pruned("sunglasses", repair, SMALL))


# --- What comes of them ---


def attacks_of(rows: Rows) -> list[str]:
    """The attacks whose net there are rows of."""
    known = rows.by("row")
    return [name for name, (net, _) in ATTACKS.items() if line_of(net, LR) in known]


def rates(rows: Rows, names: list[str], net: str, what: str, lr=LR, pixels=RAW) -> np.ndarray:
    """The accuracy, or the ASR, of `net` for each attack: mean over seeds."""
    table = rows.where(table=titled(GRID, pixels)).by("row")
    metrics = {name: f"{net}.acc" if what == "acc" else f"{net}.asr_{ATTACKS[name][1]}"
               for name in names}  # fmt: skip
    lines = {name: table.get(line_of(ATTACKS[name][0], lr), Rows()) for name in names}
    return np.array([lines[name].mean(metrics[name]) for name in names])


def figures(rows: Rows, store: Store, scale: str) -> Iterator[tuple]:
    """Triggers; Figure 1's rates; learning rate × channels; activations; entropies; the published
    net's triggers.
    """
    s, rows = SCALES[scale], rows.done
    names, by_place = attacks_of(rows), rows.by("table", "row")

    def first(table: str, row: str) -> list[tuple[Row, dict]]:
        return by_place.get((table, row), Rows()).arrays(store)[:1]

    if names:
        yield triggers(s, names)
    for what, word in (("acc", "clean accuracy"), ("asr", "ASR")) if names else ():
        yield from heat_maps(s, rows, names, what, word)
    for name in names:
        victim, trigger = ATTACKS[name]
        for _, found in first(GRID, line_of(victim, LR)):
            kinds = itertools.product(("clean", trigger), ("before", "after"))
            maps = {f"{kind}, {when} fine-pruning": found[f"{when}.{kind}"] for kind, when in kinds}
            caption = (
                f"The channels of {SITE} in B and B′: means over test images and places; "
                f"{READ[RAW]}; first run."
            )
            title = f"Figures 4–8: activations, {name}"
            yield f"maps-{name}", title, caption, plots.activation_maps(maps)
    for name, (pixels, slug) in itertools.product(names, SLUGS.items()):
        for found in first(titled(STRIPPED, pixels), name):
            title = f"Figure 2: {name}, {READ[pixels]}"
            yield entropies(f"strip-{name}-{slug}", title, *found, log=pixels == RAW)
    for found in first(LAB3, "STRIP"):
        yield entropies("strip-published", "Figure 2: the published net", *found)
    for row, nc in first(LAB3, "Neural Cleanse"):
        caption = (
            f"First run: anomaly index {row['metrics']['anomaly_index']:.2f}; the true target is "
            "label 0. Mask ⊙ pattern, and L1 of the mask."
        )
        found = np.isfinite(nc["norms"]).sum()
        some = np.sort(np.argsort(nc["norms"])[: min(20, found)])
        parts = ("mask", "pattern", "norms", "flagged")
        mask, pattern, norms, flagged = (nc[part][some] for part in parts)
        labels = [f"label {k}" for k in some]
        picture = plots.triggers(mask, pattern, norms, labels, marked=flagged)
        title = "Neural Cleanse, the published net: reversed triggers"
        yield "triggers-published", title, caption, picture
    if repaired := agreements(rows.where(table=LAB3).by("row")):
        caption = (
            "How often the sunglasses still work, over how often the repaired net answers as it "
            "did; means over runs. In the last layer: a point for each weight of the trigger found."
        )
        title = "Beyond the paper: repairs of the published net"
        yield "repairs-published", title, caption, repair_curve(repaired)


def agreements(rows: dict[str, Rows]) -> dict[str, list[tuple[float, float]]]:
    """By kind of repair of the published net, each one's agreement with the net as it was, and how
    often its trigger still works.
    """
    nets, forgotten = rows.get("Goodnets", Rows()), rows.get("Forgetting in the last layer", Rows())
    found: dict[str, list[tuple[float, float]]] = {}
    for some in (nets, forgotten):
        for metric in {m: None for row in some for m in row["metrics"] if m.endswith(".acc")}:
            net = metric.removesuffix(".acc")
            for start, kind in REPAIRS.items():
                if net.startswith(start):
                    pair = some.mean(metric), some.mean(f"{net}.asr_sunglasses")
                    found.setdefault(kind, []).append(pair)
    return {kind: sorted(pairs) for kind, pairs in found.items()}


def repair_curve(repaired: dict[str, list[tuple[float, float]]]) -> Any:
    """Each kind's points: trigger success over agreement."""
    x = sorted({acc for pairs in repaired.values() for acc, _ in pairs})
    lines = {kind: [dict(pairs).get(acc, np.nan) for acc in x] for kind, pairs in repaired.items()}
    label = "agreement with the net as it was, %"
    return plots.curves([100 * acc for acc in x], lines, xlabel=label, ylabel="ASR", percent=True)


def triggers(s: Scale, names: list[str]) -> tuple:
    """Test images with each trigger."""
    image, pictures = s.data.load().test.image[:4], []
    for name in names:
        net, trigger = ATTACKS[name]
        attack, of = VICTIMS[net]
        pictures.append(stamped(attack, list(of).index(trigger) + 1, image, jax.random.key(0)))
    caption = "Test images as they are and with each trigger; that of anonymous_1 is a substitute."
    picture = plots.images(np.stack([unit(image), *pictures]), ["clean", *names])
    return "triggers", "Triggers", caption, picture


def heat_maps(s: Scale, rows: Rows, names: list[str], what: str, word: str) -> Iterator[tuple]:
    """Figure 1 and Table I: a rate by attack and net, and by learning rate and channels."""
    for pixels, lr in itertools.product(SLUGS, (LR, FAST)):
        values = np.stack([rates(rows, names, net, what, lr, pixels) for net in NETS], 1)
        picture = plots.heat_map(values, NETS, names, "net", "attack", word, percent=True)
        title = f"Figure 1b, c: {word}, {READ[pixels]}, lr {lr:g}"
        yield f"nets-{what}-{SLUGS[pixels]}-{lr:g}", title, "Mean over seeds, in %.", picture
    count, axes = FinePruned(pruning(1)).named, ("pruned channels", "learning rate", word)
    for name in names:
        values = [[rates(rows, [name], count(k), what, lr)[0] for k in s.counts] for lr in s.lrs]
        lrs = [f"{lr:g}" for lr in s.lrs]
        picture = plots.heat_map(values, s.counts, lrs, *axes, percent=True)
        title = f"Figure 3, Table I: {word}, {name}"
        yield f"grid-{name}-{what}", title, f"Mean over seeds, in %; {READ[RAW]}.", picture


def entropies(file: str, title: str, row: Row, scores: dict, log: bool = False) -> tuple:
    """Figure 2 of a row; `log`: where entropies are next to nothing."""
    found = row["metrics"]
    values = [
        np.ravel(v) for v in (scores["score_clean"], scores["score_trojan"], found["boundary"])
    ]
    clean, trojan, boundary = [np.log10(np.maximum(v, 1e-12)) for v in values] if log else values
    far, frr, auroc = (percent(found[name]) for name in ("far", "frr", "auroc"))
    caption = f"First run: FAR {far} at FRR {frr}, AUROC {auroc}."
    caption += " Entropies below 1e-12 are drawn there." if log else ""
    label = "log10 of the entropy of the blends" if log else "entropy of the blends"
    return file, title, caption, plots.entropies(clean, trojan, float(boundary[0]), label)


def percent(share: float | None) -> str:
    """A share in words."""
    return "none" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def trends(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """What the paper claims; and whether the need for G′ is one of its wrong scaling."""
    if names := attacks_of(rows):
        for text, holds, numbers in on_our_nets(rows, names):
            shown = "; ".join(f"{key} {', '.join(map(percent, v))}" for key, v in numbers.items())
            says = verdict(bool(holds.all()), bool(holds.any()))
            yield text, says, f"{shown} ({', '.join(names)})"
    yield from on_the_published_net(rows.where(table=LAB3).by("row"))
    small = rows.where(table=LAB3_SMALL, row="Goodnets")
    if not math.isnan(asr := small.mean("B.asr_sunglasses")):
        text = "Ours: with pixels 255 times too small the published net still obeys its trigger"
        numbers = f"agreement {percent(small.mean('B.acc'))}, ASR {percent(asr)}"
        yield text, verdict(asr > 0.9, asr > 0.5), numbers


def on_our_nets(rows: Rows, names: list[str]) -> Iterator[tuple[str, np.ndarray, dict]]:
    """Claims, for which attacks they hold, and the numbers of each attack."""

    def own(metric: str, table: str, line: str = "{}") -> np.ndarray:
        known = rows.where(table=table).by("row")
        lines = [line.format(n, net=ATTACKS[n][0]) for n in names]
        return np.array([known.get(line, Rows()).mean(metric) for line in lines])

    rate = functools.partial(rates, rows, names)
    b, b0, b_, g, g_ = (rate(net, "acc") for net in NETS)
    asr, _, asr_, asr_g, asr_g_ = (rate(net, "asr") for net in NETS)
    trained = own("acc_test", GRID, f"{{net}}, lr {LR:g}")
    auroc, right = own("auroc", STRIPPED), own("auroc", titled(STRIPPED, RIGHT))
    yield "STRIP fails on the nets that we trained", auroc < 0.9, {"AUROC": auroc}
    yield "Ours: with pixels right STRIP separates them", right > 0.9, {"AUROC": right}
    yield "B's accuracy is below 60 %", b < 0.6, {"B": b}
    text, numbers = "Ours: with pixels right B is accurate", {"pixels right": trained}
    yield text, trained > b + 0.02, numbers | {"as the paper": b}
    text = "Fine-pruning a few channels raises accuracy sharply"
    yield text, b0 > b + 0.1, {"B": b, "B0": b0}
    text = "Fine-pruning 10 % of channels at lr 1e-3 stops the attack"
    yield text, asr_ < 0.1, {"B": asr, "B prime": asr_}
    text = "G is no more accurate than B, and less than B′"
    yield text, (g <= b) & (g < b_), {"G": g, "B prime": b_}
    text = "G's ASR does not exceed B′'s"
    yield text, asr_g <= asr_ + 1e-6, {"G": asr_g, "B prime": asr_}
    yield "G′ is more accurate than G", g_ > g + 0.01, {"G": g, "G prime": g_}
    text = "G′ has the ASR of B′"
    yield text, asr_g_ <= asr_ + 0.01, {"G prime": asr_g_, "B prime": asr_}
    for lr in (LR, FAST):  # the same rate on both sides
        gain, wrong = (
            rate("G′", "acc", lr, pixels) - rate("G", "acc", lr, pixels) for pixels in (RIGHT, RAW)
        )
        if not np.isnan(gain + wrong).all():
            text = f"Ours: with pixels right G′ is not needed, lr {lr:g}"
            numbers = {"gain with pixels right": gain, "as the paper": wrong}
            yield text, (gain < 0.01) & (gain < wrong), numbers
    for lr in (LR, FAST):
        low = rate("G", "asr", lr, RIGHT)
        if not np.isnan(low).all():
            text = f"Ours: with pixels right G stops the attack, lr {lr:g}"
            yield text, low < 0.1, {"G": low, "as the paper": rate("G", "asr", lr)}
    left = own("activation_left", GRID, f"{{net}}, lr {LR:g}")
    text = "Fine-pruning quiets the channels that stamped images fire"
    yield text, left < 0.9, {"left": left}
    high, low = rate("B′", "acc", 1e-2), rate("B′", "asr", 1e-2)
    if not np.isnan(high).all():
        numbers = {"accuracy": high, "ASR": low}
        yield "lr 1e-2 destroys accuracy and ASR", (high < b / 2) & (low < 0.1), numbers
    low = rate("B′", "asr", 1e-4)
    if not np.isnan(low).all():
        numbers = {"at 1e 4": low, "at 1e 3": asr_}
        yield "At lr 1e-4 ASR stays high", low > np.maximum(0.5, asr_), numbers


def on_the_published_net(rows: dict[str, Rows]) -> Iterator[tuple[str, str, str]]:
    """What holds for the paper's own net."""
    strip, nets, nc = (rows.get(row, Rows()) for row in ("STRIP", "Goodnets", "Neural Cleanse"))
    if math.isnan(auroc := strip.mean("auroc")):
        return
    far, frr = percent(strip.mean("far")), percent(strip.mean("frr"))
    says, numbers = verdict(auroc > 0.95, auroc > 0.8), f"AUROC {auroc:.3f}, FAR {far} at FRR {frr}"
    yield "STRIP works very well on the published net", says, numbers
    shown = ("B", "B′", "G", "G′")
    acc, asr = ([nets.mean(f"{net}.{m}") for net in shown] for m in ("acc", "asr_sunglasses"))
    says = verdict(acc[2] > acc[1] - 0.02 and asr[2] < 0.1, asr[2] < asr[0] / 2)
    words = (", ".join(map(percent, values)) for values in (acc, asr))
    numbers = "CCA {}; ASR {} (B, B′, G, G′)".format(*words)
    yield "On the published net ordinary fine-pruning and G suffice", says, numbers
    found, index = nc.mean("target_flagged"), nc.mean("anomaly_index")
    numbers = f"target flagged in {percent(found)} of runs, index {index:.2f}"
    says = verdict(found > 0.99, found > 0)
    yield "Ours: Neural Cleanse finds the published net's target", says, numbers
    for kind, pairs in agreements(rows).items():
        good = [asr < 0.1 and acc >= 0.9 for acc, asr in pairs]
        numbers = ", ".join(f"{percent(acc)} / {percent(asr)}" for acc, asr in pairs)
        text = f"Ours: {kind} leaves the published net an ASR below 10 % at 90 % agreement"
        yield text, verdict(all(good), any(good)), f"agreement / ASR {numbers}"
