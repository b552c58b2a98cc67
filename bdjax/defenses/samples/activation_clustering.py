"""Activation clustering: a poisoned class falls into two clusters, what is what it says and what is
stamped.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from bdjax import mesh, metrics
from bdjax.defenses.base import SampleFilter
from bdjax.defenses.parts.classes import activations, along_own, principal
from bdjax.models.layers import check_site
from bdjax.registry import defense, static
from bdjax.train import Recipe, TrainSet, batched, fit, without
from bdjax.types import (
    Array,
    Count,
    Model,
    Range,
    Share,
    Size,
    Split,
    Suspects,
    Variables,
    Weight,
)

Reduce = Literal["ica", "pca"]
Rule = Literal["size", "distance", "silhouette", "exclusionary"]


def unmix(
    key: jax.Array, z: jax.Array, weight: jax.Array, steps: int = 200, tolerance: float = 1e-4
) -> jax.Array:
    """The rotation `[k, k]` of whitened rows `z: [M, k]` to independent components: FastICA, tanh,
    all at once.

    Rows with `weight: [M]` 0 do not count.
    """
    n, weight = jnp.maximum(weight.sum(), 1.0), weight[:, None]

    def decorrelate(m):
        u, _, v = jnp.linalg.svd(m)
        return u @ v

    def step(carry):
        old, _, count = carry
        s = jnp.tanh(z @ old.T)
        new = decorrelate(
            (weight * s).T @ z / n - ((weight * (1 - s**2)).sum(0) / n)[:, None] * old
        )
        return new, jnp.abs(jnp.abs((new * old).sum(1)) - 1).max(), count + 1

    start = decorrelate(jax.random.normal(key, (z.shape[1], z.shape[1])))
    begin = (start, jnp.asarray(jnp.inf), jnp.asarray(0))
    return jax.lax.while_loop(
        lambda carry: (carry[1] > tolerance) & (carry[2] < steps), step, begin
    )[0]


def halfway(centres: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The border between `centres: [2, k]`: z is nearer to the second one where z·`toward: [k]` >
    `border: []`.
    """
    a, b = centres
    return b - a, (b @ b - a @ a) / 2


def two_means(
    key: jax.Array, z: jax.Array, weight: jax.Array, starts: int, steps: int = 50
) -> jax.Array:
    """The centres `[2, k]` of two clusters of the rows `z: [M, k]` that count (`weight: [M]`): the
    best of `starts` runs of Lloyd's algorithm, each from a random row and another one, drawn by its
    squared distance (k-means++).
    """

    def step(centres, _):
        toward, border = halfway(centres)
        second = jnp.where(z @ toward > border, weight, 0.0)
        share = jnp.stack([weight - second, second])
        n = share.sum(1)[:, None]
        return jnp.where(n > 0, share @ z / jnp.maximum(n, 1), centres), None

    def run(key):
        key_a, key_b = jax.random.split(key)
        a = z[jax.random.categorical(key_a, jnp.log(weight))]
        b = z[jax.random.categorical(key_b, jnp.log(weight * ((z - a[None]) ** 2).sum(1)))]
        centres, _ = jax.lax.scan(step, jnp.stack([a, b]), length=steps)
        return centres, (weight * ((z[:, None] - centres[None]) ** 2).sum(-1).min(1)).sum()

    centres, cost = jax.vmap(run)(jax.random.split(key, starts))
    return centres[jnp.argmin(cost)]


def silhouettes(z: jax.Array, group: jax.Array, *, batch: int = 250) -> jax.Array:
    """(b − a) / max(a, b) of each row of `z: [M, k]`: a, b its mean distance to its own cluster and
    to its class's other.

    `group: [M]` = 2·label + cluster; -1 = does not count. 0 where either cluster has no other rows.
    """
    square = (z**2).sum(1)

    def piece(i):
        gap = jnp.sqrt(jnp.maximum(square[i][:, None] + square[None] - 2 * z[i] @ z.T, 0.0))
        own = (group[i][:, None] == group[None]) & (i[:, None] != jnp.arange(z.shape[0])[None])
        other = (group[i] ^ 1)[:, None] == group[None]
        # NaN where there are none
        a, b = jnp.mean(gap, 1, where=own), jnp.mean(gap, 1, where=other)
        counts = (group[i] >= 0) & own.any(1) & other.any(1)
        return jnp.where(counts, (b - a) / jnp.maximum(jnp.maximum(a, b), 1e-12), 0.0)

    return batched(piece, z.shape[0], batch)


