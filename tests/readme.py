"""Writes the generated parts of the README: `python tests/readme.py`. A test checks that they are
up to date.

`<!-- NAME ARGUMENT -->` is filled by the function NAME below.
"""

import json
import re
from pathlib import Path

from bdjax import experiment, report
from bdjax.rows import Rows
from benchmarks.__main__ import exponents, flat

ROOT = Path(__file__).parents[1]


def committed(file: str | Path) -> list[dict]:
    """The rows of a committed results file."""
    return [json.loads(line) for line in (ROOT / file).read_text().splitlines()]


def table_of(heads: list[str], lines: list[list[str]], words: int = 1) -> str:
    """A Markdown table whose first columns, `words` of them, are not numbers."""
    align = ["---"] * words + ["--:"] * (len(heads) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, align, *lines))


def setting(row: dict) -> str:
    """On what a table was made."""
    return f"Scale `{row['scale']}`, {row['device']}, jax {row['jax']}."


def source(row: dict) -> str:
    """How a table was made."""
    runs = f"Mean ± s.d. over n runs; *p* = the paper's number. {setting(row)}"
    return f"{runs} Made by `bdjax run experiments/{row['experiment']}.py`."


def cell_of(name: str, line: dict) -> str:
    """Ours, and the paper's number where it has one."""
    stat = line["metrics"].get(name)
    if stat is None:
        return ""
    known = report.paper(name, stat) if stat["paper"] is not None else ""
    return report.ours(name, stat, line["n"]) + (f" (*p* {known})" if known else "")


# --- What can stand in the README ---


def results(file: str) -> str:
    """The tables of a committed results file."""
    rows, parts = committed(file), []
    shown = ("acc_train", "acc_test", "asr_all", "asr_nt", "anomaly_index")
    for table in report.aggregate(rows):
        names = [name for name in shown if any(name in line["metrics"] for line in table["rows"])]
        heads = ["row", "n", *(report.label_of(name) for name in names), "seconds a run"]
        lines = [
            [
                line["row"],
                str(line["n"]),
                *(cell_of(name, line) for name in names),
                f"{line['seconds']['run']:.1f}",
            ]
            for line in table["rows"]
        ]
        parts.append(f"**{table['name']}**\n\n{table_of(heads, lines)}")
    return "\n\n".join([*parts, source(rows[0])])


def pivot(argument: str) -> str:
    """A metric of a committed results file over two axes: `FILE METRIC X Y`."""
    file, metric, x, y = argument.split()
    rows = committed(file)
    table = report.pivot(rows, x, y, metric)
    factor, digits = (100, 1) if report.is_percent(metric) else (1, 2)
    lines = [
        [
            str(name),
            *(
                f"{factor * m:.{digits}f} ± {factor * sd:.{digits}f}"
                for m, sd in zip(means, spread)
            ),
        ]
        for name, means, spread in zip(table.y, table.mean, table.sd)
    ]
    body = table_of(
        [f"{report.label_of(metric)}, {x} =", *(f"{value:g}" for value in table.x)], lines
    )
    return f"{body}\n\nMean ± s.d. over {int(table.n.max())} runs. {setting(rows[0])}"


def papers(_: str) -> str:
    """For every experiment with committed results and claims: how many of them hold."""
    heads, lines = ["paper", "experiment", "scale", "rows", "reproduced", "partly", "not"], []
    for path in sorted((ROOT / "experiments" / "results").glob("*.jsonl")):
        name, _, scale = path.stem.rpartition("-")
        module = experiment.load(ROOT / "experiments" / f"{name}.py")
        if not hasattr(module, "trends"):
            continue
        rows = committed(path)
        verdicts = [trend.verdict for trend in experiment.claims(module, rows)]
        counts = [str(verdicts.count(word)) for word in ("reproduced", "partly", "not")]
        page = path.with_suffix(".md")
        link = f"[{name}.py](experiments/{name}.py)"
        link += f", [tables](experiments/results/{page.name})" if page.exists() else ""
        lines.append([module.TITLE, link, scale, str(len(rows)), *counts])
    return table_of(heads, lines, 3)


