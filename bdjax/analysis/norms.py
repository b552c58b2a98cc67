"""How large activations are: norms of an image's activations, and how well each norm tells stamped
from clean images.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bdjax import metrics
from bdjax.models.layers import check_site
from bdjax.train import batched, unit
from bdjax.types import Array, Model, Variables


class Norms(NamedTuple):
    """One value an image (`[N]`) for each of the norms ℓ1 = Σ|a|, ℓ2 = √Σa², ℓ∞ = max|a|."""

    l1: jax.Array
    l2: jax.Array
    linf: jax.Array


def norms(
    model: Model,
    variables: Variables,
    site: str,
    images: Array,
    minus: Array | None = None,
    *,
    batch: int = 250,
) -> Norms:
    """Norms of the activations of `site` on each of `images: [N, H, W, C]`; with `minus: [N, H, W,
    C]`, of what is left when the activations on those are taken away: what a trigger adds.
    """
    check_site(model, site)
    images = jnp.asarray(images)

    def piece(i):
        act = model.apply(variables, unit(images[i])).acts[site]
        if minus is not None:
            act = act - model.apply(variables, unit(jnp.asarray(minus)[i])).acts[site]
        size = jnp.abs(act.reshape(act.shape[0], -1))
        return Norms(size.sum(1), jnp.sqrt((size**2).sum(1)), size.max(1))

    return batched(piece, images.shape[0], batch)


def separation(clean: Norms, stamped: Norms) -> Norms:
    """The AUROC `[]` of each norm: 1 if every stamped image has a larger one than every clean
    image, 0.5 by chance.
    """
    return Norms(*(metrics.auroc(low, high) for low, high in zip(clean, stamped)))
