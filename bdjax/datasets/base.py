"""What every source of images shares: checks, the stratified pick, the defender's held-out data,
the cache.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from bdjax import own
from bdjax.registry import name_of, plugin_of, pytree, static, validate
from bdjax.types import INT32, Array, BadInput, Count, Dataset, Range, Seed, Split, class_name

TEST_SHARE = 0.2
"""How much of a source without a test set of its own becomes one."""
BLACK = 2
"""Images whose pixels all are at most this are taken for wrongly scaled ones."""

_fingerprints: dict[tuple, str] = {}
_given: dict["Source", Dataset] = {}


@pytree
class Source:
    """A source of images: a method `read`; `load` checks, splits and caches what it gives.

    `train_size`, `test_size`: use a stratified part only; the defender's share `holdout` comes out
    of `train_size`. `top_classes`: only these many classes, those with the most training images,
    numbered anew in their old order.
    """

    data_dir: str | None = static(None)
    holdout: Annotated[float, Range(1e-6, 1 - 1e-6)] = static(0.1)
    train_size: Count | None = static(None)
    test_size: Count | None = static(None)
    seed: Seed = static(0)
    top_classes: Annotated[int, Range(2, INT32)] | None = static(None, before=None)

    def read(self) -> tuple[Split, Split | None, Sequence[str]]:
        """The official training set, test set (None: `load` splits one off) and class names (empty:
        labels only).
        """
        raise TypeError(f"{type(self).__name__} must define read()")

    def load(self) -> Dataset:
        """The data set in memory, read-only: later calls return the same arrays, unless a file was
        changed since.
        """
        if (found := _given.get(self)) is not None:
            return found
        validate(self)
        source = dataclasses.replace(self, data_dir=str(data_dir(self.data_dir)))
        return _load(source, _stamp(source.watched()))

    def watched(self) -> list[Path]:
        """The files and folders that `read` looks at."""
        return []

    def found(self, path: str) -> Path:
        """Where `read` looks for a file given as `path`; raises `BadInput` where none is."""
        if not path:
            name = name_of(self)
            own_kind = f" (what is called {name} itself is ./{name})" if name else ""
            raise BadInput(
                "no data are named: --dataset.path says where they are, path= in Python" + own_kind
            )
        return own.at_home(path)

    def placed(self, folder: Path | None = None) -> "Source":
        """The same source with absolute paths; relative ones start at `folder`, or are where `read`
        finds them.
        """
        places = {}
        for name in ("data_dir", "path", "test"):
            if path := getattr(self, name, None):
                here = own.at_home(path) if name == "data_dir" else self.found(path)
                places[name] = os.path.abspath(here if folder is None else folder / here)
        return dataclasses.replace(self, **places)


def give(source: Source, dataset: Dataset) -> None:
    """Has `source.load()` return `dataset` in this process, whose disk need not hold its files."""
    _given[source] = dataset


def data_dir(given: str | Path | None = None) -> Path:
    """Where prepared sets live: `given`, else `BDJAX_DATA_DIR`, else the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return own.at_home(given or os.environ.get("BDJAX_DATA_DIR") or Path(cache) / "bdjax")


def fingerprint(dataset: Dataset) -> str:
    """A content hash of the images, labels and groups, whatever they are called: 16 hex digits."""
    leaves = [
        leaf
        for split in (dataset.train, dataset.clean, dataset.test)
        for leaf in split
        if leaf is not None
    ]
    key = (dataset.classes, *map(id, leaves))
    if key not in _fingerprints:
        digest = hashlib.sha256(repr(dataset.classes).encode())
        for leaf in leaves:
            array = np.ascontiguousarray(leaf)
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(array.data)
            # Another array may get this one's id.
            weakref.finalize(leaf, _fingerprints.pop, key, None)
        _fingerprints[key] = digest.hexdigest()[:16]
    return _fingerprints[key]


