"""The page of an audit: one self-contained file, the verdict first."""

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bdjax import plots, registry
from bdjax.report import TONES, Figure, draw, embedded, templates
from bdjax.rows import measured
from bdjax.types import class_name

if TYPE_CHECKING:
    from bdjax.audits import Audit

DRAWN = 60
"""The most labels whose norms are drawn; of more, only those that were searched to the end."""


class Blind(NamedTuple):
    """What a judge assumes, and what it cannot see."""

    assumes: str
    blind: str


BLIND = {
    "neural-cleanse": Blind(
        "the backdoor's label is reached from all others by a far smaller patch than any other "
        "label",
        "triggers over the whole image or over much of it, filters and warps; source-specific "
        "backdoors; backdoors for most labels at once. A label that is easy by nature looks alike "
        "unless clean nets are at hand (--reference).",
    ),
    "abs": Blind(
        "one neuron, once it fires, lifts the target label whatever the image shows",
        "backdoors that need several neurons at once. It has no p-value: clean nets have such "
        "neurons, too.",
    ),
    "deep-inspect": Blind(
        "a generator reaches the backdoor's label by a smaller perturbation than the others",
        "what Neural Cleanse cannot see; and it works on images that the net made up.",
    ),
    "mesa": Blind(
        "a patch of a given small side works wherever it stands",
        "larger triggers, and those that work at one place alone. It has no p-value.",
    ),
    "mm-bd": Blind(
        "the backdoor's label is won by a wider margin than any other, whatever the image",
        "backdoors for most labels at once, and those trained so that margins stay alike. A label "
        "that is easy by nature looks alike. It shows no trigger: it can ask for a closer look, "
        "but convicts nobody.",
    ),
    "mntd": Blind(
        "a backdoored net answers tuned queries as shadow nets with random backdoors do",
        "nets trained by another recipe, or on other data, than its shadow nets. It names no label "
        "and shows no trigger: it can ask for a closer look, but convicts nobody.",
    ),
}


def page(found: "Audit") -> str:
    """The HTML of an audit."""
    from bdjax.audits import leading, null_words, power_words

    about = found.about
    pictures = [{"id": one.name, **embedded(one)} for one in draw(_figures(found))]
    environment = templates()
    environment.filters |= {"number": _number, "percent": _percent}
    judges = [
        {
            **judge, "leading": leading(judge), "tone": TONES[judge["word"]],
            "blind": BLIND.get(judge["judge"]), "about": _first_line(judge["judge"]),
        }
        for judge in about["judges"]
    ]  # fmt: skip
    labels = list(_labels(about))
    comparing = [one for one in judges if any(one["judge"] in row["by"] for row in labels)]
    return environment.get_template("audit.html.j2").render(
        about=about, net=about["net"], data=about["data"], verdict=about["verdict"],
        tone=TONES[about["verdict"]["word"]], facts=list(_facts(about)), judges=judges,
        labels=labels, comparing=comparing, pictures=pictures, null=null_words(about),
        power=power_words(about), repair=_repair(found),
    )  # fmt: skip