def runtime(file: str) -> str:
    """What a committed run of the benchmarks measured, series by series."""
    rows, lines, before = committed(file), [], None
    slopes = exponents(rows)
    heads = [
        "case",
        "compile s",
        "ours s",
        "peak MB",
        "matmul share",
        "PyTorch s",
        "PyTorch / ours",
        "exponent",
    ]
    for row in rows:
        found = flat(row)
        share, rival = found["matmul_share"], found["rival_s"]
        cells = [
            found["case"],
            f"{found['compile_s']:.1f}",
            f"{found['ours_s']:.3f}",
            f"{found['peak_mb']:.0f}",
        ]
        cells += ["" if share is None else f"{100 * share:.0f} %"]
        cells += ["", ""] if rival is None else [f"{rival:.3f}", f"{found['ratio']:.2f}"]
        slope = slopes.get(row["table"]) if row["table"] != before else None
        lines.append([*cells, "" if slope is None else f"{slope:.2f}"])
        before = row["table"]
    inferences = [
        row["metrics"]["times_inference"] for row in rows if "times_inference" in row["metrics"]
    ]
    strip = (
        f" STRIP with N = 10 costs {inferences[0]:.2f} plain inferences of the same images."
        if inferences
        else ""
    )
    first = rows[0]
    note = f"Medians. {first['device']}, jax {first['jax']}, torch {first['torch']}.{strip}"
    return f"{table_of(heads, lines)}\n\n{note}"


def attacks(file: str) -> str:
    """For every attack: data, net, rate, what it costs and how often it works."""
    rows, lines = committed(file), []
    heads = [
        "attack",
        "data",
        "net",
        "rate %",
        "n",
        "ACC test %",
        "clean twin %",
        "ASR all %",
        "ASR nt %",
        "seconds",
    ]
    for table in report.aggregate(rows):
        twin = next(line for line in table["rows"] if line["row"] == "clean twin")
        for line in table["rows"]:
            if line is twin:
                continue
            first = Rows(rows).done.where(table=table["name"], row=line["row"])[0]
            rate = first["config"]["attack"].get("rate")
            cells = [
                line["row"],
                first["dataset"],
                first["model"],
                f"{100 * rate:g}" if rate else "",
                str(line["n"]),
            ]
            cells += [cell_of("acc_test", line), cell_of("acc_test", twin)]
            cells += [cell_of(name, line) for name in ("asr_all", "asr_nt")]
            lines.append([*cells, f"{line['seconds']['run']:.0f}"])
    reasons = experiment.load(ROOT / "experiments" / f"{rows[0]['experiment']}.py").REASONS
    notes = "\n".join(f"- {row}: {reason}." for row, reason in reasons.items())
    why = "Below 90 %, or more than 3 points of accuracy lost, and what we take to be the reason:"
    return f"{table_of(heads, lines, 3)}\n\n{source(rows[0])}\n\n{why}\n\n{notes}"


def defenses(file: str) -> str:
    """The matrix of defenses and attacks, a table a data set."""
    rows = committed(file)
    module = experiment.load(ROOT / "experiments" / f"{rows[0]['experiment']}.py")
    tables, found = module.matrix(report.valid(rows))
    text = []
    for data in dict.fromkeys(module.VICTIMS[table][0] for table in tables):
        here = [table for table in tables if module.VICTIMS[table][0] == data]
        lines = [
            [f"{name} (*oracle*)" if next(iter(line.values()))["oracle"] else name]
            + [module.short(line[table]) if table in line else "" for table in here]
            for name, line in found.items()
            if set(here) & set(line)
        ]
        text.append(table_of([data, *(module.VICTIMS[table][1] for table in here)], lines))
    return "\n\n".join([*text, f"One run each. {setting(rows[0])}"])


PARTS = {part.__name__: part for part in (results, pivot, papers, runtime, attacks, defenses)}


def generate(text: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match) -> str:
        return f"<!-- {match['head']} -->\n{PARTS[match['name']](match['argument'])}\n<!-- end -->"

    head = rf"<!-- (?P<head>(?P<name>{'|'.join(PARTS)}) ?(?P<argument>[^>]*?)) -->"
    return re.sub(rf"{head}.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(generate(path.read_text()))
