"""Graphs that were written for one number of images, made to take any."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bdjax.foreign.graph import Graph, Node, Value, numbers, run

OTHER = 7
"""How many times as many images are traced, to see where their number stands in a shape."""


def rebatched(graph: Graph, batch: int) -> Graph:
    """The graph with each fixed shape told which of its axes holds the images: by tracing it for
    `batch` images, for which the file was written, and for seven times as many.
    """
    before: dict[str, tuple[int, ...]] = {}

    def note(name: str, value: Value) -> Value:
        before[name] = value.shape
        return value

    _trace(graph, batch, note)
    nodes: list[Node] = []
    inner: set[str] = set()  # values in which the images are the inner part of an axis

    def placed(node: Node, given: Sequence[Value | None]) -> Node:
        source = given[0]
        old = before.get(node.inputs[0]) if node.op == "Reshape" else None
        if source is not None and old is not None and old != source.shape:
            to, asked = before[node.outputs[0]], numbers(given[1])  # type: ignore[arg-type]
            axis, within = _axis(old, source.shape, to, batch, node.inputs[0] in inner)
            moving = any(a > 0 and a != b for a, b in zip(asked, to))  # the file sees to it itself
            if axis is not None and asked[axis] > 0 and not moving:
                attrs = {**node.attrs, "batch_axis": axis, "each": to[axis] // batch}
                node = node._replace(attrs=attrs)
            inner.update(node.outputs if within else ())
        elif inner.intersection(node.inputs):
            inner.update(node.outputs)
        wide = before.get(node.inputs[0]) if node.op == "Expand" else None
        if source is not None and wide is not None and wide != source.shape:
            to = before[node.outputs[0]]
            here = next(i for i, (a, b) in enumerate(zip(wide, source.shape)) if a != b)
            here += len(to) - len(wide)
            attrs = {**node.attrs, "batch_axis": here, "each": to[here] // batch}
            node = node._replace(attrs=attrs)
        nodes.append(node)
        return node

    _trace(graph, OTHER * batch, lambda name, value: value, placed)
    return graph._replace(nodes=tuple(nodes))


def _trace(graph: Graph, batch: int, see: Callable[..., Value], prepare: Any = None) -> None:
    def forward(image: Any, weights: Any) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            weight = lambda n: Value(weights[n], graph.weights[n].order)  # noqa: E731
            return run(graph, image, weight, see, prepare=prepare)

    probe = jax.ShapeDtypeStruct((batch, *graph.shape), jnp.float32)
    structs = {n: jax.ShapeDtypeStruct(w.shape, jnp.float32) for n, w in graph.weights.items()}
    jax.eval_shape(forward, probe, structs)


def _axis(
    old: tuple[int, ...], new: tuple[int, ...], to: tuple[int, ...], batch: int, inner: bool
) -> tuple[int | None, bool]:
    """Which axis of `to`, the fixed shape, holds the images, and whether as the inner part of it:
    that which begins, or ends, where they do in memory. `old`, `new`: the array's shape for `batch`
    images and for more.
    """
    here = next(i for i, (a, b) in enumerate(zip(old, new)) if a != b)
    step = math.prod(old[here + 1 :])  # numbers from one image to the next
    if old[here] != batch and not inner:
        step = step * old[here] // batch
    steps = [math.prod(to[i + 1 :]) for i in range(len(to))]
    alone = [i for i, n in enumerate(to) if n == batch and steps[i] == step]
    outer = [i for i, n in enumerate(to) if steps[i] * n == step * batch]
    within = [i for i in range(len(to)) if steps[i] == step]
    if alone:
        return alone[0], False
    if outer and not (within and len(to) < len(old)):  # in memory the two are the same
        return outer[0], False
    return (within[0], True) if within else (None, False)
