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
from typing import Any

import jax

from bdjax.registry import admit, pytree, validate
from bdjax.train import Recipe, agree
from bdjax.types import Model, Split, Variables, check_images


def _admitted(method: Callable) -> Callable:
    """A call or `prepare` behind the check of the defense's values and of what it is given."""
    names = inspect.signature(method)

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        given: dict[str, Any] = names.bind(self, *args, **kwargs).arguments
        model = given["model"]
        if "data" in given:
            agree(model, given.get("recipe", Recipe()), given["data"])
        if "clean" in given:
            clean = given["clean"]
            check_images(clean.image, model.shape, clean.label, model.classes)
        else:
            clean = Split(given["data"].image, given["data"].plan.label)
        if "x" in given:
            check_images(given["x"], model.shape)
        admit(self, model, clean)
        return method(self, *args, **kwargs)

    return guarded


@pytree
class Defense:
    """Base of the defenses."""

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
