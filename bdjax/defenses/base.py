"""What a defense is: its base class says what it is given, what it returns, and what ACC, ASR and
FAR mean with it in place.

| base | call | returns |
|---|---|---|
| `Training` | `(key, model, recipe, data: TrainSet, clean)` | `Repaired`: replaces training |
| `Repair` | `(key, model, variables, clean)` | `Repaired` |
| `Judge`, `Inversion` | `(key, model, variables, clean)` | `Verdict` on the model |
| `InputFilter` | `(key, model, variables, clean, x: [B, H, W, C])` | `Scores` of the inputs |
| `SampleFilter` | `(key, model, variables, data: TrainSet)` | `Suspects` among the training rows |

All are pure and safe under jit and vmap over the key, the variables and every leaf of the defense.
`judge` measures any of them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import mesh, metrics
from bdjax.registry import admit, check_given, pytree, static, validate
from bdjax.train import (
    GIVEN,
    Recipe,
    TrainSet,
    agree,
    evaluate,
    fit,
    poisoned_set,
    poisoning_key,
    predict,
    stamped,
    unit,
    without,
)
from bdjax.types import (
    Array,
    Attack,
    BadInput,
    Dataset,
    Judgement,
    Metric,
    Model,
    Range,
    Repaired,
    Scores,
    Split,
    Splits,
    Suspects,
    Unlabelled,
    Variables,
    Verdict,
    Victim,
    between,
    check_images,
    check_variables,
)

Stage = Literal["train", "repair", "invert", "models", "inputs", "samples"]
SEEDS = 2**31 - 1
"""Folded into a judge's key for its further seeds: no search folds in so large a number."""


def _admitted(method: Callable) -> Callable:
    """A call or `prepare` behind the check of the defense's values and of what it is given."""
    names = inspect.signature(method)

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        given: dict[str, Any] = names.bind(self, *args, **kwargs).arguments
        check_given(type(self).__name__, GIVEN, given)
        model = given["model"]
        if given.get("variables"):  # a net without parameters has none
            check_variables(given["variables"])
        if "data" in given:
            agree(model, given.get("recipe", Recipe()), given["data"])
        if "clean" in given:
            clean = given["clean"]
            check_images(clean.image, model.shape, clean.label, model.classes, self.images_needed)
        else:
            clean = Split(given["data"].image, given["data"].plan.label)
        if "x" in given:
            check_images(given["x"], model.shape)
        admit(self, model, clean)
        return method(self, *args, **kwargs)

    return guarded


HOOKS = ("prepare", "report", "rank")
"""What a defense may define beside its call."""


@pytree
class Defense:
    """What all defenses share; derive from one of the kinds below.

    `stage`: the kind in a word, as rows name it. `needs`: the parts of a `Victim` that it is given.
    `hooks`: those of `prepare`, `report` and `rank` that the class or a base of it defines.
    `images_needed`: the fewest clean images that it can do with.
    `budget_fields`: the fields, dotted where nested, that count work: steps, epochs, images,
    members. A preset `cpu` differs from `paper`, or from the defaults where there is none, in these
    alone: never in a rule, a rate or a width. `sensitive`: of a repair, the number that decides
    most what is left of the backdoor, dotted too; see `analysis.sensitivity`. `measures`: the
    metrics that the class itself adds to a row.
    """

    stage: ClassVar[Stage]
    needs: ClassVar[tuple[str, ...]] = ("variables",)
    hooks: ClassVar[frozenset[str]] = frozenset()
    images_needed: ClassVar[int] = 1
    budget_fields: ClassVar[tuple[str, ...]] = ()
    sensitive: ClassVar[str | None] = None
    measures: ClassVar[tuple[Metric, ...]] = (
        Metric("pruned", hint="how many channels or neurons are cut"),
        Metric("threshold", hint="beyond which it acts"),
        Metric("repaired", hint="1 where a label was suspected, so that anything was done, else 0"),
    )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        inherited = (base.hooks for base in cls.__bases__ if issubclass(base, Defense))
        cls.hooks = frozenset(HOOKS).intersection(vars(cls)).union(*inherited)
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
        """A hook: this defense with what it learns once for an architecture and the defender's
        images, before it sees a victim (MNTD's shadow models). Called without it, a defense
        prepares itself.
        """
        return self

    def report(
        self,
        key: jax.Array,
        model: Model,
        variables: Variables,
        test: Split,
        attack: Attack | None,
        result: Any,
    ) -> dict[str, jax.Array]:
        """A hook: further numbers and arrays for figures, measured on `test` after the fact;
        nothing of it flows back into `result`.
        """
        return {}

    def applied(self, key: jax.Array, victim: Victim, data: Splits) -> Any:
        """What the call returns, given what its kind is given of a victim and its data."""
        raise TypeError(
            f"{type(self).__name__} is of no kind: derive it from Training, Repair, Inversion, "
            "Judge, InputFilter or SampleFilter"
        )

    def judged(self, key: jax.Array, victim: Victim, data: Splits) -> Judgement:
        """What is reported of this defense on a victim; ACC and ASR of the net that is left are
        measured by `judge`.
        """
        result = self.applied(jax.random.fold_in(key, 1), victim, data)
        more = self.reported(key, victim, victim.variables, data, result)
        return Judgement(*split_scalars({**result.info, **more}), result.variables)

    def reported(self, key: jax.Array, victim: Victim, variables: Any, data: Splits, result: Any):
        """What the hook `report` adds, unless there are no labels that it could be measured by."""
        if "report" not in self.hooks or isinstance(data.test.label, Unlabelled):
            return {}
        return self.report(key, victim.model, variables, data.test, victim.attack, result)


