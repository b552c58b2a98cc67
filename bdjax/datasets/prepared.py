"""Public sets through tensorflow-datasets (TFDS) without TensorFlow: `prepare` once, then load what
that left.

TFDS's stock builders call TensorFlow to unpack, read and encode. Ours subclass them, keep their
URLs, checksums, features, splits and folder names, and read the archives with the standard library.
Nothing is ever unpickled.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bdjax import own, registry, schema
from bdjax.datasets import base
from bdjax.datasets.files import TESTS, Table, column, read_file
from bdjax.datasets.pictures import decoded, stacked
from bdjax.progress import kept
from bdjax.types import BadInput, Split, shown

PARTS = ("train", "test")
DECODED = "decoded.npz"
INFO = "dataset_info.json"
FEATURES = "tensorflow_datasets.core.features."
# TFDS's own check, the system's words through any library.
FULL = ("disk space", "No space left", "quota exceeded")
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@registry.pytree
class Prepared(base.Source):
    """A public set. `tfds`: its folder; `stock`: TFDS's builder; `md5`: of the files, where TFDS
    has no builder.
    """

    tfds: ClassVar[str]
    stock: ClassVar[str] = ""
    url: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    md5: ClassVar[tuple[str, ...]] = ()
    shape: ClassVar[tuple[int, int, int]]
    names: ClassVar[tuple[str, ...]]

    @staticmethod
    def parse(*files: Path) -> tuple[Split, Split]:
        """The official training and test set in the original `files`."""
        raise TypeError("a prepared set must define parse(*files)")

    def watched(self):
        return [base.data_dir(self.data_dir) / self.tfds]

    def read(self):
        folder = base.data_dir(self.data_dir)
        if not (there := versions(folder / self.tfds)):
            name = registry.name_of(self)
            raise BadInput(f"{name} is not prepared in {folder}: run `bdjax data prepare {name}`")
        return *_decoded(there[-1]), self.names


@registry.door
def prepare(
    name: str,
    manual_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    quiet: bool = False,
) -> str:
    """Downloads and prepares the set `name`, unless that is done; returns one line that says where
    it is.

    `manual_dir`: a folder with the original archives, checked against the sha256 that TFDS has
    registered (GTSRB: the published md5), or with `NAME_train.npz` and `NAME_test.npz` (`image`,
    `label`; for GTSRB also `track`). No checksum is registered for `.npz`: theirs are noted in
    `sources.json` of the prepared folder.
    """
    cls = registry.get("dataset", name).cls
    folder, manual = base.data_dir(data_dir), own.at_home(manual_dir) if manual_dir else None
    if not issubclass(cls, Prepared):
        raise BadInput(f"{name} needs no preparing: load it as it is")
    if manual and not manual.is_dir():
        raise BadInput(f"{manual}: no such folder")

    with own.explained(folder):
        there = list(folder.glob(f"{cls.tfds}/*.*.*"))
    if not there:
        own.beside(folder, folders=(cls.tfds, "downloads"))
        if manual:
            _given(cls, manual)

    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    (tfds.disable_progress_bar if quiet else tfds.enable_progress_bar)()
    try:
        # Folders in which nothing was put go away again.
        with own.made(folder / cls.tfds), own.made(folder / "downloads"):
            builder = _builder(cls, folder, manual)
            if builder.data_path.exists():
                return f"{name} is ready in {builder.data_path}: nothing to do"
            config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
            words = "the same command begins anew, with the files that were downloaded whole"
            # Its bars go to stderr.
            with kept(words), contextlib.redirect_stdout(io.StringIO()):
                # Into VERSION.incomplete…, renamed at the end.
                builder.download_and_prepare(download_config=config)
            _decoded(Path(builder.data_path))
    except BadInput:
        raise
    except NonMatchingChecksumError as error:
        file = next((file for file in cls.files if file in str(error)), "a file")
        raise BadInput(
            f"{file} of {name} has a wrong checksum: download {cls.url}{file} again"
        ) from error
    except Exception as error:
        code, text = getattr(error, "errno", None), " ".join(str(error).split())
        if any(words in text for words in FULL):
            raise BadInput(
                f"{folder}: the disk is full; free some space or set BDJAX_DATA_DIR"
            ) from error
        if code in CLOSED:
            raise BadInput(
                f"{folder}: cannot be written ({os.strerror(code)}); set BDJAX_DATA_DIR"
            ) from error
        raise BadInput(
            f"cannot prepare {name} ({text[:120]}): download {', '.join(cls.files)} from {cls.url} "
            f"into a folder DIR and run `bdjax data prepare {name} --manual-dir DIR`"
        ) from error
    return f"{name} is ready in {builder.data_path}"


def _builder(cls: type[Prepared], folder: Path, manual: Path | None) -> Any:
    """TFDS's builder of a set, free of TensorFlow, over `folder`."""
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core.registered import skip_registration

    stock: Any = (
        getattr(tfds.image_classification, cls.stock)
        if cls.stock
        else tfds.core.GeneratorBasedBuilder
    )
    with skip_registration():

        class Builder(stock):
            name = cls.tfds
            VERSION = stock.VERSION if cls.stock else tfds.core.Version("1.0.0")

            def _info(self):
                if cls.stock:
                    return super()._info()
                image, label = (
                    tfds.features.Image(shape=cls.shape),
                    tfds.features.ClassLabel(names=cls.names),
                )
                features = tfds.features.FeaturesDict(
                    {"image": image, "label": label, "track": np.int64}
                )
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                splits = _originals(cls, dl_manager.download, manual, Path(self.data_dir))
                return {
                    part: self._generate_examples(part, split)
                    for part, split in zip(PARTS, splits, strict=True)
                }

            def _generate_examples(self, part, split):  # type: ignore[override]
                for i, (image, label) in enumerate(zip(split.image, split.label, strict=True)):
                    # As PIL images: TFDS encodes arrays with TensorFlow.
                    row = {"image": Image.fromarray(image.squeeze()), "label": int(label)}
                    extra = {
                        "id": f"{part}_{i:05d}",
                        "track": -1 if split.group is None else int(split.group[i]),
                    }
                    yield i, row | {k: v for k, v in extra.items() if k in self.info.features}

    return Builder(data_dir=folder, file_format="array_record")


