"""What stands in the pages of results and in the README, made from committed rows.

`<!-- NAME ARGUMENT -->` stands for what the function NAME below gives. In the site's pages the
build puts it there; in the README it stands between the comment and `<!-- end -->`:
`python docs/_site/results.py` writes it anew, and a test checks that it is up to date.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for the benchmarks, which are not installed

from bdjax import experiment, report, shipped
from bdjax.rows import Row, Rows, result_files
from benchmarks.__main__ import exponents, flat
from benchmarks.peers import briefly

ROWS = "experiments/results"
MATRIX, ZOO = f"{ROWS}/defense_zoo-cpu", f"{ROWS}/attack_zoo-cpu.jsonl"


def committed(file: str | Path) -> list[dict]:
    """The rows of a committed results file or folder."""
    texts = (path.read_text(encoding="utf-8") for path in result_files(ROOT / file))
    return [json.loads(line) for text in texts for line in text.splitlines()]


def table_of(heads: list[str], lines: list[list[str]], words: int = 1) -> str:
    """A Markdown table whose first columns, `words` of them, are not numbers."""
    align = ["---"] * words + ["--:"] * (len(heads) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, align, *lines))


def setting(rows: Sequence[Row]) -> str:
    """On what a table was made."""
    made = [dict.fromkeys(row[name] for row in rows) for name in ("scale", "device", "jax")]
    scale, device, jax = map(" and ".join, made)
    return f"Scale `{scale}`, {device}, jax {jax}."


def source(rows: Sequence[Row]) -> str:
    """How a table was made."""
    runs = f"Mean ± s.d. over n runs; *p* = the paper's number. {setting(rows)}"
    return f"{runs} Made by `bdjax run {rows[0]['experiment']} --scale {rows[0]['scale']}`."


def runs(rows: Iterable[Row]) -> str:
    """Over how many seeds the cells of a matrix are means, by table."""
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row["table"], set()).add(row["seed"])
    several = [f"of {table} {len(of)}" for table, of in seeds.items() if len(of) > 1]
    if not several:
        return "One run each."
    return f"Means over runs: {'; '.join(several)}; one of the others."


def cell_of(name: str, line: dict) -> str:
    """Ours, and the paper's number where it has one."""
    stat = line["metrics"].get(name)
    if stat is None:
        return ""
    known = report.paper(name, stat) if stat["paper"] is not None else ""
    numbers = [report.ours(name, stat, line["n"]), *([f"(*p* {known})"] if known else [])]
    return " ".join(text.replace(" ", "\u00a0") for text in numbers)  # broken between them alone


def files() -> Iterator[tuple[str, str, Path]]:
    """The committed results: experiment, scale, file or folder."""
    for path in shipped.results("*"):
        name, _, scale = path.stem.rpartition("-")
        yield name, scale, path


# --- What can stand in a page ---


def results(argument: str) -> str:
    """The tables of a committed results file, or those of some names: `FILE [TABLE; TABLE]`."""
    file, _, wanted = argument.partition(" ")
    rows, parts = committed(file), []
    names = [name.strip() for name in wanted.split(";") if name.strip()]
    shown = ("acc_train", "acc_test", "asr_all", "asr_nt", "far", "frr", "anomaly_index")
    for table in report.aggregate(rows):
        if names and table["name"] not in names:
            continue
        stats = [line["metrics"] for line in table["rows"]]
        here = [name for name in shown if any(name in found for found in stats)]
        told = (n for found in stats for n, stat in found.items() if stat["paper"] is not None)
        here += [name for name in dict.fromkeys(told) if name not in here]
        heads = ["row", "n", *(report.label_of(name) for name in here), "seconds a run"]
        lines = [
            [
                _row(line),
                str(line["n"]),
                *(cell_of(name, line) for name in here),
                f"{line['seconds']['run']:.1f}" if line["seconds"]["run"] is not None else "",
            ]
            for line in table["rows"]
        ]
        parts.append(f"**{table['name']}**\n\n{table_of(heads, lines)}")
    return "\n\n".join([*parts, source(rows)])


def _row(line: dict) -> str:
    marks = [word for word in ("oracle", "invalid", "substitute") if line[word]]
    return line["row"].replace("|", "\\|") + (f" (*{', '.join(marks)}*)" if marks else "")


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
                for m, sd in zip(means, spread, strict=True)
            ),
        ]
        for name, means, spread in zip(table.y, table.mean, table.sd, strict=True)
    ]
    heads = [f"{report.label_of(metric)}, {x} =", *(f"{value:g}" for value in table.x)]
    spread = f"Mean ± s.d. over {int(table.n.max())} runs. {setting(rows)}"
    return f"{table_of(heads, lines)}\n\n{spread}"


