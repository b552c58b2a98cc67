"""Rows of results as tables, figures and one self-contained page, the paper's number beside ours.

A row is one finished cell of `results.jsonl`; the rows of a table that share a name are its seeds,
shown as mean ± sample s.d. Rates are shares in [0, 1] in rows and in `table.csv`, and percentages
wherever a person reads them.
"""

import base64
import csv as table_writer
import difflib
import io
import itertools
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jinja2
import numpy as np
from matplotlib import figure
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bdjax import identity, metrics, plots, schema, shipped
from bdjax.own import beside, clear, kind, renamed
from bdjax.progress import kept, shown
from bdjax.registry import declare, declared, door
from bdjax.rows import Row, Rows, lookup, measured, paths
from bdjax.store import Store, result_files
from bdjax.types import BadInput, Count, Metric, Word, word

FIELDS = ("dataset", "model", "attack", "defense")
SHOWN = (*FIELDS, "verdict", "n")
"""What stands in columns of a table, or below it where it is the same in all rows."""
FIRST = ("acc_train", "acc_test", "asr_all", "asr_nt", "far", "frr")
"""Metrics that lead a table, in this order; the others follow as they appear."""
PAGES = ("table.csv", "table.md", "index.html")
"""What every report writes; a run's adds `report.json` and figures."""
MARKS = {"reproduced": "✓", "partly": "◐", "not": "✗", "open": "?"}
TONES = {"infected": "bad", "undecided": "fair", "no sign": "good"}
"""How a verdict is coloured."""
LEGEND = "paper → ours: mean ± sample standard deviation over n seeds; Δ = ours − paper."
OTHER = "made by other code than is at hand, and kept"
DPI = 144
PAGE, NAME, REMARKS = 132, 42, 52
"""Letters that stand side by side on a page of 1,280 pixels, in a row's name and in its remarks."""
PNG = b"\x89PNG\r\n\x1a\n"
WORKS, ABOVE = 0.5, 0.1
"""ASR_nt from which an attack works, and by how much it must exceed that on the clean twin."""
DROP = 0.05
"""Accuracy below the most accurate defense of a victim at which another is no answer."""


Shown = Literal["reproduced", "partly", "not", "open"]


class Trend(NamedTuple):
    """A claim of the paper, whether our numbers show it (`reproduced`, `partly` or `not`; `open`
    where there are none), and the numbers.
    """

    claim: str
    verdict: Shown
    numbers: str


class Figure(NamedTuple):
    """A figure of a page: its file's name, heading and caption, and the drawing, as `plots` makes
    it. A notebook shows it.
    """

    name: str
    title: str
    caption: str
    figure: figure.Figure

    def _repr_png_(self) -> bytes:
        return draw([self])[0].png


class Picture(NamedTuple):
    """A figure, drawn."""

    name: str
    title: str
    caption: str
    png: bytes


class Section(NamedTuple):
    """What a results folder brings to a page. `seconds`: by stage; `chosen`: rows shown once more,
    such as the best.
    """

    title: str
    rows: Sequence[Row]
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    trends: Sequence[Trend] = ()
    seconds: Mapping[str, float] = {}
    command: str | None = None
    chosen: Sequence[Row] = ()


# --- Which rows say something ---


def _fault(row: Row) -> str | None:
    """What is wrong with a victim, by its own row; None where nothing is, or it cannot be known:
    rows of 0.1 lack what it takes.
    """
    test, twin, found = row.get("test"), row.get("twin"), row["metrics"]
    acc, asr = found.get("acc_test"), found.get("asr_nt")
    if row.get("error") or not row.get("victim") or not isinstance(test, Mapping):
        return None
    if measured(acc) and acc <= metrics.chance(test["majority"], test["n"]):
        return (
            f"collapsed: ACC {100 * acc:.1f} %, the largest class is {100 * test['majority']:.1f} %"
        )
    if not _attacked(row) or not measured(asr):
        return None
    if asr < WORKS:
        return f"attack failed: ASR nt {100 * asr:.1f} %"
    clean = twin.get("asr_nt") if isinstance(twin, Mapping) else None
    if clean is not None and measured(clean) and asr - clean <= ABOVE:
        return f"attack failed: ASR nt {100 * asr:.1f} %, on the clean twin {100 * clean:.1f} %"
    return None


def _attacked(row: Row) -> bool:
    """Whether there is an attack, and it poisons anything: at rate 0 it only asks a clean net."""
    attack = (row.get("config") or {}).get("attack") or {}
    return bool(row.get("attack")) and attack.get("rate") != 0


@door
def faults(rows: Iterable[Row]) -> dict[str, str]:
    """What is wrong with the victims, by the run of their own rows and of all that was done to
    them: *collapsed*, no more accurate than a net that always answers the same; *attack failed*,
    ASR_nt below 50 %, or at most 10 points above what the same trigger does to the clean twin.

    Of a defense it is known where its victim's own row is among `rows`.
    """
    rows = list(rows)
    victims = {
        row["victim"]: fault
        for row in rows
        if not row.get("defense") and (fault := _fault(row)) is not None
    }
    return {r["run"]: victims[r["victim"]] for r in rows if r.get("victim") in victims}


@door
def valid(rows: Iterable[Row]) -> Rows:
    """`rows` without the defenses of victims with `faults`: what claims and counts may use."""
    rows = list(rows)
    bad = faults(rows)
    return Rows(row for row in rows if not row.get("defense") or row["run"] not in bad)


# --- From rows to tables ---


