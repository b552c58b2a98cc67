"""Any net in: files of ONNX, PyTorch, safetensors, Keras and Orbax as nets of bdjax, each with what
was understood of it and with the proof that it is the same net. No code of a file is run.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import checkpoints, datasets, metrics, own, schema
from bdjax.datasets.base import Source
from bdjax.datasets.files import sized
from bdjax.foreign import backdoorbench, files, native, runtime
from bdjax.foreign.assemble import Unsized
from bdjax.foreign.files import Bare
from bdjax.foreign.flax import orbax
from bdjax.foreign.graph import parsed
from bdjax.foreign.net import Imported
from bdjax.foreign.origin import Format, Origin, Said, Triggered, packed
from bdjax.foreign.pixels import WORDS, Pixels, alternatives, pixels
from bdjax.models.layers import Net, build
from bdjax.registry import door
from bdjax.train import predict, unit
from bdjax.types import BadInput, Dataset, Model, Share, Split, Variables, check_images, shown

ERROR, HALF = 1e-4, 1e-2
"""The largest difference, over the largest |logit|, of nets that are the same; and of those whose
file computes in 16 bits, which bdjax does in 32.
"""
POINT = 0.01
"""How far an accuracy may be from the one that it should be."""
IMAGES, TRIED = 16, 500
"""How many images the original runtime sees, and on how many other pixels are tried."""


class Loaded(NamedTuple):
    """A net, as `load_model` gives those of bdjax. `about["origin"]` says where it came from; what
    was understood of the file stands in `lines`.
    """

    net: Any
    model: Model
    variables: Variables
    about: dict[str, Any]
    lines: tuple[str, ...] = ()


class _Read(NamedTuple):
    net: Any
    model: Model
    variables: Variables
    origin: Origin
    pixels: Pixels
    lines: tuple[str, ...]
    raw: bytes
    layout: str = ""
    triggered: Split | None = None
    half: bool = False


@door
def load_net(
    file: str | Path,
    *,
    arch: str | Net | None = None,
    preprocess: str | None = None,
    size: Sequence[int] | None = None,
    dataset: str | Path | Source | None = None,
    logits: str | Path | None = None,
    accuracy: Share | None = None,
) -> Loaded:
    """The net in a file of ONNX, PyTorch, safetensors or Keras, in a checkpoint of Orbax, or in a
    folder of bdjax.

    `arch`: the architecture of bare weights; `preprocess`: the pixels that the net takes, see
    `foreign.pixels`; `size`: (H, W, C), where the file leaves it open; `dataset`: labelled
    images of its kind; `logits`: an `.npz` with `image` and the original's `logits`; `accuracy`:
    what the net should have on `dataset`. `BadInput` where the file cannot be read, or is shown to
    be another net.
    """
    path = own.at_home(file)
    if (path / "model.json").exists():
        return Loaded(*checkpoints.load_model(path))
    dataset = None if dataset is None else datasets.source(dataset)
    if accuracy is not None and dataset is None:
        raise BadInput("an accuracy is that on labelled images: give them, --dataset")
    given = None if preprocess is None else pixels(preprocess)
    if size is not None and (len(size) != 3 or min(size) < 1):
        raise BadInput(f"the size {shown(list(size))} is not that of images: give H W C")
    try:
        found = _told(path, arch, given, None if size is None else tuple(map(int, size)))
    except Unsized:
        if dataset is None:
            raise
        found = _told(path, arch, given, dataset.load().shape)
    dataset = None if dataset is None else sized(dataset, found.model.shape)
    data = None if dataset is None else dataset.load()
    with _of(path):
        if data is not None and found.model.shape != data.shape:
            wanted, have = ("×".join(map(str, one)) for one in (found.model.shape, data.shape))
            raise BadInput(f"it takes images of {wanted}, those of {data.name} are {have}")
        return _proved(
            path, found, dataset, data, logits, None if accuracy is None else float(accuracy)
        )


# --- Reading ---


@contextlib.contextmanager
def _of(path: Path) -> Iterator[None]:
    """What is wrong with a file names it."""
    try:
        yield
    except BadInput as error:
        named = re.match(rf"(cannot \w+ )?{re.escape(str(path))}(?!\w)", str(error))
        raise type(error)(str(error) if named else f"{path}: {error}") from error


def _told(path: Path, arch: str | Net | None, given: Pixels | None, size: Any) -> _Read:
    """As `_read`; whatever is wrong is one line that names the file."""
    with _of(path):
        try:
            return _read(path, arch, given, size)
        except BadInput:
            raise
        except Exception as error:  # whatever a damaged file makes what reads it raise
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise BadInput(f"damaged, or not known here ({what})") from error


def _read(path: Path, arch: str | Net | None, given: Pixels | None, size: Any) -> _Read:
    if path.is_dir():
        bare = Bare(native.of_net(orbax(path)), "flax")
        return _bare(path, b"", "orbax", bare, arch, given, size)
    raw = files.content(path)
    kind = files.kind_of(path, raw)
    found = files.read(path, raw, kind, size)
    if isinstance(found, Bare):
        return _bare(path, raw, kind, found, arch, given, size)
    if arch is not None:
        raise BadInput("it holds the whole net: leave --arch away")
    said: Said = "given" if given is not None else "assumed" if found.pixels is None else "file"
    taken = given if given is not None else found.pixels or Pixels()
    net = dataclasses.replace(found.net, pixels=taken)
    model = build(net, found.shape, found.classes)
    graph = parsed(net.graph)
    zeros = {
        k: np.zeros_like(v) for k, v in files.values_of(net, found.variables, Origin()).items()
    }
    last = next((w for w in ("LogSoftmax", "Softmax", "Sigmoid") if w in " ".join(found.notes)), "")
    origin = Origin(
        format=kind, file=path.name, last=last, pixels=said,
        template=packed(files.fill(path, raw, kind, zeros)),
    )  # fmt: skip
    made = ", ".join(f"{k} {v}" for k, v in found.about.items())
    layers = len({weight.layer for weight in graph.weights.values()})
    lines = (
        f"{kind}, {made}: {len(graph.nodes)} operators, {layers} layers with weights",
        *found.notes,
    )
    if found.half:
        lines += (f"it computes in 16 bits, here in 32: up to {HALF} apart it is the same",)
    return _Read(
        net, model, found.variables, origin, taken, lines, raw, graph.layout, half=found.half
    )


def _bare(
    path: Path,
    raw: bytes,
    kind: Format,
    bare: Bare,
    arch: str | Net | None,
    given: Pixels | None,
    size: Any,
) -> _Read:
    about = bare.about
    named = about.get("model_name")
    if arch is None and isinstance(named, str) and named.lower() in native.ALIASES:
        arch = named
    if arch is None:
        said = f" (it calls itself {shown(named)})" if named else ""
        raise BadInput(
            f"it holds weights alone{said}: give their architecture, --arch NAME "
            "(`bdjax list models`), or export the whole net to ONNX"
        )
    taken = given if given is not None else files.pixels_of(about)
    if taken is None:
        raise BadInput(f"weights do not say which pixels they take: give --preprocess, {WORDS}")
    net = native.architecture(arch) if isinstance(arch, str) else arch
    arrays = files.plain_names(bare.arrays) if bare.framework == "torch" else dict(bare.arrays)
    classes, channels = native.size_of(arrays, bare.framework)
    told = about.get("img_size")
    if size is None and isinstance(told, (list, tuple)) and len(told) == 3:
        size = tuple(int(n) for n in told)
    if size is None:
        raise Unsized("weights do not say the size of their images: give --size H W C")
    if channels not in (size[2], math.prod(size)):  # of images, or of them laid flat
        raise BadInput(f"its first layer reads {channels} channels, the images have {size[2]}")
    whole = native.pixelled(net, taken)
    model = build(whole, size, classes)
    variables, moves, named_all = native.variables(net, model, arrays, bare.framework)
    moves = {p: m._replace(name=bare.real.get(m.name, m.name)) for p, m in moves.items()}
    origin = Origin(
        format=kind, file=path.name, moves=files.moves_text(moves),
        pixels="given" if given is not None else "data",
    )  # fmt: skip
    if kind != "orbax":
        values = files.values_of(whole, variables, origin)
        zeros = {name: np.zeros_like(value) for name, value in values.items()}
        origin = dataclasses.replace(origin, template=packed(files.fill(path, raw, kind, zeros)))
    lines = [f"{kind}: the weights of {_called(net)}"]
    if not named_all:
        lines.append("its layers were matched in order, not by their names")
    triggered = backdoorbench.triggered(path, about.get("bd_test"))
    return _Read(whole, model, variables, origin, taken, tuple(lines), raw, "", triggered)


def _called(net: Any) -> str:
    from bdjax.registry import name_of

    return name_of(net) or type(net).__name__


# --- The proof ---


def _proved(
    path: Path,
    found: _Read,
    dataset: Source | None,
    data: Dataset | None,
    logits: str | Path | None,
    accuracy: float | None,
) -> Loaded:
    model, origin = found.model, found.origin
    count = sum(leaf.size for leaf in jax.tree.leaves(found.variables["params"]))
    sides = "×".join(map(str, model.shape))
    said = {"given": "as given", "file": "as the file says", "data": "as its data set has them"}
    lines = [
        *found.lines,
        f"images of {sides}, {model.classes} classes, {count:,} parameters",
        f"pixels: {found.pixels.words()}, {said.get(origin.pixels, 'a guess: give --preprocess')}",
        f"{len(model.sites)} sites: {_few(model.sites)}",
    ]
    by, errors, images = [], [], 0
    x = _images(model, data)
    ours = _outputs(found, x)
    _batched(found, x, ours)
    other = runtime.original(path, found.raw, origin.format, found.layout)
    if other is not None:
        name, outputs = other
        given = np.asarray(found.pixels.of(jnp.asarray(x)))
        error = runtime.difference(ours, outputs(given), origin.last, found.half)
        lines.append(_same(error, f"of {name}", len(x), found.half))
        if np.ptp(ours, 0).any():
            by, errors, images = [name], [error], len(x)
        else:
            lines.append(
                f"all {len(x)} images get the same logits, by which no net is told from another"
            )
    if logits is not None:
        error, images = _reference(found, own.at_home(logits))
        lines.append(_same(error, f"in {logits}", images, found.half))
        by, errors = [*by, "logits"], [*errors, error]
    metrics_: dict[str, float] = {}
    if data is not None:
        metrics_["acc_test"], more = _accuracy(found, data.test, accuracy)
        lines += more
        by += ["accuracy"] if accuracy is not None else []
    if found.triggered is not None:
        metrics_["asr_all"] = _share(found.net, found, found.triggered)
        lines.append(
            f"{len(found.triggered.label)} poisoned test images: {metrics_['asr_all']:.1%} get the "
            "label aimed at"
        )
    origin = dataclasses.replace(
        origin, by=", ".join(by), images=images, error=max(errors, default=None),
        accuracy=metrics_.get("acc_test"),
    )  # fmt: skip
    if origin.unverified:
        lines.append(f"unverified: {origin.unverified}")
    about: dict[str, Any] = {
        "origin": origin, "dataset": dataset, "attack": None, "recipe": None, "defenses": (),
        "seed": None, "fingerprint": None, "metrics": metrics_ or None,
        "triggered": found.triggered and Triggered(found.triggered.image, found.triggered.label),
    }  # fmt: skip
    return Loaded(found.net, model, found.variables, about, tuple(lines))


def _few(names: Sequence[str]) -> str:
    known = [name for name in ("conv_last", "penultimate") if name in names]
    first = [name for name in names if name not in known][:3]
    return ", ".join([*first, "…"] * (len(names) > len(known)) + known)


def _images(model: Model, data: Dataset | None) -> np.ndarray:
    """Given images, or random ones, in [0, 1]: whole pixels, for nets that read bytes."""
    drawn = np.random.default_rng(0).integers(0, 256, (IMAGES, *model.shape), np.uint8)
    return np.asarray(unit(drawn if data is None else data.test.image[:IMAGES]))


def _outputs(found: _Read, x: Any, net: Any = None) -> np.ndarray:
    model = found.model if net is None else build(net, found.model.shape, found.model.classes)
    ours = jax.jit(lambda v, x: predict(model, v, x, batch=32))(found.variables, x)
    if not np.isfinite(ours).all():
        raise BadInput("its logits are not all finite numbers")
    return np.asarray(ours)


def _batched(found: _Read, x: np.ndarray, ours: np.ndarray) -> None:
    """Raises `BadInput` where an image's logits depend on the others beside it."""
    alone = np.concatenate([_outputs(found, x[i : i + 1]) for i in range(min(3, len(x)))])
    if np.abs(alone - ours[: len(alone)]).max() > ERROR * max(np.abs(ours).max(), 1e-6):
        raise BadInput(
            "several images at once get other logits than one by one: the file fixes the number of "
            "images; export it with a dynamic batch axis"
        )