def checked(
    where: object, image: np.ndarray, label: np.ndarray, group: np.ndarray | None = None
) -> Split:
    """A `Split` of arrays from outside; raises `BadInput`, naming `where`, unless they are images
    and labels.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3) or 0 in image.shape:
        raise BadInput(
            f"{where}: images have shape {list(image.shape)}; give [N, H, W, C] with C = 1 or 3"
        )
    for what, array in (("label", label), ("group", group)):
        if array is not None and array.shape != image.shape[:1]:
            raise BadInput(
                f"{where}: {len(image)} images but {what} has shape {list(array.shape)}; give one "
                "per image"
            )
    return Split(
        _pixels(where, image), _integers(where, "labels", label), _groups(where, label, group)
    )


def _pixels(where: object, image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind not in "iuf":
        raise BadInput(f"{where}: images have dtype {image.dtype}; give uint8 pixels")
    low, high = image.min(), image.max()  # NaN if any pixel is.
    if not np.isfinite([low, high]).all():
        raise BadInput(f"{where}: some pixels are NaN or infinite; give 0 to 255")
    if low < 0 or high > 255 or (image.dtype.kind == "f" and high <= 1):
        raise BadInput(f"{where}: pixels run from {low:g} to {high:g}; give 0 to 255")
    return np.rint(image).astype(np.uint8)


def _integers(where: object, what: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iuf" or not (
        np.isfinite(array).all() and (array == np.rint(array)).all()
    ):
        raise BadInput(f"{where}: {what} are not whole numbers")
    if array.min() < 0 or array.max() >= 2**31:
        raise BadInput(
            f"{where}: {what} run from {array.min():g} to {array.max():g}; give 0 to K-1"
        )
    return array.astype(np.int32)


def _groups(where: object, label: np.ndarray, group: np.ndarray | None) -> np.ndarray | None:
    """Numbers that are unique across classes: GTSRB counts its tracks within each class."""
    if group is None:
        return None
    pairs = np.stack([label.astype(np.int64), _integers(where, "groups", group)])
    return np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int32)


@contextlib.contextmanager
def readable(where: object, hint: str) -> Iterator[None]:
    """Turns whatever damaged data make a library raise into one line."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadInput(f"{where}: damaged or not in its format ({text}); {hint}") from error