@defense("activation-clustering")
class ActivationClustering(SampleFilter):
    """Split each class into two clusters of activations, suspect one of them (Chen et al., 2018,
    arXiv:1811.03728).

    Each label's rows, poisoned ones among them, are reduced to `dims` principal ("pca") or
    independent ("ica") components of their activations at `site`, and clustered by 2-means, the
    best of `starts`. Suspect is, by `rule`:

    - "size": the smaller cluster, if its share of the class is below `size` (0.5: always the
      smaller one);
    - "silhouette": the same, if the class's mean silhouette is above `silhouette` as well;
    - "distance": a cluster whose centre is nearer to that of another class than to its own class's,
      if this does not hold for the cluster beside it (activations as they are);
    - "exclusionary": the clusters that "size" suspects are left out, a fresh net is trained by
      `recipe` on the others and classifies them; one is poison if its own label gets fewer than
      `ratio` times as many votes as the best other.

    `lanes`: classes side by side (None: the device's default). `score`: the row's silhouette,
    negative in the larger cluster. `info`: `share`, `silhouette: [K]` of the smaller cluster and of
    the class, `suspicious: [K, 2]` (larger, smaller), `cluster: [M]` (1: the smaller), and for
    "exclusionary" `own`, `other: [K]`, the votes. A cluster is only suspected where both have rows:
    never in a class of one row, or of equal activations. Rows whose activations are not numbers
    have no score and are not suspects. Train again on `train.without(data, suspects.removed)`.

    Presets: `paper`, independent components; `backdoorbench` and `art`, always the smaller cluster;
    `trojanzoo`, by size and silhouette of independent components; `exclusionary`; `cpu`, the
    paper's with fewer starts.

    Differs from the paper: principal components are the default, as in later libraries, and each
    kind misses what the other finds: whitening, which independent components need, makes 2-means
    miss larger clusters of poison, and without it the smallest ones are missed; clusters are
    left out of one retraining together, not of one each. Fails by design where poison is no
    minority of its class: an all-to-one attack on 10 classes at a rate of 10 % makes half of the
    class.

    Reference: Bryant Chen, Wilka Carvalho, Nathalie Baracaldo, Heiko Ludwig, Benjamin Edwards,
    Taesung Lee, Ian Molloy and Biplav Srivastava, "Detecting Backdoor Attacks on Deep Neural
    Networks by Activation Clustering".
    """

    size: Share = 0.35
    silhouette: Annotated[Array | float, Range(-1, 1)] = 0.1
    ratio: Weight = 1.0
    recipe: Recipe = Recipe()
    reduce: Reduce = static("pca")
    rule: Rule = static("size")
    dims: Size = static(10)
    starts: Size = static(10)
    site: str = static("penultimate")
    lanes: Count | None = static(None)

    used_if = {
        "size": {"rule": ("size", "silhouette", "exclusionary")},
        "silhouette": {"rule": ("silhouette",)},
        "ratio": {"rule": ("exclusionary",)},
        "recipe": {"rule": ("exclusionary",)},
    }
    budget_fields = ("starts", "recipe.epochs")
    presets = {
        "paper": {"reduce": "ica"},
        "backdoorbench": {"size": 0.5},
        "art": {"size": 0.5},
        "trojanzoo": {"reduce": "ica", "rule": "silhouette"},
        "exclusionary": {"rule": "exclusionary"},
        "cpu": {"reduce": "ica", "starts": 3, "recipe": Recipe(epochs=4)},
    }

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, data: TrainSet
    ) -> Suspects:
        key_classes, key_votes = jax.random.split(key)
        x, seen = activations(model, variables, data, self.site)
        label, labels = data.plan.label, jnp.arange(model.classes)

        def one(k):
            weight = (seen & (label == k)).astype(jnp.float32)
            key_axes, key_unmix, key_means = jax.random.split(jax.random.fold_in(key_classes, k), 3)
            mean, axes, variance = principal(key_axes, x, weight, self.dims)
            if self.reduce == "ica":
                axes = axes * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0))[None]
                axes = axes @ unmix(key_unmix, x @ axes - (mean @ axes)[None], weight).T
            return (
                mean,
                axes,
                *halfway(two_means(key_means, x @ axes - (mean @ axes)[None], weight, self.starts)),
            )

        mean, axes, toward, border = mesh.lane_map(one, labels, self.lanes)
        z = along_own(x, label, mean, axes)
        cluster = ((z * toward[label]).sum(1) > border[label]).astype(jnp.int32)
        first = count(seen & (cluster == 0), label, model.classes)
        total = count(seen, label, model.classes)
        # 1 is the smaller one
        cluster = jnp.where((first < total - first)[label], 1 - cluster, cluster)
        smaller = count(seen & (cluster == 1), label, model.classes)
        share = smaller / jnp.maximum(total, 1.0)
        row = silhouettes(z, jnp.where(seen, 2 * label + cluster, -1))
        whole = jax.ops.segment_sum(row, label, model.classes) / jnp.maximum(total, 1.0)

        small = (smaller > 0) & (share < self.size)
        info = {"share": share, "silhouette": whole, "cluster": cluster}
        if self.rule == "distance":
            suspicious = self.elsewhere(x, label, cluster, seen, model.classes)
        else:
            if self.rule == "silhouette":
                small &= whole > self.silhouette
            if self.rule == "exclusionary":
                held = seen & small[label] & (cluster == 1)
                info |= self.votes(key_votes, model, data, held)
                small &= info["own"] < self.ratio * info["other"]
            suspicious = jnp.stack([jnp.zeros_like(small), small], 1)
        info["suspicious"] = suspicious & (smaller > 0)[:, None]
        score = jnp.where(seen, jnp.where(cluster == 1, row, -row), jnp.nan)
        return Suspects(score, seen & info["suspicious"][label, cluster], info)

    def elsewhere(
        self, x: jax.Array, label: jax.Array, cluster: jax.Array, seen: jax.Array, classes: int
    ) -> jax.Array:
        """Which clusters `[K, 2]` lie nearer to the centre of another class than to that of their
        own, unlike the one beside them.
        """
        sums = jax.ops.segment_sum(
            x, jnp.where(seen, 2 * label + cluster, -1), 2 * classes
        ).reshape(classes, 2, -1)
        n = count(seen, 2 * label + cluster, 2 * classes).reshape(classes, 2, 1)
        centres = sums / jnp.maximum(n, 1.0)
        own = sums.sum(1) / jnp.maximum(n.sum(1), 1.0)
        # From the mean of all, so that little is lost in float32.
        centres, own = centres - own.mean(0)[None, None], own - own.mean(0)[None]
        # [K, 2, K]: squared distances less |centre|²
        gap = (own**2).sum(1)[None, None] - 2 * centres @ own.T
        home = jnp.take_along_axis(gap, jnp.arange(classes)[:, None, None], 2)
        away = (gap < home) & (gap[:, ::-1] > home[:, ::-1]) & (n.sum(1) > 0)[None, None, :, 0]
        return away.any(2)

    def votes(
        self, key: jax.Array, model: Model, data: TrainSet, held: jax.Array
    ) -> dict[str, jax.Array]:
        """How a net that was trained without the rows `held: [M]` classifies them: by class, votes
        for the `own` label and for the best `other`: `[K]`.
        """
        fresh, _ = fit(key, model, self.recipe, without(data, held))

        def piece(i):
            x, _ = data.rows(i)
            return jax.nn.one_hot(metrics.labels(model.apply(fresh, x).logits), model.classes)

        label = data.plan.label
        found = jnp.where(held[:, None], batched(piece, label.shape[0], 250), 0.0)
        found = jax.ops.segment_sum(found, label, model.classes)
        return {
            "own": jnp.diag(found),
            "other": jnp.where(jnp.eye(model.classes, dtype=bool), 0.0, found).max(1),
        }

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        check_site(model, self.site)
        self.recipe.check(max(len(clean.label), 1))


def count(rows: jax.Array, group: jax.Array, groups: int) -> jax.Array:
    """How many of `rows: [M]` bool each group has: `[groups]`."""
    return jax.ops.segment_sum(rows.astype(jnp.float32), group, groups)
