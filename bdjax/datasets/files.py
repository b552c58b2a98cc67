"""Your own images: `.npz` and `.h5` files, folders with a sub-folder per class, and what tables of
images share. Reading runs nobody's code.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from bdjax import own, schema
from bdjax.datasets.base import Source, checked, data_dir
from bdjax.datasets.pictures import picture, stacked
from bdjax.registry import dataset, pytree, static
from bdjax.types import BadInput, Range, Split

Format = Literal["npz", "folder", "parquet"]
"""How a data set is written."""
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
"""How images begin whose names do not say what they are."""
MOST_NAMES = 1_000_000
TESTS = ("test", "validation", "valid", "val")
"""How sub-folders and files of a test set are called: the first that is there is taken."""
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read_file(path: str | Path) -> tuple[Split, tuple[str, ...]]:
    """Images, labels and class names of an `.npz` or `.h5` file, by its content: as `image` [N, H,
    W, C], or in the layout of CSAW-HackML as `data` [N, C, H, W].
    """
    path = own.at_home(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file")
    schema.plain_file(path)
    if schema.is_h5(path):
        arrays = schema.read_arrays(path, "h5", ("data", "label"))
        data = arrays.pop("data")  # `checked` refuses whatever is not 4-D
        arrays["image"] = np.moveaxis(data, 1, -1) if data.ndim == 4 else data
    else:
        arrays = schema.read_arrays(path, "npz", ("image", "label", "names", "track", "group"))
    names = arrays.get("names", np.zeros(0, str))
    if names.dtype.kind != "U" or names.ndim != 1 or len(names) > MOST_NAMES:
        raise BadInput(f"{path}: names are not a list of at most {MOST_NAMES} strings")
    group = arrays.get("track", arrays.get("group"))
    return checked(path, arrays["image"], arrays["label"], group), tuple(names.tolist())


@dataset("npz")
class Npz(Source):
    """Your own `.npz`: `image` uint8 [N, H, W, C] and `label`; also `names`, and `track` or
    `group`, where it has them.

    Without a file `test`, a stratified fifth of `path` is the test set. A relative path that does
    not exist here is looked for in the data folder.
    """

    path: str = static("")
    test: str | None = static(None)

    def read(self):
        train, names = read_file(self.found(self.path))
        return train, read_file(self.found(self.test))[0] if self.test else None, names

    def watched(self):
        return [self.found(path) for path in (self.path, self.test) if path]

    def found(self, path: str) -> Path:
        """`path` here, or else in the data folder."""
        here, there = super().found(path), data_dir(self.data_dir) / path
        return there if there.is_file() and not here.is_file() else here


@dataset("h5")
class H5(Npz):
    """Your own `.h5` in the layout of CSAW-HackML: `data` [N, C, H, W] from 0 to 255,
    and `label`.
    """


@dataset("faces")
class Faces(Npz):
    """Aligned faces, 55×47×3, as `.h5` or `.npz` (Wolf et al., 2011); the file says how many people
    there are.

    Reference: Lior Wolf, Tal Hassner and Itay Maoz, "Face Recognition in Unconstrained Videos with
    Matched Background Similarity", In IEEE Conference on Computer Vision and Pattern Recognition.
    """

    def read(self):
        train, test, names = super().read()
        if train.image.shape[1:] != (55, 47, 3):
            raise BadInput(
                f"{self.path}: images are {train.image.shape[1:]}; aligned faces are (55, 47, 3)"
            )
        return train, test, names


@dataset("chest-xray")
class ChestXray(Npz):
    """Chest X-rays in three classes, as `.npz` (Ozturk et al., 2020, DarkCovidNet).

    The classes come from different hospitals and machines, so a net can learn the source instead of
    the disease: a high accuracy here says nothing about diagnosis.

    Reference: Tulin Ozturk, Muhammed Talo, Eylul Azra Yildirim, Ulas Baran Baloglu, Ozal Yildirim
    and U. Rajendra Acharya, "Automated Detection of COVID-19 Cases Using Deep Neural Networks with
    X-ray Images", Computers in Biology and Medicine.
    """


@dataset("folder")
class Folder(Source):
    """A folder of images with a sub-folder per class, resized to `size`×`size` (None: all of one
    size, as they are); grey if all of them are, else RGB. They are read as a viewer shows them: see
    `pictures.picture`.

    With sub-folders `train` and `test` (else `validation`, `valid`, `val`) these are the two sets,
    unless `test` names another folder; without, or with one of them alone, a stratified fifth is
    the test set.
    """

    path: str = static("")
    test: str | None = static(None)
    size: Annotated[int, Range(1, 4_096)] | None = static(32)

    used_if = {"data_dir": None}

    def watched(self):
        return [self.found(path) for path in (self.path, self.test) if path]

    def read(self):
        train, test, classes = self._listed()
        both = train + test
        images = stacked(self.path, (picture(path) for path, _ in both), len(both), self.size)
        split = checked(self.path, images, np.array([number for _, number in both]))
        cut = len(train)
        return split[:cut], split[cut:] if test else None, tuple(classes)

    def files(self) -> list[str]:
        """The file of each training row, within the folder."""
        root = self.found(self.path)
        return [path.relative_to(root).as_posix() for path, _ in self._listed()[0]]

    def _listed(self) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], list[str]]:
        """The files of both sets with their labels, and the names of the classes."""
        root = self.found(self.path)
        if not root.is_dir():
            raise BadInput(f"{self.path}: no such folder")
        other = None if self.test is None else self.found(self.test)
        if other is not None and not other.is_dir():
            raise BadInput(f"{self.test}: no such folder")
        if (root / "train").is_dir():
            beside = (root / name for name in TESTS)
            if other := other or next((path for path in beside if path.is_dir()), None):
                root = root / "train"
        classes = _classes(root)
        if len(classes) == 1 and classes[0] in ("train", *TESTS):  # one class would be none
            root = root / classes[0]
            classes = _classes(root)
        train, test = _files(root, classes), []
        for name, paths in train.items():
            if not paths:
                raise BadInput(f"{root / name}: has no image")
        train = [(path, classes.index(name)) for name, paths in train.items() for path in paths]
        if other is not None:
            found = _files(other, classes)
            test = [(path, classes.index(name)) for name, paths in found.items() for path in paths]
            if not test:
                raise BadInput(f"{other}: has no image")
        return train, test, classes


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes as they are numbered: numbers in their order, then words."""
    return sorted(
        names, key=lambda name: (int(name), "") if name.isdecimal() else (float("inf"), name)
    )


