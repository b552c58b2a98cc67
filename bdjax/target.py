"""What a sweep would be on a device that is not at hand: XLA's compilers need none.

`rehearse` walks through a sweep as `sweep.Runner` does and compiles for the target what that would
compile: how much memory a program takes and so how many lanes fit, whether anything is sent
between devices, what it computes and moves, and how long that takes at least.

TPUs need `libtpu` (`pip install 'jax[tpu]'`), GPUs the CUDA plug-in (`pip install
'jax[cuda13-local]'`, without NVIDIA's libraries); both compile on any Linux machine.
"""

import importlib.util
import itertools
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bdjax import mesh, registry
from bdjax.attacks.base import Attack
from bdjax.defenses.base import Defense
from bdjax.progress import duration
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.sweep import (
    Runner,
    Trained,
    Unfit,
    _untrained,
    check,
    compile_key,
    nested,
    out_of_memory,
    say,
    traced,
)
from bdjax.types import BadInput, Model

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
"""What a compiled text calls an exchange between devices."""
TERA, GIGA, GIB = 1e12, 1e9, 2**30


class Device(NamedTuple):
    """What a data sheet says of a device as JAX counts them. `flops`: products of float32 numbers a
    second in precision float32, tensorfloat32 and bfloat16; `bandwidth`, `memory`: bytes a second
    and bytes; `share`: of the memory, what JAX takes; `launch`: seconds that the smallest kernel
    takes; `options`: what the compiler is told besides.
    """

    flops: tuple[float, float, float]
    bandwidth: float
    memory: float
    share: float = 1.0
    launch: float = 0.0
    options: Mapping[str, Any] = {}

    @property
    def room(self) -> float:
        """Bytes that programs can have."""
        return self.share * self.memory

    def rate(self, precision: str | None) -> float:
        """Floating-point operations a second of products in a precision as JAX names it."""
        names = (None, "float32", "highest"), ("tensorfloat32", "high")
        return self.flops[next((i for i, some in enumerate(names) if precision in some), 2)]


def _tpu(bfloat16: float, bandwidth: float, memory: float, **options: Any) -> Device:
    """A TPU multiplies bfloat16: a product of float32 takes three passes, or six to be exact."""
    rate = bfloat16 * TERA
    return Device((rate / 6, rate / 3, rate), bandwidth * GIGA, memory * GIB, options=options)


def _gpu(
    name: str, float32: float, tf32: float, bandwidth: float, memory: float, capability: str,
    cores: int, clock: float, l2: float,
) -> Device:  # fmt: skip
    """A GPU by its data sheet: TFLOP/s without sparsity, of which JAX reaches TF32 from float32;
    GB/s; GB; compute capability, multiprocessors, GHz, MB of L2.
    """
    # JAX takes three quarters of the memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    # The smallest kernel takes about 2 µs, in a graph too: no data sheet has it.
    rates = (float32 * TERA, tf32 * TERA, tf32 * TERA)
    text = _described(name, capability, cores, clock, l2 * 1e6, bandwidth * GIGA, memory * GIGA)
    options = {"target_config": text}
    return Device(rates, bandwidth * GIGA, memory * GIGA, 0.75, 2e-6, options)


# CUDA C++ Programming Guide, technical specifications by compute capability: lanes of float32 a
# multiprocessor; KB of shared memory a multiprocessor and a block.
_CAPABILITIES = {"8.0": (64, 164, 163), "8.9": (128, 100, 99), "9.0": (128, 228, 227),
                 "10.0": (128, 228, 227)}  # fmt: skip


def _described(
    name: str, capability: str, cores: int, clock: float, l2: float, bandwidth: float, memory: float
) -> str:
    """A GPU as XLA's compiler wants it described."""
    lanes, shared, block = _CAPABILITIES[capability]
    major, minor = capability.split(".")
    return f"""
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 10 }}
      device_description_str: "NVIDIA {name}"
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        shared_memory_per_block: 49152 shared_memory_per_core: {shared * 1024}
        shared_memory_per_block_optin: {block * 1024}
        core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock} l2_cache_size: {l2:.0f}
        memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
      }}"""


