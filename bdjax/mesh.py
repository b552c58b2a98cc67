"""Where work runs: lanes (map or vmap), devices, hosts. The only `shard_map` of the project is
here.

One knob, `lanes`: how many items of a batch of independent work are computed side by side. On a CPU
one after another is fastest (a vmapped kernel becomes a slow grouped convolution); an accelerator
wants many. The numbers are the same.
"""

import contextlib
import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from platform import machine
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax.experimental import io_callback
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from bdjax.types import BadInput

OLD = jax.__version_info__ < (0, 11)
"""Whether convolutions on a CPU are those of before jax 0.11, about 1.5 times as slow."""

# Contexts of JAX's own: what was traced under another value is not taken.
_aim = jax.make_user_context()
"""The platform that programs are traced for, and the precision that the user set."""
patches = jax.make_user_context(False)
"""Whether GPU and TPU, too, compute convolutions as products of patches and kernel, which become
batched matrix products where each lane has kernels of its own: the native form is then a grouped
convolution. Which is faster is measured, under `--lanes auto`.
"""


def platform() -> str:
    """What programs are traced for, "cpu", "gpu" or "tpu": the target of `aiming`, or else what is
    at hand. Whatever depends on it while tracing asks here.
    """
    return aim[0] if (aim := _aim.value) else jax.default_backend()


@contextlib.contextmanager
def aiming(target: str) -> Iterator[None]:
    """Programs are traced for the platform `target`, whatever is at hand, with products in its
    `precision`.
    """
    with _aim((target, _asked())), jax.default_matmul_precision(precision()):
        yield


FLAGS: dict[tuple[int, ...], tuple[str, ...]] = {
    (0, 12, 0): (
        "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
        "--xla_cpu_use_onednn=true",
        "--xla_cpu_experimental_onednn_custom_call=true",
    ),
}
"""By version of JAX, what gives a CPU's convolutions to oneDNN, inside loops too: 1.2 to 2 times as
fast. Only versions that were tried: XLA stops at a flag that it does not know.
"""


def tune() -> None:
    """Adds `FLAGS` to the environment, unless XLA_FLAGS says something of them or JAX has started.
    For programs, never for a library: it acts on all that the process compiles.
    """
    started = getattr(xla_bridge, "backends_are_initialized", bool)()
    flags, given = FLAGS.get(jax.__version_info__[:3], ()), os.environ.get("XLA_FLAGS", "")
    if not started and not any(flag.partition("=")[0] in given for flag in flags):
        os.environ["XLA_FLAGS"] = " ".join([*given.split(), *flags])


def onednn() -> bool:
    """Whether a CPU's convolutions are given to oneDNN."""
    return "--xla_cpu_experimental_onednn_custom_call=true" in os.environ.get("XLA_FLAGS", "")


def precision() -> str | None:
    """How the programs of sweeps multiply float32 numbers: exactly, "float32", where JAX would
    round them first (to TF32 on a GPU, to bfloat16 on a TPU), as a verdict is judged by small
    differences; None on a CPU, which never rounds. What the user sets stands: the variable
    JAX_DEFAULT_MATMUL_PRECISION, tensorfloat32 or bfloat16, or the option of `jax.config`.
    """
    return _asked() or (None if platform() == "cpu" else "float32")


def _asked() -> str | None:
    return aim[1] if (aim := _aim.value) else jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def how() -> dict[str, Any]:
    """By what, besides the code, the digits of a number may differ: the flags of XLA that reach its
    programs, the precision of products and, on a CPU, its widest vectors.
    """
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_HARMLESS)]
    found = {"flags": sorted(flags), "precision": precision() or "float32"}
    return found | ({"vectors": vectors()} if platform() == "cpu" else {})


_HARMLESS = "--xla_dump", "--xla_force_host_platform_device_count"


def vectors() -> str:
    """The widest vectors that this CPU has, for which XLA compiles: sums of other widths are
    rounded otherwise. `AVX512F`, `AVX2`, `NEON`; the machine's kind where NumPy does not know.
    """
    multiarray = importlib.import_module("numpy._core._multiarray_umath")
    known = getattr(multiarray, "__cpu_features__", {})
    widest = ("AVX512F", "AVX2", "AVX", "SVE", "NEON")
    return next((name for name in widest if known.get(name)), machine())


