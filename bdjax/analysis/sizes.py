"""How large a reversed trigger is, and how much of it lies on the original one."""

from typing import Any

import jax.numpy as jnp

from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.registry import pytree
from bdjax.train import stamped
from bdjax.types import Metric, Split


@pytree
class Sizes:
    """A probe: the original (first) trigger beside the one that `nc` reverses for its label (Wang
    et al., 2019).

    `mask: [2, H, W, 1]`, `pattern: [2, H, W, C]`, both in [0, 1]; `l1_original`, `l1_reversed`:
    sums of the masks, in pixels; `share_covered`: how much of the reversed mask lies where the
    original one is not zero.
    """

    measures = (
        Metric("l1_original", "pixels", label="L1 original"),
        Metric("l1_reversed", "pixels", label="L1 reversed"),
        Metric("share_covered", "share"),
    )

    nc: NeuralCleanse = NeuralCleanse()

    def __call__(self, key, model, variables, attack, clean: Split, test: Split) -> dict[str, Any]:
        black, white = (stamped(attack, 1, jnp.full((1, *model.shape), v), key) for v in (0.0, 1.0))
        mask = (1 - white + black).mean(-1, keepdims=True)
        pattern = black / jnp.maximum(mask, 1e-6)
        aimed = attack.success(jnp.asarray(1), jnp.arange(model.classes), model.classes)
        label = aimed.max().reshape(1)  # of one label, but -1 where it is not aimed
        trigger = self.nc.search(key, model, variables, clean.image, label).trigger
        l1 = trigger.mask.sum()
        covered = jnp.where(mask > 0, trigger.mask, 0).sum() / l1
        found = {"l1_original": mask.sum(), "l1_reversed": l1, "share_covered": covered}
        both = {
            "mask": jnp.concatenate([mask, trigger.mask]),
            "pattern": jnp.concatenate([pattern, trigger.pattern]),
        }
        return found | both
