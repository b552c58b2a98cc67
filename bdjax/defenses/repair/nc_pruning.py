"""Neural Cleanse's pruning: the neurons that a reversed trigger fires are cut, until it no longer
works.
"""

import jax
import jax.numpy as jnp

from bdjax.channels import curve, curves_on_test, first_below, mask_of, prune, responses
from bdjax.defenses.base import Repair
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.reversed import TriggerDefense
from bdjax.models.layers import check_site
from bdjax.registry import defense, static
from bdjax.types import Attack, Model, Repaired, Share, Split, Variables


@defense("nc-pruning")
class NcPruning(TriggerDefense, Repair):
    """Prune the neurons of a reversed trigger until the net no longer reacts to it (Wang et al.,
    2019).

    Neurons of the second-to-last layer are ranked by their mean activation on the clean images
    under the reversed trigger minus that without it, highest first. The fewest are pruned after
    which at most `until` of the stamped clean images of other classes still get its label; if none
    suffices, as many as leave it the fewest.

    `until`: share of images, in [0, 1]; `site`: the layer, pruned by channels. For `nc`, `found`,
    `label`, `original`, `pick` see `reversed.TriggerDefense`. Without a suspect label nothing is
    pruned.

    Presets: `paper`; `conv`, the last convolution, as the paper does for its face net, whose
    second-to-last layer is narrow; `cpu`, the short search of Neural Cleanse.

    `info`: `order: [C]`, `gap: [C]`, `curve: [C + 1]` accuracy on the clean images and `reaction:
    [C + 1]` to the trigger by pruned count, `pruned` = how many; those of `TriggerDefense.fired`.

    Decides most: `until`. The paper does not say when a net no longer reacts: it is ours. At 0.01,
    0.05, 0.2 and 0.4 one net of MNIST was left an ASR_nt of 1, 5, 24 and 56 %.
    """

    until: Share = 0.05
    site: str = static("penultimate")

    sensitive = "until"
    presets = {
        "paper": {},
        "conv": {"site": "conv_last"},
        "cpu": {"nc": NeuralCleanse(**NeuralCleanse.presets["cpu"])},
    }

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        _, fired, info = self.fired(key, model, variables, clean)
        calm, loud = (
            responses(model, variables, self.site, images).mean(0)
            for images in (clean.image, fired.image)
        )
        order = jnp.argsort(calm - loud)
        reaction = curve(model, variables, self.site, order, fired.image, fired.aimed)
        count = jnp.where(info["repaired"], first_below(reaction, self.until), 0)
        points = curve(model, variables, self.site, order, clean.image, clean.label)
        info |= {
            "order": order,
            "gap": loud - calm,
            "curve": points,
            "reaction": reaction,
            "pruned": count,
        }
        return Repaired(prune(variables, self.site, mask_of(order, count)), info)

    def report(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        test: Split,
        attack: Attack | None,
        result: Repaired,
    ) -> dict[str, jax.Array]:
        """`acc_curve`, `asr_curve: [C + 1]`: accuracy and ASR_nt (first trigger) on `test` by
        pruned count.
        """
        return curves_on_test(key, model, variables, self.site, result.info["order"], test, attack)

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        check_site(model, self.site)
