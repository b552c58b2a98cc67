"""Link-Pruning Scale-Free: no links from dormant pixels, scale-free links elsewhere."""

import re
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses.base import Training
from bdjax.defenses.parts.view import viewed
from bdjax.models.graph import kernel_of_logits, leaf
from bdjax.registry import defense, static
from bdjax.train import Recipe, TrainSet, fit, unit
from bdjax.types import INT32, Array, BadInput, Metric, Model, Range, Repaired, Share, Split

Rule = Literal["mean", "quantile", "active"]
Topology = Literal["scale-free", "random", "dense"]
Edges = Literal["growth", "budget", "weighted"]


class Graph(NamedTuple):
    """The links that a net's dense layers have room for. Nodes: the pixels (or features), then each
    layer's units.

    `names`: the layers, first to last; `rows`: for each, the nodes that its kernel reads, in order;
    `widths`: its units.
    """

    names: tuple[str, ...]
    rows: tuple[np.ndarray, ...]
    widths: tuple[int, ...]

    @property
    def units(self) -> int:
        return sum(self.widths)

    @property
    def nodes(self) -> int:
        return len(self.rows[0]) + self.units


def feed_forward(params: Any) -> bool:
    """Whether a net has dense layers and nothing else."""
    return all(getattr(layer.get("kernel"), "ndim", None) == 2 for layer in params.values())


def last_dense(model: Model, params: Any) -> str:
    """The dense layer that makes the logits."""
    path = kernel_of_logits(model)
    if len(path) != 2 or leaf(params, path).ndim != 2:
        raise BadInput(
            f"lpsf thins a dense last layer, '{'.'.join(path)}' is none: use another net"
        )
    return path[0]


