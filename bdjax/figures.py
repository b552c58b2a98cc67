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
from bdjax.report import Figure, label_of, valid
from bdjax.rows import Rows, lookup
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.train import measuring_key, stamped, unit
from bdjax.types import Attack, BadInput, class_name

MOST = 12
"""Rows of which pictures are drawn."""
SHOWN = 6
"""Images that are shown stamped."""


def figures(
    rows: Iterable[Mapping[str, Any]], store: Store, cells: Iterable[Cell] = ()
) -> list[Figure]:
    """Of `cells`: images as their attacks stamp them. Of `rows`: a defense's scores, norms,
    reversed triggers and pruning curves, for the first seed of each row; ASR and accuracy over each
    number that varies. What the store has no arrays of is left out.
    """
    rows = Rows(rows)
    found, tables = [*_stamped(cells)], rows.by("table")
    for (table, row), some in list(rows.done.by("table", "row").items()):
        if kept := some.arrays(store)[:1]:
            found += _defense(f"{table}: {row}" if len(tables) > 1 else row, *kept[0])
        if len(found) > MOST:
            break
    found += _axes(Rows(valid(rows)))
    names = Counter[str]()
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
        picture = plots.norms(
            norms, arrays.get("index"), arrays.get("flagged"), _target(row), names
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
    """ASR and accuracy over each number in the rows' tags, a line for each of the other tags."""
    tags = dict.fromkeys(tag for row in rows for tag in row.get("tags") or {})
    for axis in tags:
        some = Rows(row for row in rows if isinstance(lookup(row, axis), (int, float)))
        values = sorted(some.by(axis))
        others = [tag for tag in tags if tag != axis]
        lines = some.by(*others) if others else {"": some}
        if len(values) < 2 or len(lines) > 8:
            continue
        for metric in ("asr_nt", "acc_test"):
            drawn = {}
            for name, each in lines.items():
                words = ", ".join(map(str, name)) if isinstance(name, tuple) else str(name or "all")
                drawn[words] = [each.where(**{axis: value}).mean(metric) for value in values]
            if np.isfinite(np.array([*drawn.values()], float)).any():
                label = label_of(metric)
                picture = plots.curves(values, drawn, None, axis, label, percent=True)
                yield Figure(f"{metric}-{slug(axis)}", f"{label} over {axis}", "Mean over seeds.",
                             picture)  # fmt: skip
