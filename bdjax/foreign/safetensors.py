"""Files of safetensors: a header of JSON, and the numbers."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bdjax import schema
from bdjax.types import BadInput, shown

TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
HEADER = 1 << 26
FORM = {
    "dtype": schema.Text("|".join(TYPES), "a type of numbers known here"),
    "shape": [schema.Number(0, 2**40, True)],
    "data_offsets": (schema.Number(0, 2**53, True),) * 2,
}


def views(raw: bytes | bytearray) -> dict[str, np.ndarray]:
    """The arrays of a file, as views of its bytes; `BadInput` where it is damaged."""
    header, length = _header(raw)
    found = {}
    for name, one in header.items():
        if name == "__metadata__":
            continue
        about = schema.fitted(one, FORM, shown(name))
        start, end = (8 + length + offset for offset in about["data_offsets"])
        dtype = np.dtype(TYPES[about["dtype"]])
        count = int(np.prod(about["shape"], dtype=object))
        if not start <= end <= len(raw) or end - start != count * dtype.itemsize:
            raise BadInput(f"'{shown(name)}' does not lie in the file as its header says")
        if count:
            found[name] = np.frombuffer(raw, dtype, count, start).reshape(about["shape"])
        else:
            found[name] = np.zeros(about["shape"], dtype)
    if sum(array.nbytes for array in found.values()) > len(raw):
        raise BadInput("its arrays overlap")
    return found


def _header(raw: bytes | bytearray) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 10 or length > min(HEADER, len(raw) - 8):
        raise BadInput("damaged, or not of safetensors")
    header = schema.parse(bytes(raw[8 : 8 + length]))
    if not isinstance(header, dict):
        raise BadInput("damaged, or not of safetensors")
    return header, length


def made_by(raw: bytes) -> str:
    """What the file says wrote it, its `format`: "pt" for PyTorch; "" where it says nothing."""
    about = _header(raw)[0].get("__metadata__")
    found = about.get("format") if isinstance(about, dict) else None
    return found if isinstance(found, str) else ""


def arrays(raw: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file, floats as float32."""
    return {
        name: np.array(view, np.float32 if view.dtype.kind in "fV" else view.dtype)
        for name, view in views(raw).items()
    }


def fill(raw: bytes, values: Mapping[str, np.ndarray]) -> bytes:
    """The file with other numbers in the arrays of `values`; all else stays as it is."""
    made = bytearray(raw)
    found = views(made)
    for name, value in values.items():
        found[name][...] = value
    return bytes(made)


def written(values: Mapping[str, np.ndarray], about: Mapping[str, str] = {}) -> bytes:
    """A file of float32 arrays."""
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    at = 0
    for name, value in values.items():
        size = 4 * value.size
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(v, np.float32).tobytes() for v in values.values())
    return len(text).to_bytes(8, "little") + text + data
