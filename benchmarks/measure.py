"""Fair timing on a noisy machine: alternating runs, medians, and the machine's own matmul rate in
the same run.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bdjax import mesh, registry
from bdjax.plots import power_law
from bdjax.sweep import commit, device_name
from bdjax.target import flops
from bdjax.types import Model


class Case(NamedTuple):
    """One point of a curve. `series`: what grows, such as "STRIP, replicas"; `size`: how large it
    is here; `program`: pure, of `args`; `rival`: the same work in PyTorch; `flops`: of the matrix
    products and convolutions that the work asks for; `baseline`: (what it is, how it is run), such
    as a plain inference, to count the program's time in.
    """

    series: str
    size: int
    program: Callable[..., Any]
    args: tuple[Any, ...]
    rival: Callable[[], Any] | None = None
    flops: float | None = None
    baseline: tuple[str, Callable[[], Any]] | None = None


def rivals() -> Any:
    """The loops of PyTorch; None where that is not installed."""
    try:
        from benchmarks import rivals
    except ImportError:
        return None
    return rivals


def row(
    experiment: str, table: str, name: str, scale: str, found: Mapping[str, float],
    seconds: Mapping[str, float], config: Mapping[str, Any], **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of a benchmark, with `run` among `more` where table, name and scale do not say which it
    is.
    """
    return {
        "run": registry.digest(table, name, scale), "experiment": experiment, "scale": scale,
        "table": table, "row": name, "seed": 0, "config": dict(config), "metrics": dict(found),
        "seconds": dict(seconds), "oracle": False, "device": device_name(), "jax": jax.__version__,
        "commit": commit(), "written": time.time(), "python": sys.version.split()[0],
        "load": os.getloadavg()[0], "how": mesh.how(), **more,
    }  # fmt: skip


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


def run(case: Case, repeats: int) -> dict[str, float]:
    """Compiles the case, then alternates ours, a matmul, the rival and the baseline `repeats` times
    after a warm-up.

    Returns `size`, `compile_s`, `run_s`, `low_s` and `high_s` (median, least and most), `rate`
    (sizes a second), `peak_mb` (arguments, results and scratch of the compiled program),
    `matmul_share` (our rate as a share of the float32 matmul's), `torch_s`, `ratio` = torch / ours,
    and `times_<baseline>` = ours / baseline.
    """
    args = jax.device_put(case.args)
    start = time.perf_counter()
    program = jax.jit(case.program).lower(*args).compile()
    compiling = time.perf_counter() - start
    product, product_flops = matmul()
    parts = {"ours": lambda: program(*args), "matmul": product}
    parts |= {"torch": case.rival} if case.rival else {}
    parts |= {"baseline": case.baseline[1]} if case.baseline else {}
    for part in parts.values():
        seconds(part)
    taken = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            taken[name].append(seconds(part))
    ours = taken["ours"]
    found = {"size": case.size, "compile_s": compiling, "run_s": statistics.median(ours),
             "low_s": min(ours), "high_s": max(ours)}  # fmt: skip
    found |= {"rate": case.size / found["run_s"], "peak_mb": mesh.held(program) / 1e6}
    if case.flops is not None:
        found["matmul_share"] = (
            case.flops / found["run_s"] / (product_flops / statistics.median(taken["matmul"]))
        )
    if case.rival is not None:
        found["torch_s"] = statistics.median(taken["torch"])
        found["ratio"] = statistics.median(
            rival / mine for rival, mine in zip(taken["torch"], ours)
        )
    if case.baseline is not None:
        found[f"times_{case.baseline[0]}"] = statistics.median(
            a / b for a, b in zip(ours, taken["baseline"])
        )
    return found


def exponent(sizes: Any, times: Any) -> float:
    """The slope of log(time) over log(size): 1 where twice the size takes twice as long; NaN for a
    single size.
    """
    if len(set(sizes)) < 2:
        return math.nan
    return power_law(sizes, times)[0]


def forward_flops(model: Model, images: int) -> float:
    """The flops of the logits of `images` images."""
    x = jnp.zeros((images, *model.shape))
    return flops(
        lambda v, x: model.apply(v, x).logits, jax.eval_shape(model.init, jax.random.key(0)), x
    )