@pytree
class Training(Defense):
    """Replaces the training, on the rows that the attacker poisoned: `__call__(key, model, recipe,
    data: TrainSet, clean) -> Repaired`. ACC and ASR are those of the net that it trains.
    """

    stage = "train"
    needs = ("recipe", "key", "attack")

    def __call__(
        self, key: jax.Array, model: Model, recipe: Recipe, data: TrainSet, clean: Split
    ) -> Repaired:
        raise TypeError(f"{type(self).__name__} must define __call__")

    def applied(self, key: jax.Array, victim: Victim, data: Splits) -> Repaired:
        return self(key, victim.model, victim.recipe, trained_on(victim, data), data.clean)

    def judged(self, key: jax.Array, victim: Victim, data: Splits) -> Judgement:
        result = self.applied(jax.random.fold_in(key, 1), victim, data)
        more = self.reported(key, victim, result.variables, data, result)
        return Judgement(*split_scalars({**result.info, **more}), result.variables)


@pytree
class Repair(Defense):
    """Changes a net: `__call__(key, model, variables, clean) -> Repaired`. ACC and ASR are those of
    the net that it leaves.
    """

    stage = "repair"

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> Repaired:
        raise TypeError(f"{type(self).__name__} must define __call__")

    def applied(self, key: jax.Array, victim: Victim, data: Splits) -> Repaired:
        return self(key, victim.model, victim.variables, data.clean)


