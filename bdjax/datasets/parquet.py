"""Parquet files of images, in the layout of HuggingFace: reading runs nobody's code."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdjax import schema
from bdjax.datasets.base import checked, readable
from bdjax.datasets.files import TESTS, Table, column, in_order
from bdjax.datasets.pictures import decoded, stacked
from bdjax.registry import dataset, static
from bdjax.types import BadInput, Split

HINT = "save it again"
MOST_ROWS = 256
"""Rows that are unpacked at a time; fewer where they may be long."""


@dataset("parquet")
class Parquet(Table):
    """Images in Parquet files, as HuggingFace has them: a column of the bytes of image files, or of
    {bytes, path}, and one of labels, whole numbers or names. They are read as a viewer shows them:
    see `pictures.picture`. Names of classes come from the file's own description, where it has one.

    `path`: a file, or a folder of them (or with a sub-folder `data`): the files, or sub-folders,
    `train…` are the training set and `test…` (else `validation…`, `val…`) the test set; where no
    file is called so, all are the training set. Without a test set, and without `test`, a
    stratified fifth of the training set is one. `image`, `label`: the columns, where several could
    be; `size`: resize the images to `size`×`size` (None: all of one size, as they are).
    """

    test: str | None = static(None)

    used_if = {"data_dir": None}

    def watched(self):
        return [self.found(path) for path in (self.path, self.test) if path]

    def read(self):
        train, test = shards(self.found(self.path))
        if self.test is not None:
            own = shards(self.found(self.test))
            test = own[1] or own[0]
        parts = [[_open(path, self) for path in files] for files in (train, test) if files]
        names = _names(parts)
        splits = [self._split(part, names) for part in parts]
        return splits[0], splits[1] if test else None, names or ()

    def _split(self, parts: list["_Part"], names: tuple[str, ...] | None) -> Split:
        where, count = parts[0].path, sum(part.rows for part in parts)
        if count < 1:
            raise BadInput(f"{where}: has no rows")
        labels: list[Any] = []

        def pictures() -> Iterator[Any]:
            for part in parts:
                for i, (raw, label) in enumerate(_rows(part)):
                    place = f"{part.path}: row {i}"
                    if raw is None:
                        raise BadInput(
                            f"{place}: has no image in it; save the bytes of the images, not their "
                            "paths"
                        )
                    if label is None:
                        raise BadInput(f"{place}: has no label")
                    labels.append(label)
                    yield decoded(place, io.BytesIO(raw))

        images = stacked(where, pictures(), count, self.size)
        if isinstance(labels[0], str):
            number = {name: k for k, name in enumerate(names or ())}
            if unknown := next((name for name in labels if name not in number), None):
                raise BadInput(f"{where}: class '{unknown[:60]}' has no training images")
            labels = [number[name] for name in labels]
        return checked(where, images, np.asarray(labels))


class _Part(NamedTuple):
    """A file, opened: its columns, the names that it gives to labels (None: to none), its rows, and
    how many are unpacked at a time.
    """

    path: Path
    file: Any
    image: str
    nested: bool
    label: str
    names: tuple[str, ...] | None
    words: bool
    rows: int
    batch: int


def is_parquet(path: Path) -> bool:
    """Whether a plain file is Parquet, by its content."""
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def holds_parquet(folder: Path) -> bool:
    """Whether the folder is one of Parquet files."""
    return bool(_groups(folder) or _groups(folder / "data"))


def shards(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of the training and of the test set at `path`, a file or a folder."""
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder")
    groups = _groups(path) or _groups(path / "data")
    test = next((groups[name] for name in TESTS if name in groups), [])
    if train := groups.get("train") or ([] if test else groups.get("", [])):
        return train, test
    raise BadInput(f"{path}: has no Parquet files of a training set: call them train-….parquet")


def _groups(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files in `folder` by the set that they, or the sub-folder, are called by."""
    groups: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        known = re.match(f"({'|'.join(('train', *TESTS))})([^a-zA-Z]|$)", entry.name)
        inside = sorted(entry.iterdir()) if known and entry.is_dir() else [entry]
        if files := [file for file in inside if file.is_file() and is_parquet(file)]:
            groups.setdefault(known[1] if known else "", []).extend(files)
    return groups


def _open(path: Path, source: Table) -> _Part:
    schema.plain_file(path)
    with readable(path, HINT):
        return _described(path, source)


def _described(path: Path, source: Table) -> _Part:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, page_checksum_verification=True)
    columns = file.schema_arrow
    able: dict[str, list[str]] = {"image": [], "label": []}
    nested, words = set(), set()
    for field in columns:
        kind = field.type
        inner = kind.field("bytes").type if _has_bytes(kind) else kind
        if columns.names.count(field.name) > 1 or "." in field.name:
            continue  # nobody could say which is meant
        if pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
            able["image"].append(field.name)
            nested |= {field.name} if inner is not kind else set()
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_string(value) or pa.types.is_large_string(value):
            words.add(field.name)
        if field.name in words or pa.types.is_integer(value):
            able["label"].append(field.name)
    said = _features(columns.metadata or {})

    def chosen(what: str, wanted: str | None, kind: str) -> str:
        likely = [n for n in able[what] if said.get(n, {}).get("_type") == kind]
        # Names are of classes where nothing else could be a label.
        numbers = [n for n in able[what] if n not in words] if what == "label" else []
        return column(path, what, wanted, able[what], likely or numbers)

    image = chosen("image", source.image, "Image")
    label = chosen("label", source.label, "ClassLabel")
    names = said.get(label, {}).get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = None
    # Of a single column nothing is asked: its description, where damaged, ends the process.
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    sizes = [max(group.total_byte_size, 1) for group in groups]
    schema.fits(path, sum(sizes))
    rows = file.metadata.num_rows
    schema.fits(path, rows)  # a value may take no room in the file
    batch = int(np.clip(schema.LARGE // max(sizes, default=1), 1, MOST_ROWS))
    names = tuple(names) if names else None
    return _Part(path, file, image, image in nested, label, names, label in words, rows, batch)


def _has_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What HuggingFace says of the columns; nothing where it is not understood."""
    try:
        said = schema.parse(metadata.get(b"huggingface", b"{}")[: schema.SMALL])
        features = said["info"]["features"]
        return {name: about for name, about in features.items() if isinstance(about, dict)}
    except (BadInput, KeyError, TypeError, AttributeError):
        return {}


def _rows(part: _Part) -> Iterator[tuple[bytes | None, Any]]:
    """The image's bytes and the label of each row."""
    read = [f"{part.image}.bytes" if part.nested else part.image, part.label]
    with readable(part.path, HINT):
        for batch in part.file.iter_batches(part.batch, columns=read, use_threads=False):
            images = batch.column(part.image)
            if part.nested:
                images = images.flatten()[0]  # None where the struct itself is
            yield from zip(images.to_pylist(), batch.column(part.label).to_pylist(), strict=True)


def _names(parts: list[list[_Part]]) -> tuple[str, ...] | None:
    """The names of the classes; None where labels are numbers without names."""
    first = parts[0][0]
    for part in (part for files in parts for part in files):
        if (part.words, part.names) != (first.words, first.names):
            raise BadInput(f"{part.path}: its labels are not those of {first.path}")
    if not first.words:
        return first.names
    found = set()
    for part in parts[0]:
        with readable(part.path, HINT):
            for batch in part.file.iter_batches(10_000, columns=[part.label], use_threads=False):
                found.update(batch.column(0).to_pylist())
    return tuple(in_order(name for name in found if name is not None))
