"""Weights that Keras 2 wrote, read as plain arrays: no code of the file is ever run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bdjax import own, schema
from bdjax.registry import door
from bdjax.types import BadInput, Model, Variables

LEAVES = {
    "kernel": ("params", "kernel"),
    "bias": ("params", "bias"),
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}


@door
def load_keras_weights(
    path: str | Path, model: Model, rename: Mapping[str, str] = {"output": "logits"}
) -> Variables:
    """The variables of `model` from a Keras `.h5` of weights (or a whole saved model), matched by
    layer name.

    `rename`: Keras name → name here, for layers that are called otherwise. Raises `BadInput` unless
    every array of the model is there, in its shape and finite, and nothing else is.
    """
    path = own.at_home(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file")
    schema.plain_file(path)
    found = _read(path, rename)
    wanted: dict[Any, Any] = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    for leaf in sorted(wanted.keys() | found.keys()):
        name, shape = "/".join(leaf[1:]), tuple(wanted[leaf].shape) if leaf in wanted else None
        if leaf not in found:
            raise BadInput(
                f"{path}: has no weights '{name}' {shape}; it was not saved from this net"
            )
        if shape != found[leaf].shape:
            raise BadInput(
                f"{path}: weights '{name}' have shape {found[leaf].shape}, the model wants "
                f"{shape or 'none'}"
            )
        if not np.isfinite(found[leaf]).all():
            raise BadInput(f"{path}: weights '{name}' are not finite; the file is damaged")
    return unflatten_dict({leaf: jnp.asarray(array) for leaf, array in found.items()})


def _read(path: Path, rename: Mapping[str, str]) -> dict[tuple[str, ...], np.ndarray]:
    import h5py

    parts = {}

    def visit(name: str, item) -> None:  # called for what lies in this file alone
        if isinstance(item, h5py.Dataset) and name.removesuffix(":0").rpartition("/")[2] in LEAVES:
            parts[name] = item

    def place(name: str) -> tuple[str, ...]:
        layer, _, leaf = name.removesuffix(":0").rpartition("/")
        layer = layer.rpartition("/")[2]
        group, leaf = LEAVES[leaf]
        return group, rename.get(layer, layer), leaf

    try:
        with h5py.File(path) as file:
            # A whole model keeps its weights there.
            whole = isinstance(file.get("model_weights", getlink=True), h5py.HardLink)
            root: Any = file["model_weights"] if whole else file
            root.visititems(visit)
            arrays = schema.h5_arrays(path, parts)
            return {place(name): np.asarray(array, np.float32) for name, array in arrays.items()}
    except BadInput:
        raise
    except Exception as error:  # Whatever a damaged file makes HDF5 raise.
        raise BadInput(
            f"{path}: not a Keras .h5 of weights ({' '.join(str(error).split())})"
        ) from error
