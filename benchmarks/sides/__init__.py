"""The libraries that `python -m benchmarks peers` compares: a module each, run in a process of its
own, by the interpreter that has it. A module has `known() -> {"versions": …, "nets": {net: {array:
shape}}}`, and for each job a function `(given: Given, **settings)` that prepares it and returns
what is timed: a call without arguments that returns its results.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Given(NamedTuple):
    """What a job is given: `data`, the arrays of images and labels, uint8 NHWC; `weights`, by the
    names that the library's own net has; `folder`, to write into.
    """

    data: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    folder: Path


def given(folder: Path, name: str, net: str) -> Given:
    """What stands in the folder for the library `name` and `net`."""

    def arrays(file: str) -> dict[str, np.ndarray]:
        with np.load(folder / file) as found:
            return dict(found)

    return Given(arrays(f"{net}.npz"), arrays(f"{net}-{name}.npz"), folder)


def answers() -> "Answers":
    """Where this process answers; what the libraries print goes to the errors from now on."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return Answers(stream)


class Answers:
    """A line of JSON an answer."""

    def __init__(self, stream):
        self.stream = stream

    def tell(self, **found) -> None:
        print(json.dumps(found, default=float), file=self.stream, flush=True)


def rates(suspects, poisoned) -> dict[str, float]:
    """`recall` of the poisoned rows and `fpr` of the others; `suspects, poisoned: [N]` bool."""
    suspects, poisoned = np.asarray(suspects, bool), np.asarray(poisoned, bool)
    return {"recall": suspects[poisoned].mean(), "fpr": suspects[~poisoned].mean()}


def anomaly(norms) -> float:
    """|norm − median| / (1.4826 · MAD) of the smallest norm, where a library gives norms alone."""
    norms = np.asarray(norms, float)
    gap = np.abs(norms - np.median(norms))
    return gap[norms.argmin()] / (1.4826 * np.median(gap))
