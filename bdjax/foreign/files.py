"""Any file of a net: which kind it is, by its content; reading it, and writing it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdjax import schema
from bdjax.foreign import keras, native, onnx, safetensors, torch
from bdjax.foreign.assemble import Found, exported
from bdjax.foreign.graph import parsed
from bdjax.foreign.native import Framework
from bdjax.foreign.net import Imported
from bdjax.foreign.origin import Format, Origin
from bdjax.foreign.pixels import NORMS, Pixels
from bdjax.types import BadInput, Variables, shown

WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "weights", "params")
"""Where checkpoints keep the weights among other things."""
PREFIXES = (*WRAPPERS, "module", "_orig_mod")
"""What may stand before the names of all weights: of these too, by DataParallel and torch.compile.
"""
KNOWN = {"cifar10": "cifar10", "cifar100": "cifar100", "gtsrb": "", "tiny": "tiny", "mnist": ""}
"""Of BackdoorBench's data sets, how it standardises their pixels; "": not."""


class Bare(NamedTuple):
    """Weights without a net. `about`: what the file says of it: the architecture, classes, size,
    data set and poisoned test images of BackdoorBench; `real`: names in the file, where they are
    others.
    """

    arrays: Mapping[str, np.ndarray]
    framework: Framework
    about: Mapping[str, Any] = {}
    real: Mapping[str, str] = {}


def kind_of(path: Path, raw: bytes) -> Format:
    """The format of a file; `BadInput` where it is none that is read here."""
    if raw[:8] == b"\x89HDF\r\n\x1a\n":
        return "h5"
    if raw[:2] == b"PK":
        names = raw[-1 << 20 :]
        return "keras" if b"model.weights.h5" in names or path.suffix == ".keras" else "torch"
    if raw[:1] == b"\x80" or path.suffix in (".pt", ".pth", ".bin"):
        return "torch"
    if path.suffix == ".safetensors" or raw[8:9] == b"{":
        return "safetensors"
    if path.suffix == ".keras":
        return "keras"
    return "onnx"