# Google Cloud's pages "TPU v5e", "TPU v4" and so on: peak compute a chip in bfloat16, HBM bandwidth
# and capacity. v2, v3 and 7x are two devices a chip, each with half of it.
TPUS = {
    "v2": _tpu(46 / 2, 700 / 2, 16 / 2),
    "v3": _tpu(123 / 2, 900 / 2, 32 / 2),
    "v4": _tpu(275, 1228, 32, chip_config_name="megacore"),
    "v5e": _tpu(197, 819, 16),
    "v5p": _tpu(459, 2765, 95),
    "v6e": _tpu(918, 1640, 32),
    "tpu7x": _tpu(2307 / 2, 7380 / 2, 192 / 2),
}
# NVIDIA's data sheets "A100 Tensor Core GPU", "H100", "H200" (SXM), "L4", "HGX B200" (an eighth).
GPUS = {
    "a100": _gpu("A100", 19.5, 156, 2039, 80, "8.0", 108, 1.41, 40),
    "a100-40gb": _gpu("A100 40GB", 19.5, 156, 1555, 40, "8.0", 108, 1.41, 40),
    "l4": _gpu("L4", 30.3, 60, 300, 24, "8.9", 58, 2.04, 48),
    "h100": _gpu("H100", 67, 494, 3350, 80, "9.0", 132, 1.98, 50),
    "h200": _gpu("H200", 67, 494, 4800, 141, "9.0", 132, 1.98, 50),
    "b200": _gpu("B200", 75, 1125, 8000, 180, "10.0", 148, 1.96, 126),
}


class Target(NamedTuple):
    """Devices to compile for. `devices`: those of a host; `hosts`: how many there are of them."""

    name: str
    device: Device
    devices: Sequence[Any]
    hosts: int = 1

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return self.devices[0].platform


def find(name: str) -> Target:
    """The target `tpu:v5e:4x4`, `gpu:h100`, `gpu:h100:8` or `cpu`, this one. Called before JAX has
    started it leaves other devices alone that are at hand.
    """
    kind, _, rest = name.partition(":")
    family, _, size = rest.partition(":")
    known = {"tpu": TPUS, "gpu": GPUS}.get(kind)
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu" and not rest:
        return Target(name, _measured(), jax.local_devices(backend="cpu"))
    if known is None or family not in known or (kind == "tpu" and not size):
        raise BadInput(
            f"target '{name}': give cpu, gpu:NAME, gpu:NAME:COUNT or tpu:NAME:SLICE, such as "
            f"gpu:h100 or tpu:v5e:4x4; GPUs: {', '.join(GPUS)}; TPUs: {', '.join(TPUS)}"
        )
    device = known[family]
    if kind == "tpu":
        # What a TPU's own machine says of itself: without it libtpu asks the network.
        about = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
                 "TPU_WORKER_ID": "0", "TPU_SKIP_MDS_QUERY": "1", "TPU_MIN_LOG_LEVEL": "3",
                 "TPU_STDERR_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
        for variable, value in about.items():
            os.environ.setdefault(variable, value)
        options = {**device.options, **_small_host(size)}
        made = _topology(name, "tpu", f"{family}:{size}", **options)
    else:
        count = _count(name, size)
        made = _topology(name, "cuda", "", topology=f"1x1x{count}", **device.options)
    hosts = Counter(place.process_index for place in made)
    first = [place for place in made if place.process_index == min(hosts)]
    return Target(name, device, first, len(hosts))


def _small_host(size: str) -> dict[str, Any]:
    """A slice of fewer chips than a host has, four, is that of a smaller host."""
    sides = [int(side) if side.isascii() and side.isdigit() else 4 for side in size.split("x")]
    return {"chips_per_host_bounds": (*sides, 1, 1)[:3]} if 0 < math.prod(sides) < 4 else {}