def _originals(
    cls: type[Prepared], download: Callable, manual: Path | None, folder: Path
) -> tuple[Split, Split]:
    """The official images, from `manual` or the network."""
    pair = _given(cls, manual) if manual else []
    if pair:
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pair}
        (folder / "sources.json").write_text(json.dumps(sums, indent=1))
        train, test = (read_file(path)[0] for path in pair)
        for path, split in zip(pair, (train, test), strict=True):
            if split.image.shape[1:] != cls.shape or split.label.max() >= len(cls.names):
                raise BadInput(
                    f"{path}: is not {cls.tfds}: {cls.shape} images with labels below "
                    f"{len(cls.names)}"
                )
        return train, test
    if manual and cls.md5:  # TFDS takes only files from there whose checksum it has registered.
        paths = [manual / file for file in cls.files]
    else:
        if not manual:  # TFDS would retry for minutes without a network.
            urllib.request.urlopen(cls.url + cls.files[0], timeout=20).close()
        paths = [Path(path) for path in download([cls.url + file for file in cls.files])]
    for path, file, md5 in zip(paths, cls.files, cls.md5, strict=False):
        if hashlib.md5(path.read_bytes()).hexdigest() != md5:
            if not manual:
                path.unlink()
            raise BadInput(f"{path}: has a wrong checksum; download {cls.url}{file} again")
    return cls.parse(*paths)


