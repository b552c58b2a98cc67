"""ONNX files: read into a graph, and written back with other weights.

The package `onnx` takes the file apart; nothing else of it is used, and nothing is looked at but
the file and, where it keeps its numbers apart, as torch writes it, the one beside it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdjax import schema
from bdjax.foreign.assemble import Found, Parts, assembled, image_shape
from bdjax.foreign.graph import ONNX, Node, Value, compute, plain
from bdjax.foreign.pixels import Pixels
from bdjax.foreign.sites import ACTIVATIONS, LINEAR, NORMS, free, needed
from bdjax.types import BadInput, shown

OLDEST = 11
"""The oldest opset that is read."""
MESSAGES, PARTS = 256, 1_000_000
"""What share of the memory a file may have whose size is not that of its weights: parsed, a byte of
an odd one takes 80; and the most operators and tensors of a large file.
"""


def read(raw: bytes, size: Sequence[int] | None = None) -> Found:
    """The net in an ONNX file; `size`: (H, W, C) where the file leaves it open."""
    model = _model(raw)
    graph = model.graph
    arrays = {tensor.name: _array(tensor) for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in arrays]
    if len(given) != 1:
        names = ", ".join(value.name for value in given) or "none"
        raise BadInput(f"the net has {len(given)} inputs ({names}): an image classifier has one")
    nodes, constants = _nodes(graph.node, arrays, _opset(model))
    output, bare, notes = _logits(nodes, graph.output)
    _in_order(nodes, {given[0].name, *arrays, *constants})
    nodes = needed(_strided(_aliased(nodes, output), arrays, constants), [output])
    image = _image(given[0], size, nodes)
    aside = _pixel_constants(nodes, image.name, {**arrays, **constants})
    weights = _weights(nodes, image.name, arrays, constants, aside)
    rest = {k: v for k, v in {**arrays, **constants}.items() if k not in weights}
    nodes, rest = _folded(nodes, rest)
    kept = {name: array for name, array in rest.items() if any(name in n.inputs for n in nodes)}
    pixels = _pixels(model, image, aside)
    parts = Parts(
        nodes, image.name, image.layout, output, image.shape, weights, kept, image.batch, bare
    )  # fmt: skip
    whole = {**arrays, **constants}
    found = assembled(parts, {name: whole[name] for name in weights}, pixels)
    half = {given[0].type.tensor_type.elem_type, *(n.attr("to") for n in nodes if n.op == "Cast")}
    return found._replace(
        notes=(*notes, *found.notes), about=_about(model), half=not half.isdisjoint((10, 16))
    )


def fill(raw: bytes, values: Mapping[str, np.ndarray]) -> bytes:
    """The file with other numbers in the tensors of `values`, of their shapes; all else stays."""
    import onnx

    model = _model(raw)
    tensors = _tensors(model)
    for name, value in values.items():
        tensor = tensors[name]
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        for field in ("float_data", "double_data", "int32_data"):
            tensor.ClearField(field)
        tensor.raw_data = np.ascontiguousarray(value.astype(kind)).tobytes()
    return model.SerializeToString()


def _tensors(model: Any) -> dict[str, Any]:
    """The stored tensors of a graph: initializers, and constants by what they are put out as."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.HasField("t"):
                tensors.setdefault(node.output[0], attribute.t)
    return tensors


def whole(path: Path, raw: bytes, most: int) -> bytes:
    """The file `raw` that stands at `path`, with the numbers in it that it keeps in a file beside
    it: a plain one, of no other folder. Both together have at most `most` bytes.
    """
    if b"location" not in raw:  # the word by which a tensor names it
        return raw
    model = _model(raw)
    apart = {name: t for name, t in _tensors(model).items() if _apart(t)}
    if not apart:
        return raw
    left = min(most, (1 << 31) - 1) - len(raw)  # protobuf's own bound
    for name, tensor in apart.items():
        numbers = _beside(path, name, tensor, left)
        left -= len(numbers)
        tensor.raw_data = numbers
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return model.SerializeToString()


def _apart(tensor: Any) -> bool:
    """Whether a tensor's numbers are in another file."""
    import onnx

    return tensor.data_location == onnx.TensorProto.EXTERNAL or bool(tensor.external_data)