def papers(_: str) -> str:
    """For every experiment with committed results and claims: how many of them hold."""
    heads, lines = ["paper", "scale", "rows", "reproduced", "partly", "not"], []
    for name, scale, path in files():
        module = experiment.load(name)
        if not hasattr(module, "trends"):
            continue
        rows = committed(path)
        verdicts = [trend.verdict for trend in experiment.claims(module, rows)]
        counts = [str(verdicts.count(word)) for word in ("reproduced", "partly", "not")]
        link = f"[{module.TITLE}]({path.stem}.md)"
        lines.append([link, scale, str(len(rows)), *counts])
    return table_of(heads, lines, 2)


def claims(file: str) -> str:
    """What a paper claims, and whether the committed rows show it."""
    rows = committed(file)
    module = experiment.load(rows[0]["experiment"])
    lines = []
    for claim, said, numbers in experiment.claims(module, rows):
        word = f"{report.MARKS[said]} {said}{' reproduced' * (said in ('partly', 'not'))}"
        lines += [f"- **{word}**: {_text(claim)}", "", f"    *{_text(numbers)}*", ""]
    return "\n".join(lines)


def _text(text: str) -> str:
    return re.sub(r"([*_|<>\[\]])", r"\\\1", text)


def notes(file: str) -> str:
    """The points of an experiment's header: where it differs from its paper."""
    module = experiment.load(committed(file)[0]["experiment"])
    return "\n".join(f"- {_text(note)}" for note in experiment.notes(module))


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


def peers(names: str) -> str:
    """What others' libraries take beside ours, a table for each file, whole studies, and what both
    find: that of the first file.
    """
    files = [sorted(committed(file), key=lambda row: row["table"]) for file in names.split()]
    studies = [row for rows in files for row in rows if "wall_s" in row["metrics"]]
    jobs = [[row for row in rows if "wall_s" not in row["metrics"]] for rows in files]
    parts = [part for rows in jobs for part in timed(rows)]
    texts = []
    for row in jobs[0]:
        said = [row["results"].get(side, {}) for side in ("ours", "theirs")]
        words = [_text(", ".join(f"{k} {briefly(v)}" for k, v in one.items())) for one in said]
        texts.append([f"{row['table']}: {row['row']}", *words, _text(row["cause"])])
    found = table_of(["job", "ours", "theirs", "there"], texts, 4)
    parts += [*whole_studies(studies), "## What they find", found]
    return "\n\n".join(parts)


def timed(rows: Sequence[Row]) -> Iterator[str]:
    """What jobs take on one Python."""
    lines, versions = [], {}
    for row in rows:
        found = row["metrics"]
        cells = [f"{found[k]:.3f}" if k in found else "–" for k in ("warm_s", "warm_theirs_s")]
        cells += [f"{found[k]:.2f}" if k in found else "–" for k in ("ratio", "cold_ratio")]
        lines.append([row["table"], row["row"], *cells])
        versions |= row["versions"]
    yield f"## Python {rows[0]['python'].rpartition('.')[0]}, jax {rows[0]['jax']}"
    yield table_of(["library", "job", "ours s", "theirs s", "warm ×", "cold ×"], lines, 2)
    yield f"{', '.join(f'{name} {value}' for name, value in versions.items())}. {setting(rows)}"


def whole_studies(rows: Sequence[Row]) -> Iterator[str]:
    """What attacks × defenses × seeds take as a command each, and as one."""
    lines = []
    for row in rows:
        found = row["metrics"]
        cells = [
            f"{found[name]:.0f}" if name in found else "–"
            for name in ("wall_s", "peak_mb", "commands", "results", "kept")
        ]
        lines.append([row["row"], _text(row["cause"]), *cells])
    if lines:
        heads = ["by", "note", "wall s", "peak MB", "commands", "results", "of them kept"]
        yield "## A whole study"
        yield table_of(heads, lines, 2)
        yield f"Python {rows[0]['python']}. {setting(rows)}"


def pods(file: str) -> str:
    """What a sweep costs on a pod whose hosts are taken away; the model, held against a cluster."""
    rows, lines, held = committed(file), [], []
    for row in rows:
        found = row["metrics"]
        if "predicted_s" in found:
            seconds = row["seconds"]["run"]
            held.append(f"{row['row']} {seconds:.1f} s, predicted {found['predicted_s']:.1f}")
            continue
        shares = [f"{100 * found[name]:.1f}" for name in ("efficiency", "lost")]
        hours = [f"{found[name]:.2f}" for name in ("hours", "tail_hours")]
        lines.append([row["table"].removeprefix("Pod, "), row["row"], *hours, *shares])
    heads = ["sweep, hosts", "dealt", "hours", "tail h", "efficiency %", "lost %"]
    return (
        f"{table_of(heads, lines, 2)}\n\nThe model against two workers of one machine: "
        f"{'; '.join(held)}. {setting(rows)}"
    )


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
    reasons = experiment.load(rows[0]["experiment"]).REASONS
    told = "\n".join(f"- {row}: {reason}." for row, reason in reasons.items())
    why = "Below 90 %, or more than 3 points of accuracy lost, and what we take to be the reason:"
    return f"{table_of(heads, lines, 3)}\n\n{source(rows)}\n\n{why}\n\n{told}"