def _count(name: str, size: str) -> int:
    if size and not (size.isascii() and size.isdigit() and 0 < int(size) <= 64):
        raise BadInput(f"target '{name}': {size} is no number of GPUs from 1 to 64")
    return int(size or 1)


def _topology(name: str, platform: str, layout: str, **options: Any) -> Sequence[Any]:
    from jax.experimental import topologies

    modules, package = {
        "tpu": (("libtpu",), "jax[tpu]"),
        "cuda": (("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "jax[cuda13-local]"),
    }[platform]
    if not any(map(_there, modules)):
        raise BadInput(f"target '{name}' needs its compiler: pip install '{package}'")
    try:
        return topologies.get_topology_desc(layout, platform, **options).devices
    except Exception as error:  # of whatever kind the plug-in has
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadInput(f"target '{name}': {reason}") from error


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _measured() -> Device:
    """The machine at hand: the rate of a matrix product, and of an addition to as much as a layer
    holds. (Of more, its memory pages are fetched anew at each call, at a fiftieth of the rate.)
    """
    n, each = 2048, 5
    product, more = jax.jit(jnp.matmul), jax.jit(lambda v: v + 1)
    a, v = jnp.ones((n, n)), jnp.ones(1 << 22)

    def fastest(fn: Callable[[], Any]) -> float:
        jax.block_until_ready(fn())
        taken = []
        for _ in range(each):
            start = time.perf_counter()
            jax.block_until_ready(fn())
            taken.append(time.perf_counter() - start)
        return min(taken)

    rate = 2 * n**3 / fastest(lambda: product(a, a))
    bandwidth = 2 * v.nbytes / fastest(lambda: more(v))
    memory = mesh.room(jax.local_devices()[0]) or math.inf
    return Device((rate, rate, rate), bandwidth, memory)


# --- What a program computes and moves ---


class Cost(NamedTuple):
    """What a program does on one device. `flops`: of its matrix products and convolutions; `bytes`:
    read from memory and written there; `kernels`: passes over memory; `bounds`: how often loops run
    at most whose length depends on the data; `unknown`: whether there are some without a bound,
    which are counted once.
    """

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    bounds: frozenset[str] = frozenset()
    unknown: bool = False

    def times(self, count: float) -> "Cost":
        """This, `count` times."""
        flops, bytes, kernels = (count * value for value in self[:3])
        return self._replace(flops=flops, bytes=bytes, kernels=kernels)

    def plus(self, other: "Cost") -> "Cost":
        """This and `other`."""
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            self.bounds | other.bounds,
            self.unknown | other.unknown,
        )

    def seconds(self, device: Device, precision: str | None) -> dict[str, float]:
        """The time that each of its parts takes at least, by what binds it."""
        return {
            "compute": self.flops / device.rate(precision),
            "memory": self.bytes / device.bandwidth,
            "kernels": self.kernels * device.launch,
        }


def flops(fn: Callable, *args: Any) -> float:
    """The flops of all matrix products and convolutions in `fn(*args)`; see `cost`."""
    return cost(jax.make_jaxpr(fn)(*args).jaxpr).flops


def cost(jaxpr: core.Jaxpr, fields: Mapping[str, float] | None = None) -> Cost:
    """What a traced program does on one device, with the bodies of loops as often as they run.

    A loop whose length depends on the data runs as often as it may: up to the number that its
    condition compares with, or, in `mesh.drain`, that of a method's `fields` which bounds it.
    Compilers fuse what is computed number by number into what reads it or, where a product, a loop
    or several need it, into one pass that writes it: so it is counted. A gradient's convolution
    over an input spread by strides is counted without the zeros.
    """
    for eqn in jaxpr.eqns:  # beside it there is padding alone
        if eqn.primitive.name == "shard_map":
            jaxpr = eqn.params["jaxpr"]
            jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
            break
    walk = _Walk(fields or {})
    walk.inside(jaxpr, [walk.stored(v) for v in jaxpr.invars], True)
    return walk.cost


class _Value(NamedTuple):
    """`parts`: what is read from memory to compute it, (number, bytes) each; `there`: whether it
    lies in memory itself.
    """

    parts: frozenset[tuple[int, int]] = frozenset()
    there: bool = False


_PRODUCTS = {"dot_general", "conv_general_dilated"}
_LAYOUT = {"reshape", "squeeze", "expand_dims", "copy", "copy_p", "optimization_barrier"}
_SAME = {"convert_element_type", "broadcast_in_dim"}
_PARTLY = {"gather", "dynamic_slice"}
_WHOLE = re.compile(
    r"sort|top_k|scatter|select_and|reduce_window|cum|fft|cholesky|lu|qr|svd|eig|triangular|"
    r"householder|schur|custom_call|callback|approx"
)
_REDUCED = re.compile(r"reduce_(?!precision)|arg(max|min)")
_LIMIT = re.compile(r"at_most_(\d+)_(\w+)")


class _Walk:
    """Adds up what a program does, equation by equation."""

    def __init__(self, fields: Mapping[str, float]):
        self.fields, self.cost, self.names = fields, Cost(), itertools.count()

    def stored(self, var: Any) -> _Value:
        """A value that lies in memory."""
        return _Value(frozenset({(next(self.names), _size(var))}), True)

    def add(self, bytes: float, kernels: float = 1, flops: float = 0) -> None:
        """Adds to the cost."""
        self.cost = self.cost.plus(Cost(flops, bytes, kernels))

    def inside(
        self, jaxpr: core.Jaxpr, given: Sequence[_Value], write: bool
    ) -> tuple[list[_Value], list[_Value]]:
        """Walks through a program; its results, in memory if `write`, and what it was given, parts
        of which may lie there now.
        """
        env: dict[Any, _Value] = dict(zip(jaxpr.invars, given))
        env |= {v: self.stored(v) for v in jaxpr.constvars}
        made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

        def value(var: Any) -> _Value:
            return env.get(var, _Value()) if isinstance(var, core.Var) else _Value()

        def bring(vars: Iterable[Any]) -> None:
            """Computes, in one pass, what does not lie in memory yet."""
            new = dict.fromkeys(
                v for v in vars if isinstance(v, core.Var) and not value(v).there and _size(v)
            )
            if new:
                parts = frozenset().union(*(value(v).parts for v in new))
                moved = sum(size for _, size in parts) + sum(map(_size, new))
                self.add(bytes=moved, kernels=len({v.aval.shape for v in new}))  # type: ignore[attr-defined]
                env.update({v: self.stored(v) for v in new})

        for eqn in jaxpr.eqns:
            name, ins, outs = eqn.primitive.name, eqn.invars, eqn.outvars
            inner = _inner(eqn)
            if name in ("scan", "while", "cond"):
                bring(ins)
                self.cost = self.cost.plus(self.controlled(eqn, made))
                env.update({v: self.stored(v) for v in outs})
            elif inner is not None:
                found = self.inside(inner, [value(v) for v in ins], False)
                for vars, values in zip((outs, ins), found):
                    env.update({v: w for v, w in zip(vars, values) if isinstance(v, core.Var)})
            elif name in _PRODUCTS or _WHOLE.match(name):
                bring(ins)
                self.add(bytes=sum(map(_size, {*filter(_is_var, ins)})) + sum(map(_size, outs)),
                         kernels=1, flops=_flops(eqn))  # fmt: skip
                env.update({v: self.stored(v) for v in outs})
            elif name == "dynamic_update_slice":  # in place
                part = value(ins[1])
                self.add(bytes=sum(n for _, n in part.parts) + _size(ins[1]), kernels=1)
                env[outs[0]] = self.stored(outs[0])
            elif _REDUCED.match(name):
                parts = frozenset().union(*(value(v).parts for v in ins))
                self.add(bytes=sum(n for _, n in parts) + sum(map(_size, outs)), kernels=1)
                env.update({v: self.stored(v) for v in outs})
            elif name in _PARTLY:
                where = frozenset().union(*(value(v).parts for v in ins[1:]))
                env[outs[0]] = _Value(where | {(next(self.names), _size(outs[0]))})
            else:
                parts = frozenset().union(*(value(v).parts for v in ins))
                there = name in _LAYOUT and value(ins[0]).there
                env.update({v: _Value(parts, there) for v in outs})
        if write:
            bring(jaxpr.outvars)
        return [value(v) for v in jaxpr.outvars], [value(v) for v in jaxpr.invars]

    def controlled(self, eqn: Any, made: Mapping[Any, Any]) -> Cost:
        """A loop, or the branch that costs most; `made`: by which equation a value was."""

        def of(closed: Any) -> Cost:
            walk = _Walk(self.fields)
            walk.inside(closed.jaxpr, [walk.stored(v) for v in closed.jaxpr.invars], True)
            return walk.cost

        if eqn.primitive.name == "cond":
            return max(map(of, eqn.params["branches"]), key=lambda c: (c.flops, c.bytes))
        if eqn.primitive.name == "scan":
            return of(eqn.params["jaxpr"]).times(eqn.params["length"])
        once = of(eqn.params["body_jaxpr"]).plus(of(eqn.params["cond_jaxpr"]))
        stack = str(eqn.source_info.name_stack)
        if (found := _LIMIT.findall(stack)) and found[-1][1] in self.fields:
            count, field = found[-1]
            limit = int(count) * self.fields[field]
        else:
            limit = _compared(eqn, made)
        if limit is None:
            return once._replace(unknown=True)
        return once.times(limit)._replace(bounds=once.bounds | {f"{limit:g}"})


def _size(var: Any) -> int:
    aval = var.aval
    return aval.size * aval.dtype.itemsize if hasattr(aval, "size") else 0


def _is_var(var: Any) -> bool:
    return isinstance(var, core.Var)


def _inner(eqn: Any) -> core.Jaxpr | None:
    """What an equation calls, where it takes and gives the same values."""
    for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(eqn.invars):
            return inner if len(inner.outvars) == len(eqn.outvars) else None
    return None


def _compared(eqn: Any, made: Mapping[Any, Any]) -> int | None:
    """The number with which a while loop compares what it counts up from 0 in ones, if it does;
    `made`: by which equation a value was.
    """
    cond, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    within, steps = ({v: e for e in jaxpr.eqns for v in e.outvars} for jaxpr in (cond, body))
    limits, needed = [], [cond.outvars[0]]  # all of them must hold
    while needed:
        part = within.get(_plain(needed.pop(), within))
        if part is None or part.primitive.name not in ("and", "lt"):
            continue
        left, right = (_plain(v, within) for v in part.invars)
        if part.primitive.name == "and":
            needed += [left, right]
        elif isinstance(right, core.Literal) and left in cond.invars[of_cond:]:
            at = cond.invars.index(left) - of_cond
            start = _plain(eqn.invars[of_cond + of_body + at], made)
            step = steps.get(body.outvars[at])
            if (
                isinstance(start, core.Literal) and start.val == 0
                and step is not None and step.primitive.name == "add"
                and step.invars[0] is body.invars[of_body + at]
                and isinstance(step.invars[1], core.Literal) and step.invars[1].val == 1
            ):  # fmt: skip
                limits.append(int(right.val))
    return min(limits, default=None)


def _plain(var: Any, made: Mapping[Any, Any]) -> Any:
    """What a value was before it was repeated or converted."""
    while _is_var(var) and var in made and made[var].primitive.name in _SAME:
        var = made[var].invars[0]
    return var


def _flops(eqn: Any) -> float:
    """The floating-point operations of a product: two for each multiplication."""
    shapes = [v.aval.shape for v in eqn.invars]
    out = eqn.outvars[0].aval.size
    if eqn.primitive.name == "dot_general":
        return 2.0 * out * math.prod(shapes[0][i] for i in eqn.params["dimension_numbers"][0][0])
    if eqn.primitive.name != "conv_general_dilated":
        return 0.0
    features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
    zeros = math.prod(eqn.params["lhs_dilation"])
    return 2.0 * out * math.prod(shapes[1]) / features / zeros


# --- A sweep, without running it ---


class Program:
    """A program of a sweep. `each`: runs a device; `calls`: how often it is called, by the most
    steps that a search in it takes; `lanes`: how many fit, 0 if none; `held`: bytes a device with
    so many; `fault`: why it does not compile; `kin`: what programs share that differ in
    `each` alone.
    """

    def __init__(self, what: str, each: int, kin: Any, trace: Callable[[int], jax.stages.Traced]):
        self.what, self.each, self.kin, self.trace = what, each, kin, trace
        self.traced = trace(mesh.default_lanes(each))
        self.calls: Counter[float] = Counter()
        self.lanes, self.held, self.text, self.fault = 0, math.inf, "", ""
        self.done = False

    def compile(self, most: int | None, room: float) -> None:
        """Finds how many lanes, at most `most`, fit into `room` bytes."""
        made: dict[int, Any] = {}

        def held(lanes: int) -> float:
            found = self.traced if lanes == mesh.default_lanes(self.each) else self.trace(lanes)
            try:
                made[lanes] = found, (program := found.lower().compile())
                return mesh.held(program)
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                return math.inf

        try:
            most = min(most or mesh.default_lanes(self.each), self.each)
            self.lanes = mesh.fitting(held, room, most)
            if self.lanes:
                self.traced, program = made[self.lanes]
                self.held, self.text = mesh.held(program), program.as_text()
        except (RuntimeError, NotImplementedError) as error:
            self.fault = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            if "Unknown backend" in self.fault:
                self.fault = "it calls the host, which compiles beside the device alone"
        self.done = True

    @property
    def fits(self) -> bool:
        """Whether a device has room for it, as far as is known."""
        return bool(self.lanes or self.fault or not self.done)

    @property
    def collectives(self) -> list[str]:
        """What it exchanges between devices."""
        return [name for name in COLLECTIVES if name in self.text]

    def cost(self) -> Cost:
        """What all its calls do on one device."""
        total = Cost()
        for steps, count in self.calls.items():
            found = cost(self.traced.jaxpr.jaxpr, {"steps": steps})
            total = total.plus(found.times(count))
        return total


class Rehearsed(NamedTuple):
    """`programs`: what a sweep calls; `unfit`: which runs do not fit, in words, if any."""

    programs: list[Program]
    unfit: str


class _Nowhere(Store):
    def save_arrays(self, run: str, arrays: Any) -> None:
        """Keeps nothing."""


class Rehearsal(Runner):
    """A runner that computes nothing: it goes through a sweep as a runner does, notes what is
    called and how often, and takes zeros for results.
    """

    noted: dict[Any, Program]
    have: set[str]
    net: str

    def go(
        self,
        cells: Sequence[Cell],
        done: Callable[[Cell], Any],
        there: Callable[[Cell], Any],
        target: Target,
    ) -> Rehearsed:
        """The programs of `cells`, compiled for the target, but for those cells that are `done`; a
        victim that is `there` is not trained.
        """
        self.noted, mine = {}, self.groups(cells)
        left = [some for group in mine if (some := [cell for cell in group if not done(cell)])]
        pending = self._in_order(cells, mine, left)
        for cell in itertools.chain(*pending):
            check(cell)
        there_now = {cell.victim_id for cell in itertools.chain(*pending) if there(cell)}
        while True:
            for program in self.noted.values():
                program.calls.clear()
            self.unfit, self.have, self.others = [], set(there_now), {}
            for group in pending:
                self.net = str(registry.name_of(group[0].model))
                self._group(group)
            called = [program for program in self.noted.values() if program.calls]
            if all(program.done for program in called):
                return Rehearsed(called, self.too_large(target.name) if self.unfit else "")
            # What does not fit is called otherwise, so that this begins anew. What has fewer runs
            # than one that fits need not be compiled.
            for program in sorted(called, key=lambda program: -program.each):
                larger = (p for p in called if p.kin == program.kin and p.lanes)
                if (one := next(larger, None)) and not program.done:
                    program.lanes, program.done = min(one.lanes, program.each), True
                    program.traced = program.trace(program.lanes)
                elif not program.done:
                    start = time.monotonic()
                    most = self.lanes if isinstance(self.lanes, int) else None
                    program.compile(most, target.device.room)
                    said = program.fault or ("compiled" if program.lanes else "does not fit")
                    say(f"{program.what}: {said}, {time.monotonic() - start:.0f} s", False)

    def _call(
        self,
        stage: str,
        fn: Callable,
        model: Model,
        shared: Any,
        *items: Any,
        donate: tuple[int, ...] = (),
    ) -> Any:
        key = (fn, model, compile_key(shared, items), *self.models[-1:])
        if key not in self.noted:
            places, runs = self.places, len(jax.tree.leaves(items)[0])
            whole, split = mesh.shardings(items, places)
            given, each = (_shapes(shared, whole), _shapes(items, split)), -(-runs // len(places))

            def trace(lanes: int) -> jax.stages.Traced:
                return traced(fn, model, *given, lanes, places, donate)

            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), items)
            kin = (fn, model, compile_key(shared, one), *self.models[-1:])
            what = ", ".join([fn.__name__.strip("_").replace("_", " "), *_named(items), self.net])
            self.noted[key] = Program(what, each, kin, trace)
        program = self.noted[key]
        if not program.fits:
            raise Unfit
        program.calls[_steps(items)] += 1
        return jax.tree.map(lambda leaf: _zeros(leaf.shape, leaf.dtype), program.traced.out_info)

    def _placed(self, shared: Any, items: Any) -> tuple[Any, Any]:
        return shared, items

    def _stacked(self, items: Sequence[Any]) -> Any:
        count = len(items) + -len(items) % len(self.places)

        def together(*leaves: Any) -> Any:
            shape, dtype = jnp.shape(leaves[0]), jnp.result_type(leaves[0])
            if shape:
                return _zeros((count, *shape), dtype)
            return jnp.stack(
                [*map(jnp.asarray, leaves), *[jnp.asarray(leaves[-1])] * count][:count]
            )

        return jax.tree.map(together, *items)

    def _victims(
        self, cells: Sequence[Cell], model: Model, shared: Any
    ) -> tuple[dict[str, Trained], dict[str, float]]:
        missing = {cell.victim_id: cell for cell in cells if cell.victim_id not in self.have}

        def train(some: Sequence[Cell]) -> None:
            self._trained(some, model, shared)
            self.have.update(cell.victim_id for cell in some)

        if missing:
            self._halved(list(missing.values()), train)
        one = jax.eval_shape(lambda: _untrained(cells[0], model, shared))
        attack, variables = jax.tree.map(lambda leaf: _zeros(leaf.shape, leaf.dtype), one)
        net = Trained(attack, variables, 0.0)
        names = [cell.victim_id for cell in cells if cell.victim_id in self.have]
        return dict.fromkeys(names, net), {"compile": 0.0, "run": 0.0}

    def _row(self, *_: Any) -> dict[str, Any]:
        return {}

    def _written(self, rows: list[dict[str, Any]]) -> None:
        pass


