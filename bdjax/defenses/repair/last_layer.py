"""Unlearning in the last layer alone: the logit of a suspect label forgets the reversed trigger."""

import jax
import jax.numpy as jnp

from bdjax.defenses.base import Repair
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.inversion import Trigger, stamp
from bdjax.defenses.parts.reversed import TriggerDefense, described
from bdjax.models.graph import kernel_out_of, leaf, with_leaf
from bdjax.registry import defense
from bdjax.train import batched, unit
from bdjax.types import BadInput, Model, Positive, Repaired, Split, Variables, Weight

SITE = "penultimate"
MOST = 8
"""Triggers that are unlearned at most."""


@defense("last-layer-unlearning")
class LastLayerUnlearning(TriggerDefense, Repair):
    """Unlearn a reversed trigger in the last layer alone, by least squares (after Wang et al.,
    2019).

    With h(x) what enters the last layer and w the column of a suspect label, w becomes w + Δ: min
    over Δ of E(Δ·h(x))² + `weight`·E((w + Δ)·h(A(x)) − w·h(x))² + ridge, over the clean images x
    and the reversed triggers A of that label: its logit stays what it is on clean images, and under
    the trigger is what it was without. All other logits, and all that stands before them, stay; so
    no image changes its answer but to or from that label.

    `weight`: of the triggers beside the clean images; `ridge`: the price of |Δ|², in mean squares
    of what enters. For `nc`, `found`, `label`, `original`, `pick` see `reversed.TriggerDefense`;
    `original` is not read. Without a suspect the net stays as it is.

    An image under the trigger is not read again as what it shows: the label only is not aimed at
    any more. What else was trained to follow the trigger stays in the layers before.

    Preset: `cpu`, the short search of Neural Cleanse. `info`: that of `TriggerDefense.fired`, and
    `change: [L]` = |Δ| / |w|.

    Decides most: `weight`, and little. At 0.01, 0.1, 1 and 10 the published net of CSAW, whose
    trigger a short search had found, kept 99.5, 99.5, 98.8 and 96.6 % of its answers and an ASR of
    5.3, 0.3, 0 and 0.4 % (`experiments/ye2021.py`, three seeds).

    No paper has it: it is the unlearning of Neural Cleanse for nets of many labels of which few
    images are at hand, where a fine-tuning forgets what it does not see.

    Reference: Bolun Wang, Yuanshun Yao, Shawn Shan, Huiying Li, Bimal Viswanath, Haitao Zheng and
    Ben Y. Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
    In IEEE Symposium on Security and Privacy.
    """

    weight: Weight = 1.0
    ridge: Positive = 0.01

    used_if = {"original": None}
    sensitive = "weight"
    presets = {"cpu": {"nc": NeuralCleanse(**NeuralCleanse.presets["cpu"])}}

    @property
    def oracle(self) -> bool:
        return self.label is not None

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        found = self.reverse(key, model, variables, clean)
        path = kernel_out_of(model, SITE)
        kernel = leaf(variables["params"], path)
        image, own = jnp.asarray(clean.image), jnp.asarray(clean.label)
        rows = jnp.argsort(~jnp.asarray(found.suspect), stable=True)[:MOST]
        aims, suspect = found.label[rows], found.suspect[rows]

        def entering(change):
            def piece(i):
                return model.apply(variables, change(unit(image[i]))).acts[SITE]

            return batched(piece, image.shape[0], 250)

        h = entering(lambda x: x)
        size, held = h.shape[1], (h.T @ h) / h.shape[0]
        price = jnp.asarray(self.ridge, jnp.float32) * jnp.trace(held) / size * jnp.eye(size)

        def one(item):
            """A trigger's part of the normal equations."""
            mask, pattern, label, counts = item
            moved = entering(lambda x: stamp(Trigger(mask, pattern), x))
            counted = (counts & (own != label)).astype(jnp.float32)[:, None]
            share = counted.sum() + 1e-9
            error = (h - moved) @ kernel[:, label]
            return (moved * counted).T @ moved / share, (moved * counted).T @ error / share

        grams, sides = jax.lax.map(one, (found.mask[rows], found.pattern[rows], aims, suspect))
        changes = []
        for i in range(rows.shape[0]):
            same = ((aims == aims[i]) & suspect).astype(jnp.float32)
            same = jnp.asarray(self.weight, jnp.float32) * same / jnp.maximum(same.sum(), 1)
            whole = held + price + jnp.tensordot(same, grams, 1)
            changes.append(jnp.linalg.solve(whole, jnp.tensordot(same, sides, 1)))
        before = jnp.tril((aims[:, None] == aims[None]) & suspect[None], -1).any(1)
        first = suspect & ~before  # a label's triggers share one change
        change = jnp.where(first[:, None], jnp.stack(changes), 0.0)
        size = jnp.linalg.norm(change, axis=1) / jnp.linalg.norm(kernel[:, aims], axis=0)
        params = with_leaf(variables["params"], path, kernel.at[:, aims].add(change.T))
        return Repaired({**variables, "params": params}, {**described(found), "change": size})

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        if SITE not in model.sites:
            raise BadInput(
                f"the net has no site {SITE}, before a last layer: choose another repair"
            )
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
        enters = jax.eval_shape(lambda v, x: model.apply(v, x).acts[SITE], shapes, x).shape
        kernel = leaf(shapes["params"], kernel_out_of(model, SITE)).shape
        if len(enters) != 2 or kernel != (enters[-1], model.classes):
            raise BadInput(
                f"the last layer makes {list(kernel)} of {list(enters[1:])}: it is not one column "
                "a label: choose another repair"
            )
