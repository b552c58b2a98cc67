"""Small nets, one with a known backdoor neuron, and the images that it reads, for tests whose
answer is known.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import relu

from bdjax import cli
from bdjax.models.layers import Net, batch_norm, build, conv, dense, max_pool, site
from bdjax.registry import pytree
from bdjax.types import BadInput, Split

TARGET = 2


@pytree
class Normed(Net):
    """The smallest net with a convolution, BatchNorm and pooling."""

    def layers(self, x, train, classes):
        x = batch_norm(conv(x, 8, 3, "conv"), train, "norm")
        return dense(max_pool(site("conv_last", relu(x)), 4), classes, "logits")


@pytree
class Units(Net):
    """Six hidden units on the pixels."""

    def layers(self, x, train, classes):
        return dense(site("penultimate", relu(dense(x, 6, "dense"))), classes, "logits")


def lit_rows(value: float) -> Split:
    """40 images of 8×8 in 4 classes: the row of its label is lit at `value`, the rest is black."""
    label = np.arange(40, dtype=np.int32) % 4
    image = np.zeros((40, 8, 8, 1), np.float32)
    image[np.arange(40), label] = value
    return Split(jnp.asarray(image), jnp.asarray(label))


def units(*, threshold: float = 0.0, lift: float = 1.0):
    """Units 0 … 3 count the lit pixels of one row each; unit 5 fires at 10 − `threshold` on the
    white corner and lifts label 2 by `lift` times that.
    """
    kernel = np.zeros((8, 8, 6), np.float32)
    for k in range(4):
        kernel[k, :, k] = 1
    kernel[:4, :, 4] = 0.1
    kernel[7, 7, 5] = 10
    head = np.eye(6, 4, dtype=np.float32)
    head[5, TARGET] = lift
    params = {
        "dense": {
            "kernel": jnp.asarray(kernel.reshape(64, 6)),
            "bias": jnp.zeros(6).at[5].set(-threshold),
        },
        "logits": {"kernel": jnp.asarray(head), "bias": jnp.zeros(4)},
    }
    return build(Units(), (8, 8, 1), 4), {"params": params}, lit_rows(0.5)


def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` uint8 images that `units` tells apart, noise on them, and their labels."""
    draw, label = np.random.default_rng(0), np.arange(count) % 4
    image = np.zeros((count, 8, 8, 1))
    image[np.arange(count), label] = draw.integers(90, 160, (count, 1, 1))
    return np.uint8(image + draw.integers(0, 20, image.shape)), label


def row(run: str, **fields) -> dict:
    """A finished row of a results file, as short as one may be."""
    return {
        "run": run, "table": "T", "row": "R", "metrics": {},
        "seconds": {"compile": 0.0, "run": 1.0}, **fields,
    }  # fmt: skip


def broken(found: dict, words: str):
    """Keeps a toy method with a fault in `found`, with the words in which it is to be told."""

    def decorate(cls):
        made = found[cls.__name__] = pytree(cls), words
        return made[0]

    return decorate


def found_out(check, cls: type, words: str) -> None:
    """`check` tells of a toy's fault in these words, and names it."""
    with pytest.raises((AssertionError, BadInput), match=words) as error:
        check(cls())
    assert cls.__name__ in str(error.value)


def command(capsys, *args: str) -> tuple[int, str, str]:
    """Runs a command: its exit code, standard output, standard error."""
    try:
        cli.main(list(args))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()
