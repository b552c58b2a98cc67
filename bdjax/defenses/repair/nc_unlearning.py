"""Neural Cleanse's unlearning: the net is fine-tuned on images that carry the reversed trigger and
their true labels.
"""

import jax
import jax.numpy as jnp

from bdjax.attacks.base import Part, poison_rows
from bdjax.defenses.base import Repair
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.parts.reversed import TriggerDefense
from bdjax.registry import defense, pytree, static, validate
from bdjax.train import Recipe, TrainSet, clean_set, fit, stamp_key
from bdjax.types import BadInput, Model, Repaired, Share, Split, Stamper, Variables


@pytree
class AsFired:
    """A trigger as it is fired at test time: an attack may stamp its own training images more
    faintly.
    """

    attack: Stamper

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        """`x: [H, W, C]` with trigger `kind: []`."""
        return self.attack.stamp(kind, x, key, train=False)


@defense("nc-unlearning")
class NcUnlearning(TriggerDefense, Repair):
    """Fine-tune on clean images, a fifth of which carry the reversed trigger with true labels (Wang
    et al., 2019).

    `share`: of the images that are stamped, in [0, 1]; images that already are of the label aimed
    at stay clean, as stamping them would teach the backdoor. `recipe`: the fine-tuning. The
    variants of the paper: the reversed trigger; the original one, `original=attack`, an oracle;
    clean images alone, `clean_only`, for which no trigger is looked for. For `nc`, `found`,
    `label`, `pick` see `reversed.TriggerDefense`. Without a suspect label the net stays as it is.

    Presets: `paper`, one epoch; `clean`, its clean-image variant; `backdoorbench`, its search and
    100 epochs of SGD at 0.01; `cpu`, the short search of Neural Cleanse.

    `info`: `loss`, `acc: [epochs]` of the fine-tuning; those of `TriggerDefense.fired`.

    Decides most: the learning rate. The paper has none for it; ours is that of its victims'
    training, Adam at 1e-3. At 1e-4, 3e-4, 1e-3 and 3e-3 the preset `cpu` left one net of MNIST
    an ASR_nt of 94, 49, 18 and 1 %.

    Differs from the paper: it takes 10 % of the training images, ours are the defender's own; the
    batch is ours. Differs from BackdoorBench: its learning rate decays along a
    cosine.
    """

    share: Share = 0.2
    recipe: Recipe = Recipe(epochs=1, batch=32)
    clean_only: bool = static(False)

    used_if = {key: {"clean_only": (False,)} for key in ("nc", "label", "pick", "share")}
    sensitive = "recipe.lr"
    presets = {
        "paper": {},
        "clean": {"clean_only": True},
        "backdoorbench": {
            "nc": NeuralCleanse(**NeuralCleanse.presets["backdoorbench"]),
            "recipe": Recipe(lr=0.01, weight_decay=5e-4, epochs=100, batch=256, optimizer="sgd"),
        },
        "cpu": {"nc": NeuralCleanse(**NeuralCleanse.presets["cpu"])},
    }

    @property
    def oracle(self) -> bool:
        return super().oracle and not self.clean_only

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        key_find, key_rows, key_fit = jax.random.split(key, 3)
        if self.clean_only:
            rows, info = clean_set(clean), {"repaired": jnp.asarray(True)}
        else:
            attack, fired, info = self.fired(key_find, model, variables, clean)
            label = jnp.asarray(clean.label)
            plan = poison_rows(key_rows, label, [Part(fired.aimed >= 0, self.share, 1, label)])
            plan = plan._replace(kind=plan.kind * fired.kind)
            rows = TrainSet(clean.image, plan, AsFired(attack), stamp_key(key_rows))
        tuned, log = fit(key_fit, model, self.recipe, rows, variables=variables)
        kept = jax.tree.map(
            lambda new, old: jnp.where(info["repaired"], new, old), tuned, dict(variables)
        )
        return Repaired(kept, info | log._asdict())

    def check(self, model: Model, clean: Split) -> None:
        validate(self)
        if self.clean_only and len(clean.image) == 0:
            raise BadInput("unlearning fine-tunes on clean images: the defender has none")
        if not self.clean_only:
            super().check(model, clean)
        self.recipe.check(len(clean.label))
