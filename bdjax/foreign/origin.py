"""Where a net of a file came from, and how it was shown to be that net."""

import json
import zlib
from typing import Annotated, Literal

import numpy as np

from bdjax import schema
from bdjax.foreign.native import Move
from bdjax.registry import pytree, static
from bdjax.types import INT32, Array, BadInput, Range

Format = Literal["onnx", "torch", "safetensors", "keras", "h5", "orbax", ""]
Said = Literal["given", "file", "data", "assumed"]


@pytree
class Origin:
    """`format` and name of the `file`; `template`: the file with zeros for its weights, packed,
    from which it is written again; `moves`: where its arrays stand here, for nets without a graph;
    `last`: what its outputs are of the logits.

    The proof: `pixels`: who said which ones it takes; `by`: what its logits, or its accuracy, were
    held against, "" for nothing; on how many `images`; the largest difference over the largest
    |logit|, `error`; and its `accuracy` on labelled images.
    """

    format: Format = static("")
    file: str = static("")
    moves: str = static("")
    last: str = static("")
    pixels: Said = static("assumed")
    by: str = static("")
    images: Annotated[int, Range(0, INT32)] = static(0)
    error: Annotated[float, Range(0, 1)] | None = static(None)
    accuracy: Annotated[float, Range(0, 1)] | None = static(None)
    template: Annotated[Array, Range(0, 255)] | None = None

    @property
    def unverified(self) -> str:
        """Why nobody knows that this net is the file's; "" where it was shown."""
        if not self.by:
            return "nothing was compared with the original: import it with --logits or --accuracy"
        if self.pixels == "assumed" and not {"logits", "accuracy"} & {*self.by.split(", ")}:
            return "which pixels it takes is a guess: import it with --preprocess or --accuracy"
        return ""

    def places(self) -> dict[str, Move]:
        """The moves, by our paths."""
        return {
            path: Move(name, *map(tuple, rest))
            for path, (name, *rest) in json.loads(self.moves or "{}").items()
        }

    def unpacked(self) -> bytes:
        """The template's bytes."""
        packed = np.asarray(self.template, np.uint8).tobytes()
        most = schema.memory() // 4
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(packed, most)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise BadInput("the template of the original file is damaged")
        return raw


@pytree
class Triggered:
    """The poisoned test images that came with a net, `image: [N, H, W, C]` uint8, and the `label:
    [N]` that counts as a hit.
    """

    image: Annotated[Array, Range(0, 255)] | None = None
    label: Annotated[Array, Range(0, INT32)] | None = None


def packed(raw: bytes) -> np.ndarray:
    """Bytes as a template."""
    return np.frombuffer(zlib.compress(raw, 1), np.uint8)
