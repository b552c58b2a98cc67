"""A net back into the format that it came in: the same graph and names, other weights."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from bdjax import own
from bdjax.checkpoints import load_model
from bdjax.foreign import files, native, onnx, runtime, safetensors
from bdjax.foreign.fold import SAME, folded
from bdjax.foreign.graph import parsed
from bdjax.foreign.net import Imported
from bdjax.foreign.origin import Origin
from bdjax.models.layers import build
from bdjax.registry import door, name_of
from bdjax.types import BadInput, Model, Variables

ALONE = (
    "it wants an older Orbax, so give both an environment of their own: pip install bdjax jax2onnx"
)
ENDINGS = {
    "onnx": (".onnx",), "torch": (".pt", ".pth", ".bin"), "safetensors": (".safetensors",),
    "keras": (".keras",), "h5": (".h5", ".hdf5"),
}  # fmt: skip


@door
def export_net(folder: str | Path, file: str | Path) -> None:
    """Writes the net of a bdjax folder to `file`, in the format in which it was imported: the same
    graph and names, the weights replaced, masks folded in. Any net can become `.safetensors`, and
    one that came from no file `.onnx`, where jax2onnx is installed.

    Raises `BadInput` where a mask cannot be folded, where a defense wraps the net, or where the
    file, read again, gives other logits: more than 1e-5 of the largest |logit|.
    """
    net, model, variables, about = load_model(folder)
    export(net, model, variables, about, own.at_home(file))


def export(net: Any, model: Model, variables: Variables, about: dict[str, Any], path: Path) -> None:
    """As `export_net`, of a net that is loaded."""
    if wrapped := [d for d in about["defenses"] if d.wrap(model) is not model]:
        raise BadInput(
            f"{name_of(wrapped[0])} wraps the net, which no file of another format can hold: it "
            "stays available as a net of bdjax"
        )
    origin = check_file(about, path)
    bare = folded(model, variables)
    _close(model, bare, variables, "its masks, folded in,")
    if origin is None and path.suffix == ".onnx":
        raw = _by_jax2onnx(model, bare)
    elif origin is None:
        leaves = {".".join(path): np.asarray(value) for path, value in _in_order(model, bare)}
        raw = safetensors.written(leaves, {"format": "bdjax"})
    else:
        raw = _again(net, model, bare, origin, path)
    with own.renamed(path) as temporary:
        temporary.write_bytes(raw)


def _in_order(model: Model, variables: Variables) -> Iterator[tuple[native.Path, Any]]:
    """The arrays by their paths, in the order in which the net reads them: the first kernel says
    its channels, the last its classes.
    """
    flat: dict[native.Path, Any] = flatten_dict(variables)  # type: ignore[assignment]
    known = [path for path in native.wanted(model) if path in flat]
    for path in (*known, *(path for path in flat if path not in known)):
        yield path, flat[path]


def _by_jax2onnx(model: Model, variables: Variables) -> bytes:
    """A net of bdjax as ONNX, images [N, H, W, C] in [0, 1], read again and held against it."""
    from jax2onnx import to_onnx  # type: ignore[import-not-found]

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        made = to_onnx(lambda x: model.apply(variables, x).logits, [("N", *model.shape)])
    del made.graph.value_info[:]  # shapes that it took down before it moved axes
    raw = made.SerializeToString()
    found = onnx.read(raw, model.shape)
    again = build(found.net, found.shape, found.classes)
    x = np.random.default_rng(0).random((4, *model.shape), np.float32)
    ours, theirs = (
        np.asarray(jax.jit(lambda v, one=one: one.apply(v, x).logits)(v))
        for one, v in ((again, found.variables), (model, variables))
    )
    read = {"the file, read again,": ours}
    if (other := runtime.original(Path(), raw, "onnx", parsed(found.net.graph).layout)) is not None:
        read[f"the file, in {other[0]},"] = other[1](x)
    for what, logits in read.items():
        if not (error := runtime.difference(logits, theirs, "")) <= SAME:
            raise BadInput(f"{what} gives logits that differ by {error:.1e} of the largest")
    return raw


def check_file(about: dict[str, Any], path: Path) -> Origin | None:
    """The file that is written again to `path`, None where that holds the weights alone; raises
    `BadInput` where a net that came so cannot become such a file, or one of the user's is there.
    """
    own.beside(path.parent, [path.name])
    origin = about.get("origin")
    origin = origin if isinstance(origin, Origin) and origin.template is not None else None
    if path.suffix == ".safetensors" and (origin is None or origin.format != "safetensors"):
        return None
    if origin is None and path.suffix == ".onnx":
        if importlib.util.find_spec("jax2onnx") is None:
            raise BadInput(f"{path}: a net of bdjax becomes ONNX by jax2onnx: {ALONE}")
        return None
    if origin is None:
        raise BadInput(
            f"{path}: the net came from no file: a .safetensors can be written, or a .onnx by "
            f"jax2onnx: {ALONE}"
        )
    if path.suffix not in (endings := ENDINGS[origin.format]):
        raise BadInput(f"{path}: the net came as {origin.format}: give a name in {endings[0]}")
    return origin


def _again(net: Any, model: Model, variables: Variables, origin: Origin, path: Path) -> bytes:
    """The original file with the weights of `variables`, read again and held against them."""
    values = files.values_of(net, variables, origin)
    where = Path(origin.file)
    raw = files.fill(where, origin.unpacked(), origin.format, values)
    found = files.read(where, raw, origin.format, model.shape)
    if isinstance(found, files.Bare):
        arrays = found.arrays
        arrays = files.plain_names(arrays) if found.framework == "torch" else dict(arrays)
        again, _, _ = native.variables(getattr(net, "net", net), model, arrays, found.framework)
    else:
        assert isinstance(net, Imported)
        if parsed(found.net.graph).nodes != parsed(net.graph).nodes:
            raise BadInput(f"{path}: the file, read again, holds another graph")
        again = found.variables
    _close(build(net, model.shape, model.classes), again, variables, "the file, read again,")
    return raw


def _close(model: Model, ours: Variables, theirs: Variables, what: str) -> None:
    x = np.random.default_rng(0).random((4, *model.shape), np.float32)
    logits = jax.jit(lambda v: model.apply(v, x).logits)
    error = runtime.difference(np.asarray(logits(ours)), np.asarray(logits(theirs)), "")
    if not error <= SAME:
        raise BadInput(f"{what} gives logits that differ by {error:.1e} of the largest")