def _beside(path: Path, name: str, tensor: Any, most: int) -> bytes:
    """The numbers that a tensor keeps in a file beside `path`."""
    import onnx

    told = {entry.key: entry.value for entry in tensor.external_data}
    place = told.get("location", "")
    what = f"the numbers of '{shown(name)}' lie in another file ({shown(place)})"
    if re.fullmatch(r"[^/\\\0]+", place) is None or place in (".", ".."):
        raise BadInput(f"{what}, which is not beside this one: save the net in one file")
    file = path.absolute().parent / place
    if not file.exists() or file.is_symlink():
        raise BadInput(
            f"{what}, which is not there: keep both together, or save the net in one file "
            "(torch.onnx.export(…, external_data=False))"
        )
    try:
        each = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = math.prod(tensor.dims) * each
        start, length = int(told.get("offset", 0)), int(told.get("length", size))
    except (KeyError, ValueError):
        size, start, length = -1, 0, 0
    if size != length or start < 0 or min(tensor.dims, default=0) < 0:
        raise BadInput(f"{what}, at a place or of a length that cannot be: damaged")
    if size > most:
        raise BadInput(f"{what}, which has more than the memory here allows")
    schema.plain_file(file)
    try:
        with open(file, "rb") as data:
            data.seek(start)
            numbers = data.read(size)
    except (OSError, OverflowError) as error:
        raise BadInput(f"cannot read {file}: {getattr(error, 'strerror', error)}") from error
    if len(numbers) < size:
        raise BadInput(f"{what}, which ends before them: damaged")
    return numbers


def _about(model: Any) -> dict[str, Any]:
    return {"made by": f"{model.producer_name} {model.producer_version}".strip() or "nobody"} | {
        "opset": str(_opset(model))
    }


# --- The file ---


def _model(raw: bytes) -> Any:
    try:
        import onnx
    except ImportError:
        raise BadInput("reading ONNX needs the package onnx: pip install 'bdjax[onnx]'") from None
    _bulky(raw)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except Exception as error:  # whatever a damaged file makes protobuf raise
        raise BadInput(f"damaged, or not ONNX ({' '.join(str(error).split())[:100]})") from error
    if not model.graph.node or not model.graph.output:
        raise BadInput("damaged, or not ONNX: it holds no graph")
    if model.functions:
        if len(raw) > 1 << 28:
            raise BadInput("its functions are not inlined: export it without")
        try:
            from onnx.inliner import inline_local_functions

            model = inline_local_functions(model)
        except Exception as error:
            raise BadInput(f"its functions cannot be inlined ({error})"[:200]) from error
    _opset(model)
    return model


def _bulky(raw: bytes) -> None:
    """Raises `BadInput` where a file is large, but not by plain numbers: its many small messages
    would take far more memory than the file.
    """
    most, small, count = schema.memory() // MESSAGES, 0, 0
    if len(raw) < most:
        return
    for field, _, part in _fields(raw, 0, len(raw)):
        for inner, _, piece in _fields(raw, *part) if field == 7 else ():  # graph
            small += piece[1] - piece[0] + 2
            for leaf, _, data in _fields(raw, *piece) if inner == 5 else ():  # initializer
                small -= data[1] - data[0] if leaf in (4, 9) else 0  # float_data, raw_data
            count += 1
            if small > most or count > PARTS:
                raise BadInput(
                    f"more than {schema.gigabytes(small)} of it are no weights: too large"
                )