def graph_of(model: Model) -> Graph:
    """The graph of all layers of a feed-forward net; of any other net, that of its last layer.

    The kernels of a feed-forward net read the layer before, or the pixels and the layer before, or
    all earlier layers.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    # Not the order of the dictionary: jit sorts it.
    order = sorted(
        params,
        key=lambda name: (name == "logits", [int(digits) for digits in re.findall(r"\d+", name)]),
    )
    names = tuple(order) if feed_forward(params) else (last_dense(model, params),)
    shapes = [params[name]["kernel"].shape for name in names]
    layers, rows = [np.arange(shapes[0][0])], []
    for name, (inputs, width) in zip(names, shapes):
        pasts = (layers[-1:], [layers[0], *layers[1:][-1:]], layers)
        fitting = [past for past in map(np.concatenate, pasts) if len(past) == inputs]
        if not fitting:
            raise BadInput(
                f"lpsf cannot tell what layer '{name}' with {inputs} inputs reads: use the net "
                "'ffnn'"
            )
        rows.append(fitting[0])
        layers.append(layers[-1][-1] + 1 + np.arange(width))
    return Graph(names, tuple(rows), tuple(width for _, width in shapes))


def grow(
    key: jax.Array, graph: Graph, alive: jax.Array, links: jax.Array, *, preferential: bool = True
) -> jax.Array:
    """Every unit, layer by layer, draws `links: [layers]` of the nodes that it may read, without
    replacement: `[units, nodes]` bool.

    P(u) ∝ k_u + 1, k_u the degree so far (Barabási–Albert); all alike unless `preferential`. Nodes
    that are not `alive: [nodes]` are never drawn; where fewer are left than `links`, all of them
    are.
    """
    layer = np.repeat(np.arange(len(graph.names)), graph.widths)
    reads = (
        jnp.asarray(np.stack([np.isin(np.arange(graph.nodes), rows) for rows in graph.rows]))
        & alive[None]
    )

    def draw(degree, now):
        key, layer, unit = now
        # The largest of log-weights plus Gumbel noise are a weighted sample without replacement.
        score = jax.random.gumbel(key, degree.shape) + (
            jnp.log(degree + 1.0) if preferential else 0.0
        )
        rank = jnp.argsort(jnp.argsort(jnp.where(reads[layer], -score, jnp.inf)))
        drawn = reads[layer] & (rank < links[layer])
        return (degree + drawn.astype(jnp.float32)).at[unit].add(
            drawn.sum(dtype=jnp.float32)
        ), drawn

    units = graph.nodes - graph.units + jnp.arange(graph.units)
    now = (jax.random.split(key, graph.units), jnp.asarray(layer), units)
    return jax.lax.scan(draw, jnp.zeros(graph.nodes), now)[1]


def degrees(drawn: jax.Array) -> jax.Array:
    """The links in and out `[nodes]` of each node of `drawn: [units, nodes]`."""
    units, nodes = drawn.shape
    drawn = drawn.astype(jnp.float32)
    return drawn.sum(0).at[nodes - units :].add(drawn.sum(1))


def exponent(degree: jax.Array, least: Array | float) -> jax.Array:
    """Maximum-likelihood exponent γ of P(k) ∝ k^−γ over the degrees k ≥ `least`: 1 + 1 / mean ln(k
    / (least − ½)).
    """
    least = jnp.asarray(least, jnp.float32)
    return 1 + 1 / jnp.log(jnp.maximum(degree, 1) / (least - 0.5)).mean(where=degree >= least)


@defense("lpsf")
class Lpsf(Training):
    """Link-Pruning Scale-Free: prune the links of dormant pixels before training (Kaviani et al.,
    2023).

    A reconstruction: the paper's text could not be obtained. Known: links from inactive or barely
    active input pixels, found on clean images, are eliminated; then the fully connected net becomes
    scale-free, with long-range links from the input. Ours:

    1. Pixel i is dormant where its score s_i falls below `tau`. `rule`: "mean", s_i = mean of x_i;
       "active", s_i = share of the images with x_i > 0.1; "quantile": the share `tau` of the pixels
       with the lowest mean.
    2. Its links to every layer are zero and stay so.
    3. Each unit, layer by layer, draws `links` sources from the earlier layers, P(u) ∝ k_u + 1
       (Barabási–Albert,
    exponent ≈ 3).
    4. The net is trained on the (poisoned) data; first values are scaled to the number of links
       that a unit has.

    The defaults come from accuracy on Fashion-MNIST's clean images alone: the largest tau of .05,
    .1, .2, .3, .4 that costs at most 4 points, and the best number of links of 8, 16 … 256. A
    trigger on pixels that are not dormant is not hindered.

    `tau`: in [0, 1]. `links`: sources a unit. `edges`: "growth", as above; "budget", a unit draws
    as many sources as the layer before is wide, the links of a fully connected chain; "weighted",
    all links stay and start scaled by k_u + 1, k grown as above. Ablations: `prune=False` keeps all
    pixels; `topology`: "random", the same number of links drawn evenly; "dense", all links.

    Made for the family `ffnn` with links="all". Other `ffnn` nets keep to the links that they have
    room for. A net with convolutions has its dormant pixels set to zero and a scale-free last
    layer, the variant that Shamshiri & Sohn (2023) call weak.

    `info`: `dormant: [H, W, C]`, `masks: {layer: [inputs, units]}`, `degree: [nodes]`, `density`,
    `exponent`, `loss`, `acc` by epoch.

    Reference: Sara Kaviani, Samaneh Shamshiri and Insoo Sohn, "A Defense Method against Backdoor
    Attacks on Neural Networks", Expert Systems with Applications.
    """

    tau: Share = 0.3
    links: Annotated[Array | int, Range(1, INT32)] = 128
    rule: Rule = static("mean")
    topology: Topology = static("scale-free")
    edges: Edges = static("growth")
    prune: bool = static(True)

    used_if = {
        "rule": {"prune": (True,)},
        "tau": {"prune": (True,)},
        "links": {"topology": ("scale-free", "random"), "edges": ("growth", "weighted")},
        "edges": {"topology": ("scale-free", "random")},
    }

    measures = (Metric("density", hint="share of the possible links"), Metric("exponent"))

    def __call__(
        self, key: jax.Array, model: Model, recipe: Recipe, data: TrainSet, clean: Split
    ) -> Repaired:
        key_init, key_grow, key_fit = jax.random.split(key, 3)
        variables, dormant = model.init(key_init), self.dormant(clean)
        graph = graph_of(model)
        alive = jnp.ones(graph.nodes, bool)
        if feed_forward(variables["params"]):
            alive = alive.at[: dormant.size].set(~dormant.reshape(-1))
        else:
            variables = {**variables, "view": (~dormant).astype(jnp.float32)}
        masks, scales, degree = self.links_of(key_grow, graph, alive)

        def with_kernels(tree, kernels):
            return tree | {
                name: {**tree[name], "kernel": kernel} for name, kernel in kernels.items()
            }

        params = variables["params"]
        first = {name: params[name]["kernel"] * masks[name] * scales[name] for name in graph.names}
        trainable = with_kernels(jax.tree.map(lambda _: 1.0, params), masks)
        variables = {**variables, "params": with_kernels(params, first)}
        variables, log = fit(
            key_fit, self.wrap(model), recipe, data, variables=variables, trainable=trainable
        )
        room = sum(mask.size for mask in masks.values())
        info = {
            "dormant": dormant,
            "masks": masks,
            "degree": degree,
            "density": sum(mask.sum() for mask in masks.values()) / room,
            "exponent": exponent(degree, self.links),
        }
        return Repaired(variables, info | log._asdict())

    def wrap(self, model: Model) -> Model:
        params = jax.eval_shape(model.init, jax.random.key(0))["params"]
        return model if feed_forward(params) else viewed(model)

    def dormant(self, clean: Split) -> jax.Array:
        """Which pixels `[H, W, C]` are dormant on the clean images."""
        x = unit(clean.image)
        if not self.prune:
            return jnp.zeros(x.shape[1:], bool)
        score = (x > 0.1).mean(0) if self.rule == "active" else x.mean(0)
        if self.rule == "quantile":
            score = jnp.argsort(jnp.argsort(score.reshape(-1))).reshape(score.shape) / score.size
        return score < self.tau

    def links_of(
        self, key: jax.Array, graph: Graph, alive: jax.Array
    ) -> tuple[dict, dict, jax.Array]:
        """By layer, the links that stay, `[inputs, units]` of 0/1, and the factors of their first
        values; the degrees `[nodes]`.
        """
        count = jnp.full(len(graph.names), self.links)
        if self.topology == "dense":
            count = jnp.full_like(count, graph.nodes)
        elif self.edges == "budget":
            count = jnp.asarray([len(graph.rows[0]), *graph.widths[:-1]])
        drawn = grow(key, graph, alive, count, preferential=self.topology == "scale-free")
        degree = degrees(drawn)
        weighted = self.edges == "weighted" and self.topology != "dense"
        masks, scales, start = {}, {}, 0
        for name, rows, width in zip(graph.names, graph.rows, graph.widths):
            mine = drawn[start : start + width][:, rows].T
            mask = (
                jnp.broadcast_to(alive[rows][:, None], mine.shape) if weighted else mine
            ).astype(jnp.float32)
            factor = mask * (degree[rows][:, None] + 1) if weighted else mask
            # The inputs' variances still add up to what they were before.
            norm = jnp.sqrt(jnp.square(factor).sum(0, keepdims=True) / len(rows))
            masks[name], scales[name] = mask, factor / jnp.maximum(norm, 1e-9)
            start += width
        return masks, scales, degree

    def check(self, model: Model, clean: Split) -> None:
        super().check(model, clean)
        graph_of(model)
