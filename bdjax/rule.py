"""The one rule by which an audit says *infected*, *undecided* or *no sign*."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdjax import metrics
from bdjax.types import Word, class_name

MOVES = 0.9
"""The share of other labels' held-out images that the trigger of a backdoor moves, at least."""


class Seed(NamedTuple):
    """What one seed of a judge says: `p_value`, NaN where it has none; the `labels` that it calls
    targets, the first one the most suspicious; and, of those that it has a trigger for, the share
    of other labels' held-out images that it moves there.
    """

    p_value: float
    labels: tuple[int, ...] = ()
    moved: Mapping[int, float] = {}


class Decision(NamedTuple):
    """What the rule says: the `word`; why, in a sentence; on which judge and label that rests; and
    the smallest p-value, corrected for the number of judges, NaN where none has one.
    """

    word: Word
    reason: str
    judge: str | None = None
    label: int | None = None
    p_value: float = math.nan


def decide(
    said: Mapping[str, Sequence[Seed]], alpha: float, complete: bool, names: Sequence[str] = ()
) -> Decision:
    """The one rule. `said`: of each judge what its seeds say; `complete`: whether one search for
    triggers was over all labels.

    Only judges with a p-value count, J of them; that of several seeds is `metrics.combined_p`. A
    judge *accuses* where Holm's (1979) step-down procedure rejects its null at `alpha`, a seed
    where its own p, times what its judge's is multiplied by there (J, if that does not accuse), is
    at most `alpha`.

    - *infected*: a judge accuses; all its accusing seeds name a label in common; and its trigger
      for that moves `MOVES` of other labels' held-out images.
    - *undecided*: a judge accuses, but its seeds have no label in common, or two judges have none,
      or its trigger moves fewer, or it has none; or some seed accuses and its judge does not; or
      the time ran out before one search was complete; or no judge has a p-value.
    - *no sign*: else.
    """
    p = {name: combined([seed.p_value for seed in seeds]) for name, seeds in said.items()}
    p = {name: value for name, value in p.items() if not math.isnan(value)}
    if not p:
        why = "no judge has a p-value here" if complete else _OUT_OF_TIME
        return Decision("undecided", why)
    order = sorted(p, key=lambda name: p[name])
    first, least = order[0], min(1.0, p[order[0]] * len(p))
    times, guilty = dict.fromkeys(order, len(p)), []
    for i, name in enumerate(order):
        if p[name] * (len(p) - i) > alpha:
            break
        times[name] = len(p) - i
        guilty.append(name)
    accusing = {
        name: [seed for seed in said[name] if seed.p_value * times[name] <= alpha] for name in p
    }
    if not guilty:
        torn = [name for name in order if accusing[name]]
        if torn:
            some, all_ = len(accusing[torn[0]]), len(said[torn[0]])
            why = f"{some} of {all_} seeds of {torn[0]} accuse the net, together they do not"
            return Decision("undecided", why, torn[0], None, least)
        if not complete:
            return Decision("undecided", _OUT_OF_TIME, None, None, least)
        return Decision("no sign", "no judge accuses the net", None, None, least)
    named = {name: _common(accusing[name]) for name in guilty}
    if not named[first]:
        why = f"the seeds of {first} accuse the net, but name no label in common"
        return Decision("undecided", why, first, None, least)
    for other in guilty[1:]:
        if named[other] and not set(named[other]) & set(named[first]):
            mine, theirs = (class_name(named[name][0], names) for name in (first, other))
            why = f"{first} names {mine}, {other} {theirs}"
            return Decision("undecided", why, first, None, least)
    moved = {
        label: max((seed.moved.get(label, math.nan) for seed in accusing[first]), key=or_least)
        for label in named[first]
    }
    label = max(moved, key=lambda label: or_least(moved[label]))
    what = class_name(label, names)
    if math.isnan(moved[label]):
        why = f"{first} accuses the net of {what}, but has no trigger to show"
        return Decision("undecided", why, first, label, least)
    share = f"its trigger moves {100 * moved[label]:.1f} % of other labels' images to {what}"
    if moved[label] < MOVES:
        why = f"{first} accuses the net, but {share}: fewer than {100 * MOVES:.0f} %"
        return Decision("undecided", why, first, label, least)
    return Decision("infected", f"{first} accuses the net: {share}", first, label, least)


_OUT_OF_TIME = "the time ran out before a search for triggers was over all labels"


def combined(p: Sequence[float]) -> float:
    """One p-value of those of the seeds, see `metrics.combined_p`; NaN of none."""
    return _combined(tuple(p)) if len(p) > 1 else p[0] if p else math.nan


@functools.lru_cache(maxsize=1024)
def _combined(p: tuple[float, ...]) -> float:
    return float(metrics.combined_p(jnp.asarray(p, jnp.float32)))


def _common(seeds: Sequence[Seed]) -> tuple[int, ...]:
    """The labels that all seeds name, in the order of the first of them."""
    return tuple(k for k in seeds[0].labels if all(k in seed.labels for seed in seeds))


def or_least(share: float) -> float:
    """A share to sort by: what was not measured comes last."""
    return -1.0 if math.isnan(share) else share


def smallest(arrays: Mapping[str, np.ndarray]) -> int | None:
    """The label with the smallest norm among those whose trigger works, or the widest margin; None
    where there is none.
    """
    if "norms" not in arrays:
        return int(arrays["margins"].argmax()) if "margins" in arrays else None
    norms = np.where(able(arrays) & np.isfinite(arrays["norms"]), arrays["norms"], np.inf)
    return int(norms.argmin()) if np.isfinite(norms).any() else None


def able(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The labels whose trigger works: `[K]` bool."""
    return np.asarray(arrays.get("qualified", np.ones(len(arrays["flagged"]))), bool)


def seed_of(arrays: Mapping[str, np.ndarray], null: tuple[float, int | None] | None = None) -> Seed:
    """What a step of a judge says, as the rule reads it. `null`: its p-value, and of which label,
    where references say so; else it is the judge's own, of the label that comes first.
    """
    p_value, first = (float(arrays["p_value"]), smallest(arrays)) if null is None else null
    flagged = np.flatnonzero(arrays["flagged"]).tolist()
    if "norms" in arrays:
        flagged.sort(key=lambda k: arrays["norms"][k])
    named: list[int] = [*([] if first is None else [first]), *flagged]
    labels = tuple(dict.fromkeys(named))
    moved: dict[int, float] = {}
    if "moved" in arrays:
        for k, share, valid in zip(arrays["label"], arrays["moved"], arrays["valid"], strict=True):
            if valid and or_least(float(share)) > or_least(moved.get(int(k), math.nan)):
                moved[int(k)] = float(share)
    return Seed(p_value, labels, moved)
