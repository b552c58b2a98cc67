"""MESA: learn the distribution of all patches that send images to a label, not one of them."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bdjax import mesh, metrics
from bdjax.defenses.base import Inversion
from bdjax.defenses.parts.inversion import descend, squash
from bdjax.registry import defense, static
from bdjax.train import in_pieces, unit
from bdjax.types import (
    Array,
    BadInput,
    Count,
    Label,
    Model,
    Range,
    Rate,
    Share,
    Size,
    Split,
    Variables,
    Verdict,
    Weight,
    between,
)

CHUNKS = 4
"""Layers of the generator, each of which reads its own part of the noise."""


class Generator(nn.Module):
    """Noise `z: [B, D]` to `out` pixels in [0, 1]: `[B, out]`. Normalised by the batch, in use as
    in training.
    """

    hidden: int
    out: int

    @nn.compact
    def __call__(self, z):
        first, *middle, last = jnp.split(z, CHUNKS, 1)
        x = first
        for i, part in enumerate((None, *middle)):
            x = x if part is None else jnp.concatenate([x, part], 1)
            x = nn.leaky_relu(
                nn.BatchNorm(False, name=f"norm_{i}")(nn.Dense(self.hidden, name=f"dense_{i}")(x)),
                0.2,
            )
        x = nn.Dense(self.out, name="pixels")(jnp.concatenate([x, last], 1))
        return squash(x / 2)  # the logistic function, with a gradient left at its ends


class Statistic(nn.Module):
    """MINE's T(z, g): `[B]` for `z: [B, D]`, `g: [B, out]`."""

    hidden: int

    @nn.compact
    def __call__(self, z, g):
        x = nn.leaky_relu(nn.Dense(self.hidden)(z) + nn.Dense(self.hidden, use_bias=False)(g), 0.2)
        x = nn.leaky_relu(nn.Dense(self.hidden)(x), 0.2)
        return nn.leaky_relu(nn.Dense(1)(x), 0.2)[:, 0]


class Estimator(NamedTuple):
    """What estimates the information: the weights of T, and the moving `average: []` of exp T over
    independent pairs.
    """

    statistic: Any
    average: jax.Array


def information(joint: jax.Array, independent: jax.Array) -> jax.Array:
    """Î = E T(z, g) − log E exp T(z̃, g), in nats: a lower bound of the mutual information. `[B]`
    both.
    """
    return joint.mean() - jnp.log(jnp.exp(independent).mean() + 1e-8)


def mine_loss(joint: jax.Array, independent: jax.Array, average: jax.Array) -> jax.Array:
    """What T and the moving average minimise: −Î with E exp T under the average, which takes the
    bias out of the gradient, and half the average's squared error, on which gradient descent at
    rate r is the moving average of rate r.
    """
    now = jnp.exp(independent).mean()
    return (
        now / jax.lax.stop_gradient(average)
        - joint.mean()
        + (average - jax.lax.stop_gradient(now)) ** 2 / 2
    )


def mine_rule(
    rule: optax.GradientTransformation, rate: Array | float
) -> optax.GradientTransformation:
    """`rule` for the net of an `Estimator`, the moving average of `rate` for its average."""
    moving = optax.sgd(rate)  # type: ignore[arg-type]
    return optax.partition({"net": rule, "average": moving}, Estimator("net", "average"))  # type: ignore[arg-type]


def stick(key: jax.Array, x: jax.Array, patch: jax.Array) -> jax.Array:
    """`x: [B, H, W, C]` under `patch: [B, S, S, C]`, at one random place for the whole batch."""
    room = jnp.asarray(x.shape[1:3]) - jnp.asarray(patch.shape[1:3]) + 1
    row, col = jax.random.randint(key, (2,), 0, room)
    return jax.lax.dynamic_update_slice(
        x, patch, (jnp.zeros_like(row), row, col, jnp.zeros_like(row))
    )


def stick_each(key: jax.Array, x: jax.Array, patch: jax.Array) -> jax.Array:
    """As `stick`, at a random place for each image."""
    keys = jax.random.split(key, x.shape[0])
    return jax.vmap(lambda k, v, p: stick(k, v[None], p[None])[0])(keys, x, patch)