def _shapes(tree: Any, place: Any) -> Any:
    """What a program is compiled for in place of arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=place),
        tree,
    )


def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """Zeros that take no memory; keys are as good as any."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape)
    return np.broadcast_to(np.zeros((), dtype), shape)


def _named(items: Any) -> list[str]:
    """The methods that a program is given: its defense or else its attack."""
    methods = [part for part in nested(items) if isinstance(part, (Defense, Attack))]
    found = sorted(methods, key=lambda method: not isinstance(method, Defense))
    return [str(registry.name_of(method)) for method in found[:1]]


def _steps(items: Any) -> float:
    """The most steps that a search of its methods takes, or of what these start from."""
    found = [getattr(part, "steps", None) for part in nested(items)]
    return max(
        (float(np.max(np.asarray(steps))) for steps in found if steps is not None), default=1
    )


def rehearse(
    cells: Sequence[Cell],
    target: Target,
    lanes: int | Literal["auto"] | None = None,
    shard: tuple[int, int] | None = None,
    done: Callable[[Cell], Any] = lambda cell: False,
    there: Callable[[Cell], Any] = lambda cell: False,
) -> Rehearsed:
    """The programs that a host of the target would run for its share of `cells`, compiled; `lanes`,
    `shard` as in `Runner`; `done`, `there`: whether a cell is computed, its victim trained already.
    """
    cached = jax.config.values["jax_enable_compilation_cache"]
    with mesh.aiming(target.platform), tempfile.TemporaryDirectory(prefix="bdjax-") as folder:
        store = _Nowhere(Path(folder), shard)
        runner = Rehearsal(store, "rehearsal", lanes=lanes, devices=target.devices, quiet=True)
        # A program of a device that is not there can be kept, but not read again.
        jax.config.update("jax_enable_compilation_cache", cached and target.platform == "cpu")
        try:
            return runner.go(cells, done, there, target)
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)


