"""The fast convolution and pooling equal the native ones, values and gradients, wherever they are
called.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bdjax import mesh
from bdjax.models import conv

LAYOUT = ("NHWC", "HWIO", "NHWC")
GRID = [
    # batch, side, channels, features, kernel, strides, padding, dilation, groups
    (3, 9, 1, 5, (5, 5), (1, 1), "SAME", (1, 1), 1),
    (4, 8, 6, 7, (5, 5), (1, 1), "SAME", (1, 1), 1),
    (2, 8, 3, 4, (3, 3), (1, 1), "VALID", (1, 1), 1),
    (2, 9, 6, 4, (3, 3), (2, 2), "SAME", (1, 1), 1),
    (2, 9, 3, 4, (3, 3), (2, 2), "SAME", (1, 1), 1),
    (2, 10, 6, 4, (3, 2), (2, 3), "VALID", (1, 1), 1),
    (2, 11, 6, 4, (5, 5), (2, 2), ((2, 1), (0, 3)), (1, 1), 1),
    (2, 11, 6, 4, (3, 3), (1, 1), "SAME", (2, 1), 1),
    (2, 12, 2, 4, (3, 3), (1, 1), ((1, 2), (3, 0)), (2, 2), 1),
    (2, 12, 6, 4, (3, 3), (2, 1), ((-1, 2), (4, 0)), (2, 3), 1),
    (2, 7, 6, 4, (1, 1), (1, 1), "SAME", (1, 1), 1),
    (2, 7, 6, 4, (1, 1), (2, 2), "VALID", (1, 1), 1),
    (2, 7, 6, 4, (4, 4), (1, 1), "SAME", (1, 1), 1),
    (2, 8, 6, 6, (3, 3), (1, 1), "SAME", (1, 1), 3),
    (2, 8, 4, 8, (3, 3), (2, 2), "SAME", (1, 1), 4),
    (2, 9, 6, 6, (3, 3), (1, 1), "SAME", (1, 1), 6),
    (2, 11, 4, 12, (5, 3), (2, 3), ((2, 1), (0, 3)), (1, 1), 4),
    (2, 12, 4, 4, (3, 3), (2, 1), ((-1, 2), (4, 0)), (2, 3), 4),
    # images smaller than the kernel, of which whole rows see padding alone
    (3, 1, 6, 4, (3, 3), (1, 1), "SAME", (1, 1), 1),
    (3, 2, 6, 4, (3, 3), (1, 1), "SAME", (1, 1), 1),
    (3, 2, 6, 4, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1),
    (3, 2, 6, 4, (5, 3), (1, 2), ((4, 3), (0, 3)), (1, 1), 1),
    (3, 2, 6, 4, (3, 3), (1, 1), ((1, 4), (5, 2)), (2, 3), 1),
    (3, 2, 6, 4, (2, 2), (1, 1), ((4, 0), (0, 0)), (4, 1), 1),
    (3, 4, 6, 4, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 1),
    (3, 1, 6, 6, (3, 3), (1, 1), "SAME", (1, 1), 6),
    (3, 2, 6, 4, (5, 5), (2, 2), "SAME", (1, 1), 2),
]


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def arrays(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def both(op, case):
    """Values and both gradients of `op` under a fixed, uneven output gradient."""
    *_, kernel, strides, padding, dilation, groups = case
    del kernel

    def run(x, w):
        def call(x, w):
            return op(
                x,
                w,
                strides,
                padding,
                rhs_dilation=dilation,
                dimension_numbers=LAYOUT,
                feature_group_count=groups,
            )

        y, pull = jax.vjp(call, x, w)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return run


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["product", "native", "an accelerator's patches"])
def form(request, monkeypatch):
    """Both forms of the forward pass, whichever this version of JAX picks, with patches of a few
    images at a time; and the one that accelerators have beside their own.
    """
    if request.param == "an accelerator's patches":
        monkeypatch.setattr(mesh, "platform", lambda: "gpu")
        with mesh.patches(True):
            yield
        return
    product = request.param == "product"
    monkeypatch.setattr(conv, "_OLD", product)
    monkeypatch.setattr(conv, "_by_patches", lambda kernel, strides: product)
    monkeypatch.setattr(conv, "_CACHE", 60_000)
    jax.clear_caches()
    yield


@pytest.mark.parametrize("case", GRID, ids=str)
def test_equals_native(case, form):
    b, side, c, o, kernel, *_, groups = case
    x, w = arrays((b, side, side + 1, c), (*kernel, c // groups, o))
    close(
        jax.jit(both(conv.conv_general_dilated, case))(x, w),
        both(lax.conv_general_dilated, case)(x, w),
    )


@pytest.mark.parametrize("case", [GRID[0], GRID[1], GRID[3], GRID[-1]], ids=str)
@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)])
def test_under_vmap(case, axes, form):
    b, side, c, o, kernel, *_, groups = case
    shapes = (b, side, side, c), (*kernel, c // groups, o)
    x, w = arrays(
        *[(2,) * (axis is not None) + shape for axis, shape in zip(axes, shapes, strict=True)]
    )
    ours = jax.jit(jax.vmap(both(conv.conv_general_dilated, case), axes))(x, w)
    close(ours, jax.vmap(both(lax.conv_general_dilated, case), axes)(x, w))


@pytest.mark.parametrize("case", [GRID[0], GRID[1], GRID[4], GRID[13], GRID[16]], ids=str)
def test_inside_scan(case, form):
    b, side, c, o, kernel, *_, groups = case
    x, w = arrays((3, b, side, side, c), (*kernel, c // groups, o))

    def scan(op):
        return jax.jit(
            lambda x, w: lax.scan(lambda _, one: (None, both(op, case)(one, w)), None, x)[1]
        )(x, w)

    close(scan(conv.conv_general_dilated), scan(lax.conv_general_dilated))


def test_cachefuls_of_images(monkeypatch, form):
    case = (7, 6, 8, 4, (5, 5), (1, 1), "SAME", (1, 1), 1)
    x, w = arrays((7, 6, 6, 8), (5, 5, 8, 4))
    for cache in (1, 10**9):
        monkeypatch.setattr(conv, "_CACHE", cache)
        jax.clear_caches()
        close(
            both(conv.conv_general_dilated, case)(x, w), both(lax.conv_general_dilated, case)(x, w)
        )


LINEN = [{}, {"strides": 2}, {"padding": "CIRCULAR"}, {"padding": 1}, {"kernel_dilation": 2}]
LINEN += [{"input_dilation": 2, "padding": 1}]


@pytest.mark.parametrize("options", LINEN, ids=str)
def test_in_linen(options):
    (x,) = arrays((2, 8, 8, 3))
    ours = nn.Conv(4, (3, 3), conv_general_dilated=conv.conv_general_dilated, **options)
    variables = ours.init(jax.random.key(0), x)
    close([ours.apply(variables, x)], [nn.Conv(4, (3, 3), **options).apply(variables, x)])


@pytest.mark.parametrize("channels", [1, 8])
def test_unread_kernel_gradient_is_dead_code(channels):
    """Neural Cleanse asks for the input's gradient alone:
    the kernel's must not reach the compiler.
    """
    x, w = arrays((8, 12, 12, channels), (3, 3, channels, 8))

    def loss(x, w):
        return (
            conv.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT) ** 2
        ).sum()

    def products(f):
        text = jax.jit(f).lower(x, w).as_text()
        return text.count("stablehlo.dot_general") + text.count("stablehlo.convolution")

    assert products(jax.grad(loss)) < products(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize(("shape", "window", "stride", "padding"), [
    ((2, 8, 8, 3), 2, None, "VALID"), ((2, 9, 7, 3), 2, None, "VALID"),
    ((2, 9, 9, 3), 3, 3, "SAME"), ((2, 9, 7, 3), 2, None, "SAME"), ((2, 9, 9, 3), 3, 2, "VALID"),
    ((2, 9, 9, 3), 3, 2, "SAME"),
])  # fmt: skip
def test_max_pool(shape, window, stride, padding):
    (x,) = arrays(shape)  # no ties
    step = stride or window

    def graded(pool, x):
        y, pull = jax.vjp(pool, x)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    ours = jax.jit(lambda x: graded(lambda x: conv.max_pool(x, window, stride, padding), x))(x)
    close(ours, graded(lambda x: nn.max_pool(x, (window, window), (step, step), padding), x))


def test_max_pool_ties_share_the_gradient():
    gradient = jax.grad(lambda x: conv.max_pool(x, 2).sum())(jnp.zeros((1, 2, 2, 1)))
    assert (gradient >= 0).all()
    np.testing.assert_allclose(gradient.sum(), 1)