@defense("mesa")
class Mesa(Inversion):
    """Learn a generator of the patches that work, for each label and threshold (Qiao et al., 2019,
    arXiv:1910.04749).

    For label t and threshold β, G(z) is to be spread evenly over {patches: F_t ≥ β}, F_t the mean
    probability of t: min over G of −E min(softmax_t(f(x ⊕ (G(z) + ε))), β) − `alpha`·Î(z; G(z)), ε
    ~ N(0, `noise`²), ⊕ pasting at a place drawn anew for each batch. Î is MINE's: E T(z, g) − log E
    exp T(z̃, g), T trained with a moving average of E exp T (`rate`), a step of it after each one of
    G, on noise of its own. All labels and thresholds are searched at once.

    `betas`: the thresholds; `side`: of the patch, which must be known or guessed, in pixels;
    `alpha`: weight of the entropy; `lr`: Adam's (β = 0.5, 0.999); `epochs` over 4/5 of the clean
    images in batches of `batch`; the rest measures. `hidden`: width of G and T; `noise_size`:
    numbers in z ~ U[0, 1]; `samples`: patches drawn at the end. `threshold`: a label that the
    patches of some β reach on more of the held-out images of other classes is flagged. `label`: the
    target label, if it is known: it alone is searched, and flagged. That is what no defender has:
    an oracle. `lanes`: searches side by side (None: the device's default).

    Verdict: `index`, the largest such share. `info`: `asr: [K, β]`; `information: [K, β]`, the last
    epoch's Î in nats; `patches: [K, β, samples, side, side, C]`.

    Presets: `paper`, CIFAR-10; `cifar100`; `cpu`, fewer and smaller
    batches.

    Differs from the paper: the released code trains on test images, ours on the defender's; there
    the true label is given, here only as `label`, and `threshold` is our own; noisy patches are
    clipped to [0, 1]; BatchNorm always takes the statistics of its batch; the moving average starts
    at 1, there at its first value. As there, triggers that do not move with their place, or are
    larger, are missed.

    Reference: Ximing Qiao, Yukun Yang and Hai Li, "Defending Neural Backdoors via Generative
    Distribution Modeling", In Advances in Neural Information Processing Systems.
    """

    alpha: Weight = 0.1
    betas: tuple[Share, ...] = (0.5, 0.8, 0.9)
    noise: Weight = 0.1
    lr: Rate = 2e-4
    rate: Share = 1e-3
    threshold: Share = 0.5
    label: Label | None = None
    side: Size = static(3)
    epochs: Annotated[int, Range(1, 1_000_000)] = static(10)
    batch: Size = static(128)
    hidden: Size = static(512)
    noise_size: Size = static(64)
    samples: Size = static(128)
    lanes: Count | None = static(None)

    used_if = {"threshold": {"label": (None,)}}
    budget_fields = ("epochs", "batch")
    presets = {
        "paper": {},
        "cifar100": {"hidden": 2048},
        "cpu": {"batch": 32, "epochs": 5},
    }

    @property
    def oracle(self) -> bool:
        return self.label is not None

    def once(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Verdict:
        key_split, key_train = jax.random.split(key)
        n = len(clean.label)
        order = jax.random.permutation(key_split, n)
        held, rest = order[: max(1, n // 5)], order[max(1, n // 5) :]
        image, label = jnp.asarray(clean.image), jnp.asarray(clean.label)
        betas = jnp.stack([jnp.asarray(beta, jnp.float32) for beta in self.betas])
        every = jnp.arange(model.classes)
        targets = every if self.label is None else jnp.asarray(self.label, jnp.int32).reshape(1)
        searched, count = targets.shape[0], len(self.betas)

        def search(item):
            target, beta, key = item
            key_train, key_test = jax.random.split(key)
            patches, log = self.train(key_train, model, variables, image[rest], target, beta)
            return (
                self.success(key_test, model, variables, image[held], label[held], target, patches),
                log,
                patches,
            )

        items = (
            jnp.repeat(targets, count),
            jnp.tile(betas, searched),
            jax.random.split(key_train, searched * count),
        )
        found = mesh.lane_map(search, items, self.lanes)

        def by_label(leaf):  # labels that were not searched have zeros
            leaf = leaf.reshape(searched, count, *leaf.shape[1:])
            return jnp.zeros((model.classes, *leaf.shape[1:]), leaf.dtype).at[targets].set(leaf)

        asr, log, patches = jax.tree.map(by_label, found)
        reached = asr.max(1)
        flagged = reached > self.threshold if self.label is None else every == targets
        return Verdict(
            reached.max(),
            flagged.any(),
            flagged,
            {"asr": asr, "information": log, "patches": patches},
        )

    def nets(self, model: Model) -> tuple[Generator, Statistic]:
        """G and T for patches of this model's images."""
        return Generator(self.hidden, self.side**2 * model.shape[2]), Statistic(self.hidden)

    def draw(self, generator: Generator, variables: Any, z: jax.Array) -> jax.Array:
        """The flat patches of `z: [B, D]`."""
        # inside of BatchNorm
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return generator.apply(variables, z, mutable=["batch_stats"])[0]  # type: ignore[index]

    def train(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        images: jax.Array,
        target: jax.Array,
        beta: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Samples `[samples, side, side, C]` of a generator trained for `target: []` and `beta:
        []`, and its last Î.
        """
        generator, statistic = self.nets(model)
        key_init, key_rows, key_steps, key_draw = jax.random.split(key, 4)
        n = images.shape[0]
        batch = min(self.batch, n)
        steps = n // batch
        shape = (batch, self.side, self.side, model.shape[2])

        def noise(key, rows):
            return jax.random.uniform(key, (rows, self.noise_size))

        def pairs(weights, key, z, g) -> Any:
            """T of `g` beside the noise `z` that it was made from, and beside other noise."""
            other = noise(key, batch)
            return tuple(statistic.apply({"params": weights}, v, g) for v in (z, other))

        adam = optax.adam(self.lr, b1=0.5, b2=0.999)  # type: ignore[arg-type]
        rule = mine_rule(adam, self.rate)

        def step(carry, item):
            """A step of G under the T that is there, then one of T on other patches of the new
            G.
            """
            (weights, of_weights), (estimator, of_estimator) = carry
            rows, key = item

            def generate(weights, key):
                key_z, key_other, key_noise, key_place = jax.random.split(key, 4)
                z = noise(key_z, batch)
                g = self.draw(generator, {"params": weights}, z)
                patch = jnp.clip(
                    g.reshape(shape) + self.noise * jax.random.normal(key_noise, shape), 0, 1
                )
                logits = model.apply(variables, stick(key_place, unit(images[rows]), patch)).logits
                reached = jnp.minimum(jax.nn.softmax(logits)[:, target], beta).mean()
                entropy = information(*pairs(estimator.statistic, key_other, z, g))
                return -reached - self.alpha * entropy, entropy

            def estimate(estimator: Estimator, key):
                key_z, key_other = jax.random.split(key)
                z = noise(key_z, batch)
                g = self.draw(generator, {"params": weights}, z)
                joint, independent = pairs(estimator.statistic, key_other, z, g)
                return mine_loss(joint, independent, estimator.average), None

            keys = jax.random.split(key)
            (weights, of_weights), entropy = descend(generate, weights, of_weights, keys[:1], adam)
            of_t, _ = descend(estimate, estimator, of_estimator, keys[1:], rule)
            return ((weights, of_weights), of_t), entropy[0]

        key_generator, key_statistic = jax.random.split(key_init)
        z = noise(key_rows, 2)
        weights = generator.init(key_generator, z)["params"]
        second = statistic.init(key_statistic, z, jnp.zeros((2, generator.out)))["params"]
        estimator = Estimator(second, jnp.ones(()))
        epochs = jax.vmap(lambda k: jax.random.permutation(k, n))(
            jax.random.split(key_rows, self.epochs)
        )
        rows = epochs[:, : steps * batch].reshape(-1, batch)
        items = (rows, jax.random.split(key_steps, rows.shape[0]))
        start = (weights, adam.init(weights)), (estimator, rule.init(estimator))
        ((weights, _), _), log = jax.lax.scan(step, start, items)
        patches = self.draw(generator, {"params": weights}, noise(key_draw, self.samples))
        return patches.reshape(-1, *shape[1:]), log[-steps:].mean()

    def success(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        images: jax.Array,
        label: jax.Array,
        target: jax.Array,
        patches: jax.Array,
    ) -> jax.Array:
        """ASR_nt of `patches`, one for each image, at a random place each;
        0 where no image counts.
        """

        def piece(i):
            x = stick_each(
                jax.random.fold_in(key, i[0]), unit(images[i]), patches[i % patches.shape[0]]
            )
            logits = model.apply(variables, x).logits
            return metrics.labels(logits)

        predicted = in_pieces(piece, images.shape[0], 250)
        return jnp.nan_to_num(
            metrics.attack_success(predicted, jnp.full_like(label, 0) + target, label).nt
        )

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        if model.classes < 2:
            raise BadInput(
                f"MESA tries the labels of a model: it needs 2 classes or more, not {model.classes}"
            )
        if len(clean.image) < 2:
            raise BadInput(
                "MESA needs clean images to train and to measure on: the defender has "
                f"{len(clean.image)}"
            )
        if not 1 <= self.side <= min(model.shape[:2]):
            raise BadInput(
                f"patches of side {self.side} do not fit into images of "
                f"{model.shape[0]}×{model.shape[1]}"
            )
        if self.label is not None:
            between("label", self.label, 0, model.classes - 1)
        if not self.betas:
            raise BadInput("betas is empty: give one threshold or more, (0.5, 0.8, 0.9)")
        if self.noise_size < CHUNKS or self.noise_size % CHUNKS:
            raise BadInput(
                f"noise_size {self.noise_size} is not a multiple of {CHUNKS}: each layer reads a "
                "part of it"
            )
