"""A user's own Flax module, Linen or NNX, as a net with sites; and weights from Orbax."""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.tracers import current_trace

from bdjax import schema
from bdjax.foreign.pixels import Pixels, pixels
from bdjax.foreign.sites import free
from bdjax.models.conv import conv_general_dilated
from bdjax.models.layers import FOREIGN
from bdjax.progress import silent
from bdjax.registry import door
from bdjax.types import BadInput, Edits, Model, Output, Variables, Victim, check_variables, shown

CONVS = ("Conv", "ConvTranspose", "ConvLocal")
LINEAR = ("Dense", "DenseGeneral", "Linear", "LinearGeneral", "Einsum", *CONVS)


@door
def net(
    module: Any,
    variables: Mapping | None = None,
    *,
    shape: Sequence[int],
    preprocess: str = "0-1",
    train: Mapping | None = None,
) -> Victim:
    """A Flax module of one's own as a net, ready for `bdjax.judge` and every defense.

    `module`: of Linen, with its `variables`, or of NNX, which holds its own. It takes images of
    `shape` (H, W, C), `[B, H, W, C]`, in the pixels that `preprocess` says, and gives logits.
    `train`: the arguments of a call in training, such as `{"train": True}`, where it has others
    then; those of a call after it have the truth reversed. Sites: what each sub-module gives, by
    its path; what enters the last dense layer, `penultimate`; what leaves the last convolution,
    `conv_last`. Activation functions that are no modules are not seen, nor is what stands within
    `scan`, `remat`, `vmap` or `jit`: a layer there has no site, and if it is the last, none is.
    """
    shape, taken = tuple(int(n) for n in shape), pixels(preprocess)
    if len(shape) != 3 or min(shape) < 1:
        raise BadInput(f"shape {shown(shape)} is not that of images: give (H, W, C)")
    taken.check(shape[-1])
    if isinstance(module, nnx.Module):
        if variables is not None:
            raise BadInput("a module of NNX holds its own variables: leave them away")
        return _victim(*_nnx(module, taken, dict(train or {})), shape)
    if not isinstance(module, nn.Module):
        raise BadInput(f"{type(module).__name__} is no module of Flax")
    if variables is None:
        raise BadInput("a module of Linen needs its variables: give what its init made")
    check_variables(variables)
    return _victim(*_linen(module, variables, taken, dict(train or {})), shape)


Pass = Callable[..., Output]
"""`pass(variables, x, watch, train, key)`: the logits and the variables after; `watch(name, kind,
value, enters)` is told of each place, and gives the value that is gone on with. Of a layer within
a transformation, whose values must not leave that, it is told with None."""


def _victim(run: Any, variables: Variables, init: Any, shape: tuple[int, int, int]) -> Victim:
    """The net of a pass over a module: its places are found by one trace."""
    seen: list[tuple[str, str, bool, Any]] = []
    probe = jax.ShapeDtypeStruct((2, *shape), jnp.float32)

    def note(name: str, kind: str, value: Any, enters: bool) -> Any:
        seen.append((name, kind, enters, value))
        return value

    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, variables))
    try:
        out = jax.eval_shape(lambda v, x: run(v, x, note, False, None)[0], like, probe)
    except BadInput:
        raise
    except Exception as error:  # whatever the user's module raises
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BadInput(f"the module cannot take images of shape {shape}: {why}") from error
    if getattr(out, "ndim", 0) != 2 or out.shape[0] != 2:
        raise BadInput(f"the module gives {shown(getattr(out, 'shape', out))}, not logits [B, K]")
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not jnp.isfinite(leaf).all():
            raise BadInput(f"the weights '{shown(jax.tree_util.keystr(path))}' are not finite")
    names = _named(seen, out.shape[1])

    def apply(
        variables: Variables,
        x: jax.Array,
        *,
        train: bool = False,
        edits: Edits | None = None,
        key: Any = None,
    ) -> Output:
        check_variables(variables)
        acts: dict[str, jax.Array] = {}
        masks, edits = variables.get("masks", {}), edits or {}
        counts: dict[tuple[str, str, bool], int] = {}

        def watch(name: str, kind: str, value: Any, enters: bool) -> Any:
            if value is None:
                return None
            event = name, kind, enters
            counts[event] = counts.get(event, -1) + 1
            if (place := names.get((*event, counts[event]))) is None:
                return value
            if place in masks:
                value = value * jnp.broadcast_to(masks[place], value.shape)
            acts[place] = edits[place](value) if place in edits else value
            return acts[place]

        logits, after = run(
            {k: v for k, v in variables.items() if k != "masks"}, x, watch, train, key
        )
        if unknown := (set(edits) | set(masks)) - set(acts):
            raise BadInput(
                f"the model has no site '{sorted(unknown)[0]}': take one of {', '.join(acts)}"
            )
        return Output(_logits(logits), acts, {**variables, **after})

    classes = max(out.shape[1], 2)
    return Victim(Model(init, apply, shape, classes, tuple(names.values())), variables)