def _fields(raw: bytes, at: int, end: int):
    """The fields of a protobuf message in `raw[at:end]`: number, kind, where the content stands."""
    while at < end:
        key, at = _varint(raw, at, end)
        if (kind := key & 7) == 2:
            length, at = _varint(raw, at, end)
        elif kind == 0:
            length = _varint(raw, at, end)[1] - at
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise BadInput("damaged, or not ONNX")
        if at + length > end:
            raise BadInput("damaged, or not ONNX: it ends early")
        yield key >> 3, kind, (at, at + length) if kind == 2 else (at, at)
        at += length


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        value |= (raw[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if raw[at - 1] < 128:
            return value, at
    raise BadInput("damaged, or not ONNX: it ends early")


def _opset(model: Any) -> int:
    found = {one.domain: one.version for one in model.opset_import}
    version = found.get("", found.get("ai.onnx", 0))
    if version < OLDEST:
        raise BadInput(f"opset {version} is older than {OLDEST}: export it with a newer one")
    return version


def _array(tensor: Any) -> np.ndarray:
    import onnx

    if _apart(tensor):  # within a branch of an If
        raise BadInput(f"the numbers of '{shown(tensor.name)}' lie in another file")
    if min(tensor.dims, default=0) < 0:
        raise BadInput(f"the tensor '{shown(tensor.name)}' has a negative size")
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except Exception as error:
        raise BadInput(
            f"the tensor '{shown(tensor.name)}' is damaged: it does not hold what its shape "
            f"{shown(list(tensor.dims))} says"
        ) from error
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise BadInput(f"the tensor '{shown(tensor.name)}' holds {array.dtype}, not numbers")
    if array.dtype.kind in "fV":
        array = array.astype(np.float32)
    return array.astype(np.int64) if array.dtype.kind in "iu" else array


# --- Nodes ---


def _nodes(
    protos: Any, arrays: Mapping[str, np.ndarray], opset: int
) -> tuple[list[Node], dict[str, np.ndarray]]:
    """The operators, attributes as plain values, and the constants among them."""
    nodes, constants = [], {}
    for proto in protos:
        if proto.domain not in ("", "ai.onnx"):
            raise BadInput(
                f"operator {shown(proto.domain)}::{shown(proto.op_type)} is not known here"
            )
        if proto.op_type == "Constant":
            constants[proto.output[0]] = _constant(proto)
        elif proto.op_type == "If":
            inner, more = _branch(proto, {**arrays, **constants}, opset)
            nodes += inner
            constants |= more
        elif proto.op_type not in ONNX:
            name = f" ('{shown(proto.name)}')" if proto.name else ""
            raise BadInput(f"operator {shown(proto.op_type)}{name} is not known here")
        else:
            attrs = _attributes(proto, opset)
            names = tuple(proto.input), tuple(proto.output)
            nodes.append(Node(proto.op_type, proto.name, *names, attrs))
    return nodes, constants


def _attributes(proto: Any, opset: int) -> dict[str, Any]:
    import onnx

    attrs: dict[str, Any] = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            array = _array(value)
            if array.size != 1:
                raise BadInput(f"{proto.op_type} has a tensor for {attribute.name}")
            value, attrs["dtype"] = array.item(), array.dtype.name
        elif isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, (list, tuple)) or hasattr(value, "__iter__"):
            value = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value]
        if not isinstance(value, (int, float, str, list)):
            raise BadInput(f"{proto.op_type} has {attribute.name}, which is not known here")
        attrs[attribute.name] = value
    if proto.op_type in ("Softmax", "LogSoftmax") and opset < 13:
        attrs = {"axis": 1, **attrs, "flat": 1}
    if proto.op_type == "BatchNormalization":
        attrs = {"momentum": 0.9, "epsilon": 1e-5, **attrs}
    return attrs


def _constant(proto: Any) -> np.ndarray:
    import onnx

    (attribute,) = proto.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _array(value)
    if attribute.name not in ("value_float", "value_floats", "value_int", "value_ints"):
        raise BadInput(f"a constant of {shown(attribute.name)} is not known here")
    whole = attribute.name.startswith("value_int")
    return np.asarray(list(value) if hasattr(value, "__iter__") else value).astype(
        np.int64 if whole else np.float32
    )


def _branch(proto: Any, known: Mapping[str, np.ndarray], opset: int) -> Any:
    """The operators of the branch that a known condition takes."""
    if (condition := known.get(proto.input[0])) is None or condition.size != 1:
        raise BadInput(f"operator If ('{shown(proto.name)}') on what is not known beforehand")
    name = "then_branch" if condition.item() else "else_branch"
    graph = next(a.g for a in proto.attribute if a.name == name)
    arrays = {tensor.name: _array(tensor) for tensor in graph.initializer}
    nodes, constants = _nodes(graph.node, {**known, **arrays}, opset)
    for inner, outer in zip(graph.output, proto.output):
        nodes.append(Node("Identity", "", (inner.name,), (outer,), {}))
    return nodes, {**arrays, **constants}


def _in_order(nodes: Sequence[Node], known: set[str]) -> None:
    """Raises `BadInput` where an operator reads what none before it makes."""
    made = {"", *known}
    for node in nodes:
        if missing := [name for name in node.inputs if name not in made]:
            raise BadInput(
                f"damaged: {node.op} ('{shown(node.name)}') reads '{shown(missing[0])}', which no "
                "operator before it makes"
            )
        made.update(node.outputs)


