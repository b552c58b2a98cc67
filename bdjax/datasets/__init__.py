"""Where images come from: an embedded sample, public sets prepared once, and your own files."""

import os
from pathlib import Path

from bdjax import own, registry, schema
from bdjax.datasets.base import Source, data_dir, fingerprint
from bdjax.datasets.files import TESTS, is_image
from bdjax.datasets.parquet import holds_parquet, is_parquet
from bdjax.datasets.prepared import prepare, versions
from bdjax.types import BadInput, Dataset

__all__ = ["data_dir", "fingerprint", "load", "prepare", "source"]


@registry.door
def load(name: str = "fashion-mnist-sample", **fields) -> Dataset:
    """The data set `name` in memory, see `source`: `load("mine.npz")`."""
    return source(name, **fields).load()


@registry.door
def source(word: str | Path | Source, **fields) -> Source:
    """The data set that `word` names, as every command takes it: NAME or NAME:PRESET of a
    registered one, a path, whose kind is known by its content, `tfds:NAME`, or the name of any set
    that TFDS has prepared in the data folder. `fields` are those of its source. A source is itself.
    """
    if isinstance(word, Source):
        return word
    word = str(word)
    name, colon, rest = word.partition(":")
    if name == "tfds" and colon:
        return registry.make("dataset", "tfds", **{"path": rest} | fields)
    if name in {entry.name for entry in registry.entries("dataset")}:
        return registry.make("dataset", name, rest if colon else None, **fields)
    path = own.at_home(word)
    if own.nameable(path) and os.path.lexists(path):
        kind, found = _kind(path)
        return registry.make("dataset", kind, **found | fields)
    if versions(data_dir(fields.get("data_dir")) / word):
        return registry.make("dataset", "tfds", **{"path": word} | fields)
    if os.path.basename(word) != word or path.suffix:
        raise BadInput(f"{word}: no such file or folder")
    return registry.make("dataset", name, **fields)  # says which name is near


def word(source: Source) -> str:
    """The word that names `source` on a command line, as far as one does."""
    name, path = registry.name_of(source) or "IMAGES", getattr(source, "path", "")
    return f"tfds:{path}" if name == "tfds" else path or name


def _kind(path: Path) -> tuple[str, dict[str, str]]:
    """The registered source that reads what is at `path`, and where it finds it."""
    where = {"path": str(path)}
    with own.explained(path, "read"):
        if not path.is_dir():
            schema.plain_file(path)
            if (kind := _file(path)) is not None:
                return kind, where
            if is_image(path):
                raise BadInput(f"{path}: is one image: give a folder with a sub-folder per class")
            raise BadInput(f"{path}: is neither .npz, .h5 nor Parquet, nor a folder of images")
        if versions(path):
            return "tfds", where
        if holds_parquet(path):
            return "parquet", where
        files = {file.stem: file for file in sorted(path.iterdir()) if file.is_file()}
        kinds = {name: kind for name in ("train", *TESTS) if (kind := _array_file(files.get(name)))}
        if "train" in kinds:
            test = next((name for name in TESTS if name in kinds), None)
            where = {"path": str(files["train"])} | ({"test": str(files[test])} if test else {})
            return kinds["train"], where
    return "folder", where


def _file(path: Path) -> str | None:
    if schema.is_h5(path):
        return "h5"
    with open(path, "rb") as file:
        zipped = file.read(4) in (b"PK\3\4", b"PK\5\6")
    return "npz" if zipped else "parquet" if is_parquet(path) else None


def _array_file(path: Path | None) -> str | None:
    kind = None if path is None else _file(path)
    return kind if kind in ("npz", "h5") else None
