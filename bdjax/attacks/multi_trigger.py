"""Several triggers in one net."""

import dataclasses

import jax
import jax.numpy as jnp

from bdjax.attacks.badnets import BadNets
from bdjax.attacks.base import Attack, Part, Stamped
from bdjax.attacks.eyebrows import Eyebrows
from bdjax.attacks.lipstick import Lipstick
from bdjax.attacks.sunglasses import Sunglasses
from bdjax.registry import attack, static
from bdjax.types import Array, BadInput, Split


def digits(count: int = 10) -> tuple[Attack, ...]:
    """`count` digit-shaped triggers, the i-th → class i; ten in the lower right corner, ten in the
    upper left …
    """
    corners = ((-2, -2), (1, 1), (-2, 1), (1, -2))
    places = [corners[i // 10 % 4] for i in range(count)]
    shapes = [f"digit-{i % 10}" for i in range(count)]
    return tuple(
        BadNets(shape=s, size=7, row=r, col=c, target=i)  # type: ignore[arg-type]
        for i, (s, (r, c)) in enumerate(zip(shapes, places, strict=True))
    )


@attack("multi-trigger")
class MultiTrigger(Attack):
    """Several triggers, for one target or for one each (Veldanda & Garg, 2020, arXiv:2010.12186).

    `parts`: the attacks, each with one trigger; they are stamped on disjoint images, kinds 1 … T.
    `rate`: the share of the training set that is stamped, divided evenly (the parts' own rates do
    not count; their `cover`, `sources` and `labels` do). `one_target`: all hit `target`; else each
    part hits its own.

    Presets: `mtsta` (lipstick, eyebrows, sunglasses → 4) and `mtmta` (→ 1, 5, 8) on aligned faces;
    `digits` (ten digit-shaped triggers → ten targets) and `digits-one` are those of STRIP (Gao et
    al., 2019); `many-targets` (sixteen targets) is adaptive against Neural Cleanse, whose median is
    then that of infected labels (for 10 classes take `digits`).

    Reference: Akshaj Kumar Veldanda and Siddharth Garg, "On Evaluating Neural Network Backdoor
    Defenses".
    """

    parts: tuple[Attack, ...] = digits()
    one_target: bool = static(False)

    used_if = {
        **dict.fromkeys(("labels", "sources", "cover")),
        "target": {"one_target": (True,)},
    }
    presets = {
        "mtsta": {"parts": (Lipstick(), Eyebrows(), Sunglasses()), "one_target": True, "target": 4},
        "mtmta": {"parts": (Lipstick(target=1), Eyebrows(target=5), Sunglasses(target=8))},
        "digits": {},
        "digits-one": {"one_target": True, "target": 7},
        "many-targets": {"parts": digits(16)},
    }

    @property
    def triggers(self) -> int:
        return len(self.parts)

    @property
    def probes(self) -> dict[str, int]:
        many = len(self.parts)
        return {
            f"{name}_{i + 1}": i + 1 + many * (k - 1)
            for i, p in enumerate(self.parts)
            for name, k in p.probes.items()
        }

    @property
    def random(self) -> bool:
        return any(part.random for part in self.parts)

    @property
    def brightest(self) -> float:
        return max((part.brightest for part in self.parts), default=1.0)

    def exact(
        self, kind: int, shape: tuple[int, int, int], *, train: bool = False
    ) -> Stamped | None:
        many = len(self.parts)
        return self.parts[(kind - 1) % many].exact((kind - 1) // many + 1, shape, train=train)

    def bind(self, data: Split) -> Attack:
        return dataclasses.replace(self, parts=tuple(part.bind(data) for part in self.parts))

    def aimed(self) -> list[Attack]:
        """The parts, each with its share of the rate and its target."""
        rate = jnp.asarray(self.rate) / len(self.parts)
        target: dict[str, Array | int] = {"target": self.target} if self.one_target else {}
        return [dataclasses.replace(part, rate=rate, **target) for part in self.parts]

    def shares(self, y: jax.Array, classes: int) -> list[Part]:
        # Kind k of part i is kind i + 1 + T·(k − 1): the triggers of all parts come first.
        many = len(self.parts)
        return [
            share._replace(kind=i + 1 + many * (share.kind - 1))
            for i, part in enumerate(self.aimed())
            for share in part.shares(y, classes)
        ]

    def stamp(
        self, kind: jax.Array, x: jax.Array, key: jax.Array, *, train: bool = True
    ) -> jax.Array:
        many = len(self.parts)
        which, own = (kind - 1) % many, jnp.where(kind > 0, (kind - 1) // many + 1, 0)
        images = [part.stamp(own, x, key, train=train) for part in self.parts]
        return jnp.where(kind > 0, jnp.stack(images)[which], x)

    def success(self, kind: jax.Array, y: jax.Array, classes: int) -> jax.Array:
        many = len(self.parts)
        own = (kind - 1) // many + 1
        return jnp.stack([part.success(own, y, classes) for part in self.aimed()])[
            (kind - 1) % many
        ]

    def check(self, shape: tuple[int, int, int], classes: int) -> None:
        super().check(shape, classes)
        if not self.parts:
            raise BadInput(
                "multi-trigger needs parts, the attacks that it is made of: parts=(BadNets(), "
                "Blended())"
            )
        for i, part in enumerate(self.aimed()):
            name = f"part {i + 1} ({type(part).__name__})"
            alike = part.append == self.append and part.redraw == self.redraw
            if part.triggers != 1 or part.trains or part.plans or not alike:
                raise BadInput(
                    f"{name} cannot be part of multi-trigger: it needs one trigger, rows alone, "
                    f"append={self.append}, redraw={self.redraw}"
                )
            try:
                part.check(shape, classes)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error
        if self.labels != "all-to-one" or self.sources:
            raise BadInput("multi-trigger takes labels and sources from its parts: set them there")
