"""What a defense is. The folder that it stands in says what it is given and what it returns:

| folder | call | returns |
|---|---|---|
| `train/` | `(key, model, recipe, data: TrainSet, clean: Split)` | `Repaired`: replaces training |
| `repair/` | `(key, model, variables, clean)` | `Repaired` |
| `invert/`, `models/` | `(key, model, variables, clean)` | `Verdict` on the model, see `Judge` |
| `inputs/` | `(key, model, variables, clean, x: [B, H, W, C])` | `Scores` of the inputs |
| `samples/` | `(key, model, variables, data)` | `Suspects`: a sweep trains without them |

All are pure and safe under jit and vmap over the key, the variables and every leaf of the defense.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import mesh, metrics
from bdjax.registry import admit, pytree, static, validate
from bdjax.train import Recipe, agree
from bdjax.types import BadInput, Model, Range, Split, Variables, Verdict, between, check_images

SEEDS = 2**31 - 1
"""Folded into a judge's key for its further seeds: no search folds in so large a number."""


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


@pytree
class Judge(Defense):
    """Base of the judges of a model: a random search, `once`, run with `seeds` different draws.

    One draw is no finding: the same net can have an index of 3.4 and of 1.4 by its seed alone. Of
    several seeds a verdict says `infected` where the rule holds on every one, `undecided` where
    they disagree; `flagged` are the labels that all of them flag (none, where each names another);
    `index` is the median; `p_value` as in `metrics.combined_p`. The rest of `info`, pictures and
    norms alike, is that of one seed, the one with the median index (of two middle ones the lower),
    so that they belong together; `info["seeds"]` has `index`, `infected`, `p_value: [S]`,
    `flagged: [S, K]` and, where there are any, `norms: [S, K]`. The first seed draws what a single
    one would. Seeds run one after another: they need the memory of one.
    """

    seeds: Annotated[int, Range(1, 1_000)] = static(1)

    def once(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Verdict:
        """The verdict of one seed."""
        raise TypeError(f"{type(self).__name__} must define once(key, model, variables, clean)")

    def rank(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> jax.Array | None:
        """A first look at every label before a long search: what `once` compares, roughly, small =
        suspicious: `[K]`. None where a judge has none.
        """
        return None

    def of_seed(self, seed: jax.Array) -> "Judge":
        """The judge that seed number `seed: []` runs, where `prepare` learned one for each."""
        return self

    def keys(self, key: jax.Array) -> jax.Array:
        """Each seed's key, the first `key` itself: `[S]`."""
        further = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, SEEDS), i))
        return jnp.concatenate([jax.random.clone(key)[None], further(jnp.arange(1, self.seeds))])

    def __call__(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Verdict:
        if self.seeds == 1:
            verdict = self.once(key, model, variables, clean)
            return verdict._replace(p_value=jnp.asarray(verdict.p_value, jnp.float32))

        def one(item):
            key, seed = item
            return self.of_seed(seed).once(key, model, variables, clean)

        found: Verdict = mesh.lane_map(one, (self.keys(key), jnp.arange(self.seeds)), 1)
        return folded(found)


def folded(found: Verdict) -> Verdict:
    """One verdict of those of `S` seeds, stacked; see `Judge`."""
    middle = jnp.argsort(found.index)[(found.index.shape[0] - 1) // 2]
    seeds = {name: getattr(found, name) for name in ("index", "infected", "flagged", "p_value")}
    seeds |= {name: found.info[name] for name in ("norms",) if name in found.info}
    return Verdict(
        jnp.median(found.index),
        found.infected.all(),
        found.flagged.all(0),
        {**jax.tree.map(lambda leaf: leaf[middle], found.info), "seeds": seeds},
        metrics.combined_p(jnp.asarray(found.p_value)),
    )


def searched(labels: Sequence[int] | None, classes: int) -> np.ndarray:
    """The labels that a search is for, `labels` or all, in order: `[L]`. An outlier is told from
    the others: fewer than 3 raise `BadInput`.
    """
    if labels is None:
        return np.arange(classes)
    found = np.sort(np.asarray(labels))
    if found.ndim != 1 or len(set(found.tolist())) < max(3, found.size):
        raise BadInput(
            f"labels {labels}: an outlier is told from the others, give at least 3 different ones"
        )
    between("labels", found, 0, classes - 1)
    return found


def spread(tree: Any, labels: np.ndarray, classes: int) -> Any:
    """Leaves of the searched `labels`, `[L, ...]`, among all: `[K, ...]`. Where nothing was
    searched, a number of a label is NaN, and pictures, counts and flags are 0.
    """

    def one(leaf):
        number = leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)
        blank = jnp.full((classes, *leaf.shape[1:]), jnp.nan if number else 0, leaf.dtype)
        return blank.at[labels].set(leaf)

    return tree if labels.size == classes else jax.tree.map(one, tree)
