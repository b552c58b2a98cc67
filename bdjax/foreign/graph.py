"""A net as the file that it came in describes it: a list of operators, run in plain JAX.

The graph is one text of JSON, so that a net folder and a row hold it like any other field, and no
code of a file is ever run. Names of values, operators and weights are those of the file. Readers
(`onnx.py`, `keras.py`) write it; `ONNX` and `KERAS` hold what an operator computes, one function
each.
"""

import base64
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bdjax.types import BadInput

Order = tuple[int, ...]
MOST = 1 << 24
"""The most numbers that a constant of a graph may have."""
LARGEST = 1 << 28
"""The most numbers that one activation of one image may have: 1 GB."""


class Value(NamedTuple):
    """An array whose axes may stand in another order than the graph says: `array` is the graph's
    array transposed by `order`, None where it is the same. So transposing costs nothing, and a
    feature map stays NHWC from one convolution to the next.

    `known`: its numbers while an operator on known numbers is traced to see how large it gets.
    """

    array: Any
    order: Order | None = None
    known: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the graph sees."""
        if self.order is None:
            return tuple(self.array.shape)
        return tuple(self.array.shape[self.order.index(i)] for i in range(len(self.order)))


class Node(NamedTuple):
    """An operator of a graph. `layer`: the layer that holds its BatchNorm's arrays; `batch`: how
    many images pass, once it is known.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    layer: str | None = None
    train: bool = False
    batch: int = 0

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute; `default` where the file leaves it out."""
        return self.attrs.get(name, default)


class Weight(NamedTuple):
    """An array of a file that is a parameter: it stands in `params/{layer}/{leaf}` (or, a `stat`,
    in `batch_stats`), transposed by `order`, in the given `shape`; `mean` and `spread`: of its
    numbers, by which fresh ones are drawn.
    """

    layer: str
    leaf: str
    shape: tuple[int, ...]
    order: Order | None = None
    stat: bool = False
    mean: float = 0.0
    spread: float = 0.0

    @property
    def path(self) -> tuple[str, str, str]:
        """Where it stands in a net's variables."""
        return ("batch_stats" if self.stat else "params", self.layer, self.leaf)


class Graph(NamedTuple):
    """What a file computes. `layout`: how the image `input` stands there: NCHW, NHWC, HW without
    its one channel, or CHW or HWC in one row. `sites`: the names by which defenses know a value.
    """

    nodes: tuple[Node, ...]
    input: str
    layout: str
    output: str
    shape: tuple[int, int, int]
    classes: int
    weights: Mapping[str, Weight]
    constants: Mapping[str, np.ndarray]
    sites: Mapping[str, tuple[str, ...]]


Operator = Callable[..., Any]
"""`operator(node, *values) -> Value`, an array in the graph's order, or a list of them; inputs that
the file leaves out are None.
"""
ONNX: dict[str, Operator] = {}
KERAS: dict[str, Operator] = {}


def operator(table: dict[str, Operator], *names: str) -> Callable[[Operator], Operator]:
    """Writes a function into a table of operators under each of its names."""

    def add(fn: Operator) -> Operator:
        table.update(dict.fromkeys(names, fn))
        return fn

    return add


# --- Axes ---


def plain(value: Value) -> Any:
    """The array as the graph has it."""
    order = value.order
    return value.array if order is None else value.array.transpose(np.argsort(order))


def ordered(value: Value, order: Order) -> Any:
    """The graph's array transposed by `order`."""
    return value.array if value.order == order else plain(value).transpose(order)


def channels_last(rank: int) -> Order:
    """The order in which axis 1 of the graph, the channels, stands last."""
    return (0, *range(2, rank), 1)


def numpy_of(*values: Value | None) -> Any:
    """NumPy where all numbers are known, else JAX's."""
    return np if all(v is None or isinstance(v.array, np.ndarray) for v in values) else jnp


def numbers(value: Value) -> list[int]:
    """The whole numbers of a value that says a shape or axes."""
    known = value.array if isinstance(value.array, np.ndarray) else value.known
    if known is None:
        raise BadInput("a shape depends on the image")
    return [int(n) for n in np.ravel(known)]


# --- Running ---


def run(
    graph: Graph,
    image: jax.Array,
    weight: Callable[[str], Value],
    see: Callable[[str, Value], Value] = lambda name, value: value,
    norm: Callable[[Node, Sequence[Value | None]], Value] | None = None,
    train: bool = False,
    prepare: Callable[[Node, Sequence[Value | None]], Node] | None = None,
) -> Any:
    """The logits `[B, K]` of `image: [B, H, W, C]`.

    `weight(name)`: a weight; `see(name, value)`: looks at each computed value, and may change it;
    `norm(node, inputs)`: a BatchNorm that keeps its own statistics; `prepare(node, inputs)`: the
    node as it is computed.
    """
    batch = image.shape[0]
    image = jnp.asarray(image)  # of NumPy it would pass for numbers that the file knows
    known = {graph.input: see(graph.input, placed(image, graph.layout))}
    known |= {name: Value(array) for name, array in graph.constants.items()}
    for node in graph.nodes:
        try:
            own = norm is not None and node.layer is not None
            names = ["" if own and _of(graph, n, node.layer) else n for n in node.inputs]
            given = [(known[n] if n in known else weight(n)) if n else None for n in names]
            node = node if prepare is None else prepare(node, given)
            node = node._replace(train=train, batch=batch)
            found = [norm(node, given)] if own and norm is not None else compute(node, given)
        except BadInput as error:
            raise BadInput(f"{node.op} '{node.name}': {error}") from error
        except Exception as error:  # whatever shapes that do not fit make JAX or NumPy raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise BadInput(f"{node.op} '{node.name}' cannot be computed: {why}") from error
        for name, value in zip(node.outputs, found):
            if math.prod(value.array.shape) > LARGEST * max(batch, 1):
                raise BadInput(f"{node.op} '{node.name}' makes {list(value.shape)}: too large")
            known[name] = value if isinstance(value.array, np.ndarray) else see(name, value)
    return plain(known[graph.output])


