"""A graph from a file as a net of bdjax."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from bdjax.foreign import onnx_ops as onnx_ops
from bdjax.foreign.graph import (
    Graph,
    Node,
    Value,
    Weight,
    channels_last,
    ordered,
    parsed,
    plain,
    run,
)
from bdjax.foreign.pixels import Pixels
from bdjax.models.layers import Net, site
from bdjax.registry import pytree, static
from bdjax.types import BadInput


@pytree
class Imported(Net):
    """A net from a file. `graph`: see `written`; `pixels`: what it takes for pixels."""

    graph: str = static("")
    pixels: Pixels = static(Pixels())

    def preprocess(self, x):
        return self.pixels.of(x)

    def check(self, shape: Sequence[int], classes: int) -> None:
        super().check(shape, classes)
        graph = parsed(self.graph)
        self.pixels.check(shape[-1])
        if (tuple(shape), classes) != (graph.shape, graph.classes):
            raise BadInput(
                f"the net takes images of {'×'.join(map(str, graph.shape))} and has "
                f"{graph.classes} classes, not {'×'.join(map(str, shape))} and {classes}"
            )

    def layers(self, x, train, classes):
        graph = parsed(self.graph)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            layers = {
                layer: _Weights(tuple(leaves), name=layer)()
                for layer, leaves in own_weights(graph).items()
            }

            def weight(name: str) -> Value:
                found = graph.weights[name]
                return Value(layers[found.layer][found.leaf], found.order)

            def see(name: str, value: Value) -> Value:
                array = value.array
                for place in graph.sites.get(name, ()):
                    array = site(place, array)
                return value._replace(array=array)

            return run(graph, x, weight, see, functools.partial(_norm, graph), train)


def own_weights(graph: Graph) -> dict[str, list[Weight]]:
    """The weights by layer, without those of a BatchNorm, which keeps its own."""
    normed = {node.layer for node in graph.nodes if node.layer is not None}
    found: dict[str, list[Weight]] = {}
    for one in graph.weights.values():
        if one.layer not in normed:
            found.setdefault(one.layer, []).append(one)
    return found


class _Weights(nn.Module):
    """The arrays of a layer; fresh ones have the mean and the spread of the file's."""

    leaves: tuple[Weight, ...]

    @nn.compact
    def __call__(self):
        return {one.leaf: self.param(one.leaf, _drawn(one), one.shape) for one in self.leaves}


def _drawn(weight: Weight | None, default: float = 0.0) -> Callable[..., jax.Array]:
    def draw(key, shape, dtype=jnp.float32):
        if weight is None:
            return jnp.full(shape, default, dtype)
        return weight.mean + weight.spread * jax.random.normal(key, shape, dtype)

    return draw


def _norm(graph: Graph, node: Node, given: Sequence[Value | None]) -> Value:
    """BatchNorm with statistics of its own: Linen's; a scale and a bias that it shares with others
    come after.
    """
    x, scale, bias, *_ = given
    assert x is not None
    order = channels_last(len(x.shape))
    array = ordered(x, order)
    own = {one.leaf: one for one in graph.weights.values() if one.layer == node.layer}
    made = nn.BatchNorm(
        use_running_average=not node.train,
        momentum=node.attr("momentum", 0.9),
        epsilon=node.attr("epsilon", 1e-5),
        use_scale="scale" in own,
        use_bias="bias" in own,
        scale_init=_drawn(own.get("scale"), 1.0),
        bias_init=_drawn(own.get("bias")),
        name=node.layer,
    )
    out = made(array)
    out = out if scale is None else out * plain(scale)
    return Value(out if bias is None else out + plain(bias), order)
