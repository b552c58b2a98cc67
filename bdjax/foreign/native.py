"""Bare weights of an architecture that bdjax has: which array of the file goes where.

Names are matched where the file has ours, or those that its framework's nets of this kind have;
else layers are matched in order, by their shapes. Neither proves that the net computes what its
owner trained: a reference does.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bdjax import registry
from bdjax.foreign.pixels import Pixels
from bdjax.models.graph import Path
from bdjax.models.layers import Net, build
from bdjax.registry import pytree, static
from bdjax.types import BadInput, Model, Variables, shown

Framework = Literal["torch", "keras", "flax"]
ALIASES: dict[str, tuple[str, dict[str, str]]] = {
    "preactresnet18": ("preact-resnet18", {}),
    **{f"resnet{depth}": ("resnet", {"depth": depth}) for depth in ("18", "34", "50")},
    **{f"vgg{depth}_bn": ("vgg-bn", {"depth": depth}) for depth in ("16", "19")},
    **{f"vgg{depth}-bn": ("vgg-bn", {"depth": depth}) for depth in ("16", "19")},
}
"""What others call our nets."""
LEAVES: dict[Framework, dict[str, str]] = {
    "torch": {
        "weight": "kernel", "bias": "bias", "running_mean": "mean", "running_var": "var",
    },
    "keras": {
        "kernel": "kernel", "bias": "bias", "gamma": "scale", "beta": "bias",
        "moving_mean": "mean", "moving_variance": "var",
    },
    "flax": {name: name for name in ("kernel", "bias", "scale", "mean", "var")},
}  # fmt: skip
COLLECTIONS = ("params", "batch_stats")
BESIDE = {"opt_state", "optimizer"}
"""What a training with Flax keeps beside its net."""
PREACT = (
    (r"^conv1$", "conv_1"),
    (r"^layer(\d)\.(\d)\.bn(\d)$", lambda m: f"block_{_block(m)}_{m[3]}_norm"),
    (r"^layer(\d)\.(\d)\.conv(\d)$", lambda m: f"block_{_block(m)}_{m[3]}"),
    (r"^layer(\d)\.(\d)\.shortcut\.0$", lambda m: f"block_{_block(m)}_shortcut"),
    (r"^(linear|fc)$", "logits"),
)
RESNET = ((r"\.shortcut\.", ".downsample."), (r"^linear$", "fc"))
RENAMES: dict[str, Sequence[tuple[str, Any]]] = {
    "preact-resnet18": PREACT,
    "resnet": RESNET,
    "deepid": ((r"^output$", "logits"),),
}
"""By net: what layers of a file are called here."""


def _block(match: re.Match[str]) -> int:
    return 2 * (int(match[1]) - 1) + int(match[2]) + 1


class Move(NamedTuple):
    """How an array of a file becomes one of ours: `file.reshape(parts).transpose(order)`, then of
    our shape.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[int, ...]
    order: tuple[int, ...]

    def ours(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Our array from the file's."""
        return array.reshape(self.parts).transpose(self.order).reshape(shape)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """The file's array from ours."""
        moved = array.reshape([self.parts[i] for i in self.order])
        return moved.transpose(np.argsort(self.order)).reshape(self.shape)


@pytree
class Pixelled(Net):
    """A net of the registry that takes other pixels."""

    net: Any = static(None)
    pixels: Pixels = static(Pixels())

    def preprocess(self, x):
        return self.net.preprocess(self.pixels.of(x))

    def check(self, shape: Sequence[int], classes: int) -> None:
        self.pixels.check(shape[-1])
        self.net.check(shape, classes)

    def layers(self, x, train, classes):
        return self.net.layers(x, train, classes)


def pixelled(net: Any, pixels: Pixels) -> Any:
    """`net` on such pixels."""
    return net if pixels == Pixels() else Pixelled(net, pixels)


def architecture(name: str) -> Net:
    """The net that is called so, here or elsewhere."""
    if name.lower() in ALIASES:
        name, fields = ALIASES[name.lower()]
        return registry.make("model", name, **fields)
    name, colon, preset = name.partition(":")
    return registry.make("model", name, preset if colon else None)


def variables(
    net: Any, model: Model, arrays: Mapping[str, np.ndarray], framework: Framework
) -> tuple[Variables, dict[str, Move], bool]:
    """The variables of `model`, a net of `net`, from the arrays of a file; how each is moved, and
    whether all were matched by their names.
    """
    shapes = wanted(model)
    named = _by_name(net, arrays, framework)
    matched = named.keys() == shapes.keys() and all(
        math.prod(arrays[name].shape) == math.prod(shapes[path]) for path, name in named.items()
    )
    if not matched:
        named = _in_order(model, shapes, arrays, framework)
    flat: dict[Any, Any] = _flat_rows(model) if framework == "torch" else {}
    moves, found = {}, {}
    for path, name in named.items():
        move = _move(path, name, arrays[name].shape, shapes[path], framework, flat.get(path[1:]))
        if not np.isfinite(arrays[name]).all():
            raise BadInput(f"the weights '{shown(name)}' are not finite: the file is damaged")
        found[path] = jnp.asarray(move.ours(arrays[name], shapes[path]), jnp.float32)
        moves["/".join(path)] = move
    return unflatten_dict(found), moves, matched


def wanted(model: Model) -> dict[Path, tuple[int, ...]]:
    """The shapes of a model's arrays, by their paths, in the order in which the net reads them."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    flat: dict[Path, Any] = flatten_dict(shapes)  # type: ignore[assignment]
    x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(unflatten_dict(v), x).logits)(flat, x).jaxpr
    inputs = dict(zip(jaxpr.invars, sorted(flat)))
    order = [v for step in jaxpr.eqns for v in step.invars if not hasattr(v, "val")]
    read = dict.fromkeys(inputs[v] for v in order if v in inputs)
    return {path: tuple(flat[path].shape) for path in (*read, *(flat.keys() - read.keys()))}


def _by_name(net: Any, arrays: Mapping[str, np.ndarray], framework: Framework) -> dict[Path, str]:
    """The paths that names of the file say."""
    found = {}
    for name, array in arrays.items():
        layer, leaf = split(name, framework)
        for pattern, to in RENAMES.get(registry.name_of(net) or "", ()):
            layer = re.sub(pattern, to, layer)
        ours = LEAVES[framework].get(leaf, leaf)
        if framework == "torch" and leaf == "weight" and array.ndim == 1:
            ours = "scale"
        kind = "batch_stats" if ours in ("mean", "var") else "params"
        found[kind, layer, ours] = name
    return found


def split(name: str, framework: Framework) -> tuple[str, str]:
    """The layer and the leaf of an array's name."""
    if framework == "torch":
        layer, _, leaf = name.rpartition(".")
        return layer, leaf
    parts = _parts(name)
    if framework == "flax":
        *layers, leaf = _within(parts) or ("",)
        return "/".join(layers), leaf
    return (parts[-2] if len(parts) > 1 else ""), parts[-1] if parts else ""


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[/.]", name.removesuffix(":0")) if part)


def of_net(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the arrays of a training with Flax those of its net, not of its optimizer or counters, in
    the order of their names, numbers by value.
    """
    real = (name for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating))
    paths = {name: path for name in real if not BESIDE & {*(path := _parts(name))}}
    homes = {path[: path.index("params")] for path in paths.values() if "params" in path}
    if homes:
        depth = min(map(len, homes))
        home, *others = sorted(home for home in homes if len(home) == depth)
        if others:
            nets = " and ".join(shown("/".join(one)) for one in (home, *others))
            raise BadInput(f"it holds several nets, {nets}: save the one that is meant alone")
        whole = {(*home, kind) for kind in COLLECTIONS}
        paths = {name: path for name, path in paths.items() if path[: depth + 1] in whole}
    return {name: arrays[name] for name in sorted(paths, key=_counted)}


def _counted(name: str) -> list[tuple[int, str]]:
    """A key that sorts Conv_10 behind Conv_2."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _within(path: tuple[str, ...]) -> tuple[str, ...]:
    """A path of Flax without its collection, and without `value`, below which NNX keeps arrays."""
    starts = [i + 1 for i, part in enumerate(path) if part in COLLECTIONS]
    return path[max(starts, default=0) : len(path) - (path[-1:] == ("value",))]


def _in_order(
    model: Model,
    wanted: Mapping[Path, tuple[int, ...]],
    arrays: Mapping[str, np.ndarray],
    framework: Framework,
) -> dict[Path, str]:
    """The paths by order: each layer of ours is the first of the file's that is left and has its
    shapes.
    """
    theirs: dict[str, dict[str, str]] = {}
    for name, array in arrays.items():
        layer, leaf = split(name, framework)
        ours = LEAVES[framework].get(leaf, leaf)
        ours = "scale" if framework == "torch" and leaf == "weight" and array.ndim == 1 else ours
        theirs.setdefault(layer, {})[ours] = name
    mine: dict[str, dict[str, Path]] = {}
    for path in wanted:
        mine.setdefault(path[1], {})[path[-1]] = path
    found = {}
    for layer, leaves in mine.items():
        fits = (
            other
            for other, names in theirs.items()
            if names.keys() == leaves.keys()
            and all(_same(arrays[names[k]].shape, wanted[leaves[k]], framework) for k in leaves)
        )
        if (other := next(fits, None)) is None:
            shapes = {k: list(wanted[path]) for k, path in leaves.items()}
            raise BadInput(f"it has no layer for '{layer}' {shapes}: its weights are another net's")
        for leaf, name in theirs.pop(other).items():
            found[leaves[leaf]] = name
    if theirs:
        raise BadInput(f"its layer '{shown(next(iter(theirs)))}' is none of this net's")
    return found


def _same(theirs: tuple[int, ...], ours: tuple[int, ...], framework: Framework) -> bool:
    if framework == "torch" and len(theirs) > 1:
        theirs = (*theirs[2:], *theirs[1::-1])
    return theirs == ours


def _move(
    path: Path, name: str, theirs: Any, ours: Any, framework: Framework, rows: Any = None
) -> Move:
    theirs = tuple(theirs)
    if framework != "torch" or path[-1] != "kernel" or len(theirs) < 2:
        move = Move(name, theirs, theirs, tuple(range(len(theirs))))
    elif rows is not None:  # a feature map laid flat, channels first there
        h, w, c = rows
        move = Move(name, theirs, (theirs[0], c, h, w), (2, 3, 1, 0))
    else:
        move = Move(name, theirs, theirs, (*range(2, len(theirs)), 1, 0))
    shape = tuple(move.parts[i] for i in move.order)
    if math.prod(shape) != math.prod(ours) or (rows is None and shape != tuple(ours)):
        raise BadInput(f"'{shown(name)}' has shape {list(theirs)}, the net wants {list(ours)}")
    return move


def _flat_rows(model: Model) -> dict[tuple[str, str], tuple[int, int, int]]:
    """The kernels, by layer and leaf, that read a feature map laid flat, and its (H, W, C)."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    flat: dict[Path, Any] = flatten_dict(shapes)  # type: ignore[assignment]
    x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(unflatten_dict(v), x).logits)(flat, x).jaxpr
    paths, maps, found = dict(zip(jaxpr.invars, sorted(flat))), {}, {}
    for step in jaxpr.eqns:
        inputs = [v for v in step.invars if not hasattr(v, "val")]
        before = [v.aval.shape for v in inputs]
        after = step.outvars[0].aval.shape
        laid = step.primitive.name == "reshape" and len(before[0]) == 4 and len(after) == 2
        if laid and after[1] == math.prod(before[0][1:]):
            maps[step.outvars[0]] = before[0][1:]
        for v in inputs:
            if v in maps and step.primitive.name == "dot_general":
                for other in inputs:
                    if other in paths:
                        found[paths[other][1:]] = maps[v]
            elif v in maps and after == v.aval.shape:
                maps[step.outvars[0]] = maps[v]
    return found


def size_of(arrays: Mapping[str, np.ndarray], framework: Framework) -> tuple[int, int]:
    """The classes and the channels that the first and the last kernel of a file say."""
    kernels = [a for n, a in arrays.items() if split(n, framework)[1] in ("weight", "kernel")]
    kernels = [a for a in kernels if a.ndim > 1]
    if not kernels:
        raise BadInput("it has no kernels: these are no weights of a net")
    first, last = kernels[0], kernels[-1]
    if framework == "torch":
        return last.shape[0], first.shape[1]
    return last.shape[-1], first.shape[-2]


__all__ = ["Move", "Pixelled", "architecture", "build", "pixelled", "size_of", "variables"]