def _of(graph: Graph, name: str, layer: str | None) -> bool:
    """Whether a value is a weight of `layer`."""
    return name in graph.weights and graph.weights[name].layer == layer


def placed(image: Any, layout: str) -> Value:
    """Images `[N, H, W, C]` as the input of a graph of this `layout` has them."""
    if layout == "NCHW":
        return Value(image, (0, 2, 3, 1))
    if layout == "NHWC":
        return Value(image)
    if layout == "HW":
        return Value(image[..., 0])
    image = image if layout == "HWC" else image.transpose(0, 3, 1, 2)
    return Value(image.reshape(image.shape[0], -1))


def compute(node: Node, given: Sequence[Value | None]) -> list[Value]:
    """What an operator makes of its inputs. One on known numbers alone is traced first where it
    could grow: a file can ask for a constant of any size in a few bytes.
    """
    fn = ONNX.get(node.op) or KERAS.get(node.op)
    if fn is None:
        raise BadInput("this operator is not known here")
    values = [v for v in given if v is not None]
    large = node.op in _GROWS or sum(v.array.size for v in values) > 64
    if large and all(isinstance(v.array, np.ndarray) for v in values):
        _bounded(fn, node, given)
    return _values(fn(node, *given))


_GROWS = {
    *("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Resize", "Upsample", "OneHot"),
    "Einsum",
}


def _bounded(fn: Operator, node: Node, given: Sequence[Value | None]) -> None:
    """Raises `BadInput` where an operator on known numbers would make too many."""

    def traced(*arrays: Any) -> list[Any]:
        left = iter(arrays)
        wrapped = [v and Value(next(left), v.order, v.array) for v in given]
        return [value.array for value in _values(fn(node, *wrapped))]

    shapes = [jax.ShapeDtypeStruct(v.array.shape, _traceable(v)) for v in given if v is not None]
    made = jax.eval_shape(traced, *shapes)
    if sum(math.prod(one.shape) for one in made) > MOST:
        raise BadInput(f"it makes a constant of {list(made[0].shape)}: too large")


def _traceable(value: Value) -> Any:
    kind = value.array.dtype
    return {"i": np.int32, "u": np.uint32, "f": np.float32}.get(kind.kind, kind)


def _values(found: Any) -> list[Value]:
    if isinstance(found, Value) or not isinstance(found, (list, tuple)):
        found = [found]
    found = [one if isinstance(one, Value) else Value(one) for one in found]
    scalar = np.generic  # what NumPy makes of an array without axes
    return [
        v._replace(array=np.asarray(v.array)) if isinstance(v.array, scalar) else v for v in found
    ]


class Dropout(nn.Module):
    """Drops by key while training; without a key it is the identity."""

    rate: float

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dropout(self.rate, deterministic=not (train and self.has_rng("dropout")))(x)


# --- As text ---


def written(graph: Graph) -> str:
    """A graph as JSON."""
    nodes = [
        {"op": n.op, "name": n.name, "in": n.inputs, "out": n.outputs, "attrs": dict(n.attrs)}
        | ({"layer": n.layer} if n.layer else {})
        for n in graph.nodes
    ]
    constants = {
        name: {
            "dtype": array.dtype.name,
            "shape": array.shape,
            "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
        }
        for name, array in graph.constants.items()
    }
    weights = {name: one._asdict() for name, one in graph.weights.items()}
    whole = graph._asdict() | {"nodes": nodes, "constants": constants, "weights": weights}
    return json.dumps(whole, ensure_ascii=False, allow_nan=True, separators=(",", ":"))


@functools.lru_cache(maxsize=64)
def parsed(text: str) -> Graph:
    """The graph that `written` wrote; `BadInput` where it is damaged."""
    try:
        found = json.loads(text)
        nodes = [
            Node(n["op"], n["name"], tuple(n["in"]), tuple(n["out"]), n["attrs"], n.get("layer"))
            for n in found["nodes"]
        ]
        graph = Graph(
            tuple(nodes),
            found["input"],
            found["layout"],
            found["output"],
            tuple(found["shape"]),
            found["classes"],
            {name: _weight(one) for name, one in found["weights"].items()},
            {name: _array(one) for name, one in found["constants"].items()},
            {name: tuple(places) for name, places in found["sites"].items()},
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"the graph of this net is damaged: {error!r}"[:200]) from error
    return graph


def _weight(one: Mapping[str, Any]) -> Weight:
    order = one["order"]
    made = Weight(**{**one, "shape": tuple(one["shape"]), "order": order and tuple(order)})
    if math.prod(made.shape) > LARGEST * 4:
        raise ValueError("a weight is too large")
    return made


def _array(one: Mapping[str, Any]) -> np.ndarray:
    array = np.frombuffer(base64.b64decode(one["data"]), one["dtype"])
    return array.reshape(one["shape"])
