"""Pruning channels of a site: what they do on clean images, masks for each count, and the curve over all masks in one
scan.

A mask is `variables["masks"][site]: [C]` of 0 and 1. `forward` multiplies the site by it, so no gradient reaches a
pruned channel: it stays at zero in any later training. `order: [C]` lists the channels, first to be pruned first.
"""

import jax
import jax.numpy as jnp

from bdjax.train import batched, unit
from bdjax.types import Array, BadInput, Model, Variables


def default_site(model: Model) -> str:
    """The last convolution; the penultimate layer of a net without convolutions."""
    return "conv_last" if "conv_last" in model.sites else "penultimate"


def check_site(model: Model, site: str) -> None:
    """Raises `BadInput` where `model` has no such site."""
    if site not in model.sites:
        raise BadInput(f"the model has no site '{site}'; it has: {', '.join(model.sites)}")


def channel_means(model: Model, variables: Variables, site: str, images: Array, *, batch: int = 250) -> jax.Array:
    """Mean activation `[C]` of each channel (last axis) of `site` over `images: [N, H, W, C]` and places."""
    images = jnp.asarray(images)

    def piece(i):
        act = model.apply(variables, unit(images[i])).acts[site]
        return act.mean(range(1, act.ndim - 1))

    return batched(piece, images.shape[0], batch).mean(0)


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
    """Share `[C + 1]` of `images: [N, H, W, C]` that get `label: [N]` (-1 = not counted) when the first 0 … C channels
    are pruned.

    With clean images and their labels: the accuracy. With stamped images and the label aimed at, -1 where that is the
    true one: ASR_nt. What stands before the site is computed once a batch: inside the loop over masks it is dead code.
    """
    images, label, masks = jnp.asarray(images), jnp.asarray(label), masks_of(order)

    def piece(i):
        x = unit(images[i])
        act = model.apply(variables, x).acts[site]

        def hits(mask):
            logits = model.apply(
                variables, x, edits={site: lambda _: act * mask.reshape(*[1] * (act.ndim - 1), -1)}
            ).logits
            return logits.argmax(-1) == label[i]

        return jax.lax.map(hits, masks).T

    counted = label >= 0
    hit = batched(piece, images.shape[0], batch) & counted[:, None]
    return hit.sum(0) / counted.sum()


def largest_within(curve: jax.Array, max_drop: Array | float) -> jax.Array:
    """The largest count `[]` up to which every point of `curve: [C + 1]` is at most `max_drop` below the first one."""
    within = curve[0] - curve <= jnp.asarray(max_drop, jnp.float32) + 1e-6  # shares of images in float32
    return jnp.cumprod(within.astype(jnp.int32)).sum() - 1
