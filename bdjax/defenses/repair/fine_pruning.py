"""Fine-Pruning: prune what sleeps on clean images, then fine-tune."""

from typing import Any

import jax
import jax.numpy as jnp

from bdjax.defenses.base import Defense
from bdjax.defenses.repair.channels import (
    channel_means,
    check_site,
    curve,
    default_site,
    largest_within,
    mask_of,
    prune,
)
from bdjax.registry import defense, static
from bdjax.train import Recipe, clean_set, fit, stamped
from bdjax.types import Array, Model, Repaired, Split, Variables, between


@defense("fine-pruning")
class FinePruning(Defense):
    """Prune the channels that clean images leave dormant, then fine-tune (Liu et al., 2018, arXiv:1805.12185).

    Channels are pruned in increasing order of their mean activation ā_c on the clean images; k of them, the largest
    count with acc(0) − acc(j) ≤ max_drop for all j ≤ k; then the net is trained on the same clean images with the
    pruned channels at zero.

    `site`: where to prune; None is the last convolution before its pooling, or the penultimate layer of a net that has
    none. `max_drop`: accuracy that pruning may cost on the clean images, absolute, in [0, 1]. `share`: prune this share
    of the channels instead, in [0, 1]. `recipe`: the fine-tuning.

    As in the paper, the same clean images rank the channels, set the count and fine-tune.

    Presets: `paper`, 48 of 60 channels and Adam at 1e-3 as in the authors' face script; `backdoorbench`, the
    penultimate layer, 100 epochs of SGD.

    `info`: `order: [C]`, `activation: [C]` = ā, `curve: [C + 1]` accuracy on the clean images by pruned count, `pruned`
    = k, `loss` and `acc` by epoch of the fine-tuning. For the curve of any other images and labels, ASR say, see
    `channels.curve`.

    Differs from the paper: a mask stands for zeroed weights, and keeps pruned channels at zero in the fine-tuning. The
    paper leaves length and rate of that open: ours is the highest rate of 1e-3, 3e-3, 1e-2 at which test accuracy stays
    within `max_drop`. Differs from BackdoorBench: its drop is relative, its learning rate decays along a cosine, and it
    looks at test images.
    """

    max_drop: Array | float = 0.04
    share: Array | float | None = None
    recipe: Recipe = Recipe(lr=3e-3, epochs=5)
    site: str | None = static(None)

    presets = {
        "paper": {"share": 0.8, "recipe": Recipe(lr=1e-3, epochs=5)},
        "backdoorbench": {
            "site": "penultimate",
            "max_drop": 0.1,
            "recipe": Recipe(lr=0.01, epochs=100, batch=256, optimizer="sgd"),
        },
    }

    def __call__(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Repaired:
        site = self.site or default_site(model)
        activation = channel_means(model, variables, site, clean.image)
        order = jnp.argsort(activation)
        points = curve(model, variables, site, order, clean.image, clean.label)
        if self.share is None:
            count = largest_within(points, self.max_drop)
        else:
            count = jnp.round(jnp.asarray(self.share, jnp.float32) * order.shape[0]).astype(jnp.int32)
        pruned = prune(variables, site, mask_of(order, count))
        tuned, log = fit(key, model, self.recipe, clean_set(clean), variables=pruned)
        info = {"order": order, "activation": activation, "curve": points, "pruned": count}
        return Repaired(tuned, info | log._asdict())

    def report(
        self, key: jax.Array, model: Model, variables: Variables, test: Split, attack: Any, result: Repaired
    ) -> dict[str, jax.Array]:
        """`acc_curve`, `asr_curve: [C + 1]`: accuracy and ASR_nt (first trigger) on `test` by pruned count, before
        fine-tuning.
        """
        site, order = self.site or default_site(model), result.info["order"]
        found = {"acc_curve": curve(model, variables, site, order, test.image, test.label)}
        if attack is not None:
            aimed = attack.success(jnp.asarray(1), test.label, model.classes)
            aimed = jnp.where(aimed == test.label, -1, aimed)
            found["asr_curve"] = curve(model, variables, site, order, stamped(attack, 1, test.image, key), aimed)
        return found

    def check(self, model: Model, clean: Split) -> None:
        between("max_drop", self.max_drop, 0, 1)
        if self.share is not None:
            between("share of pruned channels", self.share, 0, 1)
        check_site(model, self.site or default_site(model))
        self.recipe.check(len(clean.label))
