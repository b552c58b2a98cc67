"""Whole models of Keras, `.keras` and `.h5`, from the file's own description, without Keras: each
layer is written as operators of ONNX, whose feature maps stand NHWC here as in Keras.

Lambda layers, custom objects and layers that are not known here are refused by name.
"""

import io
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdjax import schema
from bdjax.foreign.assemble import Found, Parts, assembled, image_shape
from bdjax.foreign.graph import Node, Order
from bdjax.foreign.pixels import Pixels
from bdjax.foreign.sites import needed
from bdjax.types import BadInput, shown

CONFIG = 1 << 24
"""The most bytes of a description."""


class Tensor(NamedTuple):
    """A value of the graph and its rank; feature maps, of rank 4, are NCHW in the graph."""

    name: str
    rank: int


class Described(NamedTuple):
    """A layer: its kind, name, settings, and what it is called with, once for each call."""

    kind: str
    name: str
    config: Mapping[str, Any]
    calls: Sequence[tuple[list[Any], dict[str, Any]]]
    module: str = ""


class File(NamedTuple):
    """A model's description and its weights: `weights(path, layer)`: by name, those of a layer at
    `path`, in order, and where each lies in the file.
    """

    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    weights: Callable[[Sequence[Described], Described], list[str]]
    version: str


# --- Reading ---


def read(path: Path, raw: bytes, size: Sequence[int] | None = None) -> Found:
    """The net in a file of Keras; `size`: (H, W, C) where the file leaves it open."""
    file = _zipped(path, raw) if raw[:2] == b"PK" else _h5(path, raw)
    build = _Builder(file)
    output = build.model(file.config, [])
    nodes, notes, name = build.nodes, build.notes, output.name
    last = next((node for node in reversed(nodes) if name in node.outputs), None)
    if last is not None and last.op in ("Softmax", "LogSoftmax", "Sigmoid"):
        notes.append(f"the logits are what the last {last.op} reads")
        name = last.inputs[0]
    nodes = needed(nodes, [name])
    read_ = {name for node in nodes for name in node.inputs}
    constants = {k: v for k, v in build.constants.items() if k in read_}
    weights = {k: v for k, v in build.weights.items() if k in read_}
    assert build.sides is not None
    layout = {1: "HWC", 2: "HW", 3: "NCHW"}[len(build.sides)]
    sides, bare = image_shape(build.sides, size), name != output.name
    parts = Parts(nodes, "image", layout, name, sides, weights, constants, bare=bare)
    graph_arrays = {k: _of_file(file.arrays[k], build.moved.get(k)) for k in weights}
    found = assembled(parts, graph_arrays, build.pixels)
    about = {"made by": f"Keras {file.version}"}
    return found._replace(notes=(*notes, *found.notes), about=about, half=build.half)


def _of_file(array: np.ndarray, moved: Order | None) -> np.ndarray:
    return array if moved is None else array.transpose(np.argsort(moved))


def fill(path: Path, raw: bytes, values: Mapping[str, np.ndarray]) -> bytes:
    """The file with other numbers in the weights of `values`, which stand as in the graph; all
    else stays as it is.
    """
    import h5py

    file = _zipped(path, raw) if raw[:2] == b"PK" else _h5(path, raw)
    build = _Builder(file)
    build.model(file.config, [])
    inner = _entry(raw, "model.weights.h5") if raw[:2] == b"PK" else raw
    held = io.BytesIO(inner)
    with h5py.File(held, "r+") as weights:
        root: Any = weights if raw[:2] == b"PK" else weights["model_weights"]
        for name, value in values.items():
            moved = build.moved.get(name)
            root[name][...] = value if moved is None else value.transpose(moved)
    if raw[:2] != b"PK":
        return held.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            whole = entry.filename == "model.weights.h5"
            new.writestr(entry, held.getvalue() if whole else old.read(entry))
    return out.getvalue()