def _same(error: float, where: str, images: int, half: bool) -> str:
    if not error <= (HALF if half else ERROR):
        more = ", or computes too roughly in its 16 bits: export it in float32" * half
        raise BadInput(
            f"its logits differ from those {where} by {error:.1e} of the largest: it is not the "
            f"same net, or takes other pixels (--preprocess){more}"
        )
    return f"its logits are those {where}: {error:.1e} of the largest apart, {images} images"


def _reference(found: _Read, path: Path) -> tuple[float, int]:
    """The difference from the logits in a file, and of how many images."""
    arrays = schema.read_arrays(path, "reference")
    image, wanted = arrays["image"], arrays["logits"]
    if wanted.ndim != 2 or wanted.dtype.kind != "f" or wanted.shape[1] != found.model.classes:
        raise BadInput(
            f"{path}: logits are {wanted.dtype}{list(wanted.shape)}, not [N, {found.model.classes}]"
        )
    check_images(image, found.model.shape)
    if len(image) != len(wanted):
        raise BadInput(f"{path}: {len(image)} images, but logits of {len(wanted)}")
    error = runtime.difference(_outputs(found, np.asarray(unit(image))), wanted, "")
    return error, len(image)


def _share(net: Any, found: _Read, split: Split) -> float:
    logits = _outputs(found, np.asarray(split.image), net)
    return float(
        np.mean(np.asarray(metrics.labels(jnp.asarray(logits))) == np.asarray(split.label))
    )