def _facts(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    net, data, verdict = about["net"], about["data"], about["verdict"]
    yield "net", net["name"]
    yield "images", "×".join(map(str, net["shape"]))
    yield "classes", f"{net['classes']:,}"
    yield "parameters", f"{net['parameters']:,}"
    how = "labelled" if data["labelled"] else "labelled by the net"
    yield (
        "clean images",
        f"{data['name']}: {data['searched']} to search, {data['held']} held out, {how}",
    )
    if data["accuracy"] is not None:
        yield "accuracy", _percent(data["accuracy"])
    if verdict["word"] != "infected" and verdict["suspect"] is not None:
        yield "suspect", class_name(verdict["suspect"], data["names"])
    yield "smallest p, corrected", _number(verdict["p_value"])
    yield "accuses at", f"p ≤ {about['alpha']:g}"
    if (references := about["references"]) is not None:
        yield (
            "references",
            (
                f"{references['each']} clean nets of accuracy {_percent(references['accuracy'])}, "
                f"{references['took']} planted backdoors that work"
            ),
        )
    yield "time", f"{about['seconds'] / 60:.1f} min"


def _labels(about: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each label, with its norm by each judge that compares norms; few of many labels."""
    rows: dict[int, dict[str, Any]] = {}
    for judge in about["judges"]:
        for entry in judge["labels"]:
            if not measured(entry["norm"]):  # of a judge that has no triggers
                continue
            row = rows.setdefault(
                entry["label"], {"label": entry["label"], "name": entry["name"], "by": {}}
            )
            row["by"][judge["judge"]] = entry
    yield from (rows[label] for label in sorted(rows))


def _figures(found: "Audit") -> Iterator[Figure]:
    from bdjax.audits import triggers

    about, steps, names = found.about, found.steps, found.about["data"]["names"]
    for judge in about["judges"]:
        arrays = steps[f"{judge['judge']}-0"]
        if "norms" not in arrays:
            continue
        searched = np.flatnonzero(np.isfinite(arrays["norms"]))
        if not 0 < len(searched) <= DRAWN:
            continue
        picture = plots.norms(arrays["norms"][searched], None, arrays["flagged"][searched])
        called = [class_name(int(k), names) for k in searched]
        picture.axes[0].set_xticks(range(len(called)), called, rotation=40, ha="right")
        name = judge["judge"]
        title, caption = f"{name}: size of each label's trigger", "First seed; flagged: hatched."
        yield Figure(f"norms-{name}", title, caption, picture)
    shown = triggers(found)[:10]
    if shown:
        picture = plots.triggers(
            [t.mask.max(-1, keepdims=True) for t in shown], [t.pattern for t in shown],
            [t.norm for t in shown],
            [f"{t.judge}: {class_name(t.label, names)}, {_percent(t.moved)}" for t in shown],
            [t.accused for t in shown],
        )  # fmt: skip
        caption = "Mask ⊙ pattern, its size, and the share of other labels' held-out images moved."
        yield Figure("triggers", "The triggers that move most", caption, picture)
    if (arrays := steps.get("pictures-0")) is None:
        return
    label = class_name(int(arrays["label"]), names)
    by = str(arrays["judge"])
    yield Figure(
        "stamped", f"The trigger of {by} for {label}, on your images",
        "As they are, with the trigger, and the difference.",
        plots.stamped(arrays["image"], arrays["stamped"]),
    )  # fmt: skip
    if "act_clean" in arrays and min(len(arrays["act_clean"]), 4096) == len(arrays["act_clean"]):
        means = {"clean images": arrays["act_clean"], "with the trigger": arrays["act_trojan"]}
        yield Figure("activations", "Activations", "A backdoor often has channels of its own, dark "
                     "on clean images.", plots.activation_maps(means))  # fmt: skip
    yield Figure(
        "entropies", "Entropy of blends with other images",
        "A trigger that keeps the answer certain whatever it is blended with, left, acts as a "
        "backdoor's does.",
        plots.entropies(arrays["entropy_clean"], arrays["entropy_trojan"]),
    )  # fmt: skip


def _first_line(judge: str) -> str:
    try:
        text = registry.get("defense", judge).cls.__doc__ or ""
    except ValueError:  # of a plugin that is not at hand
        return ""
    return " ".join(text.partition("\n\n")[0].split())


def _repair(found: "Audit") -> str:
    from bdjax.audits import triggers

    words = ["bdjax", "repair", found.given[0], "--dataset", found.given[1]]
    words += ["--audit", str(found.folder)] if found.folder and triggers(found) else []
    return shlex.join([*words, "--out", "repaired"])


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "—"
    return "∞" if value == math.inf else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "—" if share is None or math.isnan(share) else f"{100 * share:.1f} %"
