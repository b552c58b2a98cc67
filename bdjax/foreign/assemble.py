"""From what a reader found in a file to a net: shapes seen by tracing, sites, variables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import mesh
from bdjax.foreign.batch import rebatched
from bdjax.foreign.graph import (
    ONNX,
    Graph,
    Node,
    Order,
    Value,
    Weight,
    plain,
    run,
    written,
)
from bdjax.foreign.net import Imported
from bdjax.foreign.pixels import Pixels
from bdjax.foreign.sites import NORMS, VIEWS, places
from bdjax.types import BadInput, Variables, shown

HARMLESS = {
    *("kernel_shape", "storage_order", "momentum", "epsilon", "pads", "saturate", "name", "ratio"),
    *("seed", "dtype", "training_mode", "cubic_coeff_a", "nearest_mode", "round_mode", "roi"),
    *("output_dtype", "stash_type", "precision", "softmax_precision", "flat", "batch_axis", "each"),
    *("extrapolation_value", "is_causal", "noop_with_empty_axes", "count_include_pad", "beta"),
}
"""Attributes that need not be read: they repeat what shapes say, or matter in training alone."""


class Parts(NamedTuple):
    """What a reader found. `weights`: layer, leaf and order of each array that can be trained;
    `batch`: the number of images that the file fixes; `bare`: whether a last softmax is away.
    """

    nodes: Sequence[Node]
    input: str
    layout: str
    output: str
    shape: tuple[int, int, int]
    weights: Mapping[str, tuple[str, str, Order | None]]
    constants: Mapping[str, np.ndarray]
    batch: int | None = None
    bare: bool = False


class Unsized(BadInput):
    """The file leaves the size of its images open."""


class Found(NamedTuple):
    """A net of a file. `pixels`: what the file says of them, None where it says nothing; `notes`:
    lines to be said; `about`: facts of the file, by name; `half`: whether it computes in 16 bits.
    """

    net: Any
    variables: Variables
    shape: tuple[int, int, int]
    classes: int
    pixels: Pixels | None = None
    notes: tuple[str, ...] = ()
    about: Mapping[str, str] = {}
    half: bool = False


def image_shape(sides: Sequence[int | None], size: Sequence[int] | None) -> tuple[int, int, int]:
    """The size of the images that a file describes by `sides`, in which None is open: height, width
    and channels, height and width of grey ones, or how many numbers are in a row. What it leaves
    open comes from `size`.
    """
    if len(sides) == 1:
        if size is None:
            raise Unsized(
                f"the net takes rows of {sides[0]} numbers: give --size H W C of its images"
            )
        if sides[0] not in (None, math.prod(size)):
            asked = "×".join(map(str, size))
            raise BadInput(f"the net takes rows of {sides[0]} numbers, not images of {asked}")
        return tuple(size)  # type: ignore[return-value]
    found = [*sides, 1][:3]
    known = "×".join("?" if side is None else str(side) for side in found)
    if size is not None and any(side not in (None, s) for side, s in zip(found, size)):
        raise BadInput(f"the net takes images of {known}, not of {'×'.join(map(str, size))}")
    found = found if size is None else size
    if None in found or min(found) < 1:  # type: ignore[type-var]
        raise Unsized(f"the file leaves the size of its images open ({known}): give --size H W C")
    return tuple(found)  # type: ignore[return-value]


def assembled(
    parts: Parts, arrays: Mapping[str, np.ndarray], pixels: Pixels | None = None
) -> Found:
    """The net of a graph and its `arrays`, as they stand in the file."""
    if not parts.weights:
        raise BadInput("it has no weights: nothing in it was trained")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise BadInput(f"the weights '{shown(name)}' are not finite: the file is damaged")
    nodes, homes = _normed(parts)
    normed = {node.layer for node in nodes}
    weights = {name: _weight(arrays[name], *home, normed) for name, home in homes.items()}
    graph = Graph(
        tuple(nodes), parts.input, parts.layout, parts.output, parts.shape, 0, weights,
        parts.constants, {},
    )  # fmt: skip
    if parts.batch:
        graph = rebatched(graph, parts.batch)
    shapes, logits = _traced(graph)
    graph, notes = (graph, ()) if parts.bare else _unsquashed(graph, shapes)
    graph, logits = _as_logits(graph, logits, parts.batch)
    dependent = _floating(graph, shapes)
    graph = graph._replace(classes=logits[1])
    graph = graph._replace(sites=places(graph, dependent))
    net = Imported(written(graph), pixels or Pixels())
    return Found(net, variables_of(graph, arrays), parts.shape, graph.classes, pixels, notes)


def _weight(array: np.ndarray, layer: str, leaf: str, order: Order | None, normed: Any) -> Weight:
    shape = array.shape if order is None else tuple(array.shape[i] for i in order)
    stat = leaf in ("mean", "var") and layer in normed
    flat, count = array.reshape(-1), max(array.size, 1)
    mean = float(flat.sum(dtype=np.float64)) / count
    spread = max(float(np.dot(flat, flat)) / count - mean**2, 0.0) ** 0.5
    return Weight(layer, leaf, shape, order, stat, mean, spread)


def _normed(parts: Parts) -> tuple[list[Node], Mapping[str, tuple[str, str, Order | None]]]:
    """The nodes, where a BatchNorm whose statistics are its own alone is told its layer; and the
    weights, where a scale or a bias that it shares with others is of a layer apart.
    """
    uses: dict[str, int] = {}
    for node in parts.nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    nodes, weights = [], dict(parts.weights)
    for node in parts.nodes:
        if node.op in NORMS:
            own = [n for n in node.inputs[1:] if n in weights and uses[n] == 1]
            layers = {weights[name][0] for name in own}
            if len(layers) == 1 and {*node.inputs[3:]} <= {*own}:
                node = node._replace(layer=layers.pop())
            for name in {*node.inputs[1:]} - {*own} if node.layer else ():
                if name in weights and weights[name][0] == node.layer:
                    weights[name] = (f"{node.layer}.shared", *weights[name][1:])
        nodes.append(node)
    return nodes, weights


def variables_of(graph: Graph, arrays: Mapping[str, np.ndarray]) -> Variables:
    """The variables of a graph from the arrays of its file."""
    found: dict[str, Any] = {"params": {}}
    for name, weight in graph.weights.items():
        array = arrays[name] if weight.order is None else arrays[name].transpose(weight.order)
        kind, layer, leaf = weight.path
        home = found.setdefault(kind, {}).setdefault(layer, {})
        home[leaf] = jnp.asarray(array, jnp.float32)
    return found


class _Watched(dict):
    """Attributes that keep note of which were read."""

    def __init__(self, attrs: Mapping[str, Any]):
        super().__init__(attrs)
        self.left = set(attrs)

    def get(self, name: str, default: Any = None) -> Any:
        self.left.discard(name)
        return super().get(name, default)


def _traced(graph: Graph) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """The shape of each value for a batch of 2, and of the output, by tracing alone: nothing is
    computed, and attributes that no operator read are refused.
    """
    watched = [node._replace(attrs=_Watched(node.attrs)) for node in graph.nodes]
    graph = graph._replace(nodes=tuple(watched))
    shapes: dict[str, Any] = {}
    floats: dict[str, Any] = {}

    def see(name: str, value: Value) -> Value:
        shapes[name] = value.shape
        floats[name] = value.array.dtype
        return value

    def forward(image: jax.Array, weights: Mapping[str, jax.Array]) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return run(graph, image, lambda n: Value(weights[n], graph.weights[n].order), see)

    probe = jax.ShapeDtypeStruct((2, *graph.shape), jnp.float32)
    structs = {n: jax.ShapeDtypeStruct(w.shape, jnp.float32) for n, w in graph.weights.items()}
    out = jax.eval_shape(forward, probe, structs)
    for node in watched:
        if left := sorted(node.attrs.left - HARMLESS):  # type: ignore[attr-defined]
            raise BadInput(f"{node.op} '{node.name}': its attribute {left[0]} is not known here")
    mesh.fits("an image's activations", sum(4 * math.prod(s) for s in shapes.values()))
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise BadInput("the net's output is a class number: export it with its logits for output")
    found = {name: shape for name, shape in shapes.items() if floats[name] == jnp.float32}
    return found, tuple(out.shape)


def _unsquashed(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Graph, tuple[str, ...]]:
    """The graph without a last softmax or sigmoid behind which are mere views, and a note on it.
    A softmax stays where it is not over all numbers of an image.
    """
    makers = {name: node for node in graph.nodes for name in node.outputs}
    node = makers.get(graph.output)
    while node is not None and node.op in VIEWS:
        node = makers.get(node.inputs[0])
    if node is None or node.op not in ("Softmax", "LogSoftmax", "Sigmoid"):
        return graph, ()
    shape = shapes[node.inputs[0]]  # of two images
    axis = node.attr("axis", -1) % len(shape)
    over = math.prod(shape[axis:]) if node.attr("flat") else shape[axis]
    if node.op != "Sigmoid" and (axis == 0 or 2 * over != math.prod(shape)):
        return graph, ()
    bare = node._replace(op="Identity", attrs={})
    nodes = tuple(bare if one is node else one for one in graph.nodes)
    return graph._replace(nodes=nodes), (f"the logits are what the last {node.op} reads",)


def _as_logits(
    graph: Graph, shape: tuple[int, ...], fixed: int | None
) -> tuple[Graph, tuple[int, int]]:
    """The graph with logits `[B, K]` for its output: further axes of length 1 go, and a single
    number, of a net that tells two classes, becomes two.
    """
    if len(shape) > 1 and shape[0] != 2 and fixed:
        raise BadInput(
            f"the file fixes the number of its images at {fixed}: export it with a dynamic batch "
            "axis"
        )
    if len(shape) < 2 or shape[0] != 2 or math.prod(shape[2:]) != 1 or shape[1] < 1:
        raise BadInput(f"the net's output has shape {['batch', *shape[1:]]}: not one of logits")
    output = graph.output
    for extra, when in (("Flatten", len(shape) > 2), ("Binary", shape[1] == 1)):
        if when:
            node = Node(extra, extra.lower(), (output,), (f"{output}:{extra}",), {})
            output = node.outputs[0]
            graph = graph._replace(nodes=(*graph.nodes, node), output=output)
    return graph, (2, max(shape[1], 2))


def _floating(graph: Graph, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The float values that are made of the image."""
    found = {graph.input}
    for node in graph.nodes:
        if node.op not in ("Shape", "Size") and found.intersection(node.inputs):
            found.update(node.outputs)
    return {name: shape for name, shape in shapes.items() if name in found}


def exported(graph: Graph, variables: Variables) -> dict[str, np.ndarray]:
    """The arrays of the file, by their names there, from variables."""
    found = {}
    for name, weight in graph.weights.items():
        kind, layer, leaf = weight.path
        array = np.asarray(variables[kind][layer][leaf])
        found[name] = array if weight.order is None else array.transpose(np.argsort(weight.order))
    return found


__all__ = ["ONNX", "Found", "Parts", "assembled", "exported", "plain", "variables_of"]
