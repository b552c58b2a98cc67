"""The pictures of a study that draws none itself: what is stamped, what each kind of defense saw,
and the outcome over what varies.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bdjax import plots
from bdjax.registry import describe, revive
from bdjax.report import ABOVE, WORKS, Figure, faults, label_of, valid
from bdjax.rows import Rows, lookup, measured, paths
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.train import measuring_key, stamped, unit
from bdjax.types import Attack, BadInput, class_name

MOST = 12
"""Rows of which pictures are drawn."""
SHOWN = 6
"""Images that are shown stamped."""
LINES = 8
"""Lines in a plot, and heat maps of a metric."""


def figures(
    rows: Iterable[Mapping[str, Any]], store: Store, cells: Iterable[Cell] = ()
) -> list[Figure]:
    """Of `cells`: images as their attacks stamp them. Of `rows`: a defense's scores, norms,
    reversed triggers and pruning curves, for the first seed of each row; ASR and accuracy over each
    number that varies, two of them as heat maps; which victims are valid. What the store has no
    arrays of is left out.
    """
    rows = Rows(rows)
    found, tables = [*_stamped(cells)], rows.by("table")
    for (table, row), some in list(rows.done.by("table", "row").items()):
        if kept := some.arrays(store)[:1]:
            found += _defense(f"{table}: {row}" if len(tables) > 1 else row, *kept[0])
        if len(found) > MOST:
            break
    found += _axes(Rows(valid(rows)))
    found += _validity(rows)
    return apart(found)


def apart(figures: Iterable[Figure]) -> list[Figure]:
    """Figures that differ in name: NAME, NAME-2 …"""
    found, names = list(figures), Counter[str]()
    for i, one in enumerate(found):
        names[one.name] += 1
        if names[one.name] > 1:
            found[i] = one._replace(name=f"{one.name}-{names[one.name]}")
    return found


def _stamped(cells: Iterable[Cell]) -> Iterator[Figure]:
    one_of: dict[Any, tuple[Cell, Attack]] = {}
    for cell in cells:
        if cell.attack is not None and not cell.attack.trains:
            looks = {k: v for k, v in describe(cell.attack).items() if k not in ("rate", "cover")}
            one_of.setdefault((repr(looks), cell.dataset), (cell, cell.attack))
    for cell, attack in list(one_of.values())[:MOST]:
        data = cell.dataset.load()
        attack = attack.bind(data.train)
        image, key = data.test.image[:SHOWN], measuring_key(jax.random.key(cell.seed))
        kinds = [1 + i % attack.triggers for i in range(len(image))]
        try:
            every = {k: np.asarray(stamped(attack, k, image, key)) for k in set(kinds)}
        except BadInput:  # its trigger has yet to be made
            continue
        trojan = np.stack([every[kind][i] for i, kind in enumerate(kinds)])
        name, caption = f"stamped-{slug(cell.row)}", f"As it is fired, at seed {cell.seed}."
        picture = plots.stamped(unit(image), trojan)
        yield Figure(name, f"Stamped images: {cell.row}", caption, picture)


def _defense(title: str, row: Mapping[str, Any], arrays: Mapping[str, Any]) -> Iterator[Figure]:
    name, found = slug(title), row["metrics"]
    names = _names(row) if {"norms", "mask"} & arrays.keys() else ()
    if "score_clean" in arrays and "score_trojan" in arrays:
        scores = (arrays["score_clean"], np.ravel(arrays["score_trojan"]))
        picture = plots.entropies(*scores, found.get("boundary"), "score; low = suspicious")
        yield Figure(f"scores-{name}", f"{title}: scores", "First seed.", picture)
    norms = arrays.get("norms")
    if norms is not None and np.ndim(norms) == 1 and np.isfinite(norms).any():
        what = {} if "mask" in arrays else {"what": "size of the trigger"}
        picture = plots.norms(
            norms, arrays.get("index"), arrays.get("flagged"), _target(row), names, **what
        )
        yield Figure(f"norms-{name}", f"{title}: norms of the labels", "First seed.", picture)
    mask, pattern = arrays.get("mask"), arrays.get("pattern")
    if mask is not None and pattern is not None and np.ndim(mask) == np.ndim(pattern) == 4:
        size, count = mask.sum((1, 2, 3)), len(mask)
        at = np.arange(count) if count <= 10 else np.sort(np.argsort(size)[:10])
        labels = arrays.get("label", arrays.get("candidate_label", np.arange(count)))
        called = [class_name(int(k), names) for k in labels[at]]
        flagged = arrays.get("flagged")
        marked = None if flagged is None or len(flagged) != count else flagged[at]
        caption = "Mask ⊙ pattern and the L1 of the mask" + (
            "" if count <= 10 else ", the smallest"
        )
        picture = plots.triggers(mask[at], pattern[at], size[at], called, marked)
        yield Figure(f"triggers-{name}", f"{title}: reversed triggers", f"{caption}.", picture)
    if "acc_curve" in arrays and "asr_curve" in arrays:
        acc, asr = arrays["acc_curve"], arrays["asr_curve"]
        picture = plots.pruning(np.arange(len(acc)), acc, asr, found.get("pruned"))
        yield Figure(f"pruning-{name}", f"{title}: pruning", "First seed, test images.", picture)


def slug(text: str) -> str:
    """A text as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


