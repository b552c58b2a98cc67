"""What a net takes for pixels: their range, mean and deviation, and the order of the channels."""

import re
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp

from bdjax.registry import pytree, static
from bdjax.types import BadInput, Range

NORMS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "mnist": ((0.1307,), (0.3081,)),
}
"""Mean and deviation of the channels of well-known sets, of pixels in [0, 1]."""
WORDS = (
    "0-1, 0-255, -1-1, " + ", ".join(NORMS) + " or 'mean=…,… std=…,…', with bgr for channels in "
    "the order of OpenCV, such as '0-255 bgr mean=104,117,123'"
)


_NUMBER = r"-?[\d.]+(e-?\d+)?"
_Shift = Annotated[float, Range(-1e6, 1e6)]
_Scale = Annotated[float, Range(1e-6, 1e6)]


@pytree
class Pixels:
    """From pixels in [0, 1], RGB, to those that the net takes: `(x · scale − mean) / std`, of the
    channels in reverse order with `bgr`. `mean`, `std`: of each channel of the net's order, one for
    all, or none.
    """

    scale: _Scale = static(1.0)
    mean: tuple[_Shift, ...] = static(())
    std: tuple[_Scale, ...] = static(())
    bgr: bool = static(False)

    def of(self, x: jax.Array) -> jax.Array:
        """`x: [B, H, W, C]` as the net takes it."""
        x = x[..., ::-1] if self.bgr else x
        x = x * self.scale if self.scale != 1 else x
        x = x - _channels(self.mean) if self.mean else x
        return x / _channels(self.std) if self.std else x

    def check(self, channels: int) -> None:
        """Raises `BadInput` where images of `channels` channels cannot be taken so."""
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, 1, channels):
                raise BadInput(
                    f"--preprocess: {what} has {len(values)} values, the images {channels} channels"
                )
        if self.bgr and channels != 3:
            raise BadInput(f"--preprocess: bgr is for 3 channels, the images have {channels}")

    def words(self) -> str:
        """As `--preprocess` takes it."""
        for name, (mean, std) in NORMS.items():
            if (self.scale, self.mean, self.std) == (1, mean, std):
                return name + " bgr" * self.bgr
        if self == Pixels(255, (127.5,), (127.5,), self.bgr):
            return "-1-1" + " bgr" * self.bgr
        parts = ["0-1" if self.scale == 1 else f"0-{self.scale:g}"] + ["bgr"] * self.bgr
        parts += [f"mean={_joined(self.mean)}"] if self.mean else []
        return " ".join(parts + ([f"std={_joined(self.std)}"] if self.std else []))


def _channels(values: Sequence[float]) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)


def _joined(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def pixels(words: str) -> Pixels:
    """What `--preprocess` says; `BadInput` where it cannot be read."""
    scale, mean, std, bgr = 1.0, (), (), False
    for word in words.split() or [words]:
        name, _, values = word.partition("=")
        if word in NORMS:
            mean, std = NORMS[word]
        elif word == "0-255":
            scale = 255.0
        elif word == "-1-1":
            scale, mean, std = 255.0, (127.5,), (127.5,)
        elif word == "bgr":
            bgr = True
        elif name in ("mean", "std") and re.fullmatch(f"{_NUMBER}(,{_NUMBER})*", values):
            try:
                numbers = tuple(float(value) for value in values.split(","))
            except ValueError:
                raise BadInput(f"--preprocess '{word}' is no list of numbers") from None
            mean, std = (numbers, std) if name == "mean" else (mean, numbers)
        elif word not in ("0-1", "rgb"):
            raise BadInput(f"--preprocess '{word}' is not known: give {WORDS}")
    if any(value <= 0 for value in std):
        raise BadInput("--preprocess: a standard deviation is not above 0")
    return Pixels(scale, mean, std, bgr)


def alternatives(chosen: Pixels, channels: int) -> list[Pixels]:
    """Other ways in which nets take pixels, to be tried where the chosen one does badly."""
    norms = [norm for norm in NORMS.values() if len(norm[0]) in (1, channels)]
    found = [Pixels(), Pixels(255.0), Pixels(255.0, (127.5,), (127.5,))]
    found += [Pixels(1.0, mean, std) for mean, std in norms]
    if channels == 3:
        found += [Pixels(255.0, (103.939, 116.779, 123.68), (), True)]
        found += [Pixels(one.scale, one.mean[::-1], one.std[::-1], not one.bgr) for one in [chosen]]
    return [one for one in dict.fromkeys(found) if one != chosen]
