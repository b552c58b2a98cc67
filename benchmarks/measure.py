"""Fair timing on a noisy machine: alternating runs, medians, and the machine's own matmul rate in the same run."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from bdjax.types import Model

REPEATS = 5


class Case(NamedTuple):
    """One line of a benchmark. `flops`: multiply-adds of matrix products and convolutions × 2 that the work asks for;
    `items`: victims, shadow nets, … that share the work, where the case shows what one more costs.
    """

    name: str
    ours: Callable[[], Any]
    rival: Callable[[], Any] | None
    flops: float | None = None
    items: int | None = None


class Result(NamedTuple):
    """Medians in seconds; `ratio` = rival / ours; `matmul_share`: our rate as a share of the machine's float32 matmul
    rate; `item_s`: ours, divided by the items.
    """

    case: str
    ours_s: float
    rival_s: float | None
    ratio: float | None
    matmul_share: float | None
    device: str
    item_s: float | None = None


def seconds(fn: Callable[[], Any]) -> float:
    """One run, to the end of its asynchronous work."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def matmul(n: int = 2048) -> tuple[Callable[[], Any], float]:
    """A float32 matrix product of side `n`, and its flops."""
    a = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a), 2.0 * n**3


def run(case: Case, device: str, repeats: int = REPEATS) -> Result:
    """Alternates ours, rival and matmul `repeats` times after a warm-up of each."""
    product, product_flops = matmul()
    parts = [case.ours, product] + ([case.rival] if case.rival else [])
    for part in parts:
        seconds(part)
    taken = [[seconds(part) for part in parts] for _ in range(repeats)]
    ours, square, *rest = (statistics.median(column) for column in zip(*taken, strict=True))
    rival = rest[0] if rest else None
    ratio = statistics.median(row[2] / row[0] for row in taken) if rest else None
    share = None if case.flops is None else case.flops / ours / (product_flops / square)
    return Result(case.name, ours, rival, ratio, share, device, ours / case.items if case.items else None)


def forward_flops(model: Model, images: int) -> float:
    """The flops of the logits of `images` images."""
    x = jnp.zeros((images, *model.shape))
    return flops(lambda v, x: model.apply(v, x).logits, jax.eval_shape(model.init, jax.random.key(0)), x)


def flops(fn: Callable, *args: Any) -> float:
    """The flops of all matrix products and convolutions in `fn(*args)`, scans counted to their length."""
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _flops(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.invars]
        out = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += 2.0 * out.size * _product(shapes[0][i] for i in contracted)  # type: ignore[union-attr]
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = shapes[1]
            channels_out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * out.size * _product(kernel) / channels_out  # type: ignore[union-attr]
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, core.Jaxpr):
                    total += _flops(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def _product(values: Any) -> float:
    result = 1.0
    for value in values:
        result *= value
    return result