def _logits(given: jax.Array) -> jax.Array:
    """What a module gives as logits of float32; one number, which tells two classes, as two."""
    given = given.astype(jnp.float32)
    return given if given.shape[1] > 1 else jnp.concatenate([jnp.zeros_like(given), given], 1)


def _named(
    seen: Sequence[tuple[str, str, bool, Any]], classes: int
) -> dict[tuple[str, str, bool, int], str]:
    """The sites: outputs by their module's path, and of what enters modules only what enters the
    last dense layer, or convolution to `classes` channels. The keys: module, kind, whether it
    enters, and which call of it.
    """

    def closes(i: int) -> bool:
        name, kind, enters, _ = seen[i]
        left = (v.shape[-1] for n, _, e, v in seen[i:] if n == name and not e and v is not None)
        return enters and kind in LINEAR and (kind not in CONVS or next(left, 0) == classes)

    hidden = {i: kind for i, (_, kind, _, value) in enumerate(seen) if value is None}
    last = max((i for i in range(len(seen)) if closes(i)), default=-1)
    if any(i > last and kind.endswith(LINEAR) for i, kind in hidden.items()):
        last = -1
    convs = [i for i, (_, k, enters, _) in enumerate(seen) if k in CONVS and not enters]
    end = last if last > 0 and convs and last > convs[0] else len(seen)
    maps = [
        i
        for i, (_, _, enters, v) in enumerate(seen[:end])
        if convs and not enters and v is not None and v.ndim == 4
    ]
    if maps and any("Attention" in kind for _, kind, _, _ in seen[maps[-1] :]):
        maps = []
    if maps and any(i > maps[-1] and kind.endswith(CONVS) for i, kind in hidden.items()):
        maps = []
    taken, counts = {"penultimate", "conv_last"}, dict[tuple[str, str, bool], int]()
    names = {}
    for i, (name, kind, enters, _) in enumerate(seen):
        if i in hidden:
            continue
        event = name, kind, enters
        counts[event] = counts.get(event, -1) + 1
        place = (*event, counts[event])
        if i == last:
            names[place] = "penultimate"
        elif maps and i == maps[-1]:
            names[place] = "conv_last"
        elif not enters and (last < 0 or i < last) and name:
            names[place] = free(name, taken)
    return names


def _looked(value: Any) -> bool:
    return (
        isinstance(value, jax.Array)
        and value.ndim > 1
        and jnp.issubdtype(value.dtype, jnp.floating)
    )


def _flags(train: Mapping[str, Any], now: bool) -> dict[str, Any]:
    """The arguments of a call: those of training, or, after it, with the truth reversed."""
    return {k: (v if now else not v) if isinstance(v, bool) else v for k, v in train.items()}


def _quickened(conv: nn.Conv | nnx.Conv) -> None:
    """Gives a convolution for this pass, unless it has one of its own, gradients that are fast in
    loops on a CPU.
    """
    if conv.conv_general_dilated in (None, jax.lax.conv_general_dilated):
        object.__setattr__(conv, "conv_general_dilated", conv_general_dilated)


# --- Linen ---


def _linen(
    module: nn.Module, variables: Variables, taken: Pixels, train: Mapping[str, Any]
) -> tuple[Any, Variables, Any]:
    def run(variables: Variables, x: jax.Array, watch: Any, training: bool, key: Any) -> Any:
        home = current_trace()

        def look(call, args, kwargs, context):
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if isinstance(context.module, nn.Conv):
                _quickened(context.module)
            if not context.module.path:
                return call(*args, **kwargs)
            name, kind = ".".join(context.module.path), type(context.module).__name__
            if current_trace() != home:
                watch(name, kind, None, False)
                return call(*args, **kwargs)
            if args and _looked(args[0]) and kind in LINEAR:
                args = (watch(name, kind, args[0], True), *args[1:])
            out = call(*args, **kwargs)
            return watch(name.removeprefix("site_"), kind, out, False) if _looked(out) else out

        mutable = [name for name in variables if name != "params"] if training else []
        rngs = None if key is None else {"dropout": key}
        try:
            with nn.intercept_methods(look):
                logits, after = module.apply(
                    variables, taken.of(x), **_flags(train, training), mutable=mutable, rngs=rngs
                )
        except FOREIGN as error:
            why = " ".join(str(error).split())[:200]
            raise BadInput(f"the variables are not those of this module: {why}") from error
        return logits, after

    def init(key: jax.Array) -> Variables:
        return jax.tree_util.tree_map_with_path(functools.partial(_redrawn, key), variables)

    return run, variables, init


def _redrawn(key: jax.Array, path: Any, leaf: Any) -> jax.Array:
    """Fresh numbers of a leaf's own mean and spread; statistics of BatchNorm begin anew."""
    name, leaf = jax.tree_util.keystr(path), jnp.asarray(leaf)
    if "batch_stats" in name or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.ones_like(leaf) if "var" in name else jnp.zeros_like(leaf)
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return leaf.mean() + leaf.std() * jax.random.normal(own, leaf.shape, leaf.dtype)


# --- NNX ---


