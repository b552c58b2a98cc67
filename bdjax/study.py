"""The language of studies: a `Cell` is one row of a table, and combinators make many of one.

>>> cells = grid(cell, seed=range(3), attack__rate=(0.01, 0.1))
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from bdjax import identity, registry, types
from bdjax.attacks.base import Attack
from bdjax.datasets import fingerprint
from bdjax.datasets.base import Source
from bdjax.defenses.base import Defense
from bdjax.models.layers import Net
from bdjax.registry import door, replace
from bdjax.train import Recipe
from bdjax.types import BadInput, Count, Model, Seed, Split, shown, whole

SEEDS = 10_000
"""The most seeds that one run takes: a list of cells grows with them."""


class Probe(Protocol):
    """A measurement of a net, a `pytree` class: `{name: array}`, pure and safe under jit and vmap.
    Scalars become metrics of the row, all else its arrays.
    """

    def __call__(
        self,
        key: jax.Array,
        model: Model,
        variables: Any,
        attack: types.Attack | None,
        clean: Split,
        test: Split,
    ) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of a table, for one seed. `reported`: the paper's values of our metrics;
    `substitute`: what stands in for its data; `probe`: what else is measured of the net, after the
    defense if there is one; `tags`: what the row is to be found by, `{"net": "CNN"}`; `changed`:
    what was set otherwise than the experiment has it, by path, see `bdjax.changes`.
    """

    table: str
    row: str
    dataset: Any
    model: Net
    recipe: Recipe
    attack: Attack | None = None
    defense: Defense | None = None
    seed: int = 0
    reported: Mapping[str, float] = dataclasses.field(default_factory=dict)
    substitute: str | None = None
    probe: Probe | None = None
    tags: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)
    changed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, 2**32 - 1)
        kinds = {"dataset": Source, "model": Net, "recipe": Recipe}
        for part, kind in (kinds | {"attack": Attack, "defense": Defense}).items():
            value = getattr(self, part)
            if not isinstance(value, kind) and (value is not None or part in kinds):
                raise BadInput(f"a cell's {part} is {type(value).__name__}, not {kind.__name__}")
            registry.validate(value)
        known = registry.hints(type(self))
        parts = ("table", "row", "reported", "substitute", "probe")
        registry.check_given("a cell", known, {part: getattr(self, part) for part in parts})
        if self.probe is not None and not dataclasses.is_dataclass(self.probe):
            raise BadInput(f"a cell's probe {shown(self.probe)} is no object of a pytree class")
        registry.validate(self.probe)

    @property
    def stage(self) -> str | None:
        """The kind of the defense; None without one."""
        return None if self.defense is None else self.defense.stage

    @property
    def twin(self) -> "Cell":
        """The same victim without the attack."""
        return dataclasses.replace(
            self, row=f"{self.row}, clean twin", attack=None, defense=None, reported={}
        )

    @functools.cached_property
    def data(self) -> str:
        """Content hash of the data set, as it was when it was first asked for."""
        return fingerprint(self.dataset.load())

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """All that is configured, as rows have it."""
        parts = ["dataset", "model", "recipe", "attack", "defense"]
        parts += [] if self.probe is None else ["probe"]
        return {part: registry.describe(getattr(self, part)) for part in parts}

    @functools.cached_property
    def victim_id(self) -> str:
        """Content hash of everything that decides the victim's weights."""
        return identity.victim_of(self.data, self.config, self.seed)

    @functools.cached_property
    def run_id(self) -> str:
        """Content hash of everything that decides the numbers: cells of several tables may be one
        run.
        """
        return identity.run_of(self.victim_id, self.config)

    @property
    def place(self) -> dict[str, Any]:
        """Where the run is shown, and beside what."""
        return {
            "table": self.table,
            "row": self.row,
            "tags": dict(self.tags),
            **({"set": dict(self.changed)} if self.changed else {}),
            "reported": dict(self.reported),
            "substitute": self.substitute,
        }


@door
def grid(base: Any, **axes: Iterable[Any]) -> Iterator[Any]:
    """Copies of the dataclass `base` over the product of `axes`: `grid(cell, seed=range(3),
    attack__rate=(0.01, 0.1))`.

    `a__b` is field `b` of field `a`, an array or a static one. Here and below `base` may be
    several: combinators nest.
    """
    kept = {path: tuple(values) for path, values in axes.items()}
    for one in _several(base):
        for values in itertools.product(*kept.values()):
            yield _with(one, kept, values)


@door
def zipped(base: Any, **axes: Iterable[Any]) -> Iterator[Any]:
    """Copies over the axes in step, the first values of all, then the second ones: `zipped(cell,
    seed=(0, 1), attack__target=(3, 7))`.
    """
    kept = {path: tuple(values) for path, values in axes.items()}
    if len({len(values) for values in kept.values()}) > 1:
        raise BadInput(
            "zipped axes differ in length: "
            f"{', '.join(f'{path} {len(kept[path])}' for path in kept)}"
        )
    for one in _several(base):
        for values in zip(*kept.values(), strict=True):
            yield _with(one, kept, values)


@door
def sample(
    base: Any,
    count: Count,
    draw: Seed = 0,
    **axes: Sequence[Any] | Callable[[np.random.Generator], Any],
):
    """`count` random copies, the same ones for the same `draw`: an axis is a sequence to choose
    from or a function of a generator: `sample(cell, 50, attack__rate=lambda rng: 10 **
    rng.uniform(-3, -1))`.
    """
    if empty := [path for path, axis in axes.items() if not (callable(axis) or len(axis))]:
        raise BadInput(f"axis {empty[0]} has no values to choose from")
    rng = np.random.default_rng(draw)
    for one in _several(base):
        for _ in range(count):
            drawn = [
                axis(rng) if callable(axis) else axis[int(rng.integers(len(axis)))]
                for axis in axes.values()
            ]
            yield _with(one, axes, drawn)


chain = itertools.chain
"""Several sweeps as one: `chain(grid(…), sample(…))`. What occurs twice is run once."""


def _several(base: Any) -> Iterable[Any]:
    several = [base] if dataclasses.is_dataclass(base) else base
    if not isinstance(several, Iterable) or isinstance(several, (str, bytes, jax.Array)):
        raise BadInput(f"base {shown(base)} is no cell, method or recipe, nor several of these")
    return several


def _with(base: Any, paths: Iterable[str], values: Iterable[Any]) -> Any:
    for path, value in zip(paths, values, strict=True):
        base = replace(base, path.split("__"), value)
    return base
