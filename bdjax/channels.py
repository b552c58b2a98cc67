"""Pruning channels of a site: what they do on clean images, masks for each count, and the curve
over all masks in one scan.

A mask is `variables["masks"][site]: [C]` of 0 and 1. `forward` multiplies the site by it, so no
gradient reaches a pruned channel: it stays at zero in any later training. `order: [C]` lists the
channels, first to be pruned first.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdjax.metrics import labels
from bdjax.train import batched, stamped, unit
from bdjax.types import Array, Attack, Model, Split, Variables

Measure = Literal["mean", "l1", "l2", "linf"]


def responses(
    model: Model,
    variables: Variables,
    site: str,
    images: Array,
    measure: Measure = "mean",
    *,
    batch: int = 250,
) -> jax.Array:
    """How strongly each of `images: [N, H, W, C]` drives each channel (last axis) of `site`: `[N,
    C]`, the mean over places, or the ℓ1, ℓ2 or ℓ∞ norm.
    """
    images = jnp.asarray(images)

    def piece(i):
        act = model.apply(variables, unit(images[i])).acts[site]
        act = act.reshape(act.shape[0], -1, act.shape[-1])
        if measure == "mean":
            return act.mean(1)
        return jnp.linalg.norm(act, {"l1": 1, "l2": 2, "linf": jnp.inf}[measure], axis=1)

    return batched(piece, images.shape[0], batch)


def channel_means(
    model: Model, variables: Variables, site: str, images: Array, *, batch: int = 250
) -> jax.Array:
    """Mean activation `[C]` of each channel of `site` over `images: [N, H, W, C]` and places."""
    return responses(model, variables, site, images, batch=batch).mean(0)


def prune(variables: Variables, site: str, mask: jax.Array) -> Variables:
    """`variables` with `mask: [C]` laid over the masks that they have."""
    masks = variables.get("masks", {})
    return {**variables, "masks": {**masks, site: masks.get(site, jnp.ones_like(mask)) * mask}}


def mask_of(order: jax.Array, count: Array | int) -> jax.Array:
    """The mask `[C]` that prunes the first `count` channels of `order: [C]`."""
    return (jnp.argsort(order) >= count).astype(jnp.float32)


def masks_of(order: jax.Array) -> jax.Array:
    """The masks `[C + 1, C]` for the counts 0 … C."""
    return jax.vmap(lambda count: mask_of(order, count))(jnp.arange(order.shape[0] + 1))


def over_points(
    model: Model,
    variables: Variables,
    site: str,
    edit: Callable[[jax.Array, Any], jax.Array],
    points: Any,
    images: Array,
    label: Array,
    *,
    batch: int = 250,
) -> jax.Array:
    """Share `[T]` of `images: [N, H, W, C]` that get `label: [N]` (-1 = not counted) when the
    activation a of `site` becomes `edit(a, point)`, for each of the `T` leading-axis `points`.

    With clean images and their labels: the accuracy. With stamped images and the label aimed at, -1
    where that is the true one: ASR_nt. What stands before the site is computed once a batch: inside
    the loop over points it is dead code.
    """
    images, label = jnp.asarray(images), jnp.asarray(label)

    def piece(i):
        x = unit(images[i])
        act = model.apply(variables, x).acts[site]

        def hits(point):
            out = model.apply(variables, x, edits={site: lambda _: edit(act, point)})
            return labels(out.logits) == label[i]

        return jax.lax.map(hits, points).T

    counted = label >= 0
    hit = batched(piece, images.shape[0], batch) & counted[:, None]
    return hit.sum(0) / counted.sum()


def masked(act: jax.Array, mask: jax.Array) -> jax.Array:
    """`act: [B, ..., C]` with `mask: [C]` laid over it."""
    return act * mask.reshape(*[1] * (act.ndim - 1), -1)


def curve(
    model: Model,
    variables: Variables,
    site: str,
    order: jax.Array,
    images: Array,
    label: Array,
    *,
    batch: int = 250,
) -> jax.Array:
    """`sweep` `[C + 1]` over the nets in which the first 0 … C channels of `order` are pruned."""
    return over_points(model, variables, site, masked, masks_of(order), images, label, batch=batch)


def curves_on_test(
    key: jax.Array,
    model: Model,
    variables: Variables,
    site: str,
    order: jax.Array,
    test: Split,
    attack: Attack | None,
) -> dict[str, jax.Array]:
    """`acc_curve`, `asr_curve: [C + 1]`: accuracy and ASR_nt (first trigger) on `test` by pruned
    count. To report.
    """
    found = {"acc_curve": curve(model, variables, site, order, test.image, test.label)}
    if attack is not None:
        label = jnp.asarray(test.label)
        aimed = attack.success(jnp.asarray(1), label, model.classes)
        aimed = jnp.where(aimed == label, -1, aimed)
        found["asr_curve"] = curve(
            model, variables, site, order, stamped(attack, 1, test.image, key), aimed
        )
    return found


def largest_within(curve: jax.Array, max_drop: Array | float) -> jax.Array:
    """The largest count `[]` up to which every point of `curve: [C + 1]` is at most `max_drop`
    below the first one.
    """
    # shares of images in float32
    within = curve[0] - curve <= jnp.asarray(max_drop, jnp.float32) + 1e-6
    return jnp.cumprod(within.astype(jnp.int32)).sum() - 1


def first_below(curve: jax.Array, bar: Array | float) -> jax.Array:
    """The smallest count `[]` at which `curve: [C + 1]` is at most `bar`; that of its minimum where
    it never is.
    """
    below = curve <= jnp.asarray(bar, jnp.float32) + 1e-6  # shares of images in float32
    return jnp.where(below.any(), jnp.argmax(below), jnp.argmin(curve))
