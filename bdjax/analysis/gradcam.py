"""Where a net looks: Grad-CAM for any class and site, and how much of it lies inside the trigger's
box.
"""

import jax
import jax.numpy as jnp

from bdjax.models.layers import check_site
from bdjax.train import batched, unit
from bdjax.types import Array, BadInput, Model, Variables


def grad_cam(
    model: Model,
    variables: Variables,
    images: Array,
    label: Array | int,
    site: str = "conv_last",
    *,
    batch: int = 100,
) -> jax.Array:
    """Saliency `[N, H, W]` ≥ 0 of class `label` (`[N]`, or one for all) in `images: [N, H, W, C]`
    (Selvaraju et al., 2017, arXiv:1610.02391).

    L = ReLU(Σ_k w_k·A_k) with w_k the mean over places of ∂logit/∂A_k, and A the activations of
    `site`, channel by channel; L is brought to the images' size by bilinear interpolation.
    """
    check_site(model, site)
    images = jnp.asarray(images)
    labels = jnp.broadcast_to(jnp.asarray(label), images.shape[:1])

    def piece(i):
        x = unit(images[i])
        act = model.apply(variables, x).acts[site]
        if act.ndim != 4:
            raise BadInput(
                f"Grad-CAM needs activations with places, [H, W, C]: site '{site}' has "
                f"{act.shape[1:]}"
            )

        def logit(act):
            logits = model.apply(variables, x, edits={site: lambda _: act}).logits
            return jnp.take_along_axis(logits, labels[i][:, None], 1).sum()

        weight = jax.grad(logit)(act).mean((1, 2), keepdims=True)
        cam = jax.nn.relu((weight * act).sum(-1))
        return jax.image.resize(cam, x.shape[:3], "bilinear")

    return batched(piece, images.shape[0], batch)


def trigger_box(clean: Array, stamped: Array) -> jax.Array:
    """The smallest box `[N, H, W]` bool around the pixels in which `stamped` differs from `clean:
    [N, H, W, C]`.
    """
    differs = (jnp.abs(unit(clean) - unit(stamped)) > 1 / 512).any(-1)

    def span(lines):
        return (jnp.cumsum(lines, 1) > 0) & (jnp.cumsum(lines[:, ::-1], 1)[:, ::-1] > 0)

    return span(differs.any(2))[:, :, None] & span(differs.any(1))[:, None, :]


def mass_inside(cam: jax.Array, box: jax.Array) -> jax.Array:
    """Share `[N]` of the saliency `cam: [N, H, W]` that lies inside `box: [N, H, W]`; NaN where
    there is no saliency.
    """
    total = cam.sum((1, 2))
    return jnp.where(total > 0, (cam * box).sum((1, 2)) / jnp.where(total > 0, total, 1.0), jnp.nan)
