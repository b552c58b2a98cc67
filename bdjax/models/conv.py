"""Convolution and max-pooling whose gradients stay fast inside `scan`, `while_loop` and `map` on a
CPU.

XLA:CPU rewrites convolutions to their fast form only in the entry computation, so the gradients
autodiff writes are 20 times slower inside a loop. Here a `custom_vjp` writes them as what is fast
anywhere: plain NHWC/HWIO convolutions and matrix products.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax import mesh

Pair = tuple[int, int]

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# bytes of patches made at once: they are read back from the cache, not from memory
_CACHE = 5_000_000
# GFLOP/s inside loops on two cores that multiply matrices at 200; native / as a product of patches
# and kernel:
#   channels → features   kernel  places   jax 0.10   jax 0.12   with oneDNN (`mesh.tune`)
#       1 → 8               3×3   28×28      3 / 11     4 / 21     21 / 24
#       1 → 16              5×5   28×28     16 / 32    17 / 38     97 / 38
#       1 → 32              5×5   28×28     69 / 28    71 / 26    123 / 55
#       3 → 32              3×3   32×32     21 / 47    75 / 71    139 / 78
#      32 → 32              3×3   16×16     91 / 60     85 / 51     90 / 51
#      32 → 64              5×5   14×14     99 / 136  167 / 126   213 / 133
#      64 → 64              3×3   16×16    106 / 140  170 / 137   211 / 125
#      64 → 128, strides    1×1   32×32     62 / 150   91 / 164    96 / 165
#     128 → 128             3×3   16×16    199 / 160  175 / 100   231 / 161
#     512 → 512             3×3    4×4     185 / 188  187 / 189   258 / 185
# and kernel gradients, images as channels / patches:
#      32 → 64              5×5   14×14     82 / 117  160 / 91    184 / 120
#     512 → 512             3×3    4×4     153 / 175  155 / 174   125 / 174
_OLD = mesh.OLD


class _Window(NamedTuple):
    """How a kernel of `size` walks over the image; static and hashable."""

    size: Pair
    strides: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair

    @property
    def reach(self) -> Pair:
        """Pixels from the first to the last that one window reads, along height and width."""
        (kh, kw), (dh, dw) = self.size, self.dilation
        return (kh - 1) * dh, (kw - 1) * dw


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision=None,
    preferred_element_type=None,
    **others,
) -> jax.Array:
    """`lax.conv_general_dilated`, for Linen's `nn.Conv(conv_general_dilated=...)`, with gradients
    that are fast on a CPU.

    Whatever is not a plain 2-D NHWC/HWIO convolution in float32 takes the native path, and so do
    GPU and TPU, where the compiler places convolutions well, but under `mesh.patches`.
    `mesh.platform()` decides while tracing: `lax.platform_dependent` would put the native path
    under the same `custom_vjp`, and GPUs would lose forward-mode derivatives for nothing.
    """
    native = functools.partial(
        lax.conv_general_dilated, lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation,
        dimension_numbers, feature_group_count, batch_group_count, precision,
        preferred_element_type, **others,
    )  # fmt: skip
    if lhs.ndim != 4 or not (mesh.platform() == "cpu" or mesh.patches.value):
        return native()
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    spread = any(d != 1 for d in lhs_dilation or ())
    groups = feature_group_count
    grouped = lhs.shape[-1] != rhs.shape[-2] * groups or batch_group_count != 1
    typed = (
        preferred_element_type not in (None, lhs.dtype) or not lhs.dtype == rhs.dtype == jnp.float32
    )
    asked = any(value is not None for value in others.values())
    if layout != _NHWC or spread or grouped or typed or asked or 0 in lhs.shape + rhs.shape:
        return native()
    size, dilation = rhs.shape[:2], tuple(rhs_dilation or (1, 1))
    if isinstance(padding, str):
        extent = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:3], extent, window_strides, padding)
    window = _Window(size, tuple(window_strides), tuple(tuple(p) for p in padding), dilation)  # type: ignore[arg-type]
    rhs, window = _trimmed(lhs.shape, rhs, window)
    if groups == 1:
        return _fast_conv(lhs, rhs, window, precision)
    if rhs.shape[2] == 1:  # depthwise: each channel with kernels of its own
        return _depthwise(jnp.repeat(lhs, rhs.shape[3] // groups, -1), rhs, window)
    parts = zip(jnp.split(lhs, groups, -1), jnp.split(rhs, groups, -1), strict=True)
    return jnp.concatenate([_fast_conv(x, kernel, window, precision) for x, kernel in parts], -1)


def _trimmed(shape: Sequence[int], kernel: jax.Array, window: _Window) -> tuple[jax.Array, _Window]:
    """A kernel without the rows and columns that see nothing but padding, as most do of an image of
    one pixel, and how it walks.
    """
    kept, padding = [], []
    for n, k, stride, (low, high), step in zip(shape[1:3], *window):
        starts = np.arange((n + low + high - (k - 1) * step - 1) // stride + 1) * stride - low
        places = starts[:, None] + np.arange(k) * step
        seen = np.flatnonzero(((places >= 0) & (places < n)).any(0))
        first, last = (seen[0], seen[-1]) if len(seen) else (0, k - 1)
        kept.append(slice(int(first), int(last) + 1))
        padding.append((int(low - first * step), int(high - (k - 1 - last) * step)))
    part = kernel[*kept]
    return part, window._replace(size=part.shape[:2], padding=tuple(padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fast_conv(x: jax.Array, kernel: jax.Array, window: _Window, precision) -> jax.Array:
    return _plain(x, kernel, window, precision)


def _forward(x, kernel, window, precision):
    return _plain(x, kernel, window, precision), (x, kernel)


def _backward(window, precision, saved, g):
    x, kernel = saved  # a gradient nobody reads is dead code under jit
    return _input_gradient(g, kernel, x.shape, window, precision), _kernel_gradient(
        x, g, window, precision
    )


_fast_conv.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    """Each channel of `x: [B, H, W, C]` with its own kernel, `[kh, kw, 1, C]`: a sum of kh·kw
    shifted products, one pass over memory, 100 times as fast as the native form inside a loop.
    """
    weights = kernel.reshape(-1, kernel.shape[-1])
    parts = [s * w for s, w in zip(_shifts(x, window), jnp.expand_dims(weights, (1, 2, 3)))]
    return functools.reduce(jnp.add, parts)


def _depthwise_forward(x, kernel, window):
    return _depthwise(x, kernel, window), (x, kernel)


def _depthwise_backward(window, saved, g):
    x, kernel = saved
    back = _back(g, x.shape, window)
    spread = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *_holes(window.strides), (0, 0, 0)])
    seen = jnp.stack([(s * g).sum((0, 1, 2)) for s in _shifts(x, window)])
    return _depthwise(spread, kernel[::-1, ::-1], back), seen.reshape(kernel.shape)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _holes(strides: Pair) -> list[tuple[int, int, int]]:
    """Zeros between the places of an output gradient, where the window made larger steps."""
    return [(0, 0, stride - 1) for stride in strides]


def _plain(x, kernel, window: _Window, precision, spread: Pair = (1, 1)) -> jax.Array:
    """The convolution itself; `spread` dilates the input."""
    # For a kernel larger than the image XLA has no library: its own loops have 4 to 30 GFLOP/s.
    larger = any(k > n for k, n in zip(window.size, x.shape[1:3], strict=True))
    if larger or mesh.patches.value:
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *_holes(spread), (0, 0, 0)])
        return _patches_product(x, kernel, window, precision)
    if spread == (1, 1) and _by_patches(kernel.shape, window.strides):
        return _patches_product(x, kernel, window, precision)
    how = window.strides, window.padding, spread, window.dilation
    return lax.conv_general_dilated(x, kernel, *how, _NHWC, precision=precision)


def _by_patches(kernel: Sequence[int], strides: Pair) -> bool:
    """Whether patches are faster than the native convolution with a kernel of this shape."""
    *size, channels, features = kernel
    if channels == 1:
        return features <= 16 and not mesh.onednn()
    if tuple(size) == (1, 1) != strides:
        return True
    return _OLD and features <= 64 and (features > 32 or channels <= 3)


def _padded(x: jax.Array, window: _Window) -> jax.Array:
    return lax.pad(
        x,
        jnp.zeros((), x.dtype),
        ((0, 0, 0), (*window.padding[0], 0), (*window.padding[1], 0), (0, 0, 0)),
    )


def _seen(x: jax.Array, window: _Window, i: int, j: int) -> jax.Array:
    """What the kernel's pixel (i, j) sees of the padded `x`: `[B, Ho, Wo, C]`."""
    (b, h, w, c), (rh, rw) = x.shape, window.reach
    i, j = i * window.dilation[0], j * window.dilation[1]
    return lax.slice(x, (0, i, j, 0), (b, h - rh + i, w - rw + j, c), (1, *window.strides, 1))


