"""ℓ∞ pruning: neurons of the last convolution that fire harder than a threshold are cut, which is
lowered while clean images stay right.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from bdjax.channels import largest_within, masked, over_points, prune, responses
from bdjax.defenses.base import Repair
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.reversed import Pick, Reversed, TriggerDefense, described, fire
from bdjax.models.layers import check_site, default_site
from bdjax.registry import defense, static, validate
from bdjax.train import unit
from bdjax.types import (
    Array,
    Attack,
    BadInput,
    Model,
    Repaired,
    Share,
    Size,
    Split,
    Variables,
    Weight,
)

Rule = Literal["static", "excess", "zero", "clip"]
Inputs = Literal["clean", "ori", "syn", "ori+syn"]
Norm = Literal["l1", "l2", "linf"]


def cap(act: jax.Array, threshold: jax.Array, rule: Rule) -> jax.Array:
    """Activations beyond ±`threshold: []` become 0 ("zero") or ±`threshold` ("clip")."""
    if rule == "clip":
        return jnp.clip(act, -threshold, threshold)
    return jnp.where(jnp.abs(act) > threshold, 0.0, act)


@functools.lru_cache(maxsize=64)
def capped(model: Model, site: str, rule: Rule) -> Model:
    """`model` with the activations of `site` capped at `variables["cap"]: []`;
    ∞ changes nothing.
    """

    def init(key):
        return {**model.init(key), "cap": jnp.asarray(jnp.inf)}

    def apply(variables, x, *, edits=None, **options):
        inner = {name: value for name, value in variables.items() if name != "cap"}
        edit = (edits or {}).get(site, lambda act: act)
        edits = {**(edits or {}), site: lambda act: edit(cap(act, variables["cap"], rule))}
        out = model.apply(inner, x, edits=edits, **options)
        return out._replace(variables={**out.variables, "cap": variables["cap"]})

    return model._replace(init=init, apply=apply)


@defense("linf-pruning")
class LinfPruning(TriggerDefense, Repair):
    """Cut the neurons of the last convolution that fire beyond a threshold (Cheng et al., 2019,
    arXiv:2002.12162).

    The threshold τ falls from the largest activation on clean images to 0; the lowest before which
    accuracy on the clean images fell by more than `max_drop` is taken. A neuron is a channel, its
    activation a_c a map.

    The paper leaves open what is cut; `rule` is one of four readings, with m_c(x) = ‖a_c(x)‖∞:
    "static", channels with max_x m_c(x) > τ over the images x′ of `inputs`; "excess", channels with
    max_x (m_c(x′) − m_c(x)) > τ, where τ falls from the largest excess; "zero", single activations
    beyond τ, input by input; "clip", the same, cut down to τ.

    `inputs`: what the static rules look at: "clean" images, these with the original trigger, "ori"
    (an oracle), with the reversed one, "syn", or with both, "ori+syn", the reversed one on top.
    `norm`: l1, l2 or linf, of a channel's map. `threshold`: τ itself, in units of activation,
    instead of the rule for it. `points`: values of τ, evenly spaced. `site`: None is the last
    convolution, before its pooling. For `nc`, `found`, `label`, `original`, `pick` see
    `reversed.TriggerDefense`; as in the paper, the reversed trigger is the smallest. Without a
    suspect nothing is cut.

    Presets: `static`, `excess` (both on "syn"), `zero`, `clip`; `cpu`, the short search of
    Neural Cleanse where there is one.

    `info`: `thresholds: [points + 1]`, ∞ first; `curve: [points + 1]` accuracy on the clean images;
    `threshold`: τ; under the static rules `top: [C]`, what is compared with τ, and `pruned` = how
    many; with a reversed trigger what `TriggerDefense.fired` reports.

    Decides most: `max_drop`, which ends the fall of τ: the paper's loss of accuracy at τ = 7.
    At 0.0017, 0.017, 0.05 and 0.17 one net of Fashion-MNIST with the 5×5 square kept an ASR_nt of
    99, 98, 95 and 91 %, an all-to-all one, which had 75 %, of 75, 65, 55 and 35 %
    (`experiments/sensitivity.py`).

    Differs from the paper: it looks at test images.

    Reference: Hao Cheng, Kaidi Xu, Sijia Liu, Pin-Yu Chen, Pu Zhao and Xue Lin, "Defending against
    Backdoor Attack on Deep Neural Networks".
    """

    max_drop: Share = 0.017
    threshold: Weight | None = None
    rule: Rule = static("zero")
    inputs: Inputs = static("clean")
    norm: Norm = static("linf")
    points: Size = static(33)
    site: str | None = static(None)
    pick: Pick = static("smallest")

    used_if = {
        "max_drop": {"threshold": (None,)},
        **{key: {"inputs": ("syn", "ori+syn")} for key in ("nc", "label", "pick")},
    }
    sensitive = "max_drop"
    presets = {
        "static": {"rule": "static", "inputs": "syn"},
        "excess": {"rule": "excess", "inputs": "syn"},
        "zero": {"rule": "zero"},
        "clip": {"rule": "clip"},
        "cpu": {"nc": NeuralCleanse(**NeuralCleanse.presets["cpu"])},
    }

    @property
    def oracle(self) -> bool:
        return "ori" in self.inputs or (self.label is not None and "syn" in self.inputs)

    @property
    def by_channel(self) -> bool:
        """Whether channels are cut for good, by a mask; otherwise activations are, in each pass."""
        return self.rule in ("static", "excess")

    def wrap(self, model: Model) -> Model:
        return model if self.by_channel else capped(model, self._site(model), self.rule)

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        key_find, key_fire = jax.random.split(key)
        site = self._site(model)
        found = self.reverse(key_find, model, variables, clean) if "syn" in self.inputs else None
        images = self._images(key_fire, self.inputs, self.original, found, clean, model.classes)
        calm, loud = (
            responses(model, variables, site, x, self.norm) for x in (clean.image, images)
        )
        top = (loud - calm if self.rule == "excess" else loud).max(0)
        start = top.max() if self.rule == "excess" else calm.max()
        thresholds = jnp.concatenate(
            [jnp.full(1, jnp.inf), start * jnp.linspace(1, 0, self.points)]
        )
        info = {"repaired": jnp.asarray(True)} if found is None else described(found)
        info |= {"thresholds": thresholds} | ({"top": top} if self.by_channel else {})
        points = self._sweep(model, variables, info, clean.image, clean.label)
        tau = (
            thresholds[largest_within(points, self.max_drop)]
            if self.threshold is None
            else self.threshold
        )
        tau = jnp.where(info["repaired"], jnp.asarray(tau, jnp.float32), jnp.inf)
        info |= {"curve": points, "threshold": tau}
        if not self.by_channel:
            return Repaired({**variables, "cap": tau}, info)
        mask = (top <= tau).astype(jnp.float32)
        return Repaired(prune(variables, site, mask), info | {"pruned": (1 - mask).sum()})

    def report(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        test: Split,
        attack: Attack | None,
        result: Repaired,
    ) -> dict[str, jax.Array]:
        """For each setting of inputs that there are triggers for, on `test` by threshold:
        `acc_clean`, `acc_ori`, `acc_syn`, `acc_ori+syn`, the accuracy, and `asr_ori`, `asr_syn`,
        `asr_ori+syn`, the share of images of other classes that get the label aimed at (by the
        attack where there is an original trigger); `[points + 1]` each.
        """
        info = result.info
        names = ("mask", "pattern", "label", "suspect")
        found = Reversed(*(info[name] for name in names)) if "suspect" in info else None
        settings = ["clean"] + ["ori"] * (attack is not None) + ["syn"] * (found is not None)
        settings += ["ori+syn"] * (len(settings) == 3)
        curves = {}
        for setting in settings:
            images = self._images(key, setting, attack, found, test, model.classes)
            curves[f"acc_{setting}"] = self._sweep(model, variables, info, images, test.label)
            if setting != "clean":
                aim = fire(key, attack if "ori" in setting else found, test, model.classes).aimed  # type: ignore[arg-type]
                curves[f"asr_{setting}"] = self._sweep(model, variables, info, images, aim)
        return curves

    def _site(self, model: Model) -> str:
        return self.site or default_site(model)

    def _images(
        self,
        key: jax.Array,
        setting: str,
        original: Attack | None,
        found: Reversed | None,
        split: Split,
        classes: int,
    ) -> jax.Array:
        images = unit(split.image)
        for name, attack in (("ori", original), ("syn", found)):
            if name in setting:
                assert attack is not None  # `check` said so
                images = fire(key, attack, split._replace(image=images), classes).image
        return images

    def _sweep(
        self, model: Model, variables: Variables, info: dict, images: Array, label: Array
    ) -> jax.Array:
        """Share of `images` that get `label`, by threshold: one scan."""
        if self.by_channel:
            edit, points = (
                masked,
                (info["top"][None] <= info["thresholds"][:, None]).astype(jnp.float32),
            )
        else:
            edit, points = functools.partial(cap, rule=self.rule), info["thresholds"]
        return over_points(model, variables, self._site(model), edit, points, images, label)

    def check(self, model: Model, clean: Split) -> None:
        validate(self)
        if len(clean.image) == 0:
            raise BadInput("ℓ∞ pruning lowers its threshold on clean images: the defender has none")
        if not self.by_channel and (self.norm != "linf" or self.inputs != "clean"):
            raise BadInput(
                f"rule '{self.rule}' cuts single activations: it has norm linf and inputs clean "
                "alone"
            )
        if self.rule == "excess" and self.inputs == "clean":
            raise BadInput(
                "rule 'excess' compares with a trigger: give inputs 'syn', or 'ori' with original"
            )
        if "ori" in self.inputs and self.original is None:
            raise BadInput(f"inputs '{self.inputs}' need the attack itself: give original")
        if "syn" in self.inputs:
            super().check(model, clean)
        check_site(model, self._site(model))