def _aliased(nodes: Sequence[Node], output: str) -> list[Node]:
    """The operators without those that are the identity."""
    names: dict[str, str] = {}
    found = []
    for node in nodes:
        node = node._replace(inputs=tuple(names.get(name, name) for name in node.inputs))
        if node.op == "Identity" and node.outputs[0] != output:
            names[node.outputs[0]] = node.inputs[0]
        else:
            found.append(node)
    return found


def _strided(
    nodes: Sequence[Node], arrays: Mapping[str, np.ndarray], constants: dict[str, np.ndarray]
) -> tuple[Node, ...]:
    """The operators, where an array laid flat and gathered in order, as PyTorch writes a change of
    strides, is but reshaped.
    """
    makers, found = {node.outputs[0]: node for node in nodes}, []
    known = {**arrays, **constants}
    for node in nodes:
        index = known.get(node.inputs[1]) if node.op == "Gather" else None
        flat = makers.get(node.inputs[0]) if index is not None else None
        if index is not None and flat is not None and flat.op == "Reshape":
            to = known.get(flat.inputs[1])
            whole = to is not None and to.tolist() == [-1] and node.attr("axis", 0) == 0
            if whole and np.array_equal(index.ravel(), np.arange(index.size)):
                shape = f"{node.inputs[1]}:shape"
                constants[shape] = np.asarray(index.shape, np.int64)
                node = node._replace(op="Reshape", inputs=(flat.inputs[0], shape), attrs={})
        found.append(node)
    return tuple(found)


def _logits(nodes: Sequence[Node], outputs: Sequence[Any]) -> tuple[str, bool, list[str]]:
    """The value that holds the logits, of several outputs the first that is no class number: what
    a last softmax reads, and whether there is one.
    """
    makers = {name: node for node in nodes for name in node.outputs}
    whole = (2, 3, 4, 5, 6, 7, 9, 12, 13)  # integers and bool
    real = [value.name for value in outputs if value.type.tensor_type.elem_type not in whole]
    output = (real or [outputs[0].name])[0]
    first = "first" if output == outputs[0].name else "first that is no class number"
    notes = [f"of {len(outputs)} outputs the {first}, {shown(output)}"] if len(outputs) > 1 else []
    while (node := makers.get(output)) is not None and node.op in ("Identity", "Cast", "Dropout"):
        output = node.inputs[0]
    if node is None or node.op not in ("Softmax", "LogSoftmax", "Sigmoid"):
        return output, False, notes
    return node.inputs[0], True, [*notes, f"the logits are what the last {node.op} reads"]


# --- The image ---


class _Image(NamedTuple):
    name: str
    layout: str
    shape: tuple[int, int, int]
    batch: int | None
    bytes: bool


def _image(value: Any, size: Sequence[int] | None, nodes: Sequence[Node]) -> _Image:
    """How the net takes its images; what the file leaves open comes from `size`."""
    kind = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    batch = dims[0] if dims else None
    whole = kind.elem_type == 2
    if len(dims) not in (2, 3, 4):
        raise BadInput(f"the input {shown(value.name)} has shape {dims}: not that of images")
    layout = _layout(value.name, dims, nodes) if len(dims) == 4 else {2: "CHW", 3: "HW"}[len(dims)]
    sides = [dims[i] for i in (2, 3, 1)] if layout == "NCHW" else dims[1:]
    return _Image(value.name, layout, image_shape(sides, size), batch, whole)


def _layout(name: str, dims: Sequence[int | None], nodes: Sequence[Node]) -> str:
    """NHWC where the channels stand last, by their number or because they are moved first."""
    few = [i for i in (1, 3) if dims[i] in (1, 3, 4)]
    if len(few) == 1:
        return "NCHW" if few == [1] else "NHWC"
    first = next((n for n in nodes if name in n.inputs), None)
    moved = first is not None and first.op == "Transpose" and first.attr("perm") == [0, 3, 1, 2]
    return "NHWC" if moved else "NCHW"


STEPS = {"Cast", "Transpose", "Identity", "Sub", "Add", "Mul", "Div"}


