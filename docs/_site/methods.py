"""The pages of methods, made from the registry and the committed rows: a page a method, an index a
kind.
"""

import dataclasses
import functools
import hashlib
import inspect
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from notebooks import CACHE
from results import MATRIX, ZOO, cell_of, committed, runs, setting, table_of

from bdjax import datasets, experiment, latex, plots, registry, report
from bdjax.defenses import base
from bdjax.models.shamshiri import Ffnn
from bdjax.registry import Entry
from bdjax.rows import Rows
from bdjax.train import Recipe, stamped, unit
from bdjax.types import Range, Split

KINDS = {
    "attack": "Attacks",
    "defense": "Defenses",
    "model": "Nets",
    "dataset": "Data sets",
}
RETURNS = {
    base.Training: "a trained net (`Repaired`)",
    base.Repair: "a repaired net (`Repaired`)",
    base.Inversion: "a verdict on the net, with reversed triggers (`Verdict`)",
    base.Judge: "a verdict on the net (`Verdict`)",
    base.InputFilter: "a score and a flag for each input (`Scores`)",
    base.SampleFilter: "the suspects among the training rows (`Suspects`)",
}
"""What a kind returns; the first that fits."""
NEEDS = {
    "train": "the attacker's training rows, clean images, the recipe",
    "samples": "the net, and the rows that it was trained on",
}
HEADS = {
    "Presets": "Presets",
    "Differs from the paper": "Differs from the paper",
    "Differs from": "Differs",
    "Decides most": "What decides most",
    "`info`": "What it reports",
    "Verdict": "Verdict",
    "Reference": "",
}


def place(entry: Entry) -> str:
    """Where the page of a method lies."""
    return f"methods/{entry.kind}s/{entry.name}.md"


def pages() -> Iterator[tuple[str, str | bytes]]:
    """Every page and picture, by its place in the site."""
    for kind in KINDS:
        found = [e for e in registry.entries(kind) if not e.plugin]  # no experiment's own
        yield f"methods/{kind}s/index.md", index(kind, found)
        for entry in found:
            picture = _fired(entry) if kind == "attack" else None
            yield place(entry), page(entry, picture is not None)
            if picture is not None:
                yield f"methods/{kind}s/{entry.name}.png", picture


def index(kind: str, found: list[Entry]) -> str:
    """All methods of a kind in a table; defenses by what they return."""
    lines = [f"# {KINDS[kind]}", ""]
    lines += [
        "Made from the registry: `bdjax list` shows the same. A method's class is its "
        "hyper-parameters, its flags on the command line and its entry here; what follows `name:` "
        "is a preset.",
        "",
    ]
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(_returns(entry.cls) if kind == "defense" else "", []).append(entry)
    for group, some in groups.items():
        if group:
            lines += [f"## Returns {group}", ""]
        rows = [
            [f"[`{e.name}`]({e.name}.md)", _summary(e), _cited(e), ", ".join(_presets(e))]
            for e in some
        ]
        lines += [table_of(["name", "what it does", "paper", "presets"], rows, 4), ""]
    return "\n".join(lines)


def page(entry: Entry, picture: bool) -> str:
    """All that is known of a method: from its class, and from rows."""
    first, *rest = (inspect.getdoc(entry.cls) or "").split("\n\n")
    lines = [f"# {entry.name}", "", _plain(first), ""]
    if picture:
        lines += [
            f"![Test images of Fashion-MNIST, as they are and as {entry.name} fires its trigger]"
            f"({entry.name}.png)",
            "",
        ]
    lines += [*_facts(entry), ""]
    body, sections = [], []
    for paragraph in rest:
        text = " ".join(paragraph.split())
        head = next((h for h in HEADS if text.startswith(h)), None)
        if head is None:
            (sections[-1][1] if sections else body).append(_plain(paragraph))
        elif HEADS[head]:
            told = re.sub(r"^[^:]*: ", "", text, count=1) if text.startswith(f"{head}:") else text
            sections.append((HEADS[head], [_plain(told[0].upper() + told[1:])]))
    if body:
        lines += ["## How it works", "", "\n\n".join(body), ""]
    for head, texts in sections:
        lines += [f"## {head}", "", "\n\n".join(texts), ""]
    lines += ["## Fields", "", *_fields(entry), ""]
    lines += _fared(entry)
    if (source := latex.reference(entry)) is not None:
        lines += ["## BibTeX", "", f"```bibtex\n{latex._entry(source, source.key)}```", ""]
    return "\n".join(lines)


