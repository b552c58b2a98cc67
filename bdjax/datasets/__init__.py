"""Where images come from: an embedded sample, public sets prepared once, and your own files."""

from bdjax import registry
from bdjax.datasets.base import data_dir, fingerprint
from bdjax.datasets.prepared import prepare
from bdjax.types import Dataset

__all__ = ["data_dir", "fingerprint", "load", "prepare"]


def load(name: str = "fashion-mnist-sample", **fields) -> Dataset:
    """The registered data set `name` in memory: `load("npz", path="mine.npz")`."""
    return registry.make("dataset", name, **fields).load()