def content(path: Path) -> bytes:
    """The bytes of a net's file, of at most a quarter of the memory; of ONNX in two files those of
    one.
    """
    raw = schema.content(path, most := min(schema.memory() // 4, 1 << 33))
    return onnx.whole(path, raw, most) if kind_of(path, raw) == "onnx" else raw


def read(path: Path, raw: bytes, kind: Format, size: Any) -> Found | Bare:
    """What is in a file: a net, or weights alone."""
    if kind == "onnx":
        return onnx.read(raw, size)
    if kind == "keras" or (kind == "h5" and _whole(raw)):
        return keras.read(path, raw, size)
    if kind == "h5":
        arrays, real = keras.bare(path, raw)
        return Bare(arrays, "keras", {}, real)
    if kind == "safetensors":
        arrays = safetensors.arrays(raw)
        if safetensors.made_by(raw) in ("bdjax", "flax"):  # kernels as JAX has them
            return Bare(native.of_net(arrays), "flax")
        return Bare(_cleaned(arrays), "torch")
    return _torch(path, raw)


def _whole(raw: bytes) -> bool:
    return keras.config_of(raw) is not None


def _torch(path: Path, raw: bytes) -> Bare:
    file = torch.opened(path, raw)
    content, about = file.content, {}
    if isinstance(content, dict) and "model_name" in content:
        about = {k: content.get(k) for k in ("model_name", "num_classes", "img_size", "clean_data")}
        about["bd_test"] = content.get("bd_test")
    prefix, content = _weights(content)
    tensors = torch.leaves(content)
    if not tensors:
        raise BadInput("it holds no tensors: these are no weights of a net")
    arrays = torch.arrays(path, raw, file, tensors)
    return Bare(_cleaned({f"{prefix}{k}": v for k, v in arrays.items()}), "torch", about)


def _weights(content: Any) -> tuple[str, Any]:
    """The weights within a checkpoint, and what stands before their names in the file."""
    if isinstance(content, dict):
        for name in WRAPPERS:
            inner = content.get(name)
            if isinstance(inner, dict) and torch.leaves(inner):
                more, found = _weights(inner) if set(inner) & set(WRAPPERS) else ("", inner)
                return f"{name}.{more}", found
    return "", content


def _cleaned(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a net, without counters."""
    return {
        name: array
        for name, array in arrays.items()
        if not name.endswith("num_batches_tracked") and array.dtype.kind == "f"
    }


def plain_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under the names of the net: without the `PREFIXES` that stand before them all;
    pruned ones (`weight_orig` and `weight_mask`) multiplied.
    """
    prefix = ""
    while all(name.startswith(tuple(f"{prefix}{w}." for w in PREFIXES)) for name in arrays):
        prefix += next(iter(arrays)).removeprefix(prefix).partition(".")[0] + "."
    short = {name.removeprefix(prefix): array for name, array in arrays.items()}
    found = {}
    for name, array in short.items():
        if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in short:
            continue
        mask = short.get(f"{name.removesuffix('_orig')}_mask") if name.endswith("_orig") else None
        found[name.removesuffix("_orig") if mask is not None else name] = (
            array if mask is None else array * mask
        )
    return found


def pixels_of(about: Mapping[str, Any]) -> Pixels | None:
    """How BackdoorBench standardises the pixels of the data set that a file names."""
    if (name := KNOWN.get(str(about.get("clean_data")))) is None:
        return None
    return Pixels(1.0, *NORMS[name]) if name else Pixels()


def fill(path: Path, raw: bytes, kind: Format, values: Mapping[str, np.ndarray]) -> bytes:
    """A file with other numbers in its weights, which are named, and stand, as the net has them
    from the file; all else stays as it is.
    """
    if kind == "onnx":
        return onnx.fill(raw, values)
    if kind == "safetensors":
        return safetensors.fill(raw, _in_file(values, safetensors.views(raw)))
    if kind == "torch":
        file = torch.opened(path, raw)
        masks = torch.arrays(
            path, raw, file, {k: v for k, v in torch.leaves(file.content).items() if "_mask" in k}
        )
        return torch.fill(path, raw, _in_file(values, torch.leaves(file.content), masks))
    if kind == "h5" and keras.config_of(raw) is None:
        return keras.fill_bare(raw, values)
    return keras.fill(path, raw, values)


def _in_file(
    values: Mapping[str, np.ndarray], names: Mapping[str, Any], masks: Mapping[str, Any] = {}
) -> dict[str, np.ndarray]:
    """The values under the names of the file, which may have more before and behind them."""
    found = {}
    for name, value in values.items():
        whole = next(
            (
                n
                for n in names
                for end in (name, f"{name}_orig")
                if n == end or n.endswith(f".{end}")
            ),
            None,
        )
        if whole is None:
            raise BadInput(f"the file has no '{shown(name)}'")
        mask = masks.get(f"{whole.removesuffix('_orig')}_mask")
        if mask is not None and value[mask == 0].any():
            raise BadInput(f"'{shown(name)}' is pruned in the file where it is not here")
        found[whole] = value
    return found


def values_of(net: Any, variables: Variables, origin: Origin) -> dict[str, np.ndarray]:
    """The arrays of the original file, from variables."""
    if isinstance(net, Imported):
        return exported(parsed(net.graph), variables)
    found = {}
    for path, move in origin.places().items():
        kind, layer, leaf = path.rsplit("/", 2) if path.count("/") == 2 else (None, None, None)
        if kind is None:
            raise BadInput("the places of its weights are damaged")
        found[move.name] = move.theirs(np.asarray(variables[kind][layer][leaf]))
    return found


def moves_text(moves: Mapping[str, native.Move]) -> str:
    """Moves as an `Origin` keeps them."""
    return json.dumps({path: list(move) for path, move in moves.items()})
