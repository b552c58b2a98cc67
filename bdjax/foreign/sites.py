"""Which values of a graph a defense may look at, and by what names."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bdjax.foreign.graph import Graph, Node

VIEWS = {"Identity", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Dropout", "Cast"}
VIEWS |= {"Permute", "Activation:linear"}
POOLS = {"GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "ReduceMean", "ReduceMax"}
POOLS |= {"ReduceSum", "Flatten", "Reshape"}
POOLS |= {"GlobalAveragePooling2D", "GlobalMaxPooling2D", "AveragePooling2D", "MaxPooling2D"}
CONVS = {"Conv", "ConvTranspose", "Conv2D", "DepthwiseConv2D", "SeparableConv2D"}
CONVS |= {"Conv2DTranspose"}
LINEAR = {"Gemm", "MatMul", "Dense"} | CONVS
ATTENTION = {"Softmax", "Attention", "MultiHeadAttention"}
NORMS = {"BatchNormalization"}
ACTIVATIONS = {
    *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
    *("Softplus", "Softsign", "Gelu", "Mish", "Clip", "PRelu", "ThresholdedRelu", "Swish"),
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU"),
}


def places(graph: Graph, shapes: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The sites of a graph: each computed array, by its operator's name, but for mere views;
    `NAME_pre` is what only the activation function or the BatchNorm NAME reads. `penultimate`
    enters the last layer with weights; `conv_last` is the last feature map of a net whose last
    convolution is followed by no attention.

    `shapes`: of each value that depends on the image and is no shape itself.
    """
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    named = {}
    ends = {graph.output} | {node.inputs[0] for node in graph.nodes if node.op == "Binary"}
    for node in graph.nodes:
        for i, name in enumerate(node.outputs):
            if name in shapes and node.op not in VIEWS and name not in ends:
                named[name] = f"{node.name}_{i}" if i else node.name
    for name, own in list(named.items()):
        after = readers.get(name, [])
        if len(after) == 1 and after[0].op in ACTIVATIONS | NORMS and name != graph.output:
            follower = after[0].name
            named[name] = f"{follower}_pre" if after[0].outputs[0] in named else own
    found = {name: [own] for name, own in named.items()}
    if (last := _penultimate(graph, shapes)) is not None:
        found[last] = ["penultimate"]
    if (last := _last_map(graph, shapes)) is not None:
        pre = next((n.inputs[0] for n in graph.nodes if last in n.outputs), None)
        if pre in named and named[pre].endswith("_pre"):
            found[pre] = ["conv_last_pre"]
        found[last] = [
            "conv_last",
            *(["penultimate"] if found.get(last) == ["penultimate"] else []),
        ]
    return {name: tuple(own) for name, own in unique(found).items()}


def unique(found: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The same names, the later of two equal ones numbered."""
    taken: set[str] = set()
    return {key: [free(name, taken) for name in names] for key, names in found.items()}


def free(name: str, taken: set[str]) -> str:
    """`name`, numbered where it is taken; it is so from now on."""
    found, i = name, 1
    while found in taken:
        i += 1
        found = f"{name}_{i}"
    taken.add(found)
    return found


def _penultimate(graph: Graph, shapes: Mapping[str, Any]) -> str | None:
    """What the last layer with weights reads of the image."""
    for node in reversed(graph.nodes):
        if node.op in LINEAR and any(name in graph.weights for name in node.inputs):
            return next((name for name in node.inputs if name in shapes), None)
    return None


def _last_map(graph: Graph, shapes: Mapping[str, Any]) -> str | None:
    """The last feature map: from the last hidden convolution on, what is first pooled or laid
    flat.
    """
    last = _penultimate(graph, shapes)
    hidden = [
        i
        for i, node in enumerate(graph.nodes)
        if node.op in CONVS and node.inputs[0] in shapes and last not in node.inputs
    ]
    if not hidden:
        return None
    start = hidden[-1]
    if any(node.op in ATTENTION for node in graph.nodes[start:] if node.outputs[0] in shapes):
        return None
    behind = {graph.nodes[start].outputs[0]}
    latest = graph.nodes[start].outputs[0]
    for node in graph.nodes[start + 1 :]:
        entering = [name for name in node.inputs if name in behind]
        if not entering:
            continue
        if node.op in POOLS and len(shapes[node.outputs[0]]) <= 4 and _shrinks(node, shapes):
            return entering[0]
        if node.op in LINEAR and last in node.inputs:
            return entering[0]
        if node.outputs[0] in shapes:
            behind.add(node.outputs[0])
            latest = node.outputs[0] if node.op not in VIEWS else latest
    return latest


def _shrinks(node: Node, shapes: Mapping[str, Any]) -> bool:
    before = next(shapes[name] for name in node.inputs if name in shapes)
    after = shapes[node.outputs[0]]
    return math.prod(after) < math.prod(before) or len(after) < len(before)


def needed(nodes: Sequence[Node], outputs: Iterable[str]) -> tuple[Node, ...]:
    """The nodes that `outputs` are made of."""
    wanted, found = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            found.append(node)
    return tuple(reversed(found))