def _given(cls: type[Prepared], manual: Path) -> list[Path]:
    """The two `.npz` that the user has in `manual`; empty where the original files are there."""
    pair = [manual / f"{cls.tfds}_{part}.npz" for part in PARTS]
    if all(path.is_file() for path in pair):
        return pair
    if missing := [file for file in cls.files if not (manual / file).is_file()]:
        raise BadInput(
            f"{manual}: lacks {', '.join(missing)}; put them there (or {pair[0].name} and "
            f"{pair[1].name})"
        )
    return []


def _decoded(folder: Path) -> tuple[Split, Split]:
    """The images of a prepared folder: its records, in TFDS's order; decoding takes 10 s, so their
    arrays are kept.
    """
    try:
        return _splits(schema.read_arrays(folder / DECODED, "decoded"), folder / DECODED)
    except BadInput:  # not there or damaged
        splits = _decode(folder)
    with contextlib.suppress(OSError):  # A read-only or full folder costs time, not the load.
        _save(folder, splits)
    return splits


def _save(folder: Path, splits: tuple[Split, Split]) -> None:
    arrays: dict[str, Any] = {}
    for part, split in zip(PARTS, splits, strict=True):
        arrays |= {f"{part}_{k}": v for k, v in split._asdict().items() if v is not None}
    temporary = folder / f"{os.getpid()}.incomplete.npz"
    try:
        schema.write_arrays(temporary, arrays, "decoded")
        temporary.replace(folder / DECODED)
    finally:
        temporary.unlink(missing_ok=True)


def _splits(arrays: dict[str, np.ndarray], where: Path) -> tuple[Split, Split]:
    train, test = (
        base.checked(where, *(arrays.get(f"{p}_{k}") for k in Split._fields))  # type: ignore[arg-type]
        for p in PARTS
    )
    return train, test


def _decode(folder: Path) -> tuple[Split, Split]:
    with base.readable(folder, "delete it and run `bdjax data prepare` again"):
        return tuple(_part(folder, _opened(folder), part)[0] for part in PARTS)  # type: ignore[return-value]


def _opened(folder: Path) -> Any:
    """TFDS's builder that reads a prepared folder. It would import whatever module a feature's
    description names: only TFDS's own features are let through.
    """
    for path in folder.iterdir():
        schema.plain_file(path)

    def look(value: Any) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, (dict, list)):
                look(inner)
            elif key in ("type", "pythonClassName", "python_class_name") and not (
                isinstance(inner, str) and inner.startswith(FEATURES)
            ):
                raise BadInput(f"{folder}: has a feature of other code, '{shown(inner)}'")

    raw = schema.content(folder / "features.json")
    try:
        described = schema.parse(raw)
    except BadInput as error:
        raise BadInput(f"{folder}: its features.json {error}: prepare it again") from error
    look(described if isinstance(described, dict) else {})
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder)


def _records(folder: Path, builder: Any, part: str) -> Iterator[bytes]:
    """The records of a split, each an example as it was written."""
    import tensorflow_datasets as tfds

    split = builder.info.splits[part]
    paths = [Path(path) for path in split.filepaths]
    if any(path.parent != folder for path in paths):
        raise ValueError("its files lie elsewhere")
    kind = builder.info.file_format.value
    if kind == "array_record":
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        rows = builder.as_data_source(part, deserialize_method=raw)
        for start in range(0, split.num_examples, 250):
            yield from rows.__getitems__(range(start, min(start + 250, split.num_examples)))
    elif kind == "tfrecord":
        for path in paths:
            yield from _tfrecords(path)
    else:
        raise BadInput(f"{folder}: is stored as {kind}: prepare it as array_record or tfrecord")


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Of each record its length in 8 bytes, a checksum in 4, itself, a checksum in 4."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        while head := file.read(12):
            length = int.from_bytes(head[:8], "little")
            if len(head) < 12 or length > size - file.tell() - 4:
                raise ValueError(f"{path.name} ends within a record")
            yield file.read(length)
            file.seek(4, os.SEEK_CUR)