def _shifts(x: jax.Array, window: _Window) -> list[jax.Array]:
    x = _padded(x, window)
    return [_seen(x, window, i, j) for i, j in np.ndindex(*window.size)]


def _fit(images: int, floats: int) -> int:
    """How many images' patches, of `floats` each, a CPU's cache holds: a divisor of `images`."""
    if mesh.platform() != "cpu":
        return images
    most = max(1, _CACHE // (4 * floats))
    return max(n for n in range(1, min(images, most) + 1) if images % n == 0)


def _patches_product(x, kernel, window: _Window, precision) -> jax.Array:
    """The convolution as a product of patches `[B, Ho, Wo, kh·kw·C]` and kernel, a cacheful of
    images at a time.
    """
    matrix = kernel.reshape(-1, kernel.shape[-1])

    def product(x):
        return jnp.matmul(jnp.concatenate(_shifts(x, window), -1), matrix, precision=precision)

    b, out = x.shape[0], jax.eval_shape(product, x).shape
    n = _fit(b, out[1] * out[2] * matrix.shape[0])
    return (
        product(x) if n == b else lax.map(product, x.reshape(b // n, n, *x.shape[1:])).reshape(out)
    )


def _kernel_gradient(x, g, window: _Window, precision) -> jax.Array:
    """What each kernel pixel sees times the output gradient `g: [B, Ho, Wo, O]`, summed over images
    and places.
    """
    (b, _, _, c), o, size, places = x.shape, g.shape[-1], window.size, (0, 1, 2)
    dot = functools.partial(lax.dot_general, precision=precision)
    # one long row per kernel pixel: patches of one channel would be gathered float by float
    if c == 1:
        rows = jnp.stack([s[..., 0] for s in _shifts(x, window)])
        return dot(rows, g, (((1, 2, 3), places), ((), ()))).reshape(*size, c, o)

    def patches(x, g):
        return dot(
            jnp.concatenate(_shifts(x, window), -1), g, ((places, places), ((), ()))
        ).reshape(*size, c, o)

    # images as channels: a plain convolution whose kernel is the output gradient
    def swapped(x, g):
        x, g = _padded(x, window).transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
        out = lax.conv_general_dilated(
            x, g, window.dilation, "VALID", None, None, _NHWC, precision=precision
        )
        return out.transpose(1, 2, 0, 3)

    # Swapped is fast while images and gradients take less than half of the cache, but not with
    # strides, a single pixel, or a wide kernel that sees few places.
    wide = c * o >= 64 * 64
    if _OLD or wide or window.strides != (1, 1) or size == (1, 1) or mesh.patches.value:
        product, n = patches, _fit(b, size[0] * size[1] * c * g.shape[1] * g.shape[2])
    else:
        product, n = swapped, _fit(b, 5 * (x.size + g.size) // (2 * b))
    if n == b:
        return product(x, g)
    parts = x.reshape(b // n, n, *x.shape[1:]), g.reshape(b // n, n, *g.shape[1:])
    zero = jnp.zeros((*size, c, o), g.dtype)
    return lax.scan(lambda total, part: (total + product(*part), None), zero, parts)[0]


def _input_gradient(g, kernel, shape, window: _Window, precision) -> jax.Array:
    """A convolution of the output gradient, spread by the strides, with the flipped kernel, its
    channels swapped.
    """
    (kh, kw), c, back = window.size, shape[-1], _back(g, shape, window)
    # the product first, then kh·kw shifted sums; slower from 3 channels on
    if window.strides == (1, 1) and c == 1:
        every = _padded(
            jnp.matmul(
                g, kernel.transpose(3, 0, 1, 2).reshape(g.shape[-1], -1), precision=precision
            ),
            back,
        )
        parts = [every[..., k : k + 1] for k in range(kh * kw)]
        pixels = reversed(list(np.ndindex(kh, kw)))
        return functools.reduce(
            jnp.add, [_seen(part, back, i, j) for part, (i, j) in zip(parts, pixels, strict=True)]
        )
    return _plain(g, kernel[::-1, ::-1].swapaxes(2, 3), back, precision, window.strides)


def _back(g: jax.Array, shape: Sequence[int], window: _Window) -> _Window:
    """How the flipped kernel walks over the output gradient, spread by the strides."""
    lows = [reach - low for reach, (low, _) in zip(window.reach, window.padding, strict=True)]
    spreads = [(n - 1) * stride + 1 for n, stride in zip(g.shape[1:3], window.strides, strict=True)]
    highs = [shape[1 + d] + window.reach[d] - spreads[d] - lows[d] for d in (0, 1)]
    return _Window(window.size, (1, 1), ((lows[0], highs[0]), (lows[1], highs[1])), window.dilation)


def max_pool(
    x: jax.Array, window: int, stride: int | None = None, padding: str = "VALID"
) -> jax.Array:
    """Max-pooling over `window`×`window` of `x: [B, H, W, C]`; tied maxima share the gradient.

    Windows that do not overlap are a maximum of strided slices: the gradient of `reduce_window` is
    slow on a CPU.
    """
    step = stride or window
    _, h, w, _ = x.shape
    whole = padding == "VALID" or (padding == "SAME" and h % window == w % window == 0)
    if step != window or not whole:
        return nn.max_pool(x, (window, window), (step, step), padding)
    tiles = [
        x[:, i : h - h % window : window, j : w - w % window : window]
        for i, j in np.ndindex(window, window)
    ]
    return functools.reduce(jnp.maximum, tiles)