def _names(row: Mapping[str, Any]) -> Sequence[str]:
    """The classes' names, where the row's data are at hand and small."""
    described = (row.get("config") or {}).get("dataset")
    try:
        return revive("dataset", described, {}).load().names
    except (BadInput, KeyError, TypeError, AttributeError):
        return ()


def _target(row: Mapping[str, Any]) -> int | None:
    attack = (row.get("config") or {}).get("attack") or {}
    plain = attack.get("labels", "all-to-one") != "all-to-all" and attack.get("target")
    return plain if isinstance(plain, int) and not isinstance(plain, bool) else None


def _axes(rows: Rows) -> Iterator[Figure]:
    """ASR and accuracy over each number that varies, a line for each of what else does; over two
    numbers at once heat maps.
    """
    tags = dict.fromkeys(tag for row in rows for tag in row.get("tags") or {})
    others = [tag for tag in tags if len(_numbers(rows, tag)) < 2]
    axes = [tag for tag in tags if tag not in others]
    if not axes:
        axes, others = _within(rows), ["row"]
    for metric in ("asr_nt", "acc_test"):
        label = label_of(metric)
        for axis in axes if len(axes) != 2 else ():
            rest = [tag for tag in axes if tag != axis] + others
            values, lines = _numbers(rows, axis), _lines(rows, axis, rest)
            drawn = {
                name: [each.where(**{axis: value}).mean(metric) for value in values]
                for name, each in lines.items()
                if len(lines) <= LINES
            }
            if np.isfinite(np.array([*drawn.values()], float)).any():
                picture = plots.curves(values, drawn, None, axis, label, percent=True)
                yield Figure(f"{metric}-{slug(axis)}", f"{label} over {axis}", "Mean over seeds.",
                             picture)  # fmt: skip
        if len(axes) != 2:
            continue
        x, y = axes
        for name, each in list(_lines(rows, x, others).items())[:LINES]:
            across, down = _numbers(each, x), _numbers(each, y)
            found = [[each.where(**{x: a, y: b}).mean(metric) for a in across] for b in down]
            if np.isfinite(np.array(found)).any():
                picture = plots.heat_map(found, across, down, x, y, label, percent=True)
                yield Figure(f"{metric}-{slug(name)}", f"{label}: {name}",
                             f"Over {x} and {y}. Mean over seeds; empty: no valid victim.",
                             picture)  # fmt: skip


def _numbers(rows: Rows, path: str) -> list[float]:
    """The numbers that a tag or field has in rows, in order."""
    found = {value for row in rows if isinstance(value := lookup(row, path), (int, float))}
    return sorted(found)


def _lines(rows: Rows, axis: str, others: Sequence[str]) -> dict[str, Rows]:
    """The rows that have a number on the axis, by all else that varies, in words."""
    some = Rows(row for row in rows if isinstance(lookup(row, axis), (int, float)))
    found: dict[str, Rows] = {}
    for name, each in (some.by(*others) if others else {"all": some}).items():
        words = ", ".join(map(str, name)) if isinstance(name, tuple) else str(name or "all")
        found[words] = each
    return found


def _within(rows: Rows) -> list[str]:
    """The fields of the configuration that differ among the rows of one name, as in a grid."""
    found: dict[str, None] = {}
    for some in rows.by("table", "row").values():
        for path in paths(some[0]):
            if "." in path and len(_numbers(some, path)) > 1:
                found[path] = None
    return list(found)


def _validity(rows: Rows) -> Iterator[Figure]:
    """Whether each attack works, beside what the same trigger does to the clean twin."""
    bad = faults(rows)
    victims = [row for row in rows.done if row.get("attack") and not row.get("defense")]
    victims = [row for row in victims if measured(row["metrics"].get("asr_nt"))]
    lines: dict[str, list[tuple[float, float, bool]]] = {}
    for row in victims:
        twin = (row.get("twin") or {}).get("asr_nt")
        point = row["metrics"]["asr_nt"], np.nan if twin is None else twin, row["run"] in bad
        lines.setdefault(str(row.get("row")), []).append(point)
    if 0 < len(lines) <= 3 * MOST:
        picture = plots.validity(lines, WORKS)
        caption = (
            f"ASR nt of each victim, and of its clean twin under the same trigger. A cross: the "
            f"attack failed (below {100 * WORKS:.0f} %, or within {100 * ABOVE:.0f} points of the "
            "twin), or the net collapsed; no claim and no count uses what was done to it."
        )
        yield Figure("validity", "Which victims are valid", caption, picture)
