"""Your own images: `.npz` and `.h5` files, and folders with a sub-folder per class. Reading runs
nobody's code.
"""

from pathlib import Path
from typing import Annotated

import numpy as np

from bdjax import schema
from bdjax.datasets.base import Source, checked, data_dir
from bdjax.datasets.pictures import picture
from bdjax.registry import dataset, static
from bdjax.types import BadInput, Range, Split

MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
"""How images begin whose names do not say what they are."""
MOST_NAMES = 1_000_000
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read_file(path: str | Path) -> tuple[Split, tuple[str, ...]]:
    """Images, labels and class names of an `.npz` or `.h5` file, by its content: as `image` [N, H,
    W, C], or in the layout of CSAW-HackML as `data` [N, C, H, W].
    """
    path = Path(path).expanduser()
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
        if not self.path:
            raise BadInput(
                "give the file: path=FILE (and test=FILE where the test images have their own)"
            )
        train, names = read_file(self.found(self.path))
        return train, read_file(self.found(self.test))[0] if self.test else None, names

    def watched(self):
        return [self.found(path) for path in (self.path, self.test) if path]

    def found(self, path: str) -> Path:
        """`path` here, or else in the data folder."""
        here, there = Path(path).expanduser(), data_dir(self.data_dir) / path
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
    """


@dataset("folder")
class Folder(Source):
    """A folder of images with a sub-folder per class, resized to `size`×`size`; grey if all of them
    are, else RGB. They are read as a viewer shows them: see `pictures.picture`.

    With sub-folders `train` and `test` these are the two sets; without, a stratified fifth is the
    test set.
    """

    path: str = static("")
    size: Annotated[int, Range(1, 4_096)] = static(32)

    used_if = {"data_dir": None}

    def watched(self):
        return [self.found(self.path)] if self.path else []

    def read(self):
        root = Path(self.path).expanduser()
        if not self.path or not root.is_dir():
            raise BadInput(f"{self.path or 'give the folder: path=DIR'}: no such folder")
        official = (root / "train").is_dir() and (root / "test").is_dir()
        classes = _classes(root / "train" if official else root)
        train = _files(root / "train" if official else root, classes)
        test = _files(root / "test", classes) if official else []
        size = 3 * self.size**2 * len(train + test)
        if size > (most := schema.memory() // 2):
            raise BadInput(
                f"{root}: its images take {schema.gigabytes(size)} at size {self.size}; at most "
                f"{schema.gigabytes(most)} are read here: give a smaller size"
            )
        images = self._decode([path for path, _ in train + test])
        label = np.array([number for _, number in train + test])
        split = checked(root, images, label)
        cut = len(train)
        return split[:cut], split[cut:] if official else None, tuple(classes)

    def _decode(self, paths: list[Path]) -> np.ndarray:
        from PIL import Image

        shape = (self.size, self.size)
        images = [picture(path).resize(shape, Image.Resampling.BILINEAR) for path in paths]
        mode = "L" if {image.mode for image in images} == {"L"} else "RGB"
        return np.stack([np.asarray(image.convert(mode)).reshape(*shape, -1) for image in images])


def _classes(root: Path) -> list[str]:
    names = [
        folder.name
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    if not names:
        raise BadInput(f"{root}: has no sub-folders; give one per class")
    # Folders that are numbers keep their order as numbers.
    return sorted(
        names, key=lambda name: (int(name), "") if name.isdecimal() else (float("inf"), name)
    )


def _is_image(path: Path) -> bool:
    """Whether a file is taken for an image: by its name or, whatever its name, by its content."""
    if path.suffix.lower() in IMAGES:
        schema.plain_file(path)  # a pipe would never end
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(12)
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def _files(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
    if unknown := set(_classes(root)) - set(classes):
        raise BadInput(f"{root}: class '{min(unknown)}' has no training images")
    found = []
    for number, name in enumerate(classes):
        paths = sorted(path for path in (root / name).glob("*") if _is_image(path))
        if not paths:
            raise BadInput(f"{root / name}: has no image")
        found += [(path, number) for path in paths]
    return found
