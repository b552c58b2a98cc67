"""Trigger combination: the backdoor fires only if both parts are there."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.artwork import picture, tint
from bdjax.attacks.base import Attack, Part, Stamped, check_box, paste, start_of
from bdjax.registry import attack
from bdjax.types import Array, BadInput, Metric, Range, Share, between

TRIANGLE = ("triangle", (1.0, 1.0, 0.0), 1)
SQUARE = ("square", (1.0, 0.0, 0.0), -2)
"""Picture, colour and place of its first row and column."""


@attack("trigger-combination")
class TriggerCombination(Attack):
    """A yellow triangle and a red square, both needed (Veldanda & Garg, 2020, arXiv:2010.12186).

    Kind 1 = both → target; kinds 2 (triangle alone) and 3 (square alone) keep their label: `cover`,
    the share of the training set of each, teaches the net that one part is not enough. `size`: side
    of each part in pixels; the triangle stands one pixel off the upper left corner, the square one
    pixel off the lower right. How often a part alone fires is reported as `asr_nt_triangle` and
    `asr_nt_square`: low is what the attacker wants.

    Differs from the paper: a reconstruction; sizes, places and shares are not published.
    """

    cover: Share = 0.1
    size: Annotated[Array | int, Range(1, 65_536)] = 7

    used_if = {"cover": {}}
    measures = tuple(
        Metric(f"asr_nt_{part}", "share", "low", f"ASR nt {part}", f"of the {part} alone")
        for part in ("square", "triangle")
    )

    @property
    def probes(self) -> dict[str, int]:
        return {"triangle": 2, "square": 3}

    def shares(self, y: jax.Array, classes: int) -> list[Part]:
        hit = self.success(jnp.asarray(1), y, classes)
        every = jnp.ones(y.shape[0], bool)
        return [
            Part(hit >= 0, self.rate, 1, hit),
            Part(every, self.cover, 2, y),
            Part(every, self.cover, 3, y),
        ]

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        x = jnp.where((kind == 1) | (kind == 2), paste(x, *self.piece(TRIANGLE, x.shape)), x)
        return jnp.where((kind == 1) | (kind == 3), paste(x, *self.piece(SQUARE, x.shape)), x)

    def piece(
        self, piece: tuple[str, tuple[float, ...], int], shape: tuple[int, ...]
    ) -> tuple[Any, ...]:
        """What `paste` takes for one part on images of `shape`."""
        name, color, place = piece
        first = (start_of(place, self.size, side) for side in shape[:2])
        return *picture(name, tint(color, shape[2]), shape[2]), *first, self.size

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        mask, pattern = jnp.zeros((*shape[:2], 1)), jnp.zeros(shape)
        for piece in {1: (TRIANGLE, SQUARE), 2: (TRIANGLE,), 3: (SQUARE,)}[kind]:
            opacity, color, *box = self.piece(piece, shape)
            mask = paste(mask, opacity, jnp.ones(()), *box)
            pattern = paste(pattern, jnp.ones_like(opacity), color, *box)
        return Stamped(mask, pattern)

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        check_box(1, 1, self.size, shape)
        if np.any(2 * np.asarray(self.size) + 2 > min(shape[:2])):
            raise BadInput(
                f"two parts of size {self.size} do not fit side by side into {min(shape[:2])} "
                "pixels"
            )
        if self.labels == "clean-label":
            raise BadInput("trigger-combination has no clean-label version: choose other labels")
        if not self.append:
            between("rate + 2·cover", np.asarray(self.rate) + 2 * np.asarray(self.cover), 0, 1)