def _part(
    folder: Path,
    builder: Any,
    part: str,
    image: str | None = None,
    label: str | None = None,
    size: int | None = None,
) -> tuple[Split, tuple[str, ...]]:
    """A split of a prepared folder and the names of its classes, see `Table`."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import tqdm_utils
    from tensorflow_datasets.proto import tf_example_pb2

    example: Any = tf_example_pb2.Example  # type: ignore[attr-defined]
    features, known = builder.info.features, builder.info.supervised_keys or ()
    kinds = (("image", image, tfds.features.Image), ("label", label, tfds.features.ClassLabel))
    chosen = []
    for field, wanted, kind in kinds:
        able = [name for name, feature in features.items() if type(feature) is kind]
        likely = [name for name in able if name in known]
        chosen.append(column(folder, field, wanted, able, likely))
    image, label = chosen
    if np.dtype(features[image].np_dtype) not in (np.uint8, np.uint16):
        raise BadInput(f"{folder}: images are of {features[image].np_dtype}; 8 or 16 bits are read")
    count, labels, tracks = builder.info.splits[part].num_examples, [], []

    def pictures() -> Iterator[Any]:
        bar = {"total": count, "desc": f"Decoding {part} images", "leave": False}
        for record in tqdm_utils.tqdm(_records(folder, builder, part), **bar):
            found = example.FromString(record).features.feature
            labels.extend(found[label].int64_list.value[:1])
            tracks.extend(found["track"].int64_list.value[:1] if "track" in features else ())
            (raw,) = found[image].bytes_list.value
            yield decoded(f"{folder}: {part} image {len(labels)}", io.BytesIO(raw))

    images = stacked(folder, pictures(), count, size)
    group = np.asarray(tracks) if tracks and min(tracks) >= 0 else None
    split = base.checked(folder, images, np.asarray(labels), group)
    return split, tuple(features[label].names)


@registry.dataset("tfds")
class Tfds(Table):
    """Any set that TFDS has prepared, as array_record or tfrecord; nothing is downloaded, and no
    code of the set's own is run.

    `path`: its name in the data folder, or name/config, of which the newest version is taken, or a
    folder that holds `dataset_info.json`. The splits `train` and `test` (else `validation`) are the
    two sets; without, a stratified fifth is the test set. `image`, `label`: the features, where
    several could be; `size`: resize the images to `size`×`size` (None: all of one size, as they
    are).
    """

    def found(self, path):
        here, inside = super().found(path), base.data_dir(self.data_dir) / path
        return inside if versions(inside) else here

    def watched(self):
        return [self.found(self.path)] if self.path else []

    def read(self):
        if not (there := versions(self.found(self.path))):
            folder = base.data_dir(self.data_dir)
            raise BadInput(f"{self.path}: no set that TFDS has prepared, here or in {folder}")
        folder = there[-1]
        with base.readable(folder, "prepare it again"):
            builder = _opened(folder)
            parts = [part for part in ("train", *TESTS) if part in builder.info.splits]
            if "train" not in parts:
                raise BadInput(f"{folder}: has no split `train`")
            how = (self.image, self.label, self.size)
            (train, names), *rest = (_part(folder, builder, part, *how) for part in parts[:2])
        return train, rest[0][0] if rest else None, names


def versions(folder: Path) -> list[Path]:
    """The folder itself where TFDS has prepared it, else its versions that are prepared, the newest
    last.
    """
    # os.path knows no file of a name that no file can have, where Path raises.
    if os.path.isfile(folder / INFO):
        return [folder]
    names = os.listdir(folder) if os.path.isdir(folder) else []
    # What a killed `prepare` leaves is called VERSION.incomplete….
    found = [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    found.sort(key=lambda name: [int(part) for part in name.split(".")])
    return [folder / name for name in found if os.path.isfile(folder / name / INFO)]
