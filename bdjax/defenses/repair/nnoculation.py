"""NNoculation, before deployment: train on noisy copies of the clean images, as strong a noise as
accuracy bears.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp

from bdjax.attacks.base import Attack, Part
from bdjax.defenses.base import Repair
from bdjax.mesh import lane_map
from bdjax.metrics import accuracy, labels
from bdjax.registry import defense, pytree, static
from bdjax.train import Recipe, fit, poisoned_set, predict
from bdjax.types import (
    BadInput,
    Count,
    Metric,
    Model,
    Range,
    Repaired,
    Share,
    Split,
    Variables,
)

GRID = 4
"""Rows and columns of the coarse grid."""


@pytree
class Noise(Attack):
    """Each clean image also has a copy, under its own label, with coarse noise in it.

    Each cell of a 4×4 grid is chosen with probability `level`, channel by channel; its pixels are
    replaced by N(128, 51)/255, clipped to [0, 1].
    """

    level: Share = 0.1
    append: bool = static(True)

    def shares(self, y: jax.Array, classes: int) -> list[Part]:
        return [Part(jnp.ones_like(y, bool), 1.0, 1, y)]

    def trigger(self, x: jax.Array, key: jax.Array) -> jax.Array:
        key_cell, key_noise = jax.random.split(key)
        height, width, channels = x.shape
        chosen = jax.random.uniform(key_cell, (GRID, GRID, channels)) < self.level
        chosen = chosen[jnp.arange(height) * GRID // height][:, jnp.arange(width) * GRID // width]
        noise = (128 + 51.2 * jax.random.normal(key_noise, x.shape)) / 255
        return jnp.where(chosen, jnp.clip(noise, 0, 1), x)


@defense("nnoculation")
class NNoculation(Repair):
    """Retrain on clean and coarsely noised images (Veldanda et al., 2020, arXiv:2002.08313).

    For each noise level p of `levels` the net is trained on the clean images and a noisy copy of
    each (see `Noise`). Kept is the net of the highest p whose accuracy on held-out clean images is
    at most `max_drop` below what it was; where there is none, the one of the best accuracy.

    `levels`: probabilities, in increasing order; `max_drop`: absolute, in [0, 1]; `holdout`: share
    of the clean images that are kept apart to judge; `recipe`: the training, of which an epoch
    draws one row, clean or noisy, for each clean image; `lanes`: levels side by side.

    Defaults are the paper's, batches of 1283 included: set a smaller `batch` for few images.
    Preset: `cpu`, fewer epochs, small batches.

    Decides most: `max_drop`, which picks the net: about the paper's 3 %. From 0.003
    to 0.03, and at 0.09 and 0.3, the preset `cpu` left one net of Fashion-MNIST with the 5×5 square
    an ASR_nt of 38 and 32 %, an all-to-all one, which had 75 %, 15 and 28 %
    (`experiments/sensitivity.py`).

    `info`: `level` that was kept, `before: []` and `after: [levels]`, accuracy on the held-out
    images; `loss`, `acc: [levels, epochs]`.

    Left out: all that comes after deployment, that is, quarantine of the inputs on which the old
    and the new net disagree, a CycleGAN that learns the trigger from them, and retraining with its
    images.

    Reference: Akshaj Kumar Veldanda, Kang Liu, Benjamin Tan, Prashanth Krishnamurthy, Farshad
    Khorrami, Ramesh Karri, Brendan Dolan-Gavitt and Siddharth Garg, "NNoculation: Catching BadNets
    in the Wild".
    """

    levels: tuple[Share, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    max_drop: Share = 0.03
    recipe: Recipe = Recipe(lr=1.0, epochs=20, batch=1283, optimizer="adadelta")
    holdout: Annotated[float, Range(0, 0.9)] = static(0.2)
    lanes: Count | None = static(None)

    measures = (
        Metric("level", hint="the share of noisy pixels whose net is kept"),
        Metric("before", "share", "high", "ACC before", "on clean images held out by the defender"),
    )
    budget_fields = ("recipe.epochs", "recipe.batch")
    sensitive = "max_drop"
    presets = {"cpu": {"recipe": Recipe(lr=1.0, epochs=10, batch=50, optimizer="adadelta")}}

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        key_split, key_fit = jax.random.split(key)
        image, label = jnp.asarray(clean.image), jnp.asarray(clean.label)
        order, kept = jax.random.permutation(key_split, label.shape[0]), self.kept(label.shape[0])
        held, data = order[:kept], Split(image[order[kept:]], label[order[kept:]])
        levels = jnp.stack([jnp.asarray(level, jnp.float32) for level in self.levels])

        def judge(variables: Variables) -> jax.Array:
            return accuracy(labels(predict(model, variables, image[held])), label[held])

        def train(item: Any):
            key, level = item
            key_plan, key_fit = jax.random.split(key)
            noisy = poisoned_set(key_plan, data, Noise(level=level), model.classes)
            tuned, log = fit(key_fit, model, self.recipe, noisy, variables=variables)
            return tuned, judge(tuned), log._asdict()

        before = judge(variables)
        nets, after, log = lane_map(
            train, (jax.random.split(key_fit, len(self.levels)), levels), self.lanes
        )
        # shares of images in float32
        within = before - after <= jnp.asarray(self.max_drop, jnp.float32) + 1e-6
        best = jnp.argmax(
            jnp.where(
                within, jnp.arange(1.0, len(self.levels) + 1), jnp.where(within.any(), 0.0, after)
            )
        )
        info = {"level": levels[best], "before": before, "after": after, **log}
        return Repaired(jax.tree.map(lambda leaf: leaf[best], nets), info)

    def kept(self, images: int) -> int:
        """How many of so many clean images are held out."""
        return round(self.holdout * images)

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        if not self.levels:
            raise BadInput("levels is empty: give at least one noise level")
        if self.kept(len(clean.label)) < 1:
            raise BadInput(
                f"holdout {self.holdout} of {len(clean.label)} clean images is none: raise it"
            )
        self.recipe.check(len(clean.label) - self.kept(len(clean.label)))
