"""STRIP: an input whose label survives any superimposed image carries a trigger."""

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bdjax import metrics
from bdjax.defenses.base import InputFilter
from bdjax.defenses.parts.boundary import quantile_boundary, realised
from bdjax.registry import defense, static
from bdjax.train import batched, unit
from bdjax.types import (
    MOST,
    Array,
    BadInput,
    Count,
    Metric,
    Model,
    Pixels,
    Range,
    Scores,
    Share,
    Size,
    Split,
    Variables,
    Weight,
)

Blend = Literal["sum", "average", "clipped"]
Boundary = Literal["normal", "empirical"]


def superimpose(
    x: jax.Array, overlay: jax.Array, blend: Blend = "sum", alpha: Array | float = 1.0
) -> jax.Array:
    """x + α·t, unclipped; "average": (x + α·t)/(1 + α); "clipped": cut off at 1."""
    both = x + alpha * overlay
    if blend == "average":
        return both / (1 + alpha)
    return jnp.clip(both, 0, 1) if blend == "clipped" else both


def entropies(
    key: jax.Array,
    model: Model,
    variables: Variables,
    x: Array,
    overlays: Array,
    n: int,
    *,
    blend: Blend = "sum",
    alpha: Array | float = 1.0,
    base: Array | float = 2.0,
    batch: int = 500,
) -> jax.Array:
    """Entropy of the prediction on each of `n` replicas of each input: `[B, n]` (its mean over n is
    STRIP's H).

    `x: [B, H, W, C]`, `overlays: [M, H, W, C]`, both uint8 or in [0, 1]. Each input gets its own n
    different overlays, in random order: the columns up to i are what n = i would have given. The
    B·n replicas run through the model `batch` at a time.
    """
    x, overlays = jnp.asarray(x), jnp.asarray(overlays)
    m = overlays.shape[0]
    key_order, key_first = jax.random.split(key)
    # A window of one shuffled order: different overlays for an input, without a permutation for
    # each.
    order = jax.random.permutation(key_order, m)
    first = jax.random.randint(key_first, (x.shape[0], 1), 0, m)
    drawn = order[(first + jnp.arange(n)[None]) % m].reshape(-1)

    def piece(i):
        replicas = superimpose(unit(x[i // n]), unit(overlays[drawn[i]]), blend, alpha)
        logits = model.apply(variables, replicas).logits
        # Compiled for a CPU, softmax may turn NaN logits into numbers.
        bits = metrics.entropy(jax.nn.softmax(logits)) / jnp.log2(base)
        return jnp.where(jnp.isfinite(logits).all(-1), bits, jnp.nan)

    return batched(piece, x.shape[0] * n, batch).reshape(-1, n)


class Spread(NamedTuple):
    """`sigma: [n]`, the standard deviation of H over the inputs for N = 1 … n replicas; `enough:
    []`, the N chosen.
    """

    sigma: jax.Array
    enough: jax.Array


def spread(entropies: jax.Array, flat: Array | float = 0.01) -> Spread:
    """How σ falls with N, and the N ≥ 2 from which its curve is flat: no further replica changes it
    by more than the share `flat` of itself (n: it is not flat yet).

    `entropies: [B, n]` of clean inputs, one column a replica; inputs with values that are not
    numbers do not count.
    """
    n = jnp.arange(1, entropies.shape[1] + 1)
    sigma = jnp.nanstd(jnp.cumsum(entropies, 1) / n[None].astype(entropies.dtype), axis=0)
    steep = jnp.abs(jnp.diff(sigma)) > jnp.asarray(flat, sigma.dtype) * sigma[:-1]
    return Spread(sigma, jnp.clip(jnp.max(jnp.where(steep, n[1:], 2), initial=2), 1, n[-1]))


def normal_boundary(mean: jax.Array, std: jax.Array, frr: Array | float) -> jax.Array:
    """The quantile `[]` at `frr` of a normal distribution."""
    return mean + std * jax.scipy.special.ndtri(jnp.asarray(frr, jnp.float32))


def below(entropy: jax.Array, boundary: jax.Array) -> jax.Array:
    """Which inputs, `entropy: [B]`, a boundary flags; none, where it is not above 0."""
    return (entropy <= boundary) & (boundary > 0)


@defense("strip")
class Strip(InputFilter):
    """Superimpose clean images: a prediction that stays certain betrays a trigger (Gao et al.,
    2019, arXiv:1902.06531).

    H = (1/N)·Σₙ −Σₖ p·log p over `n` = N replicas x + α·t of the input, t the defender's clean
    images; flagged if H ≤ boundary, the quantile at `frr`, the false rejection rate to accept, of H
    on clean inputs: of a normal distribution fitted to them (`boundary` "normal", whose realised
    rate may differ) or of themselves ("empirical", where they are not normal: never more than `frr`
    of them). A boundary at or below 0 (a small `frr`, a wide spread, entropies of 0) is no valid
    fit and flags nothing.

    The defender's images are split at random: `inputs` of them (None: half) fit the boundary, the
    others are overlays. `blend`: "sum" (unclipped, values up to 1 + α), "average" or "clipped";
    `alpha`: weight α of the overlay; `base` of the logarithm; `batch`: the most replicas at a time.
    `images: [M, H, W, C]`: the paper's protocol: these images, which the victim was trained on,
    take the place of the defender's. `info`: `mean`, `std` and `clean: [inputs]`, the entropies
    behind the boundary; `sigma: [n]`, their spread for 1 … n replicas, and `enough`, the N by its
    slope (`spread`); `valid_fit`, 0 where the boundary is not above 0; `boundary.realised`, the
    rate on the inputs behind the boundary. An input whose logits are not numbers has no score and
    is not flagged.

    Presets: `paper` (2,000 inputs fit the boundary), `backdoorbench` (quantile at 0.1 of 100
    inputs), `cpu` (N = 50).

    Differs from the paper: its overlays and its inputs are training images, ours are held out
    unless `images` are given; overlays of one input are all different. `backdoorbench` adds
    normalised images, which is the same only for models that do not normalise.

    Reference: Yansong Gao, Change Xu, Derui Wang, Shiping Chen, Damith C. Ranasinghe and Surya
    Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", In Annual Computer
    Security Applications Conference.
    """

    frr: Share = 0.01
    alpha: Weight = 1.0
    base: Annotated[Array | float, Range(1.001, MOST)] = 2.0
    images: Pixels | None = None
    n: Size = static(100)
    inputs: Count | None = static(None)
    blend: Blend = static("sum")
    boundary: Boundary = static("normal")
    batch: Count = static(500)

    measures = (
        Metric("mean", label="mean entropy"),
        Metric("std", label="s.d. of the entropy"),
        Metric("enough", "replicas", hint="N from which the spread of the entropies is flat"),
        Metric("valid_fit", hint="0: the fitted boundary is at or below 0, where no entropy is; "
               "nothing is flagged"),
    )  # fmt: skip
    budget_fields = ("n", "inputs")
    presets = {
        "paper": {"inputs": 2000},
        "backdoorbench": {"frr": 0.1, "inputs": 100, "boundary": "empirical"},
        "cpu": {"n": 50},
    }

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split, x: Array
    ) -> Scores:
        key_split, key_clean, key_x = jax.random.split(key, 3)
        pool = jnp.asarray(clean.image if self.images is None else self.images)
        held, overlays = jnp.split(
            pool[jax.random.permutation(key_split, len(pool))], [self._inputs(pool)]
        )

        def score(key, images):
            options = {
                "blend": self.blend,
                "alpha": self.alpha,
                "base": self.base,
                "batch": self.batch,
            }
            return entropies(key, model, variables, images, overlays, self.n, **options)

        replicas = score(key_clean, held)
        benign = replicas.mean(1)
        mean, std = benign.mean(), benign.std()
        boundary = (
            normal_boundary(mean, std, self.frr)
            if self.boundary == "normal"
            else quantile_boundary(benign, self.frr)
        )
        h = score(key_x, x).mean(1)
        info = {"mean": mean, "std": std, "clean": benign, **spread(replicas)._asdict()}
        info |= {"valid_fit": (boundary > 0).astype(jnp.float32)}
        return Scores(h, boundary, below(h, boundary), info | realised(below(benign, boundary)))

    def _inputs(self, pool: Array) -> int:
        return len(pool) // 2 if self.inputs is None else self.inputs

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        pool = clean.image if self.images is None else self.images
        have, held = len(pool), self._inputs(pool)
        if jnp.shape(pool)[1:] != tuple(model.shape):
            raise BadInput(
                f"STRIP's images must have the model's shape {model.shape}, not "
                f"{jnp.shape(pool)[1:]}"
            )
        if held < 2:
            raise BadInput(
                f"STRIP fits its boundary to clean inputs: it needs 2 or more, not {held} (of "
                f"{have} clean images)"
            )
        if self.n > have - held:
            raise BadInput(
                f"STRIP draws {self.n} different overlays, but of {have} clean images "
                f"{max(have - held, 0)} are left after {held} fit the boundary: lower n or inputs"
            )