def _accuracy(found: _Read, test: Split, wanted: float | None) -> tuple[float, list[str]]:
    """The accuracy on labelled images, and lines on it; of other pixels too, where they do
    better.
    """
    reached = _share(found.net, found, test)
    lines = [f"accuracy {reached:.1%} on {len(test.label)} labelled images"]
    missed = wanted is not None and abs(reached - wanted) > POINT
    few = test[:: -(-len(test.label) // TRIED)]
    tried = {
        one.words(): _share(_with(found.net, one), found, few)
        for one in alternatives(found.pixels, found.model.shape[2])
    }
    here = _share(found.net, found, few)
    better = [f"{words} {share:.1%}" for words, share in tried.items() if share > here + POINT]
    if why := strange(reached, test.label):
        lines[0] = f"warning: {why}"
    if better:
        lines.append(f"with other pixels it does better: {'; '.join(better)}")
    if missed:
        hint = f"; {lines[-1]}" if better else ""
        raise BadInput(
            f"its accuracy is {reached:.1%} on the labelled images, not {wanted:.1%}: it is not "
            f"the same net, or takes other pixels (--preprocess){hint}"
        )
    return reached, lines


def strange(right: float, label: Any) -> str:
    """Why images with `label: [N]` seem not to be those of a net that is right on a share `right`
    of them; "" where nothing says so.
    """
    label = np.asarray(label)
    most = float(np.bincount(label).max() / len(label))
    if right == 1 or right > metrics.chance(most, len(label)):
        return ""
    return (
        f"the net is right on {right:.1%} of {len(label)} images, which is chance: they have "
        "other classes than it, or in another order, or it takes other pixels (--preprocess)"
    )


def _with(net: Any, other: Pixels) -> Any:
    if isinstance(net, Imported):
        return dataclasses.replace(net, pixels=other)
    return native.pixelled(getattr(net, "net", net), other)


# --- Keeping ---


def save_net(folder: str | Path, loaded: Loaded) -> None:
    """A loaded net as a folder, from which every command goes on."""
    net, model, variables, about, _ = loaded
    checkpoints.save_model(folder, net, model, variables, **about)
