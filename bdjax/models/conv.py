"""Convolution and max-pooling whose gradients stay fast inside `scan` and `while_loop` on a CPU."""

import flax.linen as nn
from jax import lax

conv_general_dilated = lax.conv_general_dilated


def max_pool(x, window: int, stride: int | None = None, padding: str = "VALID"):
    """Max-pooling over `window`×`window`."""
    step = stride or window
    return nn.max_pool(x, (window, window), (step, step), padding)
