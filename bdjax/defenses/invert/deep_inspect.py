"""DeepInspect: a generator of perturbations for every label, trained on images that the net itself
made up.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bdjax import mesh, metrics
from bdjax.defenses.base import Inversion, searched, spread
from bdjax.defenses.parts.inversion import BOUND, descend, reaches, squash, within
from bdjax.registry import defense, static
from bdjax.train import batched
from bdjax.types import (
    BadInput,
    Class,
    Count,
    Model,
    Rate,
    Repeats,
    Share,
    Size,
    Split,
    Variables,
    Verdict,
    Weight,
)


class Perturber(nn.Module):
    """G(z, t): a perturbation `[B, H, W, C]` in [−1, 1] for noise `z: [B, D]` and one-hot labels
    `t: [B, K]`.
    """

    hidden: int
    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, z, t):
        x = nn.leaky_relu(nn.Dense(self.hidden)(jnp.concatenate([z, t], 1)), 0.2)
        x = nn.leaky_relu(nn.Dense(self.hidden)(jnp.concatenate([x, t], 1)), 0.2)
        raw = nn.Dense(self.shape[0] * self.shape[1] * self.shape[2])(x)
        return (2 * squash(raw) - 1).reshape(-1, *self.shape)


class Critic(nn.Module):
    """D(x): a logit `[B]`, high for images without a perturbation."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)), 0.2)
        return nn.Dense(1)(x)[:, 0]


class Params(NamedTuple):
    """What is trained side by side."""

    generator: Any
    critic: Any


def left_index(x: jax.Array) -> jax.Array:
    """How far each of `x: [K]` lies below the median, in deviations of the left side (double MAD):
    `[K]`, 0 above.

    (median − x) / (1.4826 · median of median − x over the x up to the median); ∞ where that
    deviation is 0.
    """
    gap = jnp.median(x) - x
    deviation = metrics.MAD_SCALE * jnp.nanmedian(jnp.where(gap >= 0, gap, jnp.nan))
    return jnp.where(gap > 0, gap / deviation, 0.0)