def _summary(entry: Entry) -> str:
    """The first sentence of a docstring, without the citation."""
    first = " ".join((inspect.getdoc(entry.cls) or "").partition("\n\n")[0].split())
    first = re.sub(r" \([^()]*\d{4}[^()]*\)", "", first)
    return _plain(re.split(r"(?<=[.:;]) ", first)[0].rstrip(".:;"))


def _plain(text: str) -> str:
    """A docstring's text as Markdown: what stands in it alone means nothing there."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_|<>\[\]])", r"\\\1", part) for part in parts
    )


def _cited(entry: Entry) -> str:
    if entry.year is None:
        return ""
    text = f"{entry.paper}, {entry.year}"
    return f"[{text}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else text


def _presets(entry: Entry) -> Mapping[str, Mapping[str, Any]]:
    return getattr(entry.cls, "presets", {})


def _returns(cls: Any) -> str:
    return next(words for kind, words in RETURNS.items() if issubclass(cls, kind))


def _facts(entry: Entry) -> list[str]:
    source = latex.reference(entry)
    rows = []
    if entry.year is not None:
        title = f", *{_plain(source.title)}*" if source is not None and source.title else ""
        rows.append(["paper", _cited(entry) + title])
    if entry.kind == "defense":
        cls: Any = entry.cls
        rows.append(["needs", NEEDS.get(cls.stage, "the net, and clean images of the defender")])
        rows.append(["returns", _returns(cls)])
    flags = {
        "attack": f"bdjax train --attack {entry.name} --out victim",
        "defense": f"bdjax defend victim --defense {entry.name}",
        "model": f"bdjax train --model {entry.name} --out victim",
        "dataset": f"bdjax train --dataset {entry.name} --out victim",
    }
    rows.append(["command line", f"`{flags[entry.kind]}`"])
    rows.append(["Python", f'`bdjax.make("{entry.kind}", "{entry.name}")`'])
    rows.append(["source", f"`{entry.file}`, class `{entry.cls.__name__}`"])
    return [table_of(["", ""], rows, 2)]


def _fields(entry: Entry) -> list[str]:
    """Each field with its default, its range, and what the presets give it."""
    presets = _presets(entry)
    cls: Any = entry.cls
    hints = registry.hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else "…"
        limit = next((one for _, one in registry.ranges(hints[field.name]) if one), None)
        given = [_value(p[field.name]) if field.name in p else "" for p in presets.values()]
        static = "compiled in" if registry.is_static(field) else "batched"
        rows.append([f"`{field.name}`", _value(default), _range(limit), static, *given])
    if not rows:
        return ["It has none."]
    heads = ["field", "default", "range", "in a sweep", *(f"`{name}`" for name in presets)]
    note = "Empty under a preset: the default. *Batched* fields may differ within one program."
    return [table_of(heads, rows, len(heads)), "", note]


def _value(value: Any) -> str:
    text = "…" if value is dataclasses.MISSING else _short(registry.describe(value))
    return f"`{text}`"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        name = value.get("name") or value.get("class") or value.get("function") or ""
        return f"{name.rpartition('.')[2]}(…)" if name else "…"
    if isinstance(value, list):
        text = ", ".join(map(_short, value))
        return f"({text})" if len(text) < 40 else f"({len(value)} values)"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _range(limit: Range | None) -> str:
    if limit is None:
        return ""
    return f"[{limit.low:.6g}, {limit.high:.6g}]"


# --- A picture of what an attack does ---


@functools.cache
def _sample() -> Any:
    """Images of the embedded sample in three channels, so that colours show."""
    data = datasets.load("fashion-mnist-sample", train_size=600, test_size=100)
    colour = lambda split: Split(np.repeat(np.asarray(split.image), 3, -1), split.label)  # noqa: E731
    return colour(data.train), colour(data.test), data.classes


def _fired(entry: Entry) -> bytes:
    """Some test images under the attack's default, as it is fired, and the difference. Kept by the
    code of the attack.
    """
    code = hashlib.sha256(Path(entry.source).read_bytes() + Path(__file__).read_bytes())
    kept = CACHE / "pictures" / f"{entry.name}-{code.hexdigest()[:16]}.png"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(_drawn(entry))
    return kept.read_bytes()


def _drawn(entry: Entry) -> bytes:
    train, test, classes = _sample()
    attack: Any = registry.make("attack", entry.name)
    key = jax.random.key(0)
    if attack.trains:  # its trigger is made for a net: a small one
        from bdjax.models.layers import build

        attack = registry.on_cpu(entry)
        model = build(Ffnn(hidden=(32,)), train.image.shape[1:], classes)
        recipe = Recipe(epochs=2, batch=32)
        attack = attack.train(key, model, recipe, train)[0]
    else:
        attack = attack.bind(train)
    image = test.image[:4]
    kinds = [1 + i % attack.triggers for i in range(len(image))]
    every = {k: np.asarray(stamped(attack, k, image, key)) for k in set(kinds)}
    trojan = np.stack([every[kind][i] for i, kind in enumerate(kinds)])
    out = io.BytesIO()
    plots.stamped(unit(image), trojan).savefig(out, format="png", dpi=96)
    return out.getvalue()


# --- How it fared ---


def _fared(entry: Entry) -> list[str]:
    """What the committed rows of the zoos say of an attack or a defense."""
    made = {"attack": _attack_rows, "defense": _defense_rows}.get(entry.kind)
    found = [] if made is None else made(entry)
    return [] if not found else ["## How it fared in our experiments", "", *found, ""]


@functools.cache
def _matrix() -> tuple[Rows, dict[str, Any], Any]:
    rows = Rows(committed(MATRIX))
    module = experiment.load("defense_zoo")
    return rows, module.matrix(report.valid(rows))[1], module


def _defense_rows(entry: Entry) -> list[str]:
    """Each victim of the matrix under each form of this defense."""
    rows, found, module = _matrix()
    here = {
        name: line
        for name, line in found.items()
        if any(row["defense"] == entry.name for row in line.values())
    }
    tables = dict.fromkeys(table for line in here.values() for table in line)
    if not tables:
        return []
    before = found[module.BEFORE]
    lines = [
        [table, module.short(before[table]), *(module.short(line[table]) if table in line else ""
                                               for line in here.values())]
        for table in tables
        if table in before
    ]  # fmt: skip
    judge = issubclass(entry.cls, base.Judge)
    said = "ACC / ASR_nt in % with the defense on"
    if judge:
        said = "✓ infected, ? seeds that disagree, ✗ else, and the index"
    mine = [row for row in rows if row["table"] in tables]
    return [
        table_of(["victim", "no defense", *here], lines, 1),
        "",
        f"{said}; without a defense ACC / ASR_nt. {setting(mine)} {runs(mine)} From the "
        "[matrix of defenses and attacks](../../results/defenses.md); *no attack* shows false "
        "alarms and what the defense costs.",
    ]


def _attack_rows(entry: Entry) -> list[str]:
    rows = Rows(committed(ZOO)).done
    mine = [row for row in rows if row["attack"] == entry.name]
    names = ("acc_test", "asr_all", "asr_nt")
    lines = [
        [line["row"], table["name"], f"`{line['model']}`", str(line["n"])]
        + [cell_of(name, line) for name in names]
        for table in report.aggregate(mine)
        for line in table["rows"]
    ]
    if not lines:
        return []
    heads = ["as", "data", "net", "n", *map(report.label_of, names)]
    return [
        table_of(heads, lines, 3),
        "",
        f"Mean ± s.d. over n runs; *p* = the paper's number. {setting(mine)} From [every "
        "attack](../../results/attacks.md). What "
        "defenses do to it: [the matrix](../../results/defenses.md).",
    ]