@door
def aggregate(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Tables `{name, metrics, rows}` in order of first appearance, with one row for all the seeds
    of a name.

    A row is `{row, experiment, scale, dataset, model, attack, defense, victim, n, failed, errors,
    verdict, invalid, faults, notes, metrics, seconds, oracle, redraw, substitute, other_code,
    marked}` and a metric `{n, mean, sd, paper, delta}`; `sd` is None for one seed, `paper` and
    `delta` where the paper has no number; `other_code` counts seeds, see `identity.kept`. Seeds of
    a defense whose victim has `faults` do not count, unless all are so: then the row is `invalid`.
    """
    rows = list(rows)
    bad, old = faults(rows), identity.kept(rows)
    scales = {row.get("scale") for row in rows}
    tables: dict[str, dict[tuple[Any, ...], list[Row]]] = {}
    for row in rows:
        # Rows of several scales, data sets, nets or methods never share a mean, whatever they are
        # called.
        name = (row.get("table") or "Results") + (
            f" ({row.get('scale')})" if len(scales) > 1 else ""
        )
        key = (row.get("row") or "", *(row.get(field) for field in FIELDS))
        tables.setdefault(name, {}).setdefault(key, []).append(row)
    return [
        _table(name, [_line(key[0], cells, bad, old) for key, cells in groups.items()])
        for name, groups in tables.items()
    ]


def _table(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    found = dict.fromkeys(metric for line in lines for metric in line["metrics"])
    whole = all(line["other_code"] == line["n"] for line in lines)
    for line in lines:
        line["marked"] = bool(line["other_code"]) and not whole  # where all are, it is said once
    return {
        "name": name,
        "metrics": [m for m in FIRST if m in found] + [m for m in found if m not in FIRST],
        "rows": lines,
    }


def _line(
    label: str, cells: list[Row], bad: Mapping[str, str], old: Container[str]
) -> dict[str, Any]:
    done = [cell for cell in cells if not cell.get("error")]
    odd = [cell for cell in done if cell["run"] in bad]
    lost = [cell for cell in odd if cell.get("defense")]
    invalid = bool(lost) and len(lost) == len(done)
    whole = len(done)
    done = done if invalid else [cell for cell in done if cell not in lost]
    reported: dict[str, Any] = {}
    for cell in cells:
        reported = dict(cell.get("reported") or {}) | reported
    names = dict.fromkeys([m for cell in done for m in cell["metrics"]] + list(reported))
    stats = {m: _stat([cell["metrics"].get(m) for cell in done], reported.get(m)) for m in names}
    return {
        "row": label,
        **{f: cells[0].get(f) for f in ("experiment", "scale", *FIELDS)},
        "victim": _victim(cells[0]),
        "n": len(done),
        "failed": len(cells) - whole,
        "errors": _different(cells, "error"),
        "verdict": _verdicts(done),
        "invalid": invalid,
        "faults": [
            ("" if len(odd) == whole else f"{len(odd)} of {whole} seeds: ") + "; ".join(reasons)
            for reasons in [list(dict.fromkeys(bad[cell["run"]] for cell in odd))]
            if reasons
        ],
        "notes": _settings(done) + _notes(done),
        "metrics": {m: stat for m, stat in stats.items() if stat["n"] or stat["paper"] is not None},
        "seconds": {
            part: _stat([c["seconds"].get(part) for c in done], None)["mean"]
            for part in ("compile", "run")
        },
        "oracle": any(cell.get("oracle") for cell in cells),
        "redraw": any(_redraws(cell) for cell in cells),
        "other_code": sum(cell["run"] in old for cell in done),
        "substitute": ", ".join(_different(cells, "substitute")) or None,
    }


def _victim(row: Row) -> str:
    """What the rows of a victim share, whatever its seed and what is done to it."""
    config = {k: v for k, v in (row.get("config") or {}).items() if k not in ("defense", "probe")}
    return json.dumps([config, *(row.get(field) for field in FIELDS[:3])])


def _redraws(row: Row) -> bool:
    """Whether the attacker's triggers were drawn anew in every step of the training."""
    return bool(((row.get("config") or {}).get("attack") or {}).get("redraw"))


def _settings(cells: Sequence[Row]) -> list[str]:
    """In what the settings of a line differ that stands for more than seeds."""
    if all(cell.get("config") == cells[0].get("config") for cell in cells):
        return []
    parts = tuple(f"{part}." for part in cells[0].get("config") or {})
    found = [path for path in axes(cells) if path.startswith(parts)]
    if not found:  # another method, which has a column of its own
        return []
    some = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return [f"a mean over settings that differ in {some}"]


def _notes(cells: Iterable[Row]) -> list[str]:
    """What was set in the rows, and what those of victims say of their poison and their twins."""
    found = []
    for cell in cells:
        if changed := cell.get("set"):
            found.append(
                "not as in the experiment: " + ", ".join(f"{k} {v}" for k, v in changed.items())
            )
        plan = cell.get("plan")
        if isinstance(plan, Mapping) and plan["poisoned"] < plan["asked"]:
            found.append(f"{plan['poisoned']} rows poisoned of {plan['asked']} asked for")
        found += _flags(cell)
        own = cell.get("victim") and _attacked(cell) and not cell.get("defense")
        if own and not cell.get("twin"):
            found.append("no twin")
    return list(dict.fromkeys(found))


def _flags(row: Row) -> list[str]:
    """Which labels a judge flags, and which are targets, by name."""
    said = row.get("labels") or {}
    words = [("flags", said.get("flagged")), ("target", said.get("target"))]
    text = ", ".join(f"{word} {' and '.join(some)}" for word, some in words if some)
    return [text] if text and said.get("flagged") else []


def _different(rows: Iterable[Row], field: str) -> list[str]:
    return list(dict.fromkeys(str(row[field]) for row in rows if row.get(field)))


def _verdicts(rows: Iterable[Row]) -> str | None:
    """What a judge said of a line's seeds: `infected`, or `2 infected, 1 undecided`."""
    found = [row["metrics"] for row in rows if measured(row["metrics"].get("infected"))]
    said = Counter(word(m["infected"], m.get("undecided")) for m in found)
    if len(said) < 2:
        return next(iter(said), None)
    return ", ".join(f"{said[w]} {w}" for w in get_args(Word) if said[w])


def _stat(values: Iterable[Any], paper: Any) -> dict[str, Any]:
    known = [float(v) for v in values if measured(v)]
    finite = all(map(math.isfinite, known))
    mean = (statistics.fmean(known) if finite else sum(known)) if known else None
    mean = mean if measured(mean) else None  # ∞ and −∞ have none
    paper = float(paper) if measured(paper) else None
    delta = None if mean is None or paper is None else mean - paper
    return {
        "n": len(known),
        "mean": mean,
        "sd": statistics.stdev(known) if len(known) > 1 and finite else None,
        "paper": paper,
        "delta": delta if measured(delta) else None,
    }


def verdict(whole: bool, part: bool) -> str:
    """The verdict of a `Trend`: `whole`, the claim holds as it was made; `part`, in part."""
    return "reproduced" if whole else "partly" if part else "not"


# --- How numbers are written ---


def percent(share: float) -> str:
    """A share in a sentence: `91.2 %`."""
    return f"{100 * share:.1f} %"


def is_percent(metric: str) -> bool:
    """Whether `metric` is a share, printed as a percentage; see `types.Metric`."""
    return _about_metric(metric).unit == "share"


def label_of(metric: str) -> str:
    """`asr_nt` as a heading: `ASR nt %`."""
    unit = _about_metric(metric).unit
    return _plain_label(metric) + (" %" if unit == "share" else f", {unit}" if unit else "")


def _plain_label(metric: str) -> str:
    """`asr_nt` as `ASR nt`."""
    return _about_metric(metric).label or re.sub(r"_|\.(?!\d)", " ", metric)  # 0.05 is a number


def _about_metric(name: str) -> Metric:
    """What is declared of a metric; a plain number is what nobody declared."""
    return declared(name) or Metric(name)


def _digits(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3


def _number(value: float, digits: int, sign: bool = False) -> str:
    if math.isinf(value):
        return f"{value:+}".replace("inf", "∞").replace("-", "−").lstrip("" if sign else "+")
    if value and abs(value) < 0.5 * 10**-digits and digits == 3:
        return f"{value:{'+' if sign else ''}.1e}".replace("-", "−")
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def _scaled(metric: str, stat: Mapping[str, Any]) -> tuple[float, int]:
    """The factor and the number of decimals with which `stat` is printed."""
    if is_percent(metric):
        return 100.0, 1
    known = [v for v in (stat["mean"], stat["sd"]) if v is not None and math.isfinite(v)]
    whole = all(v == round(v) for v in known)
    return 1.0, 0 if whole else _digits(stat["mean"] if stat["mean"] is not None else 0.0)


def ours(metric: str, stat: Mapping[str, Any] | None, n: int) -> str:
    """`91.2 ± 0.3`; the number of values too, where it is not the row's `n`."""
    if stat is None or stat["mean"] is None:
        return "±∞" if stat and stat["n"] else "—"
    factor, digits = _scaled(metric, stat)
    text = _number(factor * stat["mean"], digits)
    if stat["sd"] is not None:
        text += f" ± {_number(factor * stat['sd'], digits)}"
    return text if stat["n"] == n else f"{text} (n={stat['n']})"


def paper(metric: str, stat: Mapping[str, Any] | None) -> str:
    """The paper's number with the decimals that the paper gave."""
    if stat is None or stat["paper"] is None:
        return "—"
    if math.isinf(stat["paper"]):
        return _number(stat["paper"], 0)
    return (
        f"{100 * stat['paper']:.2f}".rstrip("0").rstrip(".")
        if is_percent(metric)
        else f"{stat['paper']:g}"
    )


def delta(metric: str, stat: Mapping[str, Any] | None) -> str:
    """Ours minus the paper's: `−7.8`, in points where the metric is a percentage."""
    if stat is None or stat["delta"] is None:
        return "—"
    factor, digits = _scaled(metric, stat)
    return _number(factor * stat["delta"], digits, sign=True)


def _pair(metric: str, stat: Mapping[str, Any] | None, n: int) -> str:
    if stat is None or stat["paper"] is None:
        return ours(metric, stat, n)
    return f"{paper(metric, stat)} → {ours(metric, stat, n)}" + (
        f" (Δ {delta(metric, stat)})" if stat["n"] else ""
    )


def _seconds(value: float | None) -> str:
    return "—" if value is None else _number(value, 2 if value < 1 else 1 if value < 100 else 0)


def _remarks(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know of a row: `(kind, text)`."""
    found = [("oracle", "oracle")] if line["oracle"] else []
    if line["redraw"]:
        found.append(("redraw", "triggers drawn anew in every step"))
    if line["substitute"]:
        found.append(("substitute", f"substitute: {line['substitute']}"))
    found += [("invalid", text) for text in line["faults"]]
    found += [("note", text) for text in line["notes"]]
    if line["marked"]:
        some = f"{line['other_code']} of {line['n']} seeds " * (line["other_code"] < line["n"])
        found.append(("other code", f"{some}by other code ‡"))
    if line["failed"]:
        found.append(("failed", f"{line['failed']} failed: {'; '.join(line['errors'])}"))
    return found


def _fixed(table: Mapping[str, Any]) -> dict[str, str]:
    """Fields with one value in the whole table, which need no column."""
    values = {field: {line[field] for line in table["rows"]} for field in SHOWN}
    return {field: str(next(iter(v))) for field, v in values.items() if len(v) == 1 and v != {None}}


def _caption(table: Mapping[str, Any]) -> str:
    parts = [f"n = {v}" if k == "n" else f"{k} {v}" for k, v in _fixed(table).items()]
    if any(line["other_code"] for line in table["rows"]):
        marked = any(line["marked"] for line in table["rows"])
        parts.append(f"{'‡' if marked else 'all rows'}: {OTHER}")
    return " · ".join(parts)


def _shown(table: Mapping[str, Any]) -> list[str]:
    """Fields that need a column."""
    fixed = _fixed(table)
    return [
        f for f in SHOWN if f not in fixed and any(line[f] is not None for line in table["rows"])
    ]


# --- Files ---


def csv(tables: Iterable[Mapping[str, Any]]) -> str:
    """One line a row, for machines: shares as shares, full precision."""
    records, tables = [], list(tables)
    known = {metric for table in tables for metric in table["metrics"]}
    for table in tables:
        for line in table["rows"]:
            record = {k: line[k] for k in ("experiment", "scale")} | {"table": table["name"]}
            record |= {k: line[k] for k in ("row", *SHOWN, "failed")}
            after = {f"seconds_{k}": v for k, v in line["seconds"].items()}
            after |= {"invalid": "; ".join(line["faults"]) or None}
            after |= {k: line[k] for k in ("oracle", "redraw", "substitute", "other_code")}
            for metric, stat in line["metrics"].items():
                of, _, part = metric.rpartition("_")
                taken = metric in record.keys() | after or (of in known and part in ("sd", "paper"))
                name = f"metric_{metric}" if taken else metric
                record |= {name: stat["mean"], f"{name}_sd": stat["sd"]}
                record |= {f"{name}_paper": stat["paper"]}
            records.append(record | after)
    records = [{_cell(k): _cell(v) for k, v in record.items()} for record in records]
    columns = [
        column
        for column in dict.fromkeys(name for record in records for name in record)
        if column in FIELDS or any(record.get(column) is not None for record in records)
    ]
    out = io.StringIO()
    writer = table_writer.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        values = (record.get(column) for column in columns)
        writer.writerow([str(v).lower() if isinstance(v, bool) else v for v in values])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A value of a CSV; a text that a spreadsheet would run as a formula gets an apostrophe."""
    formula = isinstance(value, str) and value.startswith(tuple("=+-@\t\r\n＝＋－＠"))
    return f"'{value}" if formula else value


def _tables(section: Section) -> list[dict[str, Any]]:
    return aggregate(section.rows) + aggregate(section.chosen)


def markdown(sections: Iterable[Section]) -> str:
    """The tables and trends as Markdown."""
    parts = []
    for section in sections:
        parts.append(f"# {_md(section.title)}")
        for table in _tables(section):
            fields, metrics = _shown(table), table["metrics"]
            remarks = [", ".join(_md(text) for _, text in _remarks(line)) for line in table["rows"]]
            named = [_md(label_of(metric)) for metric in metrics]
            heads = ["", *fields, *named, "compile s", "run s"] + ["remarks"] * any(remarks)
            align = (
                ["---"] * (1 + len(fields)) + ["---:"] * (len(metrics) + 2) + ["---"] * any(remarks)
            )
            body = []
            for line, remark in zip(table["rows"], remarks, strict=True):
                cells = [line["row"], *("—" if line[f] is None else line[f] for f in fields)]
                cells += [_pair(m, line["metrics"].get(m), line["n"]) for m in metrics]
                cells += [_seconds(line["seconds"][part]) for part in ("compile", "run")]
                body.append([*map(_md, cells), *([remark] if any(remarks) else [])])
            lines = ["| " + " | ".join(cells) + " |" for cells in (heads, align, *body)]
            parts += [f"## {_md(table['name'])}", _md(_caption(table)), "\n".join(lines)]
        if section.notes:
            parts += ["## Notes", "\n".join(f"- {_md(note)}" for note in section.notes)]
        if section.trends:
            trends = (Trend(*trend) for trend in section.trends)
            parts += [
                "## Trends",
                "\n".join(
                    f"- **{_md(t.verdict)}**: {_md(t.claim)} ({_md(t.numbers)})" for t in trends
                ),
            ]
    parts.append(LEGEND)
    return "\n\n".join(part for part in parts if part) + "\n"


def _md(text: Any) -> str:
    text = (
        " ".join(shown(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    )
    return re.sub(r"([*_`\[\]])", r"\\\1", text)


def draw(figures: Iterable[tuple[str, str, str, figure.Figure]]) -> list[Picture]:
    """Figures as PNGs."""
    made = []
    for name, title, caption, drawing in figures:
        buffer = io.BytesIO()
        options = {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}}
        with plots.any_letter():
            drawing.savefig(buffer, format="png", dpi=DPI, **options)
        made.append(Picture(name, title, caption, buffer.getvalue()))
    return made


@door
def write(
    folder: str | Path,
    rows: Sequence[Row],
    figures: Iterable[tuple[str, str, str, figure.Figure]] = (),
    title: str = "Results",
    notes: Sequence[str] = (),
    trends: Iterable[tuple[str, Shown, str]] = (),
    seconds: Mapping[str, float] | None = None,
    command: str | None = None,
) -> Path:
    """Writes `table.csv`, `table.md`, `index.html` and `figures/*.png` to `folder`, all or none;
    returns the page.

    `figures`: `Figure`s; `trends`: `Trend`s; `notes`: lines for the page; `seconds`: by stage;
    `command`: as typed. `report.json` keeps what is not in the rows, what is declared of their
    metrics too, for `merge`.
    """
    section = Section(
        title,
        rows,
        draw(figures),
        list(notes),
        [Trend(*trend) for trend in trends],
        seconds or {},
        command,
    )
    about = {
        name: value
        for name, value in section._asdict().items()
        if name not in ("rows", "pictures", "chosen")
    }
    about["figures"] = [picture[:3] for picture in section.pictures]
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    about["metrics"] = [list(known) for name in names if (known := declared(name)) is not None]
    if odd := [p.name for p in section.pictures if not plain_name(p.name)]:
        raise BadInput(f"a figure is called '{odd[0]}': give a name without / \\ :")
    files = {f"figures/{picture.name}.png": picture.png for picture in section.pictures}
    files["report.json"] = schema.dump(about, "report", indent=1).encode()
    return _save(Path(folder), files | _documents([section], title))


def _documents(sections: Sequence[Section], title: str) -> dict[str, bytes]:
    documents = {
        "table.csv": csv(table for section in sections for table in aggregate(section.rows)),
        "table.md": markdown(sections),
        "index.html": page(sections, title),
    }
    return {name: text.encode() for name, text in documents.items()}


def ready(folder: str | Path, *more: str) -> None:
    """Raises `BadInput` now, rather than after hours of work, where a report (and the files `more`)
    cannot be written to `folder` beside what is there.
    """
    beside(Path(folder), (*PAGES, *more), ["figures"], _old)


def _save(folder: Path, files: Mapping[str, bytes]) -> Path:
    # Everything is written before anything is renamed: a full disk leaves what was there before.
    beside(folder, files, ["figures"], _old)
    clear(folder)
    with ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(renamed(folder / name, _old)).write_bytes(content)
    return folder / "index.html"


def _old(path: Path) -> bool:
    """Whether version 0.1 wrote this part of a report: it kept no manifest."""
    text = path.read_bytes()
    if path.suffix == ".png":
        return text.startswith(PNG) and path.stem in _names(path.parent.parent / "report.json")
    return {
        "table.csv": b"table,row,dataset,model,attack,defense,n,failed" in text.partition(b"\n")[0],
        "table.md": text.endswith(f"{LEGEND}\n".encode()),
        "index.html": b'<p class="brand">bdjax' in text,
        "report.json": bool({"title", "trends", "figures"} <= {*_about(path)}),
    }.get(path.name, False)


def _about(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _names(path: Path) -> list[Any]:
    figures = _about(path).get("figures")
    return [f[0] for f in figures if isinstance(f, list) and f] if isinstance(figures, list) else []


@door
def load(folder: str | Path) -> Section:
    """A results folder, also one whose run was interrupted before it wrote its page; or a results
    file. Rows that came with bdjax bring title, notes and claims of their experiment.
    """
    folder = Path(folder)
    if not result_files(folder):
        raise BadInput(
            f"{folder} has no results.jsonl: give a folder that `bdjax run` or `bdjax sweep` wrote"
        )
    rows = Store(folder).rows()
    if not rows:
        raise BadInput(f"{folder}/results.jsonl has no finished row yet")
    section = Section(str(rows[0].get("experiment") or folder.name), rows)
    if not (folder / "report.json").exists():
        return _shipped(section, folder)
    about = schema.read_json(folder / "report.json", "report")
    for known in about.get("metrics", ()):  # of probes, whose experiment is not imported here
        if declared(known[0]) is None:
            declare(str(folder), Metric(*known))
    pictures = []
    for name, title, caption in about["figures"]:
        if (png := _figure(folder, name)) is None:
            print(
                f"{shown(folder)}: figure {shown(name)} is left out: it is no PNG in its figures/",
                file=sys.stderr,
            )
        else:
            pictures.append(Picture(name, title, caption, png))
    trends = [Trend(*trend) for trend in about["trends"]]
    parts = {name: about[name] for name in ("title", "notes", "seconds", "command")}
    return section._replace(pictures=pictures, trends=trends, **parts)


def _shipped(section: Section, path: Path) -> Section:
    """With what the experiment says, where the rows are those that came with bdjax."""
    name = section.title
    if name not in shipped.names() or path.resolve() not in shipped.results(name):
        return section
    from bdjax import experiment  # it imports this module

    module = experiment.load(name)
    trends = experiment.claims(module, section.rows)
    return section._replace(title=module.TITLE, notes=experiment.notes(module), trends=trends)


def _figure(folder: Path, name: Any) -> bytes | None:
    """A figure of a results folder, None where it has none of this name: a page shows nothing from
    elsewhere, whatever paths and links say.
    """
    if not plain_name(name) or kind(folder / "figures") != "folder":
        return None
    path = folder / "figures" / f"{name}.png"
    try:
        content = schema.content(path) if kind(path) == "file" else b""
    except (OSError, BadInput):
        return None
    return content if content.startswith(PNG) else None


def plain_name(name: Any) -> bool:
    """Whether a figure's name names a file of a folder, and no path."""
    return isinstance(name, str) and re.fullmatch(r"[^/\\:\0]+", name) is not None


def placed(folders: Sequence[str | Path], out: str | Path | None) -> tuple[list[str | Path], Path]:
    """What a report is of, an experiment of bdjax's own standing for the rows that came with it;
    and where it goes to.
    """
    found: list[str | Path] = []
    fixed = False  # whether a page would stand beside rows that are not the user's, or in a file
    for one in folders:
        own = (
            []
            if Path(one).exists() or str(one) not in shipped.names()
            else shipped.results(str(one))
        )
        found += own or [one]
        fixed = fixed or bool(own) or Path(one).suffix == ".jsonl"
    if out is None and fixed:
        raise BadInput(f"{folders[0]} is no results folder to write into: give --out")
    return found, Path(("report" if len(found) > 1 else found[0]) if out is None else out)


@door
def merge(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    x: str | None = None,
    y: str | None = None,
    metric: str | None = None,
) -> Path:
    """One page, CSV and Markdown for several results folders, in `out` (None: the folder itself,
    `report` for several).

    With `metric` each folder shows the best defense of every victim, with `x` too a pivot over that
    axis (and `y`). Returns the page.
    """
    if not folders:
        raise BadInput("report needs at least one results folder")
    folders, out = placed(folders, out)
    several = len(folders) > 1
    loaded, sections = _told_apart(folders, [load(folder) for folder in folders]), []
    ready(out)
    for section in loaded:
        # Over an axis a metric may also be shown of which neither high nor low is better, or where
        # nothing is defended.
        defended = any(row.get("defense") for row in section.rows)
        if metric and not (x and (_about_metric(metric).better is None or not defended)):
            section = section._replace(chosen=best(section.rows, metric))
        if metric and x:
            section = section._replace(
                pictures=[*section.pictures, *draw(pivot_figures(section.rows, x, y, metric))]
            )
        sections.append(section)
    with kept("each file is whole, old or new; the same command writes all of them"):
        return _save(
            out,
            _documents(sections, f"{len(sections)} results" if several else sections[0].title),
        )


def _told_apart(folders: Sequence[str | Path], sections: list[Section]) -> list[Section]:
    """Sections of one title, as an experiment's at two scales, say which folder or file each is."""
    counts = Counter(section.title for section in sections)
    names = [Path(one).stem if Path(one).suffix == ".jsonl" else str(one) for one in folders]
    return [
        s._replace(title=f"{s.title}, {shown(name)}") if counts[s.title] > 1 else s
        for s, name in zip(sections, names)
    ]


# --- The page ---


class _Cell(NamedTuple):
    """What is shown, and what it is sorted by: "" where there is nothing."""

    text: str
    value: Any


class _Column(NamedTuple):
    """`group`: the heading over several columns, "" for none; `kind`: number, text, remarks or a
    part of a pair.
    """

    group: str
    head: str
    kind: str
    hint: str
    cells: list[Any]


def _columns(table: Mapping[str, Any]) -> list[_Column]:
    lines = table["rows"]
    columns = [_Column("", "row", "name", "", [_Cell(line["row"], line["row"]) for line in lines])]
    # The numbers come first: on a phone, what stands behind them has to be scrolled to.
    fields = []
    for field in _shown(table):
        cells = [
            _Cell("—", "") if line[field] is None else _Cell(str(line[field]), line[field])
            for line in lines
        ]
        fields.append(_Column("", field, "number" if field == "n" else "text", "", cells))
    columns += [column for column in fields if column.head == "n"]
    for metric in table["metrics"]:
        stats = [line["metrics"].get(metric) for line in lines]
        label, hint = label_of(metric), _about_metric(metric).hint

        def value(name: str, stats=stats) -> list[Any]:
            found = [None if stat is None else stat[name] for stat in stats]
            # As JavaScript writes infinite numbers.
            return ["" if v is None else str(v).replace("inf", "Infinity") for v in found]

        mine = [
            _Cell(ours(metric, s, line["n"]), v) for s, line, v in zip(stats, lines, value("mean"))
        ]
        if not any(stat and stat["paper"] is not None for stat in stats):
            columns.append(_Column("", label, "number", hint, mine))
            continue
        theirs = [_Cell(paper(metric, s), v) for s, v in zip(stats, value("paper"))]
        gaps = [_Cell(delta(metric, s), v) for s, v in zip(stats, value("delta"))]
        columns.append(_Column(label, "paper", "number paper", hint, theirs))
        columns.append(_Column(label, "ours", "number ours", hint, mine))
        columns.append(_Column(label, "Δ", "number delta", "ours − paper", gaps))
    for part in ("compile", "run"):
        cells = [
            _Cell(_seconds(v), "" if v is None else v)
            for v in (line["seconds"][part] for line in lines)
        ]
        columns.append(_Column("seconds", part, "number", "mean over the cells of a row", cells))
    columns += [column for column in fields if column.head != "n"]
    if any(map(_remarks, lines)):
        columns.append(_Column("", "remarks", "remarks", "", [_remarks(line) for line in lines]))
    return columns


def _view(table: Mapping[str, Any], anchor: str) -> dict[str, Any]:
    name, *columns = _columns(table)
    groups = [
        list(some)
        for _, some in itertools.groupby(columns, key=lambda c: (c.group or c.head, c.group))
    ]
    # What does not fit beside the names stands in a table below, with the names again: as few
    # tables as it takes, and these about as wide as each other.
    room = PAGE - _width(name)
    parts = _packed(groups, room)
    while len(tighter := _packed(groups, room := room - 4)) == len(parts) and room > 0:
        parts = tighter
    return {
        "id": anchor,
        "name": table["name"],
        "caption": _caption(table),
        "parts": [_part(table, [name, *part], whole=part is parts[0]) for part in parts],
    }


def _packed(groups: Iterable[Sequence[_Column]], room: float) -> list[list[_Column]]:
    """Groups of columns in order, as many side by side as there is room for."""
    parts: list[list[_Column]] = []
    left = 0.0
    for group in groups:
        width = sum(map(_width, group))
        if not parts or width > left:
            parts.append([])
            left = room
        parts[-1] += group
        left -= width
    return parts


def _width(column: _Column) -> float:
    """About how many letters a column is wide."""
    if column.kind == "remarks":
        return REMARKS
    longest = max((len(cell.text) for cell in column.cells), default=0)
    longest += longest // 8 if column.kind == "number ours" else 0  # in bold
    return min(max(longest, len(column.head) + 3), NAME if column.kind == "name" else PAGE) + 3


def _part(table: Mapping[str, Any], columns: Sequence[_Column], whole: bool) -> dict[str, Any]:
    """Columns of a table: headings, over one column or several, and lines; all of them if `whole`,
    else those that say something here.
    """
    heads: list[dict[str, Any]] = []
    for i, column in enumerate(columns):
        if column.group and heads and heads[-1]["group"] == column.group:
            heads[-1]["columns"].append((i, column))
        else:
            heads.append({"group": column.group, "hint": column.hint, "columns": [(i, column)]})
    body = [
        {
            "marks": [mark for mark in _remarks(line) if mark[0] != "note"],
            "cells": [(column, column.cells[i]) for column in columns],
            "invalid": line["invalid"],
        }
        for i, line in enumerate(table["rows"])
        if whole or any(_says(column.cells[i]) for column in columns[1:])
    ]
    return {"heads": heads, "body": body}


def _says(cell: Any) -> bool:
    return bool(cell.text not in ("", "—") if isinstance(cell, _Cell) else cell)


def _facts(section: Section) -> list[tuple[str, str]]:
    failed = sum(bool(row.get("error")) for row in section.rows)
    names = ("experiment", "scale", "device", "jax", "commit")
    facts = [(name, ", ".join(_different(section.rows, name))) for name in names]
    facts += _how(section.rows)
    facts.append(("cells", f"{len(section.rows)}" + (f", {failed} failed" if failed else "")))
    return [(name, text) for name, text in [*facts, ("command", section.command)] if text]


def _how(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What may make the digits of the rows differ, where it is not the default of all of them."""
    made = [row["how"] for row in rows if row.get("how")]
    flags = dict.fromkeys(" ".join(how["flags"]) or "none" for how in made)
    products = dict.fromkeys(how["precision"] for how in made)
    vectors = dict.fromkeys(how["vectors"] for how in made if "vectors" in how)
    lanes = sorted({n for how in made for n in how.get("lanes", {}).values()})
    convolutions = dict.fromkeys("patches" if how.get("patches") else "native" for how in made)
    found = {
        "XLA flags": [*flags], "products": [*products], "vectors": [*vectors],
        "lanes": [f"{n}" for n in lanes], "convolutions": [*convolutions],
    }  # fmt: skip
    usual = {"none", "float32", "1", "native"}
    return [(name, ", ".join(some)) for name, some in found.items() if not usual.issuperset(some)]


def _stages(section: Section) -> list[tuple[str, str, float]]:
    """`(stage, seconds as text, share)`. Without a record of stages,
    the time that the cells ran.
    """
    seconds = dict(section.seconds) or {
        "run": sum(row["seconds"].get("run", 0.0) for row in section.rows)
    }
    total = seconds.pop("total", 0.0)
    shown = [(stage, _seconds(spent), spent) for stage, spent in seconds.items() if spent]
    return [*shown, ("total", _seconds(total), 0.0)] if total else shown


def page(sections: Sequence[Section], title: str) -> str:
    """One self-contained HTML page: nothing is fetched, sorting and the colour scheme need no
    library.
    """
    views = []
    for i, section in enumerate(sections):
        pictures = [
            {"id": f"s{i}-f{j}", **embedded(picture)} for j, picture in enumerate(section.pictures)
        ]
        tables = [_view(table, f"s{i}-t{j}") for j, table in enumerate(_tables(section))]
        views.append(
            {
                "id": f"s{i}",
                "title": section.title,
                "facts": _facts(section),
                "stages": _stages(section),
                "trends": section.trends,
                "notes": section.notes,
                "tables": tables,
                "pictures": pictures,
            }
        )
    return templates().get_template("page.html.j2").render(title=title, sections=views, marks=MARKS)


def templates() -> jinja2.Environment:
    """What makes pages of bdjax's templates: all that is shown is text, not markup."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("bdjax"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def embedded(picture: Picture) -> dict[str, Any]:
    """A picture as templates take it, whole within the page."""
    return {
        "title": picture.title,
        "caption": picture.caption,
        "data": base64.b64encode(picture.png).decode(),
        # The width in a PNG's header, in CSS pixels.
        "width": int.from_bytes(picture.png[16:20], "big") * 96 // DPI,
    }


# --- The console ---


@door
def console_tables(rows: Iterable[Row], width: Count = 110) -> Group:
    """The tables within `width` columns; remarks, and metrics of few rows or beyond the width,
    stand below.
    """
    return Group(*(part for table in aggregate(rows) for part in _console(table, width)))


def _console(table: Mapping[str, Any], width: int) -> list[Any]:
    lines = table["rows"]
    name = min(max(len(line["row"]) for line in lines), 32)
    sizes = not _fixed(table).get("n")
    cells = {
        m: [_stacked(m, line["metrics"].get(m), line["n"]) for line in lines]
        for m in table["metrics"]
    }
    widths = {
        m: max(len(text) for text in (label_of(m), *(t for cell in cells[m] for t in cell))) + 2
        for m in cells
    }
    known = {m: sum(m in line["metrics"] for line in lines) for m in cells}
    reported = {m: any(cell[1] for cell in cells[m]) for m in cells}
    # The paper's metrics come first, then those of every table, then the others, as far as there is
    # room.
    left, chosen = width - name - 11 - 4 * sizes, set()
    for metric in sorted(cells, key=lambda m: (not reported[m], m not in FIRST)):
        if widths[metric] <= left and 2 * known[metric] >= len(lines):
            chosen.add(metric)
            left -= widths[metric]

    title, caption = Text(shown(table["name"]), "bold"), Text(shown(_caption(table)), "dim")
    grid = Table(title=title, caption=caption, box=None, padding=(0, 2, 0, 0), pad_edge=False,
                 header_style="",
                 title_justify="left", caption_justify="left")  # fmt: skip
    grid.add_column("", min_width=name, max_width=name, overflow="fold")
    if sizes:
        grid.add_column(Text("n", "bold"), justify="right")
    for metric in filter(chosen.__contains__, cells):
        head = Text(shown(label_of(metric)), "bold").append(
            "\npaper, Δ" if reported[metric] else "", "not bold dim"
        )
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column(
        Text("seconds", "bold").append("\ncompile", "not bold dim"), justify="right", no_wrap=True
    )
    below = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    below.add_column(min_width=name, max_width=name, overflow="fold")
    below.add_column(max_width=width - name - 2, overflow="fold")
    for i, line in enumerate(lines):
        stacked = [cells[m][i] for m in cells if m in chosen]
        stacked.append((_seconds(line["seconds"]["run"]), _seconds(line["seconds"]["compile"])))
        style = "dim" if line["invalid"] else ""
        texts = [
            Text(first, style).append(f"\n{second}" if second else "", "dim")
            for first, second in stacked
        ]
        name_of = Text(shown(line["row"]), style)
        grid.add_row(name_of, *([Text(str(line["n"]), style)] * sizes), *texts)
        rest = [m for m in cells if m in line["metrics"] and m not in chosen]
        notes = [f"{label_of(m)} {_pair(m, line['metrics'][m], line['n'])}" for m in rest]
        said = [line["verdict"]] if line["verdict"] and "verdict" not in _fixed(table) else []
        if notes := said + [text for _, text in _remarks(line)] + notes:
            words = shown(" · ".join(notes))
            below.add_row(Text(shown(line["row"]), "dim"), Text(words, "dim"))
    return [grid, *([Text(), below] if below.row_count else []), Text()]


def _stacked(metric: str, stat: Mapping[str, Any] | None, n: int) -> tuple[str, str]:
    if stat is None or stat["paper"] is None:
        return ours(metric, stat, n), ""
    return ours(metric, stat, n), f"{paper(metric, stat)}, {delta(metric, stat)}"


def line(row: Row) -> str:
    """A finished row in one line, for progress."""
    numbers = [
        f"{label_of(m)} {_pair(m, _stat([row['metrics'].get(m)], v), 1)}"
        for m, v in _known(row).items()
    ]
    numbers = [said, *numbers] if (said := _verdicts([row])) else numbers
    text = f"failed: {row['error']}" if row.get("error") else ", ".join(numbers)
    return shown(
        f"{row.get('table')}, {row.get('row')}, seed {row.get('seed')}: {text} "
        f"[{_seconds(row['seconds']['run'])} s]"
    )


def _known(row: Row) -> dict[str, Any]:
    """The metrics that lead a table or that the paper has, with the paper's number."""
    reported = row.get("reported") or {}
    return {
        m: reported.get(m)
        for m in dict.fromkeys([*FIRST, *reported])
        if measured(row["metrics"].get(m))
    }


@door
def print_table(rows: Iterable[Row], console: Console | None = None) -> None:
    """Prints "paper vs ours": ours above, the paper's and the difference below. Plain text without
    a terminal.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 110))
    console.print(console_tables(rows, min(console.width, 120)))


# --- Questions to a sweep ---


class Pivot(NamedTuple):
    """A metric over two axes. `x: [X]`, `y: [Y]`: the values that occur; `mean, sd, n: [Y, X]`:
    over the rows there.
    """

    x: list[Any]
    y: list[Any]
    mean: np.ndarray
    sd: np.ndarray
    n: np.ndarray


@door
def axes(rows: Iterable[Row]) -> list[str]:
    """What varies between rows: fields, tags, and the configuration by dots: what a pivot may ask
    for.
    """
    rows = Rows(rows)
    inner = (path for row in rows for path in paths(row) if path not in row)
    found = dict.fromkeys([*FIELDS, "seed", "row", *inner])
    return [path for path in found if len(rows.by(path)) > 1]


@door
def pivot(rows: Iterable[Row], x: str, y: str | None, metric: str) -> Pivot:
    """`metric` over the axes `x` and `y` (None: one line); failed rows, rows that lack an axis, and
    defenses of victims with `faults` are left out.
    """
    rows = valid(rows).done
    known = Rows(row for row in rows if measured(row["metrics"].get(metric)))
    cells = known.by(x, y) if y else {(value, ""): some for value, some in known.by(x).items()}
    cells = {place: some for place, some in cells.items() if None not in place}
    if not cells:
        _explain(rows, [axis for axis in (x, y) if axis], metric)
    xs, ys = (_ordered(place[i] for place in cells) for i in (0, 1))
    at = [[cells.get((i, j), Rows()) for i in xs] for j in ys]
    mean, sd = (
        np.array([[of(some, metric) for some in line] for line in at])
        for of in (Rows.mean, Rows.std)
    )
    return Pivot(xs, ys, mean, sd, np.array([[len(some) for some in line] for line in at]))


def _ordered(values: Iterable[Any]) -> list[Any]:
    found = list(dict.fromkeys(values))
    return sorted(found) if all(isinstance(v, (int, float)) for v in found) else found


def _explain(rows: Sequence[Row], asked: Sequence[str], metric: str) -> None:
    """Says which metric, or which of the axes `asked`, no row has."""
    known = sorted({m for row in rows for m, value in row["metrics"].items() if measured(value)})
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.0)
        raise BadInput(
            f"no row has the metric '{metric}'" + (f"; the nearest is '{near[0]}'" if near else "")
        )
    if asked:
        raise BadInput(
            f"no row with '{metric}' has {' and '.join(map(repr, asked))}; what varies: "
            f"{', '.join(axes(rows)) or 'nothing'}"
        )


@door
def pivot_figures(rows: Iterable[Row], x: str, y: str | None, metric: str) -> list[Figure]:
    """The pivot as a line with its spread and, over two axes, as a heat-map."""
    table = pivot(rows, x, y, metric)
    percent = is_percent(metric)
    label = _plain_label(metric) if percent else label_of(metric)  # an axis has the %
    name = re.sub(r"[^\w-]+", "-", f"{metric}-{x}-{y}" if y else f"{metric}-{x}")
    title = f"{_plain_label(metric)} over {x}" + (f" and {y}" if y else "")
    n = sorted(set(table.n[table.n > 0].tolist()))
    counts = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    lines = {f"{y} = {value}" if y else label: table.mean[i] for i, value in enumerate(table.y)}
    spread = {line: table.sd[i] for i, line in enumerate(lines)}
    curve = plots.curves(table.x, lines, spread, xlabel=x, ylabel=label, percent=percent)
    made = [
        Figure(
            f"{name}-lines",
            f"{title}: lines",
            f"Mean and one sample standard deviation, {counts}."
            + (" Infinite means are not drawn." if np.isinf(table.mean).any() else ""),
            curve,
        )
    ]
    if y:
        picture = plots.heat_map(
            table.mean, table.x, table.y, xlabel=x, ylabel=y, label=label, percent=percent
        )
        made.insert(
            0,
            Figure(
                f"{name}-map", f"{title}: map", f"Mean, {counts}; blank: no valid run.", picture
            ),
        )
    return made


@door
def best(rows: Iterable[Row], metric: str, drop: float = DROP) -> list[dict[str, Any]]:
    """For each victim the rows of the defense, without oracle, that is best by the mean of `metric`
    over seeds.

    What is best is declared with the metric, else `BadInput`. A net that cannot classify is no
    answer: a cell more than `drop` of accuracy below the victim's most accurate defended cell does
    not count; nor do victims with `faults`.
    """
    rows = valid(rows).done
    victims: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.get("defense") and not row.get("oracle") and measured(row["metrics"].get(metric)):
            defense = json.dumps([row["defense"], (row.get("config") or {}).get("defense")])
            victims.setdefault(_victim(row), {}).setdefault(defense, []).append(row)
    if not victims:
        _explain(rows, [], metric)
        raise BadInput(f"no defense without oracle has '{metric}': give --x for a table of victims")
    if (better := _about_metric(metric).better) is None:
        raise BadInput(
            f"it is not declared whether a high or a low '{metric}' is better: "
            f"Metric('{metric}', better='low') in `measures` of the class that gives it"
        )

    def mean(cell: Sequence[Row], name: str) -> float:
        found = Rows(cell).mean(name)
        return found if measured(found) else 0.0

    sign = 1 if better == "high" else -1
    varying = [
        path for path in axes(rows) if path.startswith(("attack.", "recipe.", "model.", "dataset."))
    ]
    found = []
    for cells in victims.values():
        top = max(mean(cell, "acc_test") for cell in cells.values())
        able = [cell for cell in cells.values() if mean(cell, "acc_test") >= top - drop]
        winner = max(able, key=lambda cell: sign * mean(cell, metric))
        setting = [
            f"{path} {lookup(winner[0], path)}" for path in varying if not path.endswith(".name")
        ]
        label = ", ".join([*setting, str(winner[0]["row"])])
        found += [
            {**row, "table": f"Best defense by {label_of(metric)}", "row": label} for row in winner
        ]
    return found
