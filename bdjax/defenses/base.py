"""What a defense is. The folder that it stands in says what it is given and what it returns:

| folder | call | returns |
|---|---|---|
| `train/` | `(key, model, recipe, data: TrainSet, clean: Split)` | `Repaired`: replaces training |
| `repair/` | `(key, model, variables, clean)` | `Repaired` |
| `invert/`, `models/` | `(key, model, variables, clean)` | `Verdict` on the model |
| `inputs/` | `(key, model, variables, clean, x: [B, H, W, C])` | `Scores` of the inputs |
| `samples/` | `(key, model, variables, data)` | `Suspects`: a sweep trains without them |

All are pure and safe under jit and vmap over the key, the variables and every leaf of the defense.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from bdjax.registry import admit, pytree, validate
from bdjax.train import Recipe, agree
from bdjax.types import Model, Split, Variables, check_images


def _admitted(method: Callable) -> Callable:
    """A call or `prepare` behind the check of the defense's values and of what it is given."""
    names = inspect.signature(method)

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        given = names.bind(self, *args, **kwargs).arguments
        model, clean, data = given["model"], given.get("clean"), given.get("data")
        if data is not None:
            agree(model, given.get("recipe", Recipe()), data)
        if clean is not None:
            check_images(clean.image, model.shape, clean.label, model.classes)
        if "x" in given:
            check_images(given["x"], model.shape)
        admit(self, model, Split(data.image, data.plan.label) if clean is None else clean)
        return method(self, *args, **kwargs)

    return guarded


@pytree
class Defense:
    """Base of the defenses.

    `budget_fields`: the fields, dotted where nested, that count work: steps, epochs, images,
    members. A preset `cpu` differs from `paper`, or from the defaults where there is none, in these
    alone: never in a rule, a rate or a width. `sensitive`: of a repair, the number that decides
    most what is left of the backdoor, dotted too; see `analysis.sensitivity`.
    """

    budget_fields: ClassVar[tuple[str, ...]] = ()
    sensitive: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in {"__call__", "prepare"} & set(vars(cls)):
            setattr(cls, name, _admitted(vars(cls)[name]))

    @property
    def oracle(self) -> bool:
        """Whether a choice uses what no defender has (test ASR, poisoned data, the target label);
        every result row says so.
        """
        return False

    def check(self, model: Model, clean: Split) -> None:
        """Raises `BadInput` where this defense cannot be run on `model` with the defender's `clean`
        images.
        """
        validate(self)

    def wrap(self, model: Model) -> Model:
        """The model that the variables of `Repaired` belong to: `model` itself, unless the defense
        builds another one around it (an ensemble, a net behind an autoencoder). Equal for equal
        arguments, so that programs are shared.
        """
        return model

    def prepare(self, key: jax.Array, model: Model, clean: Split) -> "Defense":
        """This defense with what it learns once for an architecture and the defender's images,
        before it sees a victim (MNTD's shadow models); most learn nothing. Called without it, a
        defense prepares itself.
        """
        return self

    def report(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        test: Split,
        attack: Any,
        result: Any,
    ) -> dict[str, jax.Array]:
        """Further arrays for figures, measured on `test` after the fact; nothing of it flows back
        into `result`.
        """
        return {}
