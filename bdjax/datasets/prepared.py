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
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bdjax import own, registry, schema
from bdjax.datasets import base
from bdjax.datasets.files import read_file
from bdjax.progress import kept
from bdjax.types import BadInput, Split

PARTS = ("train", "test")
DECODED = "decoded.npz"
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
        # The newest version; what a killed `prepare` leaves is called VERSION.incomplete….
        versions = sorted(
            path for path in (folder / self.tfds).glob("*.*.*") if "incomplete" not in path.name
        )
        if not versions:
            name = registry.name_of(self)
            raise BadInput(f"{name} is not prepared in {folder}: run `bdjax data prepare {name}`")
        return *_decoded(versions[-1]), self.names


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
    folder, manual = base.data_dir(data_dir), Path(manual_dir).expanduser() if manual_dir else None
    if not issubclass(cls, Prepared):
        raise BadInput(f"{name} needs no preparing: load it as it is")
    if manual and not manual.is_dir():
        raise BadInput(f"{manual}: no such folder")

    with own.explained(folder):
        there = list(folder.glob(f"{cls.tfds}/*.*.*"))
    if not there:
        own.beside(folder, folders=(cls.tfds, "downloads"))

    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    (tfds.disable_progress_bar if quiet else tfds.enable_progress_bar)()
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
    pair = [manual / f"{cls.tfds}_{part}.npz" for part in ("train", "test")] if manual else []
    if manual and all(path.is_file() for path in pair):
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
    if manual and (missing := [file for file in cls.files if not (manual / file).is_file()]):
        raise BadInput(
            f"{manual}: lacks {', '.join(missing)}; put them there (or {pair[0].name} and "
            f"{pair[1].name})"
        )
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
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.core.utils import tqdm_utils

    arrays = {}
    for path in folder.iterdir():
        schema.plain_file(path)
    try:
        builder: Any = tfds.builder_from_directory(folder)
        for part in PARTS:
            # TFDS's own decoding warns where there is no OpenCV.
            rows = builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()})
            size, shape = (
                builder.info.splits[part].num_examples,
                builder.info.features["image"].shape,
            )
            image, (label, track) = (
                np.empty((size, *shape), np.uint8),
                np.empty((2, size), np.int32),
            )
            for start in tqdm_utils.tqdm(
                range(0, size, 1000), desc=f"Decoding {part} images", leave=False
            ):
                for i, row in enumerate(
                    rows.__getitems__(range(start, min(start + 1000, size))), start
                ):
                    image[i] = np.asarray(Image.open(io.BytesIO(row["image"]))).reshape(shape)
                    label[i], track[i] = row["label"], row.get("track", -1)
            arrays |= {f"{part}_image": image, f"{part}_label": label}
            if (track >= 0).all():
                arrays[f"{part}_group"] = track
    except Exception as error:  # Whatever damaged records make the reader raise.
        text = " ".join(str(error).split())[:120]
        raise BadInput(
            f"{folder}: damaged ({text}); delete it and run `bdjax data prepare` again"
        ) from error
    return _splits(arrays, folder)