def _nnx(module: nnx.Module, taken: Pixels, train: Mapping[str, Any]) -> tuple[Any, Variables, Any]:
    """As `_linen`: parameters are `params`, all other state `batch_stats`. Sub-modules are watched
    where the graph holds them as objects; what stands in `nnx.scan` or `vmap` is not seen.
    """
    graph, params, rest = _parts(module)
    plain = [(path, leaf) for path, leaf in nnx.to_flat_state(rest) if _floating(leaf)]
    variables = {"params": _nested(nnx.to_flat_state(params)), "batch_stats": _nested(plain)}
    places = {path for path, _ in plain}

    def run(variables: Variables, x: jax.Array, watch: Any, training: bool, key: Any) -> Any:
        state = _state(params, variables["params"])
        made = nnx.merge(graph, state, _state(rest, variables["batch_stats"]), copy=True)
        (made.train if training else made.eval)()
        for i, (_, part) in enumerate(nnx.iter_graph(made)):
            if isinstance(part, nnx.RngStream) and key is not None:
                part.key[...] = jax.random.fold_in(key, i)
        _watched(made, watch)
        logits = made(taken.of(x), **_flags(train, training))
        after = nnx.to_flat_state(_parts(made)[2])
        return logits, {"batch_stats": _nested((p, v) for p, v in after if p in places)}

    def init(key: jax.Array) -> Variables:
        return jax.tree_util.tree_map_with_path(functools.partial(_redrawn, key), variables)

    return run, variables, init


def _parts(module: nnx.Module) -> tuple[Any, Any, Any]:
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return graph, params, rest


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf.get_value()).dtype, jnp.floating)


def _nested(leaves: Any) -> dict[str, Any]:
    """State by names, numbers of lists as text."""
    found: dict[str, Any] = {}
    for path, leaf in leaves:
        here = found
        for part in path[:-1]:
            here = here.setdefault(str(part), {})
        here[str(path[-1])] = jnp.asarray(leaf.get_value())
    return found


def _state(like: Any, values: Mapping[str, Any]) -> Any:
    """A state of NNX with the values at their names."""
    pairs = []
    for path, leaf in nnx.to_flat_state(like):
        here: Any = values
        for part in path:
            here = here.get(str(part)) if isinstance(here, Mapping) else None
        pairs.append((path, leaf if here is None else leaf.replace(here)))
    return nnx.from_flat_state(pairs)


def _watched(module: nnx.Module, watch: Any) -> None:
    """Lets every sub-module of a module, which is ours alone, tell what enters and leaves it."""
    home = current_trace()
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Conv):
            _quickened(part)
        if path and callable(part):
            part.__class__ = _telling(type(part), ".".join(map(str, path)), watch, home)


def _telling(cls: type, name: str, watch: Any, home: Any) -> type:
    kind = cls.__name__

    def call(self, *args, **kwargs):
        if current_trace() != home:
            watch(name, kind, None, False)
            return cls.__call__(self, *args, **kwargs)
        if args and _looked(args[0]) and kind in LINEAR:
            args = (watch(name, kind, args[0], True), *args[1:])
        out = cls.__call__(self, *args, **kwargs)
        return watch(name, kind, out, False) if _looked(out) else out

    return type(kind, (cls,), {"__call__": call})


# --- Orbax ---

TREE = "_METADATA"
"""The file in which Orbax lists the arrays of a folder."""


def orbax(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint whose leaves have names, by these; `BadInput` where it is none,
    damaged, or declares more than there is room for. In a folder of `CheckpointManager` it is that
    of the last step.
    """
    import orbax.checkpoint as ocp

    path = _item(path)
    try:
        with silent("absl"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path.absolute()).item_metadata.tree
            shapes = _flat(tree)
            if not shapes or any(not isinstance(name, str) for name in shapes):
                raise BadInput("it holds no named arrays")
            size = sum(4 * math.prod(leaf.shape) for leaf in shapes.values())
            if size > schema.memory() // 4:
                raise BadInput(f"declares {schema.gigabytes(size)}: too large for this machine")
            # As plain arrays: the devices that wrote them need not be here.
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            found = _flat(checkpointer.restore(path.absolute(), restore_args=plain))
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged checkpoint makes Orbax raise
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"damaged, or no checkpoint of Orbax ({why})") from error
    return {name: np.asarray(leaf) for name, leaf in found.items() if hasattr(leaf, "shape")}


def _item(path: Path) -> Path:
    """The folder of arrays in that of a checkpoint, a step, or all steps of a training."""
    steps = [step for step in path.iterdir() if step.name.isdecimal() and step.is_dir()]
    if steps and not (path / TREE).is_file():
        path = max(steps, key=lambda step: int(step.name))
    found = [path] if (path / TREE).is_file() else sorted(p.parent for p in path.glob(f"*/{TREE}"))
    if not found:
        raise BadInput("holds no net: no model.json of bdjax, and no checkpoint of Orbax")
    if len(found) > 1:
        raise BadInput(f"{path} holds {' and '.join(p.name for p in found)}: give one of them")
    return found[0]


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