def _classes(root: Path) -> list[str]:
    names = [
        folder.name
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    if not names:
        raise BadInput(f"{root}: has no sub-folders; give one per class")
    return in_order(names)


def is_image(path: Path) -> bool:
    """Whether a file is taken for an image: by its name or, whatever its name, by its content."""
    if path.suffix.lower() in IMAGES:
        schema.plain_file(path)  # a pipe would never end
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(12)
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def _files(root: Path, classes: list[str]) -> dict[str, list[Path]]:
    if unknown := set(_classes(root)) - set(classes):
        raise BadInput(f"{root}: class '{min(unknown)}' has no training images")
    return {
        name: sorted(path for path in (root / name).glob("*") if is_image(path)) for name in classes
    }


# --- Tables: a row an image, a column the images, a column the labels ---


@pytree
class Table(Source):
    """Rows of images and labels. `image`, `label`: the columns, where it does not go without saying
    which; `size`: resize the images to `size`×`size` (None: all of one size, as they are).
    """

    path: str = static("")
    image: str | None = static(None)
    label: str | None = static(None)
    size: Annotated[int, Range(1, 4_096)] | None = static(None)


def sized(source: Source, shape: tuple[int, int, int]) -> Source:
    """The source with its images of the `shape` that a net takes, where their size is a choice."""
    if not isinstance(source, (Folder, Table)):
        return source
    return dataclasses.replace(source, size=shape[0] if shape[0] == shape[1] else None)


def column(
    where: object, field: str, wanted: str | None, able: Sequence[str], likely: Sequence[str]
) -> str:
    """The column of the images or labels (`field`): the one `wanted`, of those that are `able` to
    hold them; else the only `likely` or able one, or the one that is called so.
    """
    if wanted is not None:
        if wanted in able:
            return wanted
        there = f"; those that do: {', '.join(able)}" if able else ""
        raise BadInput(f"{where}: no column '{wanted[:60]}' holds {field}s{there}"[:300])
    found = likely or able
    found = found if len(found) == 1 else [name for name in USUAL[field] if name in found]
    if found:
        return found[0]
    if not able:
        raise BadInput(f"{where}: no column holds {field}s; {NEEDED[field]}")
    names = ", ".join(able)[:150]
    raise BadInput(f"{where}: several columns could be the {field}s ({names}): give {field}=NAME")


USUAL = {"image": ("image", "img"), "label": ("label", "labels")}
NEEDED = {
    "image": "give the bytes of image files, or {bytes, path}",
    "label": "give whole numbers or names",
}