def pick(label: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` rows, in order: of each class its share, and one at least. A smaller pick is part of a
    larger one.
    """
    order = np.random.default_rng(seed).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    count = np.bincount(label)
    rank = np.arange(len(label)) - np.repeat(np.cumsum(count) - count, count)
    depth = (rank + 0.5 * (rank > 0)) / np.repeat(count, count)
    return np.sort(order[np.argsort(depth, kind="stable")[:size]])


def divide(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """`(rest, part)`, stratified by class, as far as each class is enough for both; images of one
    group stay together.
    """
    unit = _units(split)
    units, first = np.unique(unit, return_index=True)
    label = np.asarray(split.label)[first]
    if 2 * (least := len(np.unique(label))) > len(units):  # one of each class would leave none
        label, least = np.zeros_like(label), 1
    size = min(max(round(share * len(units)), least), max(len(units) - 1, 1))
    part = np.isin(unit, units[pick(label, size, seed)])
    return split[~part], split[part]


def _units(split: Split) -> np.ndarray:
    """What is never torn apart, by row: an image, or a group of them."""
    return np.arange(len(split.label)) if split.group is None else np.asarray(split.group)


def trainable(source: Source, data: Dataset) -> None:
    """Raises `BadInput` where a class of the source's `data` has too few images to train on, as
    well as to hold out: those who only judge a net can do with them.
    """
    parts = data.train, data.clean
    if all(_missing(part.label, data.classes) is None for part in parts):
        return
    many = np.zeros(data.classes, int)
    for part in parts:
        first = np.unique(_units(part), return_index=True)[1]
        many += np.bincount(np.asarray(part.label)[first], minlength=data.classes)
    what = "images" if data.train.group is None else "groups of images"
    if many[which := int(many.argmin())] < 2:
        why = (
            f"has {many[which]} of the 2 {what} needed beside the test set, one of them to hold out"
        )
        why += "; add images of it" + " or raise train_size" * (source.train_size is not None)
    else:
        which = _missing(data.train.label, data.classes) or 0
        why = f"has all its {what} held out; lower holdout"
    where = getattr(source, "path", "") or data.name
    raise BadInput(f"{where}: class {class_name(which, data.names)} {why}")


def together(*splits: Split) -> Split:
    """The images of all, without their groups."""
    return Split(
        np.concatenate([split.image for split in splits]),
        np.concatenate([split.label for split in splits]),
    )


def _part(where: object, field: str, split: Split, size: int | None, seed: int) -> Split:
    if size is None:
        return split
    low, high = len(np.unique(split.label)), len(split.label)
    if not low <= size <= high:
        raise BadInput(
            f"{where}: {field} is {size}; give {low} (one image a class) to {high} (all there are)"
        )
    return split[pick(np.asarray(split.label), size, seed)]


def _largest(
    train: Split, test: Split | None, count: int
) -> tuple[Split, Split | None, np.ndarray]:
    """Both sets without all but the `count` largest classes, and the old numbers of these."""
    kept = np.sort(np.argsort(-np.bincount(train.label), kind="stable")[:count])

    def only(split: Split) -> Split:
        split = split[np.isin(split.label, kept)]
        return split._replace(label=np.searchsorted(kept, split.label).astype(np.int32))

    return only(train), None if test is None else only(test), kept


def _missing(label: Array, classes: int) -> int | None:
    present = np.unique(label)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    first = int(gaps[0]) if len(gaps) else len(present)
    return first if first < classes else None


def _stamp(paths: Iterable[Path]) -> str:
    """Equal as long as nobody writes to the files, or to those in the folders; 16 hex digits."""
    digest = hashlib.sha256()

    def look(path: str | Path, depth: int = 3) -> None:  # folder/train/CLASS/image
        try:
            found = os.stat(path)
            digest.update(
                repr((str(path), found.st_mtime_ns, found.st_size, found.st_ino)).encode()
            )
            if depth and stat.S_ISDIR(found.st_mode):
                for name in sorted(os.listdir(path)):
                    look(os.path.join(path, name), depth - 1)
        except (OSError, ValueError):  # `read` says what is wrong
            digest.update(repr(str(path)).encode())

    for path in paths:
        look(path)
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _load(source: Source, stamp: str) -> Dataset:
    name = name_of(source) or type(source).__name__
    where = getattr(source, "path", "") or name
    with own.explained(Path(where), "read"):
        train, test, names = source.read()
    if plugin_of(type(source)) is not None:
        train = checked(where, *train)  # type: ignore[arg-type]
        test = None if test is None else checked(where, *test)  # type: ignore[arg-type]
    names = tuple(names)
    classes = len(names) or int(train.label.max()) + 1
    for split in (train, test):
        if split is not None and (high := np.asarray(split.image).max()) <= BLACK:
            what = "test" if split is test else "training"
            raise BadInput(
                f"{where}: no pixel of the {what} images is above {high} of 255: they are black; "
                "give 0 to 255"
            )
        if split is not None and (high := split.label.max()) >= classes:
            raise BadInput(
                f"{where}: a label is {high} but there are {classes} classes; give 0 to "
                f"{classes - 1}"
            )
    if (missing := _missing(train.label, classes)) is not None:
        raise BadInput(
            f"{where}: class {class_name(missing, names)} has no training image; number the "
            "classes 0 to K-1 without a gap"
        )
    if source.top_classes is not None:
        if source.top_classes > classes:
            raise BadInput(f"{where}: top_classes is {source.top_classes}; give 2 to {classes}")
        train, test, kept = _largest(train, test, source.top_classes)
        names, classes = tuple(names[k] for k in kept) if names else (), len(kept)
    if test is None:
        train, test = divide(train, TEST_SHARE, source.seed)
    if train.image.shape[1:] != test.image.shape[1:]:
        raise BadInput(
            f"{where}: training images are {train.image.shape[1:]}, test images "
            f"{test.image.shape[1:]}"
        )
    train = _part(where, "train_size", train, source.train_size, source.seed)
    test = _part(where, "test_size", test, source.test_size, source.seed)
    train, clean = divide(train, source.holdout, source.seed)
    if not len(train.label):
        raise BadInput(f"{where}: one image, or one group of them, is too few; give a few hundred")
    for leaf in (*train, *clean, *test):
        if isinstance(leaf, np.ndarray):
            leaf.flags.writeable = False
    return Dataset(name, train, clean, test, classes, names)
