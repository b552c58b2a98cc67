"""Neural Cleanse's filter: an input that fires the neurons which a reversed trigger fires is turned
away.
"""

import jax
import jax.numpy as jnp

from bdjax.channels import mask_of, responses
from bdjax.defenses.base import InputFilter
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.boundary import quantile_boundary, realised
from bdjax.defenses.parts.reversed import TriggerDefense
from bdjax.models.layers import check_site
from bdjax.registry import defense, static
from bdjax.train import stamped
from bdjax.types import Array, Attack, Metric, Model, Scores, Share, Split, Variables


@defense("nc-filter")
class NcFilter(TriggerDefense, InputFilter):
    """Flag inputs that fire the neurons of a reversed trigger (Wang et al., 2019).

    Neurons of the second-to-last layer are ranked by their mean activation on the clean images
    under the reversed trigger minus that without it. An input's score is −1 × the mean activation
    of the top `share`; it is flagged if it scores lower than all but `fpr` of the clean images.

    `share`: of the neurons, in (0, 1], at least one; `fpr`: false positive rate to accept, in [0,
    1]; `site`: the layer, whose channels are averaged over places where it has any. For `nc`,
    `found`, `label`, `original`, `pick` see `reversed.TriggerDefense`. Without a suspect label
    nothing is flagged: scores 0, boundary −∞.

    Presets: `cpu`, the short search of Neural Cleanse.

    `info`: `gap: [D]`, `top: [D]` 0/1; the mean activation of the top neurons over the images,
    `clean: []` and `reversed: []`; those of `boundary.realised` and `TriggerDefense.fired`.
    """

    fpr: Share = 0.05
    share: Share = 0.01
    site: str = static("penultimate")

    measures = tuple(Metric(n, label=f"activation, {n}") for n in ("clean", "reversed", "original"))
    presets = {"paper": {}, "cpu": {"nc": NeuralCleanse(**NeuralCleanse.presets["cpu"])}}

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split, x: Array
    ) -> Scores:
        _, fired, info = self.fired(key, model, variables, clean)
        calm, loud = (
            responses(model, variables, self.site, images) for images in (clean.image, fired.image)
        )
        gap = loud.mean(0) - calm.mean(0)
        count = jnp.maximum(
            jnp.round(jnp.asarray(self.share, jnp.float32) * gap.shape[0]), 1.0
        ).astype(jnp.int32)
        top = 1 - mask_of(jnp.argsort(-gap), count)

        def activation(acts):
            return acts @ top / top.sum()

        benign = -activation(calm)
        # Where the neurons sleep on clean images, most of these tie at zero.
        boundary = jnp.where(info["repaired"], quantile_boundary(benign, self.fpr), -jnp.inf)
        score = jnp.where(
            info["repaired"], -activation(responses(model, variables, self.site, x)), 0.0
        )
        info |= {
            "gap": gap,
            "top": top,
            "clean": -benign.mean(),
            "reversed": activation(loud).mean(),
            **realised(benign <= boundary),
        }
        return Scores(score, boundary, score <= boundary, info)

    def report(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        test: Split,
        attack: Attack | None,
        result: Scores,
    ) -> dict[str, jax.Array]:
        """`original: []`: the mean activation of the top neurons over `test` under the attack's own
        first trigger.
        """
        if attack is None:
            return {}
        top = result.info["top"]
        fired = responses(model, variables, self.site, stamped(attack, 1, test.image, key))
        return {"original": (fired @ top / top.sum()).mean()}

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        check_site(model, self.site)
