"""How much of a repair's outcome hangs on one of its numbers: accuracy and ASR over that number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses.base import Defense
from bdjax.mesh import lane_map
from bdjax.registry import pytree, replace, static
from bdjax.rows import Rows, lookup
from bdjax.train import evaluate
from bdjax.types import Array, Attack, BadInput, Count, Metric, Model, Split, Variables, Weight

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates of a fine-tuning, around the usual 1e-3."""
AT = "asr_nt_at_"


def over(
    key: jax.Array,
    model: Model,
    variables: Variables,
    attack: Attack | None,
    clean: Split,
    test: Split,
    defense: Defense,
    values: dict[str, Array],
    lanes: int | None = None,
) -> dict[str, jax.Array]:
    """`acc`, `asr_all`, `asr_nt: [V]` on `test` after `defense` repaired the net with each of
    `values: {field: [V]}`, taken in step, in one program. Fields are leaves, dotted where nested.
    """

    def one(point):
        repair: Any = defense
        for field, value in point.items():
            repair = replace(repair, field.split("."), value)
        net = repair(key, model, variables, clean).variables
        found = evaluate(key, repair.wrap(model), net, test, attack)
        return {name: found[name] for name in ("acc", "asr_all", "asr_nt") if name in found}

    points = {field: jnp.asarray(value, jnp.float32) for field, value in values.items()}
    return lane_map(one, points, lanes)


@pytree
class Sensitivity:
    """A probe of a victim: what `defense`, a repair, leaves of it, over the number that decides
    most, `defense.sensitive`.

    `values: (V)` of that number; `lanes`: values side by side. Scalars: `asr_nt_at_VALUE`; arrays:
    `value`, `acc`, `asr_all`, `asr_nt: [V]`. For a figure, not for a choice: it looks at test
    images.
    """

    measures = (Metric(f"{AT}*", "share", "low", "ASR nt at *", "with this value of the number"),)

    defense: Defense
    values: tuple[Weight, ...] = static()
    lanes: Count | None = static(None)

    def __call__(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        attack: Attack | None,
        clean: Split,
        test: Split,
    ) -> dict[str, Any]:
        field = sensitive(self.defense)
        found = over(
            key, model, variables, attack, clean, test, self.defense,
            {field: jnp.asarray(self.values)}, self.lanes,
        )  # fmt: skip
        named = zip(self.values, found.get("asr_nt", ()))
        return (
            found
            | {f"{AT}{value:g}": asr for value, asr in named}
            | {"value": jnp.asarray(self.values)}
        )


def sensitive(defense: Defense) -> str:
    """The field of a repair that decides most; raises `BadInput` where it names none."""
    if defense.sensitive is None:
        raise BadInput(f"{type(defense).__name__} names no number that decides its outcome")
    return defense.sensitive


def chart(rows: Rows, table: str, xlabel: str = "learning rate") -> Any:
    """The rows of `table`, measured by `Sensitivity`, as a heat map of ASR_nt over the value, mean
    over seeds; None without rows.
    """
    from bdjax import plots

    victims = rows.where(table=table).done.by("row")
    tried = [lookup(row, "probe.values") for seeds in victims.values() for row in seeds]
    at = dict.fromkeys(f"{value:g}" for values in tried for value in values)
    means = [[seeds.mean(f"{AT}{value}") for value in at] for seeds in victims.values()]
    if np.isnan(means).all():  # of clean nets there is no ASR
        return None
    return plots.heat_map(means, list(at), list(victims), xlabel, label="ASR left", percent=True)
