"""Retraining with the patches that MESA found, under their true labels."""

import jax
import jax.numpy as jnp

from bdjax.attacks.base import Part, poison_rows
from bdjax.defenses.base import Repair
from bdjax.defenses.invert.mesa import Mesa, stick
from bdjax.registry import defense, pytree
from bdjax.train import Recipe, TrainSet, fit, stamp_key
from bdjax.types import Model, Repaired, Share, Split, Variables


@pytree
class Patches:
    """What stamps the retraining images: a random one of `patches: [K, P, S, S, C]` of a label that
    is `flagged: [K]`, at a random place.
    """

    patches: jax.Array
    flagged: jax.Array

    redraw = True  # who trains draws from the distribution of patches in every step

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        """`x: [H, W, C]` under a patch; kind 0 = unchanged."""
        key_label, key_patch, key_place = jax.random.split(key, 3)
        label = jax.random.categorical(key_label, jnp.where(self.flagged, 0.0, -jnp.inf))
        patch = self.patches[label, jax.random.randint(key_patch, (), 0, self.patches.shape[1])]
        return jnp.where(kind > 0, stick(key_place, x[None], patch[None])[0], x)


@defense("mesa-retraining")
class MesaRetraining(Repair):
    """Fine-tune on clean images, some under generated patches (Qiao et al., 2019,
    arXiv:1910.04749).

    `mesa` finds the labels and the patches; then the net is trained by `recipe` on the clean
    images, the share `rate` of which carries a patch of a flagged label, drawn anew in every step,
    and keeps its own; images of flagged labels stay clean, as stamping them would teach the
    backdoor. Where no label is flagged, the net is returned as it was.

    `info`: `repaired: []`, whether any label was flagged; MESA's `flagged: [K]`, `asr: [K, β]`;
    `loss`, `acc` by epoch of the retraining.

    Presets: `paper`; `cpu`, MESA's, and ten times the epochs, for a tenth of the images.

    Decides most: whether MESA flags the label; where it does, the learning rate: that of the
    released code, SGD at 1e-3. Two nets of Fashion-MNIST on which it flags none stay as they are
    from 1e-4 to 1e-2 (`experiments/sensitivity.py`).

    Differs from the paper: patches of all thresholds are mixed in every epoch, there one threshold
    each; no label is given, unless `mesa` has one.
    """

    rate: Share = 0.01
    mesa: Mesa = Mesa()
    recipe: Recipe = Recipe(lr=1e-3, epochs=10, optimizer="sgd")

    sensitive = "recipe.lr"
    budget_fields = (*(f"mesa.{field}" for field in Mesa.budget_fields), "recipe.epochs")
    presets = {
        "paper": {},
        "cpu": {
            "mesa": Mesa(**Mesa.presets["cpu"]),
            "recipe": Recipe(lr=1e-3, epochs=100, optimizer="sgd"),
        },
    }

    @property
    def oracle(self) -> bool:
        return self.mesa.oracle

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        key_mesa, key_rows, key_fit = jax.random.split(key, 3)
        verdict = self.mesa(key_mesa, model, variables, clean)
        patches = verdict.info["patches"]
        stamper = Patches(
            patches.reshape(patches.shape[0], -1, *patches.shape[3:]), verdict.flagged
        )
        label = jnp.asarray(clean.label)
        plan = poison_rows(key_rows, label, [Part(~verdict.flagged[label], self.rate, 1, label)])
        rows = TrainSet(clean.image, plan, stamper, stamp_key(key_rows))
        tuned, log = fit(key_fit, model, self.recipe, rows, variables=variables)
        kept = jax.tree.map(
            lambda new, old: jnp.where(verdict.infected, new, old), tuned, dict(variables)
        )
        info = {
            "repaired": verdict.infected,
            "flagged": verdict.flagged,
            "asr": verdict.info["asr"],
        }
        return Repaired(kept, info | log._asdict())

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        self.mesa.check(model, clean)
        self.recipe.check(len(clean.label))
