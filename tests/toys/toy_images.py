"""A data set of a stranger's own."""

import numpy as np

import bdjax
from bdjax.types import Count


@bdjax.dataset("stripes")
class Stripes(bdjax.Source):
    """Noise of 8×8, in which the row of its label is bright."""

    count: Count = bdjax.static(200)

    def read(self):
        rng = np.random.default_rng(self.seed)
        label = np.arange(self.count, dtype=np.int32) % 4
        image = rng.integers(0, 60, (self.count, 8, 8, 1), np.uint8)
        image[np.arange(self.count), label] += 150
        return bdjax.Split(image, label), None, ("first", "second", "third", "fourth")