def _pixel_constants(
    nodes: Sequence[Node], image: str, known: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """The constants by which a graph scales its pixels, before its first layer, and how: no
    weights.
    """
    found, name = {}, image
    while True:
        readers = [node for node in nodes if name in node.inputs]
        if len(readers) != 1 or readers[0].op not in STEPS:
            return found
        (node,) = readers
        others = [other for other in node.inputs if other != name]
        if any(other not in known or known[other].size > 4 for other in others):
            return found
        found |= dict.fromkeys(others, node.op)
        name = node.outputs[0]


def _pixels(model: Any, image: _Image, aside: Mapping[str, str]) -> Pixels | None:
    """What the file says of its pixels; None where it says nothing."""
    said = {entry.key: entry.value for entry in model.metadata_props}
    bgr = said.get("Image.BitmapPixelFormat", "").lower().startswith("bgr")
    nominal = said.get("Image.NominalPixelRange", "")
    if image.bytes or nominal.endswith("0_255"):
        return Pixels(255.0, (), (), bgr)
    known = {tensor.name: _array(tensor) for tensor in model.graph.initializer}
    known |= {n.output[0]: _constant(n) for n in model.graph.node if n.op_type == "Constant"}
    for name, how in aside.items():
        most = float(np.abs(known[name]).max())
        scaled = (how == "Div" and most > 20) or (how == "Mul" and most < 0.05)
        if scaled or (how == "Sub" and most > 2):
            return Pixels(255.0, (), (), bgr)
        if how == "Sub":
            return Pixels(1.0, (), (), bgr)
    if nominal.startswith("Normalized_0"):
        return Pixels(1.0, (), (), bgr)
    return None


# --- Weights ---

SLOTS = {
    "Conv": {1: "kernel", 2: "bias"},
    "ConvTranspose": {1: "kernel", 2: "bias"},
    "Gemm": {0: "kernel", 1: "kernel", 2: "bias"},
    "MatMul": {0: "kernel", 1: "kernel"},
    "BatchNormalization": {1: "scale", 2: "bias", 3: "mean", 4: "var"},
    "InstanceNormalization": {1: "scale", 2: "bias"},
    "GroupNormalization": {1: "scale", 2: "bias"},
    "LayerNormalization": {1: "scale", 2: "bias"},
    "RMSNormalization": {1: "scale"},
    "PRelu": {1: "slope"},
}
"""Where operators take weights, and what those are called here."""
SETTINGS = {"Clip", "Pad", "Resize", "Upsample", "Pow", "Dropout", "Where", "Range", "Reshape"} | {
    "Slice", "Tile", "ConstantOfShape", "OneHot", "Less", "Greater", "Equal", "Max", "Min",
}  # fmt: skip
"""Operators whose further inputs are settings, never weights."""
SAME = {"Identity", "Cast", "Transpose"}


def _weights(
    nodes: Sequence[Node],
    image: str,
    arrays: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray],
    aside: Mapping[str, str],
) -> dict[str, tuple[str, str, Any]]:
    """The arrays that can be trained: layer, leaf and order of each.

    They are the floats that stand where operators take weights, and further initializers of more
    than one number that meet the image; what scales the pixels, and settings, are not.
    """
    dependent = _dependent(nodes, {image})
    readers: dict[str, list[tuple[Node, int]]] = {}
    for node in nodes:
        for i, name in enumerate(node.inputs):
            readers.setdefault(name, []).append((node, i))
    names, taken, norms = _display(nodes), set(), {}
    found: dict[str, tuple[str, str, Any]] = {}
    for name, array in {**arrays, **constants}.items():
        if array.dtype.kind != "f" or name in aside or name not in readers:
            continue
        use = _use(name, readers, dependent)
        if use is None:
            continue
        node, place, perm = use
        slot = SLOTS.get(node.op, {}).get(place)
        if slot is None and (array.size <= 1 or name in constants):
            continue
        layer, leaf = _home(name, node, slot, names)
        if node.op in NORMS:
            norms.setdefault(id(node), layer)
            found[name] = (f"{id(node)}", leaf, None)
            continue
        order = _stored(node, slot, array.ndim, perm) if len(readers[name]) == 1 else None
        found[name] = (_once(layer, leaf, taken), leaf, order)
    others = {place.partition("/")[0] for place in taken}
    homes = {f"{key}": free(layer, others) for key, layer in norms.items()}
    return {k: (homes.get(layer, layer), leaf, order) for k, (layer, leaf, order) in found.items()}


def _dependent(nodes: Sequence[Node], names: set[str]) -> set[str]:
    """The values that are computed from `names`; shapes of such are none."""
    found = set(names)
    for node in nodes:
        if node.op not in ("Shape", "Size") and found.intersection(node.inputs):
            found.update(node.outputs)
    return found