@pytree
class InputFilter(Defense):
    """Judges inputs: `__call__(key, model, variables, clean, x: [B, H, W, C]) -> Scores`.

    ACC and ASR count what passes: a clean input that is flagged is lost, a stamped one that is
    flagged is stopped. `frr`: share of the clean test images that are flagged, with its 95 %
    interval; `far`: of the stamped ones that the net obeys, the share that passes; `auroc` of the
    scores of these two. Means over the triggers. A filter may answer by another net than the
    victim's: `info["answer"]: [B]`.
    """

    stage = "inputs"
    needs = ("variables", "attack")
    measures = (
        Metric("far", "share", "low", "FAR",
               "share of working trojaned inputs that the defense lets through"),
        Metric("frr", "share", "low", "FRR", "share of clean inputs that the defense rejects"),
        Metric("frr_low", "share", "low", "FRR low",
               "least value of the 95 % interval of the FRR, from the number of clean inputs"),
        Metric("frr_high", "share", "low", "FRR high",
               "largest value of the 95 % interval of the FRR"),
        Metric("boundary", hint="score below which an input is flagged"),
        Metric("auroc", "", "high", "AUROC", "inputs: chance that a stamped one whose backdoor "
               "works scores as more suspicious than a clean one"),
    )  # fmt: skip

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split, x: Array
    ) -> Scores:
        raise TypeError(f"{type(self).__name__} must define __call__")

    def applied(self, key: jax.Array, victim: Victim, data: Splits) -> Scores:
        return self(key, victim.model, victim.variables, data.clean, data.test.image)

    def judged(self, key: jax.Array, victim: Victim, data: Splits) -> Judgement:
        model, variables, attack, test = victim.model, victim.variables, victim.attack, data.test
        # Clean and stamped inputs go through one call: the defense is traced once.
        kinds = [] if attack is None else range(1, attack.triggers + 1)
        pictures = [unit(test.image)]
        if attack is not None:
            for kind in kinds:
                key_kind = jax.random.fold_in(key, kind + 1)
                pictures.append(stamped(attack, kind, test.image, key_kind))
        x = jnp.stack(pictures)
        predictions = jax.lax.map(lambda x: metrics.labels(predict(model, variables, x)), x)
        inputs = data._replace(test=Split(x.reshape(-1, *x.shape[2:]), test.label))
        scores = self.applied(jax.random.fold_in(key, 1), victim, inputs)
        score, flagged = (leaf.reshape(x.shape[:2]) for leaf in (scores.score, scores.flagged))
        answers = scores.info.get("answer", predictions).reshape(x.shape[:2])
        more = {name: value for name, value in scores.info.items() if name != "answer"}
        found = {"frr": flagged[0].mean(), "boundary": scores.boundary}
        arrays = {"score_clean": score[0]}
        if not isinstance(test.label, Unlabelled):
            found["frr_low"], found["frr_high"] = metrics.interval(flagged[0])
            found["acc_test"] = ((answers[0] == test.label) & ~flagged[0]).mean()
            more |= self.reported(key, victim, variables, data, scores)
            if attack is not None:
                label = jnp.asarray(test.label)
                aimed = jnp.stack(
                    [attack.success(jnp.asarray(k), label, model.classes) for k in kinds]
                )
                passing = _passing(score, flagged, predictions, answers, aimed, label)
                arrays |= {"score_trojan": score[1:], "far_per_trigger": passing["far"]}
                found |= {name: each.mean() for name, each in passing.items()}
        scalars, others = split_scalars(more)
        return Judgement({**scalars, **found}, {**others, **arrays})


def _passing(
    score: jax.Array, flagged: jax.Array, predicted: jax.Array, answers: jax.Array,
    aimed: jax.Array, label: jax.Array,
) -> dict[str, jax.Array]:  # fmt: skip
    """`far`, `asr_all`, `asr_nt`, `auroc: [T]` of clean inputs, at index 0 of `[1 + T, N]`, and of
    those under each trigger, `aimed: [T, N]` at.
    """

    def one(score_, flagged_, predicted_, answer, aimed):
        works = metrics.hits(predicted_, aimed) & (aimed != label)
        far, _ = metrics.far_frr(flagged[0], flagged_, works)
        rates = metrics.attack_success(jnp.where(flagged_, -2, answer), aimed, label)
        auroc = metrics.auroc(-score[0], -score_, None, works)
        return {"far": far, "asr_all": rates.all, "asr_nt": rates.nt, "auroc": auroc}

    return jax.vmap(one)(score[1:], flagged[1:], predicted[1:], answers[1:], aimed)


