"""PyTorch's files of weights, read without PyTorch and without running anything in them.

A file is a zip (or, before 1.6, a row) of a pickle and of the tensors' numbers. Of the pickle only
the operations and the few names are known here that tensors, dicts and NumPy's scalars need: any
other name, and so any code, is refused by its name.
"""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bdjax import schema
from bdjax.types import BadInput, shown

LEGACY = 0x1950A86A20F9469CFC6C
"""The number that a file from before PyTorch 1.6 begins with."""
PICKLE = 1 << 26
"""The most bytes of a pickle: it holds names and shapes, not numbers."""
TYPES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


class Storage(NamedTuple):
    """The numbers that tensors are views of: their key in the file and how many there are."""

    key: str
    dtype: Any
    size: int


class Tensor(NamedTuple):
    """A view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Picture:
    """An image of PIL, as its pickle describes it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def shown(self) -> Any:
        """The image, of PIL."""
        from PIL import Image

        _, mode, size, *_, data = self.state
        count = {"L": 1, "RGB": 3}.get(mode)
        if count is None or not isinstance(data, bytes) or len(data) != count * size[0] * size[1]:
            raise BadInput(f"an image of mode {shown(mode)} in it is not known here")
        return Image.frombytes(mode, tuple(size), data)


def _tensor(storage, offset, shape, strides, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise BadInput("a tensor without numbers")
    return Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _parameter(tensor, *_: Any) -> Tensor:
    return tensor


def _dtype(name: str, *_: Any) -> Any:
    dtype = np.dtype(name)
    if dtype.hasobject or dtype.itemsize > 64:
        raise BadInput(f"numbers of type {shown(name)}")
    return _Dtype(dtype)


class _Dtype:
    """A type of NumPy, whose state, its byte order, is set after it is made."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _scalar(dtype: _Dtype, raw: bytes = b"") -> Any:
    return np.frombuffer(_bytes(raw), dtype.dtype, 1)[0]


class _Array:
    """An array of NumPy, whose content is set after it is made."""

    def __init__(self, *_: Any):
        self.array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(raw, (bytes, str)):
            raise BadInput("an array of objects")
        flat = np.frombuffer(_bytes(raw), dtype.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def _bytes(raw: Any) -> bytes:
    return raw.encode("latin1") if isinstance(raw, str) else raw


def _encoded(text: str, *_: Any) -> bytes:
    return text.encode("latin1")


NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *words: ":".join(map(str, words)),
    ("_codecs", "encode"): _encoded,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _Array,
    ("PIL.Image", "Image"): Picture,
    ("PIL.PngImagePlugin", "PngImageFile"): Picture,
    **{(f"numpy.{c}.multiarray", "scalar"): _scalar for c in ("core", "_core")},
    **{(f"numpy.{c}.multiarray", "_reconstruct"): _Array for c in ("core", "_core")},
    **{("torch", name): name for name in TYPES},
}
"""The names that a pickle may use, and what stands for them."""
OPERATIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1"),
    *("BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING"),
    *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_DICT", "EMPTY_LIST"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM"),
    *("SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPERSID"),
    *("GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE"),
)
"""The operations of a pickle that are known; BUILD is our own."""
_PURE: Any = pickle._Unpickler  # type: ignore[attr-defined]  # no index costs it memory


class _Unpickler(_PURE):
    dispatch = {code: _PURE.dispatch[code] for code in (getattr(pickle, o)[0] for o in OPERATIONS)}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAMES:
            return NAMES[module, name]
        if module == "torch" and name in ("float32", "float16", "bfloat16", "int64", "uint8"):
            return name
        raise _Code(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, size, *_ = pid
        if kind != "storage" or storage not in TYPES:
            raise BadInput(f"numbers of type {shown(storage)}, which is not known here")
        return Storage(str(key), np.dtype(TYPES[storage]), int(size))

    def build(self) -> None:
        """Gives an object its state; of a dict's further attributes nothing is kept."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, (Picture, _Dtype, _Array)):
            made.__setstate__(state)
        elif not isinstance(made, dict):
            raise BadInput("its pickle gives something a state that has none")

    dispatch[pickle.BUILD[0]] = build


class _Code(Exception):
    """A pickle wants something that is not known here."""


def unpickled(raw: Any) -> Any:
    """What a pickle describes; `BadInput` where it holds anything but tensors, dicts and such."""
    file = io.BytesIO(raw) if isinstance(raw, bytes) else raw
    try:
        return _Unpickler(file, encoding="latin1").load()
    except _Code as error:
        raise BadInput(
            f"it holds {shown(error)}, which is code: bdjax reads tensors, dicts and numbers "
            "alone. Save the weights (torch.save(net.state_dict(), FILE)), or export it to ONNX"
        ) from None
    except BadInput:
        raise
    except KeyError as error:
        raise BadInput(f"its pickle is damaged, or does what is not known here ({error})") from None
    except Exception as error:  # whatever a damaged pickle makes Python raise
        raise BadInput(f"its pickle is damaged ({' '.join(str(error).split())[:100]})") from error


# --- Files ---


class File(NamedTuple):
    """A file of PyTorch: what its pickle describes, and where the numbers of each storage are."""

    content: Any
    storages: Mapping[str, tuple[int, int]]
    little: bool = True


def opened(path: Path, raw: bytes) -> File:
    """The parts of a file; `BadInput` where it is none, damaged, or holds code."""
    if raw[:2] == b"PK":
        return _zipped(path, raw)
    if raw[:2] == b"\x80\x02" and LEGACY.to_bytes(10, "little") in raw[:20]:
        return _legacy(raw)
    if raw[:1] == b"\x80":
        raise BadInput("it is a plain pickle: save the weights by torch.save")
    raise BadInput("damaged, or not a file of PyTorch")


def _zipped(path: Path, raw: bytes) -> File:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            schema.check_zip(archive)
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "data.pkl" not in entries:
                if "archive_format" in entries or "code" in str(entries):
                    raise BadInput("it is a program of torch, not weights: export the net to ONNX")
                raise BadInput("its zip has no data.pkl: not a file of weights")
            if any(name.startswith("code/") for name in entries):
                raise BadInput("it is TorchScript, which is code: export the net to ONNX")
            if entries["data.pkl"].file_size > PICKLE:
                raise BadInput("its pickle is too large: it holds more than weights")
            content = unpickled(archive.read(entries["data.pkl"]))
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
            places = {
                name.removeprefix("data/"): _place(raw, entry)
                for name, entry in entries.items()
                if name.startswith("data/")
            }
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged zip makes zipfile raise
        raise BadInput(f"its zip is damaged ({' '.join(str(error).split())[:100]})") from error
    return File(content, places, order != b"big")


def _place(raw: bytes, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of an unpacked entry stand in the file."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise BadInput("its numbers are packed, which PyTorch does not do")
    name, extra = struct.unpack_from("<HH", raw, entry.header_offset + 26)
    start = entry.header_offset + 30 + name + extra
    if start + entry.file_size > len(raw):
        raise BadInput("its zip is damaged: it ends early")
    return start, start + entry.file_size


def _legacy(raw: bytes) -> File:
    file = io.BytesIO(raw)
    for _ in range(3):  # a number, the version, sizes of C's types
        unpickled(file)
    content = unpickled(file)
    keys = unpickled(file)
    storages = _storages(content)
    places = {}
    for key in keys if isinstance(keys, list) else ():
        if key not in storages:
            raise BadInput("its storages are damaged")
        start = file.tell() + 8
        (count,) = struct.unpack("<q", file.read(8).ljust(8, b"\0"))
        end = start + count * storages[key].dtype.itemsize
        if count < 0 or end > len(raw):
            raise BadInput("it ends early")
        places[key] = start, end
        file.seek(end)
    return File(content, places)


def _storages(content: Any) -> dict[str, Storage]:
    return {tensor.storage.key: tensor.storage for tensor in leaves(content).values()}


def leaves(content: Any) -> dict[str, Tensor]:
    """The tensors of nested dicts, by their keys joined with dots."""
    found, stack, seen = {}, [("", content)], set()
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            parts = [(f"{name}.{k}" if name else f"{k}", v) for k, v in value.items()]
            stack += parts[::-1]
    return found


def arrays(path: Path, raw: bytes, file: File, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The numbers of `tensors`; `BadInput` where a tensor looks beyond its storage, or all of them
    would be larger than the file.
    """
    total, found = 0, {}
    for name, tensor in tensors.items():
        start, end = file.storages.get(tensor.storage.key, (0, 0))
        dtype = tensor.storage.dtype
        count = (end - start) // dtype.itemsize
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides))
        numbers = int(np.prod(tensor.shape, dtype=object))
        if len(tensor.shape) != len(tensor.strides) or min((*tensor.shape, *tensor.strides, 0)) < 0:
            raise BadInput(f"the tensor '{shown(name)}' is damaged")
        if numbers > count or (numbers and not 0 <= tensor.offset + reach < count):
            raise BadInput(f"the tensor '{shown(name)}' looks beyond its numbers: damaged")
        total += numbers * max(dtype.itemsize, 4)
        schema.fits(path, total, len(raw))
        flat = np.frombuffer(raw, dtype.newbyteorder("<" if file.little else ">"), count, start)
        steps = tuple(s * dtype.itemsize for s in tensor.strides)
        view = np.lib.stride_tricks.as_strided(
            flat[tensor.offset :], tensor.shape, steps, writeable=False
        )
        found[name] = np.array(view, np.float32 if dtype.kind in "fV" else dtype)
    return found


def fill(path: Path, raw: bytes, values: Mapping[str, np.ndarray]) -> bytes:
    """The file with other numbers in the tensors of `values`; all else stays as it is."""
    file = opened(path, raw)
    made, tensors = bytearray(raw), leaves(file.content)
    for name, value in values.items():
        tensor = tensors[name]
        start, end = file.storages[tensor.storage.key]
        dtype = tensor.storage.dtype.newbyteorder("<" if file.little else ">")
        flat = np.frombuffer(made, dtype, (end - start) // dtype.itemsize, start)
        steps = tuple(s * dtype.itemsize for s in tensor.strides)
        view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps)
        view[...] = value
    return _checked(bytes(made), raw) if raw[:2] == b"PK" else bytes(made)


def _checked(made: bytes, raw: bytes) -> bytes:
    """A zip whose entries were changed in place, with their checksums put right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            start, end = _place(raw, entry) if entry.compress_type == 0 else (0, 0)
            content = made[start:end] if entry.compress_type == 0 else old.read(entry)
            entry.flag_bits &= ~8  # sizes stand before the content
            new.writestr(entry, content)
    return out.getvalue()
