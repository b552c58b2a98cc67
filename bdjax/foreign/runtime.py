"""The logits of a file by the program that it was written for, where that is installed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import metrics
from bdjax.foreign.graph import placed, plain
from bdjax.foreign.origin import Format
from bdjax.types import BadInput

Outputs = Callable[[np.ndarray], np.ndarray]
"""`outputs(x: [N, H, W, C])`, pixels as the net takes them: what the net gives, `[N, K]`."""


def original(path: Path, raw: bytes, kind: Format, layout: str) -> tuple[str, Outputs] | None:
    """The name of the runtime and its outputs; None where there is none, or it cannot run the
    file.
    """
    try:
        if kind == "onnx":
            return _onnxruntime(raw, layout)
        if kind in ("keras", "h5"):
            return _keras(path, layout)
    except ImportError:
        return None
    return None


def _onnxruntime(raw: bytes, layout: str) -> tuple[str, Outputs]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(raw, options, ["CPUExecutionProvider"])
    except Exception as error:
        raise BadInput(f"onnxruntime refuses it: {' '.join(str(error).split())[:200]}") from error
    (given,) = session.get_inputs()
    names = {
        "tensor(uint8)": np.uint8, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    }  # fmt: skip
    types = [one.type for one in session.get_outputs()]  # the reader leaves class numbers away
    taken = next((i for i, one in enumerate(types) if "int" not in one and "bool" not in one), 0)
    fixed = given.shape[0] if isinstance(given.shape[0], int) else None

    def outputs(x: np.ndarray) -> np.ndarray:
        x = plain(placed(x, layout))
        kind = names.get(given.type, np.float32)
        x = np.ascontiguousarray(np.rint(x) if kind is np.uint8 else x, kind)
        size = fixed or len(x)
        parts = []
        for i in range(0, len(x), size):
            part = x[i : i + size]
            full = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
            parts.append(np.asarray(session.run(None, {given.name: full})[taken])[: len(part)])
        return np.concatenate(parts).reshape(len(x), -1)

    return f"onnxruntime {onnxruntime.__version__}", outputs


def keras() -> Any:
    """Keras, on JAX unless the user has chosen another backend."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    return keras


def _keras(path: Path, layout: str) -> tuple[str, Outputs] | None:
    program = keras()
    try:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            # nothing but standard layers is in it: the reader saw to that
            model: Any = program.saving.load_model(path, compile=False, safe_mode=True)
    except Exception:  # a file that this Keras cannot load proves nothing
        return None

    def outputs(x: np.ndarray) -> np.ndarray:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            # its maps are NCHW in the graph alone
            made = model(x if layout == "NCHW" else plain(placed(x, layout)), training=False)
        while isinstance(made, (dict, list, tuple)):  # the reader takes the first
            made = next(iter(made.values() if isinstance(made, dict) else made))
        return np.asarray(made).reshape(len(x), -1)

    return f"keras {program.__version__}", outputs


ROUNDING = 1e-6
"""How far logarithms of a softmax in float32 may be apart: all that is left of a net's logits where
its probabilities are nearly alike, as before any training.
"""


def difference(ours: np.ndarray, theirs: np.ndarray, last: str, half: bool = False) -> float:
    """The largest difference of logits `[N, K]` over the largest |logit|; of outputs after a
    softmax or a sigmoid, `last`, those of their logarithms, which differ by a constant a row.
    Those that are so near 0 or 1 that they are mere rounding, earlier with `half`, are left out.
    """
    theirs = theirs.astype(np.float32)
    least = (1e-2 if last == "Sigmoid" else 1e-4) if half else 1e-6
    if last == "Sigmoid" or theirs.shape[1] == 1:
        ours = ours[:, -theirs.shape[1] :]
        if last == "Sigmoid":
            kept = (theirs > least) & (theirs < 1 - least)
            safe = np.clip(theirs, least, 1 - least)
            ours, theirs = (np.where(kept, one, 0) for one in (ours, np.log(safe / (1 - safe))))
    elif last:
        kept = theirs > (-14 if last == "LogSoftmax" else least)
        theirs = theirs if last == "LogSoftmax" else np.log(np.maximum(theirs, least))
        best = np.asarray(metrics.labels(jnp.asarray(theirs)))[:, None]
        ours, theirs = (
            np.where(kept, one - np.take_along_axis(one, best, 1), 0) for one in (ours, theirs)
        )
    if ours.shape != theirs.shape:
        raise BadInput(f"the original gives outputs of shape {list(theirs.shape)}")
    error = np.maximum(np.abs(ours - theirs) - (ROUNDING if last else 0), 0)
    return float(error.max() / max(np.abs(theirs).max(), 1e-6))