def defenses(file: str) -> str:
    """The matrix of defenses and attacks, a table a data set."""
    rows = committed(file)
    module = experiment.load(rows[0]["experiment"])
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
    mine = [row for row in rows if row["table"] in tables]
    return "\n\n".join([*text, f"{runs(mine)} {setting(rows)}"])


def short(_: str) -> str:
    """The README's table: of each experiment with claims how many hold, the defenses that work."""
    lines = []
    for name, scale, path in files():
        module = experiment.load(name)
        if hasattr(module, "trends"):
            rows = committed(path)
            said = [trend.verdict for trend in experiment.claims(module, rows)]
            counts = [str(said.count(word)) for word in ("reproduced", "partly", "not")]
            lines.append([f"{module.TITLE} (`{name}`, scale `{scale}`)", str(len(rows)), *counts])
    heads = ["experiment", "rows", "claims reproduced", "partly", "not"]
    return table_of(heads, lines)


def made(_: str) -> str:
    """By which code, on which jax and device the rows of each file were computed."""
    lines = []
    for name, scale, path in files():
        rows = committed(path)
        said = [
            ", ".join(f"{word} ({n})" if n < len(rows) else str(word) for word, n in found.items())
            for found in (
                Counter(row.get(key) for row in rows) for key in ("commit", "jax", "device")
            )
        ]
        lines.append([f"`{name}`, scale `{scale}`", str(len(rows)), *said])
    return table_of(["experiment", "rows", "commit", "jax", "device"], lines, 2)


PARTS: dict[str, Any] = {
    part.__name__: part
    for part in (
        results,
        pivot,
        papers,
        claims,
        notes,
        runtime,
        peers,
        pods,
        attacks,
        defenses,
        short,
        made,
    )
}
_HEAD = rf"<!-- (?P<head>(?P<name>{'|'.join(PARTS)}) ?(?P<argument>[^>]*?)) -->"


def filled(text: str) -> str:
    """A page of the site with what its comments stand for."""
    return re.sub(_HEAD, lambda found: PARTS[found["name"]](found["argument"]), text)


def generate(text: str) -> str:
    """The README with what stands between `<!-- name -->` and `<!-- end -->` made anew."""

    def fill(found: re.Match) -> str:
        return f"<!-- {found['head']} -->\n{PARTS[found['name']](found['argument'])}\n<!-- end -->"

    return re.sub(rf"{_HEAD}.*?<!-- end -->", fill, text, flags=re.S)


# --- The pages of each committed results file ---


def pages() -> Iterator[tuple[str, str | bytes]]:
    """A page for each committed results file, its pictures, and the page that a run writes."""
    for name, scale, path in files():
        file = path.relative_to(ROOT).as_posix()
        module = experiment.load(name)
        rows = committed(path)
        trends = experiment.claims(module, rows)
        lines = [
            f"# {module.TITLE}" + f", scale {scale}" * (scale != "cpu"),
            "",
            f"`bdjax run {name} --scale {scale}`; {len(rows)} rows. "
            f"[The page that the run writes](pages/{path.stem}/index.html): every metric, sorted "
            "by a click.",
            "",
        ]
        if trends:
            lines += ["## What it claims, and what our rows show", "", claims(file), ""]
        pictures = sorted((ROOT / ROWS).glob(f"{name}-*.png")) if scale == "cpu" else []
        if pictures:
            lines += ["## Pictures", ""]
        for picture in pictures:
            what = picture.stem.removeprefix(f"{name}-").replace("-", " ")
            lines += [f"![{module.TITLE}: {what}]({picture.name})", ""]
            yield f"results/{picture.name}", picture.read_bytes()
        lines += ["## Tables", "", results(file), ""]
        if told := notes(file):
            lines += ["## Notes: where we differ, and why", "", told, ""]
        yield f"results/{path.stem}.md", "\n".join(lines)
        section = report.Section(
            module.TITLE,
            report.load(path).rows,
            [
                report.Picture(
                    p.stem, p.stem.removeprefix(f"{name}-"), module.TITLE, p.read_bytes()
                )
                for p in pictures
            ],
            experiment.notes(module),
            trends,
            command=f"bdjax run {name} --scale {scale}",
        )
        whole = report.page([section], module.TITLE)
        yield f"results/pages/{path.stem}/index.html", whole.encode()


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(generate(readme.read_text(encoding="utf-8")), encoding="utf-8")