def default_lanes(items: int) -> int:
    """1 on a CPU, all items at once on an accelerator."""
    return 1 if platform() == "cpu" else items


def widest(seconds: Callable[[int], float], most: int, first: int = 1) -> int:
    """The lanes, at most `most`, at which `seconds(lanes)`, the time of one item, is least: from
    `first` halved while that takes no tenth more; or else doubled while that saves a tenth.
    """
    lanes, best = first, seconds(first)
    while lanes > 1 and 0.9 * (took := seconds(lanes // 2)) <= best:
        lanes, best = lanes // 2, took
    if lanes < first:
        return lanes
    while lanes < most and (took := seconds(min(2 * lanes, most))) < 0.9 * best:
        lanes, best = min(2 * lanes, most), took
    return lanes


def fitting(held: Callable[[int], float], size: float, most: int) -> int:
    """The lanes, at most `most`, with which a program fits into `size` bytes, 0 if none: `held` is
    what it holds with so many, infinite where it cannot be compiled. Few are asked: from one lane
    to the next it grows by about the same.
    """
    if held(most) <= size:
        return most
    if most == 1 or (one := held(1)) > size:
        return 0
    each = max(held(2) - one, 1.0)
    lanes = 1 if math.isinf(each) else min(most - 1, 1 + int((size - one) // each))
    while lanes > 1 and held(lanes) > size:
        lanes //= 2
    return lanes


def held(program: Any) -> float:
    """Bytes that a compiled program holds on a device, as its compiler planned it: arguments,
    results and scratch.
    """
    plan = program.memory_analysis()
    sizes = (plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes)
    return float(sum(sizes) - plan.alias_size_in_bytes)


def room(device: Any) -> int | None:
    """Bytes of memory that programs can have on a device; None where it does not say."""
    found = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    if found is None and hasattr(os, "sysconf"):
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return found


def fits(what: str, size: int, device: Any = None) -> None:
    """Raises `BadInput` where `what` takes more bytes than the device, the first one if None, has
    at all: before any of them is taken.
    """
    most = room(device or jax.local_devices()[0])
    if most is not None and size > most:
        raise BadInput(
            f"{what} takes {size / 1e9:,.1f} GB, there are {most / 1e9:,.1f}: make it smaller"
        )


def bytes_of(tree: Any) -> int:
    """The bytes of a pytree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return leaves[0].shape[0] if leaves else 0


def lane_map(fn: Callable, items: Any, lanes: int | None = None) -> Any:
    """`fn` of each of the leading-axis `items`, `lanes` at a time (None: the device's default)."""
    n = _count(items)
    lanes = min(lanes or default_lanes(n), n)
    if n == 1:  # no loop: XLA:CPU has its best convolutions outside loops
        return jax.tree.map(lambda leaf: leaf[None], fn(jax.tree.map(lambda leaf: leaf[0], items)))
    if lanes == n:
        return jax.vmap(fn)(items)
    return jax.lax.map(fn, items, batch_size=None if lanes == 1 else lanes)


def drain(
    start: Callable, step: Callable, done: Callable, items: Any, lanes: int | None = None
) -> Any:
    """Steps every item's state until it is done, `lanes` at a time; a lane that has finished takes
    the next item.

    `start(item) -> state`, `step(state) -> state`, `done(state) -> bool []`. Returns the final
    states, stacked like `items`. Early-stopped items cost nothing: there is no waiting for the
    slowest of a batch. The field `steps` of whose search it is bounds the steps of an item.
    """
    n = _count(items)
    lanes = min(lanes or default_lanes(n), n)
    if lanes == 1:
        return lane_map(lambda item: loop(lambda s: ~done(s), step, start(item)), items, 1)

    def pick(index):
        return jax.tree.map(lambda leaf: leaf[jnp.minimum(index, n - 1)], items)

    def choose(flag, new, old):
        return jax.tree.map(
            lambda a, b: jnp.where(flag.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
        )

    def round_(carry):
        state, item, following, out = carry
        state = choose(jax.vmap(done)(state), state, jax.vmap(step)(state))
        finished = jax.vmap(done)(state) & (item < n)
        out = jax.tree.map(
            lambda o, s: o.at[jnp.where(finished, item, n)].set(s, mode="drop"), out, state
        )
        # Finished lanes take the next items in turn; an index of n or more means that nothing is
        # left for this lane.
        item = jnp.where(finished, following + jnp.cumsum(finished) - 1, item)
        state = choose(finished, jax.vmap(lambda i: start(pick(i)))(item), state)
        return state, item, following + finished.sum(), out

    first = jnp.arange(lanes)
    blank = jax.tree.map(
        lambda leaf: jnp.zeros((n, *leaf.shape), leaf.dtype), jax.eval_shape(lambda: start(pick(0)))
    )
    carry = (jax.vmap(lambda i: start(pick(i)))(first), first, jnp.asarray(lanes), blank)
    return loop(lambda c: (c[1] < n).any(), round_, carry, -(-n // lanes))[3]


class Keeper(Protocol):
    """Keeps the states of loops on the host, see `bdjax.loops`."""

    def start(self, state: Any) -> tuple[Any, Any]: ...

    def step(self, state: Any) -> Any: ...


_keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


@contextlib.contextmanager
def keeping(keeper: Keeper | None) -> Iterator[None]:
    """Programs traced inside show `keeper` the state of each loop of `drain` after each step, and
    go on from the one that it gives.
    """
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)


def loop(going: Callable, step: Callable, state: Any, times: int = 1) -> Any:
    """`jax.lax.while_loop`, its state kept where `keeping` says so. It has at most `times` as many
    rounds as the field `steps` of whose search it is: its scope says so, for `bdjax.target`.
    """
    keeper, stop = _keeper.get(), jax.ShapeDtypeStruct((), bool)
    with jax.named_scope(f"at_most_{times}_steps"):
        if keeper is None:
            return jax.lax.while_loop(going, step, state)

        def kept(carry):
            state = step(carry[0])
            return state, io_callback(keeper.step, stop, state, ordered=True)

        shapes = jax.eval_shape(lambda s: s, state)
        carry = io_callback(keeper.start, (shapes, stop), state, ordered=True)
        return jax.lax.while_loop(lambda c: ~c[1] & going(c[0]), kept, carry)[0]


def over_runs(
    fn: Callable, *, lanes: int | None = None, devices: Sequence[Any] | None = None
) -> Callable:
    """`run(shared, items) -> outputs`: `fn(shared, item)` for each of the leading-axis `items`,
    spread over `devices`.

    Each device works through its own runs, `lanes` at a time; nothing is ever sent between devices.
    The number of runs is padded to a multiple of the devices with copies of the last one, whose
    results are dropped. Not jitted itself.
    """
    devices = list(devices or jax.local_devices())
    if len(devices) == 1:
        return lambda shared, items: lane_map(lambda item: fn(shared, item), items, lanes)
    mesh = Mesh(devices, ("runs",))

    def local(shared, items):
        return lane_map(lambda item: fn(shared, item), items, lanes)

    # check_vma: BatchNorm's statistics enter a scan unvarying and leave it varying over the mesh.
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("runs")), out_specs=P("runs"), check_vma=False
    )

    def run(shared, items):
        n = _count(items)
        padding = -n % len(devices)
        items = jax.tree.map(
            lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], padding, 0)]), items
        )
        return jax.tree.map(lambda leaf: leaf[:n], sharded(shared, items))

    return run


def place(shared: Any, items: Any, devices: Sequence[Any] | None = None) -> tuple[Any, Any]:
    """`shared` copied to every device and `items` split over them (where their number allows),
    before a program starts.
    """
    whole, split = shardings(items, devices)
    return jax.device_put(shared, whole), jax.device_put(items, split)


def shardings(items: Any, devices: Sequence[Any] | None = None) -> tuple[Any, Any]:
    """Where `place` puts what is shared, and the `items`."""
    devices = list(devices or jax.local_devices())
    if len(devices) == 1:
        one = SingleDeviceSharding(devices[0])
        return one, one
    mesh = Mesh(devices, ("runs",))
    split = P("runs") if _count(items) % len(devices) == 0 else P()
    return NamedSharding(mesh, P()), NamedSharding(mesh, split)