@defense("deep-inspect")
class DeepInspect(Inversion):
    """Find the label that a conditional generator reaches by small perturbations, without data
    (Chen et al., 2019).

    A reconstruction: the paper's text could not be obtained. Known: model inversion makes surrogate
    data; a conditional GAN minimises NLL(f(x + G(z, t)), t) + γ1·L_GAN + γ2·max(0, ‖G(z, t)‖₁ − γ);
    the sizes of the perturbations of all labels are compared by the double median absolute
    deviation, on the left side alone, at 2 or so. Ours: all else.

    1. Surrogates: `images` for each label, minimising −log p_label by Adam from noise through x =
       tanh(·)/2 + ½.
    2. G and a critic D are trained side by side on batches of surrogates with random labels t, all
       labels at once: L_GAN = −log D(x + G), D told x from x + G; x + G is clipped to [0, 1], ‖·‖₁
       summed over pixels.
    3. The size of t is the mean of ‖G(z, t)‖₁ over z. A label with a left index above `threshold`
       is flagged, if its perturbations work on `success` of the surrogates of other labels.

    `gamma_gan` = γ1, `gamma_norm` = γ2, `budget` = γ in units of ‖·‖₁; `steps`, `batch`, `lr`: of
    the generator; `inversion_steps`, `inversion_lr`: of the surrogates; `hidden`, `noise_size`:
    width of G and D, numbers in z ~ N(0, 1). `labels`: G is for these alone (None: all), the
    surrogates are of all. `lanes`: labels inverted side by side (None: the device's default).
    `seeds`: see `Judge`. Clean images are not used.

    Verdict: `index`, the largest left index; `p_value`, see `metrics.smallest_p`. `info`: `norms`,
    `index`, `success: [K]`; `perturbation: [K, H, W, C]`, the mean over z; `surrogate: [K, H, W,
    C]`, one of each label.

    Presets: `default`; `cpu`, fewer steps and images. `gamma_norm` and `success` are such that a
    clean net was not flagged; far from there the sizes of all labels are alike, or no label is
    reached.

    Reference: Huili Chen, Cheng Fu, Jishen Zhao and Farinaz Koushanfar, "DeepInspect: A Black-box
    Trojan Detection and Mitigation Framework for Deep Neural Networks", In International Joint
    Conference on Artificial Intelligence.
    """

    gamma_gan: Weight = 0.1
    gamma_norm: Weight = 0.04
    budget: Weight = 0.0
    lr: Rate = 1e-3
    inversion_lr: Rate = 0.1
    success: Share = 0.25
    threshold: Weight = 2.0
    steps: Repeats = static(3000)
    batch: Size = static(128)
    images: Size = static(64)
    inversion_steps: Repeats = static(200)
    hidden: Size = static(256)
    noise_size: Size = static(100)
    labels: tuple[Class, ...] | None = static(None, before=None)
    lanes: Count | None = static(None)

    images_needed = 0
    budget_fields = ("steps", "batch", "images", "inversion_steps")
    presets = {
        "default": {},
        "cpu": {"steps": 2000, "batch": 32, "images": 32, "inversion_steps": 50},
    }

    def once(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Verdict:
        key_surrogate, key_train, key_measure = jax.random.split(key, 3)
        surrogate = self.surrogates(key_surrogate, model, variables)
        pool = surrogate.reshape(-1, *model.shape)
        generator, weights = self.train(key_train, model, variables, pool)
        owner = jnp.repeat(jnp.arange(model.classes), self.images)

        def measure(item):
            label, key = item
            z = jax.random.normal(key, (pool.shape[0], self.noise_size))

            def piece(i):
                g = self.perturb(generator, weights, z[i], jnp.full(i.shape, label), model.classes)
                hit = reaches(model.apply(variables, jnp.clip(pool[i] + g, 0, 1)).logits, label)
                return jnp.abs(g).sum((1, 2, 3)), hit, g

            norm, hit, g = batched(piece, pool.shape[0], 250)
            return norm.mean(), hit.mean(where=owner != label), g.mean(0)

        labels = searched(self.labels, model.classes)
        items = (jnp.asarray(labels, jnp.int32), jax.random.split(key_measure, labels.size))
        norms, success, mean = mesh.lane_map(measure, items, self.lanes)
        verdict = self.judge(norms, success)
        info = verdict.info | {"perturbation": mean}
        flagged, info = spread((verdict.flagged, info), labels, model.classes)
        return verdict._replace(flagged=flagged, info=info | {"surrogate": surrogate[:, 0]})

    def judge(self, norms: jax.Array, success: jax.Array) -> Verdict:
        """The outlier rule on the labels' `norms` and `success: [K]`."""
        norms = jnp.where(jnp.isnan(norms), jnp.inf, norms)
        index = jnp.nan_to_num(left_index(norms), posinf=jnp.inf)
        works = success >= self.success
        flagged = (index > self.threshold) & works
        return Verdict(
            index.max(),
            flagged.any(),
            flagged,
            {"norms": norms, "index": index, "success": success},
            metrics.smallest_p(norms, works),
        )

    def surrogates(self, key: jax.Array, model: Model, variables: Variables) -> jax.Array:
        """Images that the net takes for each label: `[K, images, H, W, C]`."""
        adam = optax.adam(self.inversion_lr)  # type: ignore[arg-type]
        rule = optax.chain(adam, within(-BOUND, BOUND))

        def one(item):
            label, key = item
            raw = jax.random.normal(key, (self.images, *model.shape))

            def loss(raw, _):
                logits = model.apply(variables, squash(raw)).logits
                return -jax.nn.log_softmax(logits)[:, label].mean(), None

            (raw, _), _ = descend(loss, raw, rule.init(raw), jnp.arange(self.inversion_steps), rule)
            return squash(raw)

        items = (jnp.arange(model.classes), jax.random.split(key, model.classes))
        return mesh.lane_map(one, items, self.lanes)

    def train(
        self, key: jax.Array, model: Model, variables: Variables, pool: jax.Array
    ) -> tuple[Perturber, Any]:
        """The generator and its weights, trained on the surrogates `pool: [M, H, W, C]`."""
        generator, critic = Perturber(self.hidden, model.shape), Critic(self.hidden)
        batch = min(self.batch, pool.shape[0])
        labels = jnp.asarray(searched(self.labels, model.classes), jnp.int32)

        def loss(params: Params, key):
            key_rows, key_label, key_z = jax.random.split(key, 3)
            x = pool[jax.random.randint(key_rows, (batch,), 0, pool.shape[0])]
            label = labels[jax.random.randint(key_label, (batch,), 0, labels.shape[0])]
            z = jax.random.normal(key_z, (batch, self.noise_size))
            g = self.perturb(generator, params.generator, z, label, model.classes)
            made = jnp.clip(x + g, 0, 1)
            logits = model.apply(variables, made).logits
            reached = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
            size = jnp.maximum(0, jnp.abs(g).sum((1, 2, 3)) - self.budget).mean()
            # Each net's gradient sees the other one fixed.
            unmasked = critic.apply({"params": jax.lax.stop_gradient(params.critic)}, made)
            real, fake = (
                critic.apply({"params": params.critic}, v) for v in (x, jax.lax.stop_gradient(made))
            )
            fooled = nn.softplus(-unmasked).mean()  # type: ignore[operator]
            told = nn.softplus(-real).mean() + nn.softplus(fake).mean()  # type: ignore[operator]
            return reached + self.gamma_gan * fooled + self.gamma_norm * size + told, None

        key_generator, key_critic, key_steps = jax.random.split(key, 3)
        z, t = jnp.zeros((1, self.noise_size)), jnp.zeros((1, model.classes))
        first = generator.init(key_generator, z, t)["params"]
        params = Params(first, critic.init(key_critic, pool[:1])["params"])
        rule = optax.adam(self.lr, b1=0.5, b2=0.999)  # type: ignore[arg-type]
        keys = jax.random.split(key_steps, self.steps)
        (params, _), _ = descend(loss, params, rule.init(params), keys, rule)
        return generator, params.generator

    def perturb(
        self, generator: Perturber, weights: Any, z: jax.Array, label: jax.Array, classes: int
    ) -> jax.Array:
        """G(z, label): `[B, H, W, C]`."""
        return generator.apply({"params": weights}, z, jax.nn.one_hot(label, classes))  # type: ignore[return-value]

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        pixels = math.prod(model.shape)
        size = 4 * pixels * (model.classes * self.images + self.hidden * 8)
        mesh.fits("DeepInspect's surrogates and nets", size + 4 * self.hidden * self.noise_size)
        searched(self.labels, model.classes)
        if model.classes < 3:
            raise BadInput(
                "DeepInspect compares the labels of a model: it needs 3 or more, not "
                f"{model.classes}"
            )