def _use(name: str, readers: Mapping[str, Any], dependent: set[str]) -> Any:
    """Where an array meets the image: the operator, in which place, and how it was transposed on
    the way there.
    """
    seen: set[str] = set()
    line: list[Any] = [(name, ())]
    while line:
        here, perms = line.pop(0)
        for node, place in readers.get(here, ()):
            if node.op in SETTINGS and place > 0:
                continue
            if dependent.intersection(node.outputs):
                return node, place, perms
            if node.outputs[0] in seen:
                continue
            seen.add(node.outputs[0])
            step = node.attr("perm") if node.op == "Transpose" else ()
            known = perms is not None and node.op in SAME
            line.append((node.outputs[0], (*(perms or ()), step) if known else None))
    return None


def _stored(node: Node, slot: str | None, rank: int, perms: Any) -> tuple[int, ...] | None:
    """The order of axes in which bdjax has kernels, HWIO and [in, out]; None: that of the file."""
    if slot != "kernel" or perms is None:
        return None
    order = list(range(rank))
    for perm in perms:
        if perm:
            order = [order[i] for i in perm]
    if node.op == "Conv":
        order = [order[i] for i in (*range(2, rank), 1, 0)]
    elif node.op == "ConvTranspose":
        order = [order[i] for i in (*range(2, rank), 0, 1)]
    elif node.op == "Gemm" and node.attr("transB", 0):
        order = order[::-1]
    return None if order == list(range(rank)) else tuple(order)


def _home(name: str, node: Node, slot: str | None, names: Mapping[int, str]) -> tuple[str, str]:
    """The layer and the leaf of an array: by its own name where that has a dot, such as
    `conv1.weight`, else by its operator's.
    """
    layer, dot, last = _word(name).rpartition(".")
    named = bool(dot) and last in ("weight", "bias", "running_mean", "running_var", "gamma", "beta")
    if slot is not None:
        return (layer if named else names[id(node)]), slot
    if last == "bias" and named:
        return layer, "bias"
    return _word(name), "value"


def _once(layer: str, leaf: str, taken: set[str]) -> str:
    """The layer's name, numbered where it has such a leaf."""
    places = {place.rpartition("/")[0] for place in taken if place.endswith(f"/{leaf}")}
    own = free(layer, places)
    taken.add(f"{own}/{leaf}")
    return own


def _word(name: str) -> str:
    """A name of the file as bdjax writes it: letters, digits, dots and hyphens."""
    word = re.sub(r"[^\w.-]+", "_", name.strip("/").replace("::", ".")) or "value"
    return "params_" if word == "params" else word  # which Flax keeps for itself


def _display(nodes: Sequence[Node]) -> dict[int, str]:
    """What each operator is called: by its path in the file, such as `layer1.0.conv1` for
    `/layer1/layer1.0/conv1/Conv`, else by its kind.
    """
    found, counts = {}, {}
    for node in nodes:
        parts = [part for part in node.name.split("/") if part]
        path: list[str] = []
        for part in parts:
            if path and part.startswith(f"{path[-1]}."):
                path.pop()
            path.append(part)
        kind = re.fullmatch(rf"(?i)(node_)?{node.op}(_\d+)?", path[-1]) if path else None
        if kind and len(path) > 1 and node.op in LINEAR | NORMS | ACTIVATIONS:
            path.pop()
        elif kind:
            path[-1] = path[-1].lower()
        name = _word(".".join(path)).removeprefix("node_") if path else node.op.lower()
        counts[name] = counts.get(name, 0) + 1
        found[id(node)] = name if counts[name] == 1 else f"{name}_{counts[name]}"
    return found


# --- Constants ---


def _folded(
    nodes: Sequence[Node], known: dict[str, np.ndarray]
) -> tuple[tuple[Node, ...], dict[str, np.ndarray]]:
    """The operators that are left, once those on constants alone are computed."""
    left, known = [], dict(known)
    names = _display(nodes)
    for node in nodes:
        named = node._replace(name=names[id(node)])
        given = [name for name in node.inputs if name]
        if node.op != "Shape" and given and all(name in known for name in given):
            values = [Value(known[name]) if name else None for name in node.inputs]
            try:
                made = compute(named, values)
            except BadInput as error:
                raise BadInput(f"{node.op} '{named.name}': {error}") from error
            except Exception as error:
                raise BadInput(
                    f"{node.op} '{named.name}' cannot be computed: {error}"[:200]
                ) from error
            known |= {name: np.asarray(plain(v)) for name, v in zip(node.outputs, made)}
        else:
            left.append(named)
    return tuple(left), known