def _entry(raw: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return archive.read(name)


def _zipped(path: Path, raw: bytes) -> File:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            schema.check_zip(archive)
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            if "config.json" not in sizes or "model.weights.h5" not in sizes:
                raise BadInput("it has no config.json and model.weights.h5: no model of Keras")
            schema.fits(path, sum(sizes.values()), len(raw))
            if sizes["config.json"] > CONFIG or sizes.get("metadata.json", 0) > CONFIG:
                raise BadInput("its description is too large")
            config = schema.parse(archive.read("config.json"))
            about = schema.parse(archive.read("metadata.json")) if "metadata.json" in sizes else {}
            weights = archive.read("model.weights.h5")
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged zip makes zipfile raise
        raise BadInput(f"its zip is damaged ({' '.join(str(error).split())[:100]})") from error
    arrays, names = _arrays(path, weights, None)
    version = str(about.get("keras_version", "3")) if isinstance(about, dict) else "3"

    def find(within: Sequence[Described], layer: Described) -> list[str]:
        group = _group(names, within, layer)
        found = [name for name in arrays if re.fullmatch(rf"{re.escape(group)}/vars/\d+", name)]
        return sorted(found, key=lambda name: int(name.rpartition("/")[2]))

    return File(_object(config), arrays, find, version)


def _group(names: Mapping[str, str], within: Sequence[Described], layer: Described) -> str:
    """The group of a layer's weights: by the name that it keeps, else by its kind and number."""
    group = ""
    for part in (*within, layer):
        inside = group if part.kind == "EinsumDense" else f"{group}layers/"
        here = [g for g in names if re.fullmatch(rf"{re.escape(inside)}[^/]+", g)]
        kind = re.sub(r"(?<=[a-z0-9])([A-Z])|(?<=.)([A-Z])(?=[a-z])", r"_\1\2", part.kind).lower()
        named = [g for g in here if names[g] == part.name]
        group = (named or [f"{inside}{kind}"])[0] + "/"
    return group.removesuffix("/")


def config_of(raw: bytes) -> tuple[bytes, str] | None:
    """The description of the model in an HDF5 file, and Keras's version; None where it holds
    weights alone.
    """
    import h5py

    try:
        with h5py.File(io.BytesIO(raw)) as file:
            config = file.attrs.get("model_config")
            version = _text(file.attrs.get("keras_version", "2"))
    except Exception as error:  # whatever a damaged file makes HDF5 raise
        raise BadInput(f"damaged ({' '.join(str(error).split())[:100]})") from error
    if config is None:
        return None
    text = config if isinstance(config, bytes) else str(config).encode("utf-8", "replace")
    if len(text) > CONFIG:
        raise BadInput("its description is too large")
    return text, version


def bare(path: Path, raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of an HDF5 file that holds weights alone, by layer and leaf, and what they are
    called in the file.
    """
    arrays, names = _arrays(path, raw, None)
    found, real = {}, {}
    for name, array in arrays.items():
        layer, numbered, number = name.partition("/vars/")
        own = name
        if numbered:  # of Keras 3: a layer's arrays have numbers for names
            leaf = _numbered(layer, number, arrays)
            own = f"{names.get(layer) or layer.rpartition('/')[2]}/{leaf}"
        found[own], real[own] = array, name
    return found, real


def _numbered(layer: str, number: str, arrays: Mapping[str, np.ndarray]) -> str:
    own = [a for n, a in arrays.items() if n.startswith(f"{layer}/vars/")]
    if len(own) == 4 and all(a.ndim == 1 for a in own):
        return ("gamma", "beta", "moving_mean", "moving_variance")[int(number)]
    return ("kernel", "bias")[int(number)] if number in ("0", "1") else number


def fill_bare(raw: bytes, values: Mapping[str, np.ndarray]) -> bytes:
    """A file of weights alone, with other numbers."""
    import h5py

    held = io.BytesIO(raw)
    with h5py.File(held, "r+") as file:
        for name, value in values.items():
            if name not in file:
                raise BadInput(f"the file has no '{shown(name)}' to write to")
            file[name][...] = value  # type: ignore[index]
    return held.getvalue()


def _h5(path: Path, raw: bytes) -> File:
    if (found := config_of(raw)) is None:
        raise BadInput("it holds weights alone, and no model: give --arch")
    text, version = found
    arrays, _ = _arrays(path, raw, "model_weights")

    def find(within: Sequence[Described], layer: Described) -> list[str]:
        path = [one.name for one in (*within, layer)]
        top, inside = path[0], {n: n.rpartition("/")[0] for n in arrays}
        inside = {n: group for n, group in inside.items() if n.startswith(f"{top}/")}
        own = [n for n, group in inside.items() if group.endswith(f"/{'/'.join(path)}")]
        own = own or [n for n, group in inside.items() if group.endswith(f"/{layer.name}")]
        own = own or [n for n in arrays if n.startswith(f"{top}/") and not within]
        rank = {name: i for i, name in enumerate(ORDER)}
        return sorted(own, key=lambda n: rank.get(_leaf(n), len(rank)))

    return File(_object(schema.parse(text)), arrays, find, version)


ORDER = (
    *("depthwise_kernel", "pointwise_kernel", "kernel", "gamma", "alpha", "bias", "beta"),
    "moving_mean", "moving_variance", "mean", "variance", "count",
)  # fmt: skip
"""The order in which layers hold their weights."""


def _leaf(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(":0")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _arrays(
    path: Path, raw: bytes, root: str | None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of an HDF5 file below `root`, in its order, and the names that groups keep."""
    import h5py

    parts, names = {}, {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            parts[name] = item
        else:
            kept = item.get("vars")
            names[name] = _text(kept.attrs.get("name", "")) if kept is not None else ""

    try:
        with h5py.File(io.BytesIO(raw)) as file:
            top: Any = file if root is None else file.get(root)
            if not isinstance(top, h5py.Group):
                raise BadInput(f"it has no {root}")
            top.visititems(visit)  # what lies in this file alone
            arrays = schema.h5_arrays(path, parts, len(raw))
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged file makes HDF5 raise
        raise BadInput(f"its weights are damaged ({' '.join(str(error).split())[:100]})") from error
    plain = {k: np.asarray(v, np.float32) for k, v in arrays.items() if v.dtype.kind in "fiu"}
    return plain, names


def _object(config: Any) -> Mapping[str, Any]:
    if not isinstance(config, dict) or "class_name" not in config:
        raise BadInput("its description is no model's")
    return config


# --- Layers ---

LAYERS: dict[str, Callable[..., Any]] = {}


def _layer(*names: str) -> Callable[[Callable], Callable]:
    def add(fn: Callable) -> Callable:
        LAYERS.update(dict.fromkeys(names, fn))
        return fn

    return add


class _Builder:
    """Writes layers as operators. `moved`: the order of axes in which the file has an array of the
    graph.
    """

    def __init__(self, file: File):
        self.file = file
        self.nodes: list[Node] = []
        self.weights: dict[str, tuple[str, str, Order | None]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.moved: dict[str, Order] = {}
        self.sides: list[int | None] | None = None
        self.pixels: Pixels | None = None
        self.notes: list[str] = []
        self.half = False
        self.within: list[Described] = []
        self.names: set[str] = set()

    def model(self, config: Mapping[str, Any], given: Sequence[Tensor]) -> Tensor:
        """A model, or one within another, called on `given`."""
        kind, inner = config.get("class_name"), config.get("config")
        _standard(config)
        if kind == "Sequential":
            layers = inner if isinstance(inner, list) else _list(inner, "layers")
            return self.sequential([_described(layer) for layer in layers], inner, given)
        if kind in ("Functional", "Model"):
            return self.functional(_map(inner), given)
        raise BadInput(f"the model '{shown(kind)}' is a class of its owner: its code is not read")

    def sequential(
        self, layers: Sequence[Described], config: Any, given: Sequence[Tensor]
    ) -> Tensor:
        x = given[0] if given else None
        for layer in layers:
            if x is None:
                shape = _shape(layer.config) or _shape(_map(config))
                x = self.input(shape)
            if layer.kind != "InputLayer":
                x = self.call(layer, [x], {})
        if x is None:
            raise BadInput("the model has no layers")
        return x

    def functional(self, config: Mapping[str, Any], given: Sequence[Tensor]) -> Tensor:
        layers = {layer.name: layer for layer in map(_described, _list(config, "layers"))}
        inputs = _ends(config.get("input_layers"))
        known: dict[tuple[str, int], Tensor] = {}
        if len(inputs) != 1:
            raise BadInput(f"the model has {len(inputs)} inputs: an image classifier has one")
        first = layers.get(inputs[0][0])
        if first is None:
            raise BadInput("its description is damaged: the input is none of its layers")
        known[inputs[0]] = given[0] if given else self.input(_shape(first.config))
        waiting = [(layer, i) for layer in layers.values() for i in range(len(layer.calls))]
        while waiting:
            left = []
            for layer, i in waiting:
                args, kwargs = layer.calls[i]
                if (layer.name, i) in known:
                    continue
                if all(tuple(one) in known for one in _tensors([args, kwargs])):
                    made = _replaced([args, kwargs], known)
                    known[layer.name, i] = self.call(layer, *made)
                else:
                    left.append((layer, i))
            if len(left) == len(waiting):
                raise BadInput(f"its layer '{shown(left[0][0].name)}' is joined to nothing known")
            waiting = left
        outputs = _ends(config.get("output_layers"))
        if not outputs or outputs[0] not in known:
            raise BadInput("its description is damaged: the output is none of its layers")
        if len(outputs) > 1 and self.within and isinstance(config["output_layers"], dict):
            raise BadInput(f"'{shown(self.within[-1].name)}' has named outputs: not known here")
        if len(outputs) > 1 and not self.within:
            self.notes.append(f"of {len(outputs)} outputs the first, {shown(outputs[0][0])}")
        return known[outputs[0]]

    def input(self, shape: Any) -> Tensor:
        if not isinstance(shape, list) or len(shape) not in (2, 3, 4):
            raise BadInput(f"the model's input has shape {shown(shape)}: not one of images")
        if self.sides is not None:
            raise BadInput("the model has several inputs: an image classifier has one")
        if not all(n is None or (type(n) is int and 0 < n < 1 << 24) for n in shape[1:]):
            raise BadInput(f"the model's input has shape {shown(shape)}: not one of images")
        self.sides = shape[1:]
        return Tensor("image", len(shape))

    def call(self, layer: Described, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What a layer makes of its inputs."""
        if layer.kind in ("Sequential", "Functional", "Model"):
            self.within.append(layer)
            config = {"class_name": layer.kind, "config": layer.config}
            out = self.model(config, [args[0][0] if isinstance(args[0], list) else args[0]])
            self.within.pop()
            return out
        self.half |= "float16" in str(layer.config.get("dtype"))  # or mixed_float16, bfloat16
        if (fn := LAYERS.get(layer.kind)) is None:
            raise BadInput(
                f"the layer {shown(layer.kind)} ('{shown(layer.name)}') is not known here"
            )
        if layer.config.get("data_format") == "channels_first":
            raise BadInput(f"the layer '{shown(layer.name)}' has channels first: not known here")
        try:
            return fn(self, layer, *args, **kwargs) if kwargs else fn(self, layer, *args)
        except BadInput:  # a ValueError, too
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:100]
            raise BadInput(f"the layer '{shown(layer.name)}' is damaged ({why})") from error

    # What layers are made of.

    def emit(self, op: str, inputs: Iterable[str], name: str, **attrs: Any) -> str:
        out = self.free(f"{name}:out")
        self.nodes.append(Node(op, self.free(name), tuple(inputs), (out,), attrs))
        return out

    def free(self, name: str) -> str:
        found, i = name, 1
        while found in self.names:
            i += 1
            found = f"{name}_{i}"
        self.names.add(found)
        return found

    def constant(self, value: Any) -> str:
        name = self.free("constant")
        self.constants[name] = np.asarray(value)
        return name

    def path(self, layer: Described) -> str:
        return ".".join(re.sub(r"[^\w.-]+", "_", one.name) for one in (*self.within, layer))

    def arrays(self, layer: Described) -> list[str]:
        return self.file.weights(self.within, layer)

    def weight(self, layer: Described, array: str, leaf: str, moved: Order | None = None) -> str:
        """A weight; `moved`: the order of the graph's axes in which the file has it."""
        self.weights[array] = (self.path(layer), leaf, moved)
        if moved is not None:
            self.moved[array] = moved
        return array

    def channels_last(self, x: Tensor) -> str:
        """The value with its axes as Keras has them."""
        if x.rank != 4:
            return x.name
        return self.emit("Transpose", [x.name], f"{x.name}:nhwc", perm=[0, 2, 3, 1])

    def channels_first(self, name: str, rank: int) -> Tensor:
        """A value whose axes stand as Keras has them."""
        if rank == 4:
            name = self.emit("Transpose", [name], f"{name}:nchw", perm=[0, 3, 1, 2])
        return Tensor(name, rank)

    def activated(self, x: Tensor, config: Any, name: str) -> Tensor:
        """`x` after the activation function of a layer's settings."""
        if isinstance(config, dict):
            if config.get("class_name") == "function" or "config" not in config:
                config = config.get("config")
            else:
                return self.call(
                    Described(config["class_name"], name, _map(config["config"]), ()), [x], {}
                )
        if config in (None, "linear"):
            return x
        if config == "softmax":
            return self.softmax(x, -1, name, "Softmax")
        if config == "log_softmax":
            return self.softmax(x, -1, name, "LogSoftmax")
        old = self.file.version.startswith("2")
        how: dict[str, tuple[str, dict[str, Any]]] = {
            "relu": ("Relu", {}), "sigmoid": ("Sigmoid", {}), "tanh": ("Tanh", {}),
            "elu": ("Elu", {}), "selu": ("Selu", {}), "softplus": ("Softplus", {}),
            "softsign": ("Softsign", {}), "gelu": ("Gelu", {}), "swish": ("Swish", {}),
            "silu": ("Swish", {}), "mish": ("Mish", {}), "exponential": ("Exp", {}),
            "hard_silu": ("HardSwish", {}), "hard_swish": ("HardSwish", {}),
            "leaky_relu": ("LeakyRelu", {"alpha": 0.2}), "celu": ("Celu", {}),
            "hard_sigmoid": ("HardSigmoid", {"alpha": 0.2 if old else 1 / 6}),
            "relu6": ("Clip", {"min": 0.0, "max": 6.0}),
        }  # fmt: skip
        if not isinstance(config, str) or config not in how:
            raise BadInput(f"the activation function {shown(config)} ('{name}') is not known here")
        op, attrs = how[config]
        return Tensor(self.emit(op, [x.name], name, **attrs), x.rank)

    def softmax(self, x: Tensor, axis: int, name: str, op: str) -> Tensor:
        if axis not in (-1, x.rank - 1):
            raise BadInput(f"softmax over axis {axis} ('{name}') is not known here")
        return Tensor(self.emit(op, [x.name], name, axis=1 if x.rank == 4 else -1), x.rank)


def _map(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadInput("its description is damaged: settings are missing")
    return value


def _list(value: Any, name: str) -> list[Any]:
    found = _map(value).get(name)
    if not isinstance(found, list):
        raise BadInput(f"its description is damaged: it has no {name}")
    return found


OURS = ("keras", "tensorflow.keras", "tf_keras", "tensorflow.python.keras")
PARTS = ("keras.layers", "keras.src.layers", "keras.src.models", "keras.models", "keras.engine")


def _standard(config: Mapping[str, Any]) -> None:
    """Raises `BadInput` where a description is of a class that is not Keras's own."""
    module, own = config.get("module"), config.get("registered_name")
    kind = shown(config.get("class_name"))
    if config.get("class_name") in ("Lambda", "TFOpLambda", "SlicingOpLambda"):
        raise BadInput(f"it has a {kind} layer, which is code: bdjax runs none. Export it to ONNX")
    foreign = module is not None and str(module).partition(".")[0] not in ("keras", "tf_keras")
    if foreign or (isinstance(own, str) and ">" in own and not own.startswith("keras")):
        raise BadInput(f"it has a {kind} of its owner's code, which is not read: export it to ONNX")


def _described(config: Any) -> Described:
    config = _map(config)
    _standard(config)
    inner = _map(config.get("config")) if isinstance(config.get("config"), dict) else {}
    if isinstance(config.get("config"), list):  # an old Sequential within
        inner = {"layers": config["config"]}
    name = config.get("name", inner.get("name"))
    calls = [_call(node) for node in config.get("inbound_nodes", None) or ()]
    module = str(config.get("module") or "")
    return Described(str(config.get("class_name")), str(name), inner, calls, module)


def _call(node: Any) -> tuple[list[Any], dict[str, Any]]:
    """What a layer is called with, tensors as (layer, call)."""
    if isinstance(node, dict):
        args = _found(node.get("args", []))
        kwargs = _found(node.get("kwargs", {}))
    else:  # Keras 2
        args = [_ref(*one[:3]) for one in node]
        kwargs = {}
        for one in node:
            extra = one[3] if len(one) > 3 and isinstance(one[3], dict) else {}
            kwargs |= {k: _old(v) for k, v in extra.items()}
        args = [args] if len(args) > 1 else args
    return args, {
        k: v for k, v in kwargs.items() if k not in ("mask", "training") and v is not None
    }


class _Ref(NamedTuple):
    layer: str
    call: int


def _ref(layer: str, call: int, which: int) -> _Ref:
    if which:
        raise BadInput(f"a further output of '{shown(layer)}' is read: not known here")
    return _Ref(layer, call)


def _old(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
        return _ref(*value)
    return value


def _found(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            return _ref(*value["config"]["keras_history"])
        return {k: _found(v) for k, v in value.items()}
    return [_found(v) for v in value] if isinstance(value, list) else value


def _tensors(value: Any) -> list[_Ref]:
    if isinstance(value, _Ref):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [ref for part in parts for ref in _tensors(part)]


def _replaced(value: Any, known: Mapping[tuple[str, int], Tensor]) -> Any:
    if isinstance(value, _Ref):
        return known[value.layer, value.call]
    if isinstance(value, dict):
        return {k: _replaced(v, known) for k, v in value.items()}
    return [_replaced(v, known) for v in value] if isinstance(value, list) else value


def _ends(value: Any) -> list[tuple[str, int]]:
    """The inputs or outputs of a model: (layer, call) each."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return []
    if len(value) == 3 and isinstance(value[0], str):
        value = [value]
    found = [_ref(*one) for one in value if isinstance(one, list) and len(one) == 3]
    return [(str(one.layer), int(one.call)) for one in found]


def _shape(config: Mapping[str, Any]) -> Any:
    return next(
        (
            config[k]
            for k in ("batch_shape", "batch_input_shape", "build_input_shape")
            if config.get(k)
        ),
        None,
    )


# --- With weights ---


def _pair(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [value, value]
    return [int(n) for n in found]


def _convolution(config: Mapping[str, Any]) -> dict[str, Any]:
    auto = {"same": "SAME_UPPER", "valid": "VALID"}.get(str(config.get("padding")))
    if auto is None:
        raise BadInput(f"padding {shown(config.get('padding'))} is not known here")
    return {
        "strides": _pair(config["strides"]),
        "dilations": _pair(config.get("dilation_rate", 1)),
        "auto_pad": auto,
    }


def _linear(layer: Described) -> str:
    """The name of a layer's part before its activation function."""
    plain = layer.config.get("activation") in (None, "linear")
    return layer.name if plain else f"{layer.name}.linear"


@_layer("Conv2D", "Convolution2D")
def conv2d(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    kernel, *bias = b.arrays(layer)
    inputs = [x.name, b.weight(layer, kernel, "kernel", (2, 3, 1, 0))]
    inputs += [b.weight(layer, one, "bias") for one in bias]
    how = _convolution(layer.config) | {"group": int(layer.config.get("groups", 1))}
    out = Tensor(b.emit("Conv", inputs, _linear(layer), **how), 4)
    return b.activated(out, layer.config.get("activation"), layer.name)


def _depthwise(b: _Builder, layer: Described, x: Tensor, kernel: str, name: str, **how) -> Tensor:
    h, w, c, m = b.file.arrays[kernel].shape
    b.weight(layer, kernel, "depthwise_kernel")
    turned = b.emit("Transpose", [kernel], f"{name}.turned", perm=[2, 3, 0, 1])
    shape = b.constant(np.asarray([c * m, 1, h, w], np.int64))
    placed = b.emit("Reshape", [turned, shape], f"{name}.kernel")
    return Tensor(b.emit("Conv", [x.name, placed], name, group=c, **how), 4)


def _biased(b: _Builder, layer: Described, x: Tensor, bias: Sequence[str], name: str) -> Tensor:
    if not bias:
        return x
    weight = b.weight(layer, bias[0], "bias")
    if x.rank == 4:
        shape = b.constant(np.asarray([-1, 1, 1], np.int64))
        weight = b.emit("Reshape", [weight, shape], f"{name}.column")
    return Tensor(b.emit("Add", [x.name, weight], f"{name}.biased"), x.rank)


@_layer("DepthwiseConv2D")
def depthwise_conv2d(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    kernel, *bias = b.arrays(layer)
    out = _depthwise(b, layer, x, kernel, _linear(layer), **_convolution(layer.config))
    out = _biased(b, layer, out, bias, layer.name)
    return b.activated(out, layer.config.get("activation"), layer.name)


@_layer("SeparableConv2D", "SeparableConvolution2D")
def separable_conv2d(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    deep, point, *bias = b.arrays(layer)
    x = _depthwise(b, layer, x, deep, f"{layer.name}.depthwise", **_convolution(layer.config))
    inputs = [x.name, b.weight(layer, point, "kernel", (2, 3, 1, 0))]
    inputs += [b.weight(layer, one, "bias") for one in bias]
    out = Tensor(b.emit("Conv", inputs, _linear(layer)), 4)
    return b.activated(out, layer.config.get("activation"), layer.name)


@_layer("Conv2DTranspose", "Convolution2DTranspose")
def conv2d_transpose(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    if layer.config.get("output_padding") is not None:
        raise BadInput(f"output_padding ('{layer.name}') is not known here")
    kernel, *bias = b.arrays(layer)
    inputs = [x.name, b.weight(layer, kernel, "kernel", (2, 3, 1, 0))]
    inputs += [b.weight(layer, one, "bias") for one in bias]
    how = _convolution(layer.config)
    reach = [(n - 1) * d + 1 for n, d in zip(b.file.arrays[kernel].shape, how["dilations"])]
    beyond = [max(s - r, 0) for s, r in zip(how["strides"], reach)]  # a stride leaves zeros behind
    how |= {"output_padding": beyond} if any(beyond) else {}
    out = Tensor(b.emit("ConvTranspose", inputs, _linear(layer), **how), 4)
    return b.activated(out, layer.config.get("activation"), layer.name)


@_layer("Dense")
def dense(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    kernel, *bias = b.arrays(layer)
    b.weight(layer, kernel, "kernel")
    name = _linear(layer)
    if x.rank == 2:
        inputs = [x.name, kernel, *(b.weight(layer, one, "bias") for one in bias)]
        out = Tensor(b.emit("Gemm", inputs, name), 2)
    else:
        made = b.emit("MatMul", [b.channels_last(x), kernel], name)
        if bias:
            made = b.emit("Add", [made, b.weight(layer, bias[0], "bias")], f"{name}.biased")
        out = b.channels_first(made, x.rank)
    return b.activated(out, layer.config.get("activation"), layer.name)


@_layer("BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2")
def batch_normalization(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    config, found = layer.config, b.arrays(layer)
    _last_axis(layer, x.rank)
    channels = b.file.arrays[found[-1]].shape
    gamma = found.pop(0) if config.get("scale", True) else None
    beta = found.pop(0) if config.get("center", True) else None
    mean, var = found
    inputs = [
        b.constant(np.ones(channels, np.float32))
        if gamma is None
        else b.weight(layer, gamma, "scale"),
        b.constant(np.zeros(channels, np.float32))
        if beta is None
        else b.weight(layer, beta, "bias"),
        b.weight(layer, mean, "mean"),
        b.weight(layer, var, "var"),
    ]
    how = {"epsilon": config.get("epsilon", 1e-3), "momentum": config.get("momentum", 0.99)}
    return _by_channels(b, "BatchNormalization", x, inputs, layer.name, **how)


def _by_channels(
    b: _Builder, op: str, x: Tensor, inputs: Sequence[str], name: str, **how: Any
) -> Tensor:
    """An operator that looks for the channels in axis 1, where those of rank 3 do not stand."""
    if x.rank != 3:
        return Tensor(b.emit(op, [x.name, *inputs], name, **how), x.rank)
    turned = b.emit("Transpose", [x.name], f"{name}.turned", perm=[0, 2, 1])
    made = b.emit(op, [turned, *inputs], name, **how)
    return Tensor(b.emit("Transpose", [made], f"{name}.back", perm=[0, 2, 1]), 3)


def _last_axis(layer: Described, rank: int, without: str | None = None) -> None:
    """Raises `BadInput` where a layer works on another axis, or has the option `without`."""
    axis = layer.config.get("axis", -1)
    if axis not in (-1, rank - 1, [-1], [rank - 1]):
        raise BadInput(f"axis {shown(axis)} ('{layer.name}') is not known here")
    if without is not None and layer.config.get(without):
        raise BadInput(f"{without} ('{layer.name}') is not known here")


@_layer("LayerNormalization")
def layer_normalization(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    _last_axis(layer, x.rank, "rms_scaling")
    found = b.arrays(layer)
    source = b.channels_last(x)
    gamma = b.weight(layer, found.pop(0), "scale") if layer.config.get("scale", True) else None
    inputs = [source, gamma or b.constant(np.ones(1, np.float32))]
    inputs += [b.weight(layer, found[0], "bias")] if layer.config.get("center", True) else []
    epsilon = layer.config.get("epsilon", 1e-3)
    made = b.emit("LayerNormalization", inputs, layer.name, axis=-1, epsilon=epsilon)
    return b.channels_first(made, x.rank)


@_layer("GroupNormalization")
def group_normalization(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    _last_axis(layer, x.rank)
    config, found = layer.config, b.arrays(layer)
    groups = int(config["groups"])
    channels = b.file.arrays[found[0]].shape[0] if found else 1
    if groups == -1 and not found:
        raise BadInput(f"groups of a channel without weights ('{layer.name}') are not known here")
    how = {"num_groups": channels if groups == -1 else groups}
    how |= {"epsilon": config.get("epsilon", 1e-3)}
    inputs = [
        b.weight(layer, found.pop(0), leaf)
        if config.get(option, True)
        else b.constant(np.full(channels, value, np.float32))
        for option, leaf, value in (("scale", "scale", 1), ("center", "bias", 0))
    ]
    return _by_channels(b, "GroupNormalization", x, inputs, layer.name, **how)


@_layer("PReLU")
def prelu(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    (alpha,) = b.arrays(layer)
    b.weight(layer, alpha, "slope")
    made = b.emit("PRelu", [b.channels_last(x), alpha], layer.name)
    return b.channels_first(made, x.rank)


@_layer("Normalization")
def normalization(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    _last_axis(layer, x.rank, "invert")
    found = b.arrays(layer)
    mean, var = [b.file.arrays[name] for name in found[:2]] if found else [
        np.asarray(layer.config[key], np.float32) for key in ("mean", "variance")
    ]  # fmt: skip
    if b.pixels is None and x.name == "image":
        b.pixels = Pixels(255.0) if np.abs(mean).max() > 2 else Pixels()
    column = (-1, 1, 1) if x.rank == 4 else (-1,)
    deviation = np.maximum(np.sqrt(var), 1e-7)
    made = b.emit("Sub", [x.name, b.constant(mean.reshape(column))], f"{layer.name}.centred")
    made = b.emit("Div", [made, b.constant(deviation.reshape(column))], layer.name)
    return Tensor(made, x.rank)


@_layer("MultiHeadAttention")
def multi_head_attention(b: _Builder, layer: Described, *args: Any, **kwargs: Any) -> Tensor:
    given = dict(zip(("query", "value", "key"), args)) | kwargs
    query, value = given["query"], given["value"]
    key = given.get("key", value)
    if given.keys() - {"query", "key", "value", "return_attention_scores", "use_causal_mask"}:
        raise BadInput(f"attention with a mask ('{layer.name}') is not known here")
    if given.get("use_causal_mask") or given.get("return_attention_scores") or query.rank != 3:
        raise BadInput(f"attention of this kind ('{layer.name}') is not known here")
    config = layer.config
    heads, size = int(config["num_heads"]), int(config["key_dim"])
    depth = int(config.get("value_dim") or size)
    own = [
        Described("EinsumDense", name, {}, ())
        for name in ("query", "key", "value", "attention_output")
    ]
    b.within.append(layer)
    parts = []
    for part, x, width in zip(own, (query, key, value), (size, size, depth)):
        parts.append(_projected(b, part, x, [-1, heads * width], f"{layer.name}.{part.name}"))
    how = {"q_num_heads": heads, "kv_num_heads": heads, "scale": size**-0.5}
    mixed = b.emit("Attention", parts, f"{layer.name}.attention", **how)
    made = _projected(b, own[3], Tensor(mixed, 3), [heads * depth, -1], layer.name)
    b.within.pop()
    return Tensor(made, 3)


def _projected(b: _Builder, part: Described, x: Tensor, shape: list[int], name: str) -> str:
    found = b.arrays(part) or b.arrays(part._replace(name=f"{part.name}_dense"))
    kernel, *bias = found
    b.weight(part, kernel, "kernel")
    to = b.constant(np.asarray(shape, np.int64))
    made = b.emit("MatMul", [x.name, b.emit("Reshape", [kernel, to], f"{name}.kernel")], name)
    if not bias:
        return made
    row = b.constant(np.asarray([-1], np.int64))
    placed = b.emit("Reshape", [b.weight(part, bias[0], "bias"), row], f"{name}.row")
    return b.emit("Add", [made, placed], f"{name}.biased")


# --- Without weights ---


@_layer("Activation")
def activation(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    return b.activated(x, layer.config["activation"], layer.name)


@_layer("ReLU")
def relu(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    config = layer.config
    most, slope = config.get("max_value"), config.get("negative_slope") or 0.0
    if config.get("threshold") or (most is not None and slope):
        raise BadInput(f"a ReLU of this kind ('{layer.name}') is not known here")
    if most is not None:
        return Tensor(b.emit("Clip", [x.name], layer.name, min=0.0, max=float(most)), x.rank)
    if slope:
        return Tensor(b.emit("LeakyRelu", [x.name], layer.name, alpha=float(slope)), x.rank)
    return Tensor(b.emit("Relu", [x.name], layer.name), x.rank)


@_layer("LeakyReLU")
def leaky_relu(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    slope = layer.config.get("negative_slope", layer.config.get("alpha", 0.3))
    return Tensor(b.emit("LeakyRelu", [x.name], layer.name, alpha=float(slope)), x.rank)


@_layer("ELU")
def elu(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    alpha = float(layer.config.get("alpha", 1.0))
    return Tensor(b.emit("Elu", [x.name], layer.name, alpha=alpha), x.rank)


@_layer("Softmax")
def softmax(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    axis = layer.config.get("axis", -1)
    return b.softmax(x, axis[0] if isinstance(axis, list) else axis, layer.name, "Softmax")


@_layer("MaxPooling2D", "MaxPool2D", "AveragePooling2D", "AvgPool2D")
def pooling(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    config = layer.config
    size = _pair(config["pool_size"])
    how = _convolution({**config, "strides": config.get("strides") or size})
    op = "MaxPool" if layer.kind.startswith("Max") else "AveragePool"
    return Tensor(b.emit(op, [x.name], layer.name, kernel_shape=size, **how), 4)


@_layer("GlobalAveragePooling2D", "GlobalAvgPool2D", "GlobalMaxPooling2D", "GlobalMaxPool2D")
def global_pooling(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    op = "ReduceMax" if "Max" in layer.kind else "ReduceMean"
    keep = bool(layer.config.get("keepdims"))
    made = b.emit(op, [x.name], layer.name, axes=[2, 3], keepdims=int(keep))
    return Tensor(made, 4 if keep else 2)


@_layer("GlobalAveragePooling1D", "GlobalMaxPooling1D")
def global_pooling_1d(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    op = "ReduceMax" if "Max" in layer.kind else "ReduceMean"
    return Tensor(b.emit(op, [x.name], layer.name, axes=[1], keepdims=0), 2)


@_layer("Flatten")
def flatten(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    return Tensor(b.emit("Flatten", [b.channels_last(x)], layer.name, axis=1), 2)


@_layer("Reshape")
def reshape(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    shape = [int(n) for n in layer.config["target_shape"]]
    if -1 in shape:  # an axis may stay as it is, but the batch may not be guessed
        shape = [0, *shape]
    else:
        shape = [-1, *shape]
    to = b.constant(np.asarray(shape, np.int64))
    return b.channels_first(b.emit("Reshape", [b.channels_last(x), to], layer.name), len(shape))


@_layer("Permute")
def permute(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    perm = [0, *(int(n) for n in layer.config["dims"])]
    made = b.emit("Transpose", [b.channels_last(x)], layer.name, perm=perm)
    return b.channels_first(made, x.rank)


def _edges(value: Any) -> tuple[list[int], list[int]]:
    """Before and after, of height and width."""
    rows = value if isinstance(value, list) else [value, value]
    (top, bottom), (left, right) = (one if isinstance(one, list) else [one, one] for one in rows)
    return [int(top), int(left)], [int(bottom), int(right)]


@_layer("ZeroPadding2D")
def zero_padding(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    low, high = _edges(layer.config["padding"])
    pads = b.constant(np.asarray([0, 0, *low, 0, 0, *high], np.int64))
    return Tensor(b.emit("Pad", [x.name, pads], layer.name), 4)


@_layer("Cropping2D")
def cropping(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    low, high = _edges(layer.config["cropping"])
    pads = b.constant(-np.asarray([0, 0, *low, 0, 0, *high], np.int64))
    return Tensor(b.emit("Pad", [x.name, pads], layer.name), 4)


@_layer("UpSampling2D")
def up_sampling(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    scales = b.constant(np.asarray([1, 1, *_pair(layer.config["size"])], np.float32))
    how = _resized(layer, "nearest")
    return Tensor(b.emit("Resize", [x.name, "", scales], layer.name, **how), 4)


@_layer("Resizing")
def resizing(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    of = layer.config
    if of.get("antialias") or of.get("crop_to_aspect_ratio") or of.get("pad_to_aspect_ratio"):
        raise BadInput(f"'{layer.name}' resizes with antialias or aspect ratios: not known here")
    sizes = b.constant(np.asarray([of["height"], of["width"]], np.int64))
    how = {**_resized(layer, "bilinear"), "axes": [2, 3], "nearest_mode": "round_prefer_ceil"}
    return Tensor(b.emit("Resize", [x.name, "", "", sizes], layer.name, **how), 4)


def _resized(layer: Described, usual: str) -> dict[str, Any]:
    modes = {"nearest": "nearest", "bilinear": "linear"}
    if (mode := modes.get(layer.config.get("interpolation", usual))) is None:
        raise BadInput(f"interpolation of this kind ('{layer.name}') is not known here")
    return {"mode": mode, "coordinate_transformation_mode": "half_pixel"}


def _joining(op: str) -> Callable[..., Tensor]:
    def join(b: _Builder, layer: Described, *given: Any, **more: Any) -> Tensor:
        flat = [one for part in given for one in (part if isinstance(part, list) else [part])]
        flat += more.values()
        rank = max(x.rank for x in flat if isinstance(x, Tensor))
        names = []
        for x in flat:
            if isinstance(x, Tensor) and x.rank != rank:
                raise BadInput(f"tensors of several ranks ('{layer.name}') are not known here")
            plain = isinstance(x, (int, float)) and not isinstance(x, bool)
            if not plain and not isinstance(x, Tensor):
                raise BadInput(f"what '{layer.name}' is called with is not known here")
            names.append(b.constant(np.float32(x)) if plain else x.name)  # type: ignore[union-attr,arg-type]
        return Tensor(b.emit(op, names, layer.name), rank)

    return join


for _names, _op in {
    ("Add",): "Sum", ("Subtract",): "Sub", ("Average",): "Mean", ("Maximum",): "Max",
    ("Minimum",): "Min", ("Divide", "TrueDivide"): "Div",
}.items():  # fmt: skip
    _layer(*_names)(_joining(_op))


@_layer("Multiply")
def multiply(b: _Builder, layer: Described, *given: Any, **more: Any) -> Tensor:
    flat = [one for part in given for one in (part if isinstance(part, list) else [part])]
    out = flat[0]
    for other in (*flat[1:], *more.values()):
        out = _joining("Mul")(b, layer, out, other)
    return out


@_layer("Concatenate")
def concatenate(b: _Builder, layer: Described, given: list[Tensor], axis: int = -1) -> Tensor:
    rank, axis = given[0].rank, int(layer.config.get("axis", axis))
    axis = axis + rank if axis < 0 else axis
    place = {1: 2, 2: 3, 3: 1}.get(axis, axis) if rank == 4 else axis
    return Tensor(b.emit("Concat", [x.name for x in given], layer.name, axis=place), rank)


@_layer("Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout")
def dropout(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    rate = float(layer.config.get("rate", 0.5))
    return Tensor(b.emit("Dropout", [x.name], layer.name, ratio=rate), x.rank)


@_layer("GaussianNoise", "ActivityRegularization", "Identity", "RandomFlip", "RandomRotation")
@_layer("RandomZoom", "RandomTranslation", "RandomContrast", "RandomBrightness", "RandomCrop")
def identity(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    if layer.kind == "RandomCrop":
        raise BadInput(f"RandomCrop ('{layer.name}') is not known here")
    return x


@_layer("Rescaling")
def rescaling(b: _Builder, layer: Described, x: Tensor) -> Tensor:
    scale, offset = layer.config.get("scale", 1.0), layer.config.get("offset", 0.0)
    if b.pixels is None and x.name == "image":
        b.pixels = Pixels(255.0) if float(np.max(scale)) < 0.05 else Pixels()
    column = (-1, 1, 1) if x.rank == 4 else (-1,)
    made = x.name
    for op, value in (("Mul", scale), ("Add", offset)):
        array = np.asarray(value, np.float32)
        if op == "Add" and not array.any():
            continue
        array = array.reshape(column) if array.ndim else array
        made = b.emit(op, [made, b.constant(array)], f"{layer.name}.{op.lower()}")
    return Tensor(made, x.rank)