@pytree
class SampleFilter(Defense):
    """Judges the rows of a training set by the net that was trained on them: `__call__(key, model,
    variables, data: TrainSet) -> Suspects`.

    ACC and ASR are those of a net that is trained again, from the victim's key, without the
    suspects. `recall`, `precision` of the poisoned rows; `auroc_pooled` over all rows,
    `auroc_within` among those of one training label.
    """

    stage = "samples"
    needs = ("variables", "recipe", "key", "attack")
    measures = (
        Metric("recall", "share", "high", hint="share of the poisoned rows that are removed"),
        Metric("precision", "share", "high", hint="share of the removed rows that are poisoned"),
        Metric("auroc_pooled", "", "high", "AUROC pooled", "training rows: chance that a poisoned "
               "one scores as more suspicious than a clean one of any label"),
        Metric("auroc_within", "", "high", "AUROC within", "training rows: chance that a poisoned "
               "one scores as more suspicious than a clean one of its own training label; mean "
               "over labels"),
    )  # fmt: skip

    def __call__(
        self, key: jax.Array, model: Model, variables: Variables, data: TrainSet
    ) -> Suspects:
        raise TypeError(f"{type(self).__name__} must define __call__")

    def applied(self, key: jax.Array, victim: Victim, data: Splits) -> Suspects:
        return self(key, victim.model, victim.variables, trained_on(victim, data))

    def judged(self, key: jax.Array, victim: Victim, data: Splits) -> Judgement:
        model, rows = victim.model, trained_on(victim, data)
        result = self.applied(jax.random.fold_in(key, 1), victim, data)
        exists = jnp.arange(rows.plan.kind.shape[0]) < rows.plan.size
        poison, removed = (rows.plan.kind > 0) & exists, result.removed & exists
        hit = (poison & removed).sum()
        found = dict(result.info)
        if victim.attack is not None:
            score, clean = result.score, exists & ~poison
            found |= {
                "recall": hit / poison.sum(), "precision": hit / jnp.maximum(removed.sum(), 1),
                "auroc_pooled": metrics.auroc(score, score, clean, poison),
                "auroc_within": _within(score, rows.plan.label, clean, poison, model.classes),
            }  # fmt: skip
        more = self.reported(key, victim, victim.variables, data, result)
        again = jax.random.fold_in(victim.key, 3)
        repaired, _ = fit(again, model, victim.recipe, without(rows, result.removed))
        return Judgement(*split_scalars({**found, **more}), repaired)


def _within(
    score: jax.Array, label: jax.Array, clean: jax.Array, poison: jax.Array, classes: int
) -> jax.Array:
    """AUROC among the rows of one training label, the mean over the labels that hold both kinds: it
    owes nothing to scores that differ from label to label.
    """

    def one(k):
        mine = label == k
        return metrics.auroc(score, score, clean & mine, poison & mine)

    return jnp.nanmean(mesh.lane_map(one, jnp.arange(classes), 1))


