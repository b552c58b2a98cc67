"""Where work runs: lanes (map or vmap), devices, hosts. The only `shard_map` of the project is
here.

One knob, `lanes`: how many items of a batch of independent work are computed side by side. On a CPU
one after another is fastest (a vmapped kernel becomes a slow grouped convolution); an accelerator
wants many. The numbers are the same.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bdjax.types import BadInput

_aim: ContextVar[str | None] = ContextVar("platform", default=None)


def platform() -> str:
    """What programs are traced for, "cpu", "gpu" or "tpu": the target of `aiming`, or else what is
    at hand. Whatever depends on it while tracing asks here.
    """
    return _aim.get() or jax.default_backend()


@contextlib.contextmanager
def aiming(target: str) -> Iterator[None]:
    """Programs are traced for the platform `target`, whatever is at hand."""
    before = platform()
    token = _aim.set(target)
    # JAX keeps what it has traced, and does not know what for.
    if before != target:
        jax.clear_caches()
    try:
        yield
    finally:
        _aim.reset(token)
        if before != target:
            jax.clear_caches()


FLAGS = {
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


def default_lanes(items: int) -> int:
    """1 on a CPU, all items at once on an accelerator."""
    return 1 if platform() == "cpu" else items


def widest(seconds: Callable[[int], float], most: int) -> int:
    """The lanes, at most `most`, at which `seconds(lanes)`, the time of one item, is least: doubled
    from 1 for as long as that saves a tenth.
    """
    lanes, best = 1, seconds(1)
    while lanes < most and (took := seconds(min(2 * lanes, most))) < 0.9 * best:
        lanes, best = min(2 * lanes, most), took
    return lanes


def fits(what: str, size: int, device: Any = None) -> None:
    """Raises `BadInput` where `what` takes more bytes than the device, the first one if None, has
    at all: before any of them is taken.
    """
    device = device or jax.local_devices()[0]
    room = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    if room is None and hasattr(os, "sysconf"):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if room is not None and size > room:
        raise BadInput(
            f"{what} takes {size / 1e9:,.1f} GB, there are {room / 1e9:,.1f}: make it smaller"
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
    slowest of a batch.
    """
    n = _count(items)
    lanes = min(lanes or default_lanes(n), n)
    if lanes == 1:
        return lane_map(
            lambda item: jax.lax.while_loop(lambda s: ~done(s), step, start(item)), items, 1
        )

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
    return jax.lax.while_loop(lambda c: (c[1] < n).any(), round_, carry)[3]


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
    devices = list(devices or jax.local_devices())
    if len(devices) == 1:
        return jax.device_put((shared, items), devices[0])
    mesh = Mesh(devices, ("runs",))
    split = P("runs") if _count(items) % len(devices) == 0 else P()
    return jax.device_put(shared, NamedSharding(mesh, P())), jax.device_put(
        items, NamedSharding(mesh, split)
    )
