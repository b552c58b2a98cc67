"""A part of Fashion-MNIST that comes with bdjax: everything runs without a network.

`python -m bdjax.datasets.sample DIR` made it from the four original files in DIR.
"""

import sys
from pathlib import Path

import numpy as np

from bdjax.datasets.base import Source, pick
from bdjax.datasets.files import read_file
from bdjax.datasets.public import FashionMnist
from bdjax.registry import dataset

HERE = Path(__file__).parent


@dataset("fashion-mnist-sample")
class Sample(Source):
    """A stratified part of Fashion-MNIST, 10,000 / 2,000 images, embedded (Xiao et al., 2017,
    arXiv:1708.07747).
    """

    used_if = {"data_dir": None}

    def read(self):
        train, test = (
            read_file(HERE / f"fashion_mnist_{part}.npz")[0] for part in ("train", "test")
        )
        return train, test, FashionMnist.names


if __name__ == "__main__":
    originals = FashionMnist.parse(*(Path(sys.argv[1]) / file for file in FashionMnist.files))
    for part, split, size in zip(("train", "test"), originals, (10_000, 2_000), strict=True):
        rows = pick(np.asarray(split.label), size, seed=0)
        rows = rows[np.argsort(split.label[rows], kind="stable")]  # Like next to like packs better.
        arrays = {"image": split.image[rows], "label": split.label[rows].astype(np.uint8)}
        np.savez_compressed(HERE / f"fashion_mnist_{part}.npz", **arrays)
