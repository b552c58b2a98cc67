"""Writes the generated parts of the README: `python tests/readme.py`. A test checks that they are up to date."""

import json
import re
from pathlib import Path

from bdjax import registry

ROOT = Path(__file__).parents[1]
FOLDERS = {"attack": "Attacks", "defense": "Defenses", "model": "Models", "dataset": "Data"}


def methods() -> str:
    """Method → paper → file."""
    parts = []
    for kind, title in FOLDERS.items():
        parts.append(f"**{title}**\n\n| name | paper | file |\n|---|---|---|")
        for e in registry.entries(kind):
            link = f"[arXiv:{e.arxiv}](https://arxiv.org/abs/{e.arxiv})" if e.arxiv else ""
            paper = f"{e.paper}, {e.year} {link}".strip() if e.paper else ""
            parts[-1] += f"\n| `{e.name}` | {paper} | [{Path(e.file).name}]({e.file}) |"
    return "\n\n".join(parts)


def results(file: str) -> str:
    """The tables of a committed results file."""
    from bdjax import report

    path = ROOT / file
    if not path.exists():
        return f"`{file}` is not there yet."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shown = ("acc_train", "acc_test", "asr_all", "asr_nt", "anomaly_index")
    parts = []
    for table in report.aggregate(rows):
        names = [name for name in shown if any(name in line["metrics"] for line in table["rows"])]
        heads = ["row", "n", *(report.label_of(name) for name in names), "seconds a run"]
        lines = [heads, ["---"] + ["--:"] * (len(heads) - 1)]
        for line in table["rows"]:
            cells = [cell_of(report, name, line) for name in names]
            lines.append([line["row"], str(line["n"]), *cells, f"{line['seconds']['run']:.1f}"])
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        parts.append(f"**{table['name']}**\n\n{body}")
    return "\n\n".join([*parts, source(rows[0])])


def pivot(argument: str) -> str:
    """A metric of a committed results file over two axes: `FILE METRIC X Y`."""
    from bdjax import report

    file, metric, x, y = argument.split()
    path = ROOT / file
    if not path.exists():
        return f"`{file}` is not there yet."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    table = report.pivot(rows, x, y, metric)
    factor, digits = (100, 1) if report.is_percent(metric) else (1, 2)
    shown = [
        [f"{factor * mean:.{digits}f} ± {factor * sd:.{digits}f}" for mean, sd in zip(*line)]
        for line in zip(table.mean, table.sd)
    ]
    heads = [f"{report.label_of(metric)}, {x} =", *(f"{value:g}" for value in table.x)]
    lines = [heads, ["---"] + ["--:"] * len(table.x), *([str(name), *cells] for name, cells in zip(table.y, shown))]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    note = f"Mean ± s.d. over {int(table.n.max())} runs. Scale `{rows[0]['scale']}`, {rows[0]['device']}, jax {rows[0]['jax']}."
    return f"{body}\n\n{note}"