@pytree
class Judge(Defense):
    """Judges a model: `__call__(key, model, variables, clean) -> Verdict`, of a random search,
    `once`, run with `seeds` different draws. The net stays as it is, and so do its ACC and ASR;
    `target_flagged` is the share of the attack's targets that are flagged.

    One draw is no finding: the same net can have an index of 3.4 and of 1.4 by its seed alone. Of
    several seeds a verdict says `infected` where the rule holds on every one, `undecided` where
    they disagree; `flagged` are the labels that all of them flag (none, where each names another);
    `index` is the median; `p_value` as in `metrics.combined_p`. The rest of `info`, pictures and
    norms alike, is that of one seed, the one with the median index (of two middle ones the lower),
    so that they belong together; `info["seeds"]` has `index`, `infected`, `p_value: [S]`,
    `flagged: [S, K]` and, where there are any, `norms: [S, K]`. The first seed draws what a single
    one would. Seeds run one after another: they need the memory of one.
    """

    stage = "models"
    measures = (
        Metric("anomaly_index",
               hint="median over the seeds of the search of what the judge decides on"),
        Metric("p_value", hint="of the null that the net is clean, where the judge has one"),
        Metric("infected", "share",
               hint="share of nets on which the judge's own rule holds for every seed of its "
               "search"),
        Metric("undecided", "share",
               hint="share of nets on which the seeds of the search disagree"),
        Metric("target_flagged", "share", "high",
               hint="share of the attack's targets that are flagged"),
    )  # fmt: skip

    seeds: Annotated[int, Range(1, 1_000)] = static(1, before=1)

    def applied(self, key: jax.Array, victim: Victim, data: Splits) -> Verdict:
        return self(key, victim.model, victim.variables, data.clean)

    def judged(self, key: jax.Array, victim: Victim, data: Splits) -> Judgement:
        result = self.applied(jax.random.fold_in(key, 1), victim, data)
        more = self.reported(key, victim, victim.variables, data, result)
        found = {
            "anomaly_index": result.index,
            "p_value": jnp.asarray(result.p_value),
            "infected": result.infected.astype(jnp.float32),
        }
        if "seeds" in result.info:
            found["undecided"] = result.undecided.astype(jnp.float32)
        if victim.attack is not None:
            aims = victim.attack.targets(victim.model.classes)
            found["target_flagged"] = targets_flagged(result.flagged, aims)
        scalars, arrays = split_scalars({**result.info, **more, "flagged": result.flagged})
        return Judgement({**found, **scalars}, arrays)

    def once(self, key: jax.Array, model: Model, variables: Variables, clean: Split) -> Verdict:
        """The verdict of one seed."""
        raise TypeError(f"{type(self).__name__} must define once(key, model, variables, clean)")

    def rank(
        self, key: jax.Array, model: Model, variables: Variables, clean: Split
    ) -> jax.Array | None:
        """A hook: a first look at every label before a long search: what `once` compares, roughly,
        small = suspicious: `[K]`.
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


@pytree
class Inversion(Judge):
    """A judge that searches for the triggers, or the neurons, of a backdoor."""

    stage = "invert"


def judge(
    key: jax.Array, victim: Victim, defense: Defense | None, data: Splits | Dataset,
    *, measured: bool = True,
) -> Judgement:  # fmt: skip
    """What `defense` does to `victim`, measured on `data.test`: the same for every kind, pure, safe
    under jit and vmap.

    Without a defense: the victim itself. `measured=False` leaves out `acc_train`, `acc_test`,
    `asr_all`, `asr_nt` of the net that is left behind. Parts of the victim that the kind needs and
    that are absent raise `BadInput`.

    >>> victim = Victim(model, variables, attack)
    >>> judge(key, victim, FinePruning(), dataset).metrics["asr_nt"]
    """
    data = Splits(data.train, data.clean, data.test)
    needs = ("variables",) if defense is None else defense.needs
    for part in needs:
        if getattr(victim, part) is None and part != "attack":  # a clean net has none
            who = "to measure a net" if defense is None else type(defense).__name__
            raise BadInput(f"{who} needs the victim's {part}: Victim(…, {part}=…)")
    done = Judgement({}, {}) if defense is None else defense.judged(key, victim, data)
    if not measured or isinstance(data.test.label, Unlabelled):
        return done
    found, arrays = dict(done.metrics), dict(done.arrays)
    if not isinstance(defense, InputFilter):  # what passes a filter is measured there
        left = victim
        if defense is not None and done.variables is not None:
            left = victim._replace(model=defense.wrap(victim.model), variables=done.variables)
        numbers, curves = measure(key, left, data)
        found, arrays = {**numbers, **found}, {**curves, **arrays}
    return Judgement(found, arrays, done.variables)


def trained_on(victim: Victim, data: Splits) -> TrainSet:
    """The very rows that a victim of this key was trained on; of an attack that makes images of its
    own there are none (`sweep.check` refuses it).
    """
    key = poisoning_key(victim.key)
    return poisoned_set(key, data.train, victim.attack, victim.model.classes)


def measure(key: jax.Array, victim: Victim, data: Splits) -> tuple[dict, dict]:
    """ACC and ASR of a net as every row has them: scalars and arrays."""
    model, variables = victim.model, victim.variables
    found = evaluate(key, model, variables, data.test, victim.attack)
    found["acc_test"] = found.pop("acc")
    if data.train is not None:
        answers = metrics.labels(predict(model, variables, data.train.image))
        found["acc_train"] = metrics.accuracy(answers, jnp.asarray(data.train.label))
    return split_scalars(found)


def targets_flagged(flagged: Array, targets: Array) -> Any:
    """The share of the targets `[..., K]` that are among the labels `flagged: [..., K]`."""
    return (flagged & targets).sum(-1) / targets.sum(-1)


def split_scalars(found: Mapping[str, Any]) -> tuple[dict, dict]:
    """The scalars of a nested dict, and its arrays, by dotted name."""
    scalars, arrays = {}, {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            inner = split_scalars(value)
            scalars |= {f"{name}.{k}": v for k, v in inner[0].items()}
            arrays |= {f"{name}.{k}": v for k, v in inner[1].items()}
        elif value is not None:
            (scalars if jnp.ndim(value) == 0 else arrays)[name] = jnp.asarray(value)
    return scalars, arrays


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
