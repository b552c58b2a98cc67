"""A net that is shown a part of each image only: `variables["view"]: [H, W, C]` multiplies the
pixels, in training and at test.
"""

import functools

import jax.numpy as jnp

from bdjax.types import Model


@functools.lru_cache(maxsize=64)
def viewed(model: Model) -> Model:
    """`model` behind a view; the view is a variable, so that it can be traced, vmapped and saved.
    It is never trained.
    """

    def init(key):
        return {**model.init(key), "view": jnp.ones(model.shape)}

    def apply(variables, x, **options):
        inner = {name: value for name, value in variables.items() if name != "view"}
        out = model.apply(inner, x * variables["view"][None], **options)
        return out._replace(variables={**out.variables, "view": variables["view"]})

    return model._replace(init=init, apply=apply)
