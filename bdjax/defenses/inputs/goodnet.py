"""Goodnet: two nets look at an input, and what they do not agree on is called poisoned."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from bdjax.channels import channel_means, curve, first_below, mask_of, prune
from bdjax.defenses.base import InputFilter, Repair
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.metrics import labels
from bdjax.models.layers import check_site, default_site
from bdjax.registry import defense, pytree, static
from bdjax.train import Recipe, predict
from bdjax.types import (
    INT32,
    Array,
    BadInput,
    Metric,
    Model,
    Range,
    Repaired,
    Scores,
    Share,
    Split,
    Variables,
)

Flag = Literal["disagree", "agree"]


def quarantine(first: jax.Array, second: jax.Array, flag: Flag = "disagree") -> jax.Array:
    """Labels `[B]` in 0 … K from logits `[B, K]` of two nets: the first one's label, or K,
    "poisoned", where they disagree, or agree. Logits that are not numbers are poisoned.
    """
    label, other = labels(first), labels(second)
    passed = ((label == other) == (flag == "disagree")) & (label >= 0) & (other >= 0)
    return jnp.where(passed, label, first.shape[-1])


@pytree
class AntiNet(Repair):
    """The opposite of a repair: prunes the channels that clean images fire most, so that the
    backdoor alone is left.

    In decreasing order of their mean activation, the fewest after which accuracy on the clean
    images is at most `floor`, in [0, 1]. `channels`: these instead; Ye et al. read them off the
    activations of poisoned images: an oracle. `site`: None is the last convolution, or the
    penultimate layer of a net that has none.
    """

    floor: Share = 0.1
    channels: tuple[Annotated[int, Range(0, INT32)], ...] | None = static(None)
    site: str | None = static(None)

    @property
    def oracle(self) -> bool:
        return self.channels is not None

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        site = self.site or default_site(model)
        activation = channel_means(model, variables, site, clean.image)
        if self.channels is not None:
            mask = jnp.ones_like(activation).at[jnp.asarray(self.channels)].set(0.0)
        else:
            order = jnp.argsort(-activation)
            points = curve(model, variables, site, order, clean.image, clean.label)
            mask = mask_of(order, first_below(points, self.floor))
        return Repaired(prune(variables, site, mask), {"pruned": (1 - mask).sum()})

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        check_site(model, self.site or default_site(model))
        if len(clean.image) == 0:
            raise BadInput("an anti-network is pruned by clean images: the defender has none")


@defense("goodnet")
class Goodnet(InputFilter):
    """Compare a net with its repaired self; where they disagree the input is poisoned (Ye et al.,
    2021).

    G(B, B′): B(x) if B(x) = B′(x), else the extra label K, B′ being B repaired on the defender's
    clean images. G′(B0, B′): the same with B0, a lightly repaired B, in the place of B. Of a net
    and an anti-network, which has the backdoor and little else, those inputs are poisoned on which
    they agree.

    `repair`: any defense that repairs, which makes B′; `light`: that which makes B0, None for B
    itself; `flag`: inputs on which the nets "disagree", or "agree". Score: 1 where the input
    passes, 0 where it is flagged.

    Presets: `paper`, G with 6 of DeepID's 60 channels pruned one by one (`fine-pruning:csaw`; there
    with `site="pool_3"`; their code stops at 4); `improved`, G′ with B0 after 2; `anti`, the
    anti-network; `anti-sunglasses`, Ye et al.'s channels for that face net, an oracle; `cpu`, G
    with an epoch for each channel. B0 of `improved` is a stage on the way to its B′.

    `info`: `answer: [B]` in 0 … K, what the goodnet answers; `repaired`, `light`: what the repairs
    report.

    Differs from the paper: see `fine-pruning`; its anti-network is in the authors' code alone.

    Reference: Binfang Ye, Abdullahi Bamigbade and Vahan Babushkin, "Comparative Analysis of
    Defenses against the Backdoor Attacks on Deep Neural Networks".
    """

    repair: Repair = FinePruning(**FinePruning.presets["csaw"])
    light: Repair | None = None
    flag: Flag = static("disagree")

    measures = (Metric("repaired.pruned", hint="how many channels are cut in the repaired net"),)
    budget_fields = ("repair.recipe.epochs",)
    presets = {
        "paper": {},
        "improved": {"light": FinePruning(**{**FinePruning.presets["csaw"], "one_by_one": 2})},
        "anti": {"repair": AntiNet(), "flag": "agree"},
        "anti-sunglasses": {
            "repair": AntiNet(channels=(5, 7, 10, 14, 23, 25), site="conv_2"),
            "flag": "agree",
        },
        "cpu": {"repair": FinePruning(one_by_one=6, recipe=Recipe(lr=1e-3, epochs=1, batch=32))},
    }

    @property
    def oracle(self) -> bool:
        return self.repair.oracle or (self.light is not None and self.light.oracle)

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split, x: Array
    ) -> Scores:
        def logits(repair):
            if repair is None:
                return predict(model, variables, x), {}
            net, info = repair(key, model, variables, clean)
            return predict(repair.wrap(model), net, x), info

        (first, light), (second, repaired) = logits(self.light), logits(self.repair)
        label = quarantine(first, second, self.flag)
        score = (label < model.classes).astype(jnp.float32)
        boundary = jnp.zeros(())
        return Scores(
            score,
            boundary,
            score <= boundary,
            {"answer": label, "repaired": repaired, "light": light},
        )

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        for repair in (self.repair, self.light):
            if repair is not None:
                repair.check(model, clean)