HEADS = ("program", "calls", "lanes", "MB a device", "sent", "GFLOP", "GB", "ms a call", "bound by",
         "in all")  # fmt: skip


def report(found: Rehearsed, target: Target) -> tuple[list[tuple[str, ...]], list[str]]:
    """A line of a table for each program, the longest first, and what it comes to in words."""
    device, rows, notes = target.device, [], [found.unfit] if found.unfit else []
    with mesh.aiming(target.platform):
        precision = mesh.precision()
    lasting, bounds, unknown = 0.0, set(), set()
    for program in found.programs:
        if program.fault:
            notes.append(f"does not compile: {program.what}: {program.fault}")
        total, calls = program.cost(), sum(program.calls.values())
        parts = total.seconds(device, precision)
        bound = max(parts, key=lambda name: parts[name])
        words = (
            program.what, str(calls), f"{program.lanes} of {program.each}",
            f"{program.held / 1e6:,.0f}" if program.text else "", ", ".join(program.collectives)
            or "nothing", f"{total.flops / calls / 1e9:,.3g}", f"{total.bytes / calls / 1e9:,.3g}",
            f"{1e3 * parts[bound] / calls:,.3g}", bound, duration(parts[bound]),
        )  # fmt: skip
        rows.append((parts[bound], words))
        lasting += parts[bound]
        bounds |= {program.what} if total.bounds else set()
        unknown |= {program.what} if total.unknown else set()
    chips = target.hosts * len(target.devices)
    kind = f"{len(target.devices)} × {[*target.name.split(':'), target.name][1]}"
    hosts = "one host" if target.hosts == 1 else f"{target.hosts} hosts"
    notes += [
        f"memory of a device: {device.room / 1e9:.1f} GB; products in {precision or 'float32'}",
        f"{hosts} of {kind}: {duration(lasting)}, {lasting * chips / 3600:.2g} "
        "device-hours at the roofline: as fast as the data sheet lets products or memory be, "
        "without compiling",
    ]
    if bounds:
        notes.append(f"at most, as if no search ended early: {', '.join(sorted(bounds))}")
    if unknown:
        notes.append(f"at least, with a loop of unknown length: {', '.join(sorted(unknown))}")
    return [words for _, words in sorted(rows, reverse=True)], notes
