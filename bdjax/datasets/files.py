"""Your own images: `.npz` and `.h5` files, and folders with a sub-folder per class. Reading runs
nobody's code.
"""

from pathlib import Path
from typing import Annotated

import numpy as np

from bdjax.datasets.base import Source, checked, data_dir
from bdjax.registry import dataset, static
from bdjax.types import BadInput, Range, Split

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read_file(path: str | Path) -> tuple[Split, tuple[str, ...]]:
    """Images, labels and class names of an `.npz` or `.h5` file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        arrays = _h5(path) if path.suffix == ".h5" else _npz(path)
    except Exception as error:  # Whatever a damaged file makes a parser raise.
        if "Object arrays" in str(error):
            raise BadInput(
                f"{path}: holds pickled objects, which bdjax never loads; save plain arrays"
            ) from error
        raise BadInput(
            f"{path}: damaged or not in its format ({' '.join(str(error).split())})"
        ) from error
    if missing := [key for key in ("image", "label") if key not in arrays]:
        image = "`data` [N, C, H, W]" if path.suffix == ".h5" else "`image` [N, H, W, C]"
        raise BadInput(f"{path}: has no {missing[0]}; give {image} and `label` [N]")
    names = arrays.get("names", np.zeros(0, str))
    if names.dtype.kind != "U" or names.ndim != 1:
        raise BadInput(f"{path}: names are not a list of strings")
    group = arrays.get("track", arrays.get("group"))
    return checked(path, arrays["image"], arrays["label"], group), tuple(names.tolist())


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {
            k: file[k] for k in ("image", "label", "names", "track", "group") if k in file.files
        }


def _h5(path: Path) -> dict[str, np.ndarray]:
    import h5py

    with h5py.File(path) as file:
        arrays = {k: np.asarray(file[k]) for k in ("data", "label") if k in file}
    if "data" in arrays:  # The CSAW layout is [N, C, H, W]; `checked` refuses whatever is not 4-D.
        data = arrays.pop("data")
        arrays["image"] = np.moveaxis(data, 1, -1) if data.ndim == 4 else data
    return arrays


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
    are, else RGB.

    With sub-folders `train` and `test` these are the two sets; without, a stratified fifth is the
    test set.
    """

    path: str = static("")
    size: Annotated[int, Range(1, 4_096)] = static(32)

    used_if = {"data_dir": None}

    def read(self):
        root = Path(self.path).expanduser()
        if not self.path or not root.is_dir():
            raise BadInput(f"{self.path or 'give the folder: path=DIR'}: no such folder")
        official = (root / "train").is_dir() and (root / "test").is_dir()
        classes = _classes(root / "train" if official else root)
        train = _files(root / "train" if official else root, classes)
        test = _files(root / "test", classes) if official else []
        images = self._decode([path for path, _ in train + test])
        label = np.array([number for _, number in train + test])
        split = checked(root, images, label)
        cut = len(train)
        return split[:cut], split[cut:] if official else None, tuple(classes)

    def _decode(self, paths: list[Path]) -> np.ndarray:
        from PIL import Image

        images, shape = [], (self.size, self.size)
        for path in paths:
            try:
                with Image.open(path) as file:
                    if file.mode[0] in "IF":
                        raise ValueError("more than 8 bits a pixel: convert it to 8")
                    image = file.convert("L" if file.mode in ("1", "L") else "RGB")
                    images.append(image.resize(shape, Image.Resampling.BILINEAR))
            except Exception as error:  # Whatever a damaged image makes PIL raise.
                raise BadInput(f"{path}: cannot be read as an image ({error})") from error
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


def _files(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
    if unknown := set(_classes(root)) - set(classes):
        raise BadInput(f"{root}: class '{min(unknown)}' has no training images")
    found = []
    for number, name in enumerate(classes):
        paths = sorted(path for path in (root / name).glob("*") if path.suffix.lower() in IMAGES)
        if not paths:
            raise BadInput(f"{root / name}: has no image")
        found += [(path, number) for path in paths]
    return found