def papers(_: str) -> str:
    """For every experiment with committed results and claims: how many of them hold."""
    from bdjax import experiment

    heads = ["paper", "experiment", "scale", "rows", "reproduced", "partly", "not"]
    lines = [heads, ["---"] * 3 + ["--:"] * 4]
    for path in sorted((ROOT / "experiments" / "results").glob("*.jsonl")):
        name, _, scale = path.stem.rpartition("-")
        source = ROOT / "experiments" / f"{name}.py"
        module = experiment.load(source) if source.exists() else None
        if not hasattr(module, "trends"):
            continue
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        verdicts = [verdict for _, verdict, _ in module.trends(rows)]
        counts = [str(verdicts.count(word)) for word in ("reproduced", "partly", "not")]
        page = path.with_suffix(".md")
        link = f"[{name}.py](experiments/{name}.py)"
        link += f", [tables](experiments/results/{page.name})" if page.exists() else ""
        lines.append([module.TITLE, link, scale, str(len(rows)), *counts])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def runtime(file: str) -> str:
    """What a committed run of the benchmarks measured, series by series."""
    from benchmarks.__main__ import exponents, flat

    path = ROOT / file
    if not path.exists():
        return f"`{file}` is not there yet."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    slopes = exponents(rows)
    heads = ["case", "compile s", "ours s", "peak MB", "matmul share", "PyTorch s", "PyTorch / ours", "exponent"]
    lines, before = [heads, ["---"] + ["--:"] * 7], None
    for row in rows:
        found = flat(row)
        share, rival = found["matmul_share"], found["rival_s"]
        cells = [found["case"], f"{found['compile_s']:.1f}", f"{found['ours_s']:.3f}", f"{found['peak_mb']:.0f}"]
        cells += [
            "" if share is None else f"{100 * share:.0f} %",
            *(["", ""] if rival is None else [f"{rival:.3f}", f"{found['ratio']:.2f}"]),
        ]
        slope = slopes.get(row["table"]) if row["table"] != before else None
        lines.append([*cells, "" if slope is None else f"{slope:.2f}"])
        before = row["table"]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    inferences = [found["times_inference"] for found in map(flat, rows) if "times_inference" in found]
    strip = f" STRIP with N = 10 costs {inferences[0]:.2f} plain inferences of the same images." if inferences else ""
    first = rows[0]
    return f"{body}\n\nMedians. {first['device']}, jax {first['jax']}, torch {first['torch']}.{strip}"


def source(row: dict) -> str:
    """How a table was made."""
    return (
        f"Mean ± s.d. over n runs; *p* = the paper's number. Scale `{row['scale']}`, {row['device']}, jax {row['jax']}. "
        f"Made by `bdjax run experiments/{row['experiment']}.py`."
    )


def attacks(file: str) -> str:
    """For every attack: data, net, rate, what it costs and how often it works."""
    from bdjax import experiment, report

    path = ROOT / file
    if not path.exists():
        return f"`{file}` is not there yet."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    heads = ["attack", "data", "net", "rate %", "n", "ACC test %", "clean twin %", "ASR all %", "ASR nt %", "seconds"]
    lines = [heads, ["---"] * 3 + ["--:"] * 7]
    for table in report.aggregate(rows):
        twin = next(line for line in table["rows"] if line["row"] == "clean twin")
        for line in table["rows"]:
            if line is twin:
                continue
            mine = [row for row in rows if (row["table"], row["row"]) == (table["name"], line["row"])]
            rate = mine[0]["config"]["attack"].get("rate")
            parts = [
                line["row"],
                mine[0]["dataset"],
                mine[0]["model"],
                f"{100 * rate:g}" if rate else "",
                str(line["n"]),
            ]
            parts += [cell_of(report, "acc_test", line), cell_of(report, "acc_test", twin)]
            parts += [cell_of(report, name, line) for name in ("asr_all", "asr_nt")]
            lines.append([*parts, f"{line['seconds']['run']:.0f}"])
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    reasons = experiment.load(ROOT / "experiments" / f"{rows[0]['experiment']}.py").REASONS
    notes = "\n".join(f"- {row}: {reason}." for row, reason in reasons.items())
    return f"{body}\n\n{source(rows[0])}\n\nBelow 90 %, or more than 3 points of accuracy lost, and what we take to be the reason:\n\n{notes}"


def cell_of(report, name: str, line: dict) -> str:
    """Ours, and the paper's number where it has one."""
    stat = line["metrics"].get(name)
    if stat is None:
        return ""
    known = report.paper(name, stat) if stat["paper"] is not None else ""
    return report.ours(name, stat, line["n"]) + (f" (*p* {known})" if known else "")


def generate(text: str) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match) -> str:
        name, _, argument = match["name"].partition(" ")
        made = {
            "methods": methods,
            "results": lambda: results(argument),
            "attacks": lambda: attacks(argument),
            "pivot": lambda: pivot(argument),
            "papers": lambda: papers(argument),
            "runtime": lambda: runtime(argument),
        }[name]()
        return f"<!-- {match['name']} -->\n{made}\n<!-- end -->"

    return re.sub(
        r"<!-- (?P<name>(methods|results|attacks|pivot|papers|runtime)[^>]*?) -->.*?<!-- end -->",
        fill,
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(generate(path.read_text()))
