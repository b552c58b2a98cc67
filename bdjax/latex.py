"""Results as a paper takes them: booktabs tables, vector figures of a column's width, and BibTeX of
what was used.

What a paper is cited by stands with the method: its citation in the first paragraph of the
docstring, and a paragraph `Reference: Ada Lovelace and Alan Turing, "A Title", In A Conference.`
there, or with another method that has the same citation. Digests of code are blind to both.
"""

import inspect
import io
import itertools
import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from bdjax import experiment, own, registry, report, shipped
from bdjax.figures import figures as drawn
from bdjax.plots import STYLE, any_letter
from bdjax.plugins import raised_in
from bdjax.progress import shown
from bdjax.registry import Entry, door
from bdjax.rows import Row, Rows
from bdjax.store import Store
from bdjax.types import BadInput

FORMATS = ("pdf", "svg")
COLUMN, PAGE = 3.3, 6.9
"""Inches: a column, and the text, of a paper in two columns."""
NARROW = 5.5
"""Inches: what is drawn wider than this takes the whole page."""
SMALLEST = 0.75
"""Text shrinks no further than to this share: 7.5 points where it was 10."""
ROOM = {"table": 48, "table*": 100}
"""Characters that stand side by side in a column and on a page."""
LINES = 48
"""Lines of tables that stand above one another on a page."""
LONG = 44
"""Characters of a name from which on it is broken into lines."""
FONTS: dict[Any, Any] = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "bdjax"}
HEAD = "% Needs booktabs, figures graphicx."
FLOATS = 40
"""Floats that LaTeX surely holds at a time, beside those of the paper itself."""


@door
def write(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    tables: bool = False,
    figures: str | None = None,
    bib: bool = False,
    file: str | Path | None = None,
) -> list[Path]:
    """Writes of results folders `tables.tex`, `references.bib` and, for `figures` such as
    "pdf,svg", `figures/NAME.pdf` and so on, with `figures.tex` that places them; returns the paths.

    `out`: as in `report.merge`. `file`: the experiment file that draws them, where it is not one of
    bdjax's own: nothing that a folder says is run.
    """
    formats = [] if figures is None else figures.split(",")
    if odd := [kind for kind in formats if kind not in FORMATS]:
        raise BadInput(f"figures '{odd[0]}' is not one of {', '.join(FORMATS)}")
    folders, out = report.placed(folders, out)
    sections = [report.load(folder) for folder in folders]
    found: dict[str, bytes] = {}
    if tables:
        found["tables.tex"] = latex(sections, cite=bib).encode()
    if bib:
        rows = [row for section in sections for row in section.rows]
        found["references.bib"] = bibtex(rows).encode()
    if formats:
        placed, names = [HEAD], set()
        for folder, section in zip(folders, sections, strict=True):
            for one in _drawings(Path(folder), section, file):
                if not report.plain_name(one.name):
                    raise BadInput(f"a figure is called '{one.name}': give a name without / \\ :")
                of = "" if len(folders) == 1 else f"{Path(folder).resolve().name}-"
                name = _other(re.sub(r"[^A-Za-z0-9.+-]", "-", of + one.name), names)
                names.add(name)
                environment = _sized(one.figure)
                for kind in formats:
                    found[f"figures/{name}.{kind}"] = _saved(one.figure, kind)
                placed.append(_placed(one, name, environment))
        if "pdf" in formats:
            found["figures.tex"] = _floats(placed).encode()
    own.beside(out, found, ["figures"])
    report._save(out, found)
    return [out / name for name in found]


def _other(name: str, taken: Container[str]) -> str:
    """A name that is not taken: NAME, NAME-2 …"""
    more = (f"{name}-{i}" for i in itertools.count(2))
    return next(one for one in itertools.chain([name], more) if one not in taken)


# --- Tables ---


@door
def latex(sections: Iterable[report.Section], cite: bool = False) -> str:
    """Booktabs tables, one for each of a report's. Bold: the best of the defenses of one victim,
    see `_best`; `cite`: the caption cites what the rows use by the keys of `bibtex`.
    """
    parts, known = [HEAD], _keys() if cite else {}
    for section in sections:
        facts = {name: text for name, text in report._facts(section) if name in WHERE}
        for table in report.aggregate(section.rows):
            keys = {}
            if cite:
                lines = {(line["row"], *(line[f] for f in report.FIELDS)) for line in table["rows"]}
                mine = [
                    row
                    for row in section.rows
                    if (row.get("row") or "", *(row.get(f) for f in report.FIELDS)) in lines
                ]
                keys = {u.name: known[u.source] for u in used(mine) if u.source is not None}
            parts.append(_table(table, facts, keys))
    return _floats(parts)


def _floats(parts: Sequence[str]) -> str:
    """The head and its floats, with room for them where they are many."""
    head, *floats = parts
    room = [rf"\extrafloats{{{len(floats)}}}"] if len(floats) > FLOATS else []
    return "\n".join([head, *room, *floats])


WHERE = ("scale", "device", "jax", "commit", "XLA flags", "products", "lanes", "convolutions")
"""The facts of a results folder that a caption names."""


def _table(table: Mapping[str, Any], facts: Mapping[str, str], keys: Mapping[str, str]) -> str:
    lines, fields = table["rows"], report._shown(table)
    marks, notes = _notes(lines)
    first = [["", *map(_tex, fields)]]
    for line, mark in zip(lines, marks, strict=True):
        sign = rf"\textsuperscript{{{mark}}}" if mark else ""
        label = _tex(line["row"])
        if label.startswith(("[", "*")):  # which the \\ before it would take for its own
            label = "{}" + label
        first.append([label + sign, *(_tex(line[f], "--") for f in fields)])
    blocks = [_block(metric, lines) for metric in table["metrics"]]
    wide = [_width(first, i) for i in range(len(first[0]))]
    sizes = [sum(_width(block.cells, i) for i in range(len(block.cells[0]))) for block in blocks]
    small = sum(wide) + sum(sizes) <= ROOM["table"]
    environment = "table" if small else "table*"
    parts: list[list[_Block]] = [[]]
    left = ROOM[environment] - sum(wide)
    for block, size in zip(blocks, sizes, strict=True):
        if size > left and parts[-1]:  # what does not fit side by side stands below
            parts.append([])
            left = ROOM[environment] - wide[0]
        parts[-1].append(block)
        left -= size
    tabulars = [_tabular(*page) for page in _pages(first, parts[0])]
    tabulars += [_tabular(*page) for part in parts[1:] for page in _pages(*_more(first, part))]
    about = [*filter(None, [report._caption(table)]), *(f"{k} {v}" for k, v in facts.items())]
    said = [_tex(f"{table['name'].rstrip('.')}. {' · '.join(about)}.")]
    if any(s["sd"] is not None for line in lines for s in line["metrics"].values()):
        said.append(r"Mean $\pm$ sample standard deviation over the seeds.")
    if any(block.best for block in blocks):
        said.append(
            rf"Bold: best of a victim's defenses without oracle, {100 * report.DROP:.0f} points of "
            "accuracy at most below the most accurate."
        )
    if keys:
        named = (rf"{_tex(name)}~\cite{{{key}}}" for name, key in keys.items())
        said.append(f"Sources: {', '.join(named)}.")
    floats, captions = [], [" ".join(said), f"{_tex(table['name'])}, continued."]
    for i, text in enumerate(_together(tabulars)):
        floats += [rf"\begin{{{environment}}}", r"  \centering\small"]
        floats += [rf"  \caption{{{captions[i > 0]}}}", r"  \smallskip", text]
        floats += [rf"  \par\footnotesize {n}" for n in notes if n.partition("}")[0] + "}" in text]
        floats += [rf"\end{{{environment}}}", ""]
    return "\n".join(floats)


class _Block(NamedTuple):
    """The columns of a metric, `cells: [1 + lines][columns]` with their headings first; `over`:
    a heading over all of them.
    """

    over: str
    cells: list[list[str]]
    best: set[int]


def _pages(
    first: Sequence[Sequence[str]], blocks: Sequence[_Block]
) -> Iterator[tuple[list[Sequence[str]], list[_Block]]]:
    """A tabular as several that are no longer than a page, each with the headings."""
    head, room = 1 + any(len(block.cells[0]) > 1 for block in blocks), len(first) - 1
    size = -(-room // max(1, -(-room // (LINES - 1 - head))))
    for i in range(1, len(first), size):
        at = [0, *range(i, min(i + size, len(first)))]
        yield (
            [first[k] for k in at],
            [block._replace(cells=[block.cells[k] for k in at]) for block in blocks],
        )


def _together(tabulars: Sequence[str]) -> Iterator[str]:
    """The tabulars, as many above one another as a page holds."""
    some: list[str] = []
    for one in tabulars:
        if some and sum(text.count(r"\\") + 2 for text in [*some, one]) > LINES + 2:
            yield "\n".join(some)
            some = []
        some.append(one)
    yield "\n".join(some)


def _block(metric: str, lines: Sequence[Mapping[str, Any]]) -> _Block:
    stats, best = [line["metrics"].get(metric) for line in lines], _best(metric, lines)
    mine = [_tex(report.ours(metric, s, line["n"])) for s, line in zip(stats, lines, strict=True)]
    mine = [rf"\textbf{{{text}}}" if i in best else text for i, text in enumerate(mine)]
    label = _tex(report.label_of(metric))
    if not any(stat and stat["paper"] is not None for stat in stats):
        return _Block("", [[label], *([text] for text in mine)], best)
    theirs = [_tex(report.paper(metric, stat)) for stat in stats]
    return _Block(label, [["paper", "ours"], *map(list, zip(theirs, mine, strict=True))], best)


def _best(metric: str, lines: Sequence[Mapping[str, Any]]) -> set[int]:
    """Which lines have the best mean among the defenses of one victim, as it is printed: neither an
    oracle, nor a judge, nor of a victim that is none, nor a net that cannot classify. A defense
    without a rival is not the best, nor are all of them.
    """
    better, found = report._about_metric(metric).better, set()
    victims: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        judge = line["verdict"] is not None
        if line["defense"] and not (judge or line["oracle"] or line["invalid"]):
            victims.setdefault(line["victim"], []).append(i)

    def mean(i: int, name: str) -> float | None:
        return lines[i]["metrics"].get(name, {}).get("mean")

    for some in victims.values():
        known = [(i, value) for i in some if (value := mean(i, metric)) is not None]
        top = max((acc for i in some if (acc := mean(i, "acc_test")) is not None), default=0.0)
        able = [
            (i, v) for i, v in known if (mean(i, "acc_test") or 0) >= top - report.DROP or not top
        ]
        if better is None or not able:
            continue
        value = (max if better == "high" else min)(v for _, v in able)
        printed = {i: _printed(metric, lines[i]) for i, _ in known}
        said = {printed[i] for i, v in able if v == value}
        winners = {i for i, _ in able if printed[i] in said}
        found |= winners if len(winners) < len(known) else set()
    return found


def _printed(metric: str, line: Mapping[str, Any]) -> str:
    return report.ours(metric, line["metrics"][metric], line["n"]).partition(" ")[0]


def _notes(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The mark of each line, and what the marks mean: lines of which the same is to be known share
    one.
    """
    marks: dict[str, str] = {}
    found = []
    for line in lines:
        text = "; ".join(said for _, said in report._remarks(line))
        found.append(marks.setdefault(text, _letters(len(marks))) if text else "")
    return found, [rf"\textsuperscript{{{mark}}}{_tex(text)}." for text, mark in marks.items()]


def _letters(i: int) -> str:
    """a … z, aa, ab …"""
    return (_letters(i // 26 - 1) if i >= 26 else "") + chr(ord("a") + i % 26)


def _tabular(first: Sequence[Sequence[str]], blocks: Sequence[_Block]) -> str:
    sides = [column[1:] for column in zip(*first, strict=True)]
    align = "".join("r" if i and _numbers(side) else _left(side) for i, side in enumerate(sides))
    align += "".join("r" * len(block.cells[0]) for block in blocks)
    heads, rules, at = [""] * len(first[0]), [], len(first[0]) + 1
    for block in blocks:
        width = len(block.cells[0])
        heads.append(rf"\multicolumn{{{width}}}{{c}}{{{block.over}}}" if width > 1 else "")
        rules += [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"] if width > 1 else []
        at += width
    rows = [
        [*left, *(cell for block in blocks for cell in block.cells[i])]
        for i, left in enumerate(first)
    ]
    over = [" & ".join(heads) + r" \\", " ".join(rules)] if rules else []
    body = [" & ".join(row) + r" \\" for row in rows]
    text = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", *over, body[0], r"\midrule", *body[1:]]
    return "\n".join(f"  {one}" for one in [*text, r"\bottomrule", r"\end{tabular}\par\medskip"])


def _left(cells: Sequence[str]) -> str:
    """How a column of words is set; 5 points a character in the table's size."""
    return "l" if max(map(_letters_of, cells)) <= LONG else f"p{{{5 * LONG}pt}}"


def _more(
    first: Sequence[Sequence[str]], blocks: Sequence[_Block]
) -> tuple[list[Sequence[str]], list[_Block]]:
    """The lines that have something there, by their names alone."""
    at = [
        i
        for i in range(len(first))
        if any(set(block.cells[i]) - {"--"} for block in blocks)  # headings have, too
    ]
    some = [block._replace(cells=[block.cells[i] for i in at]) for block in blocks]
    return [first[i][:1] for i in at], some


def _numbers(cells: Iterable[str]) -> bool:
    return all(re.fullmatch(r"[\d.]+|--", cell) for cell in cells)


def _width(cells: Sequence[Sequence[str]], column: int) -> int:
    """Characters that a column takes, with what stands between it and the next."""
    return min(max(_letters_of(row[column]) for row in cells), LONG) + 2


def _letters_of(cell: str) -> int:
    return len(re.sub(r"\\[a-z]+|[${}\\]", "", cell))


GREEK = (
    r"\zeta \eta \theta \iota \kappa \nu \xi \pi \rho \varsigma \upsilon \phi \chi \psi \omega "
    r"\Gamma \Theta \Lambda \Xi \Pi \Sigma \Upsilon \Phi \Psi \Omega"
)
SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", **{sign: f"\\{sign}" for sign in "&%$#_"},
    "<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$", "±": r"$\pm$", "∞": r"$\infty$", "—": "--",
    "–": "--", "…": r"\dots{}", "·": r"$\cdot$", "×": r"$\times$", "→": r"$\to$", "≤": r"$\leq$",
    "≥": r"$\geq$", "≈": r"$\approx$", "ℓ": r"$\ell$", "α": r"$\alpha$", "β": r"$\beta$",
    "γ": r"$\gamma$", "δ": r"$\delta$", "Δ": r"$\Delta$", "ε": r"$\varepsilon$",
    "λ": r"$\lambda$", "μ": r"$\mu$", "µ": r"$\mu$", "σ": r"$\sigma$", "τ": r"$\tau$",
    "‖": r"$\|$", "²": r"$^2$", "‡": r"\ddag{}", "†": r"\dag{}", "’": "'", "“": "``", "”": "''",
    "✓": "yes", "✗": "no", "′": "$'$", "⁄": "/", "‘": "`", "„": ",,", "⊙": r"$\odot$",
    "⊕": r"$\oplus$", "√": r"$\surd$", "≠": r"$\neq$", "∼": r"$\sim$", "∝": r"$\propto$",
    "∈": r"$\in$", "←": r"$\gets$", "°": r"$^\circ$", "Đ": "D", "đ": "d", "Ð": "D", "ð": "d",
    "Þ": "Th", "þ": "th", "\u0328": "",  # a hook below, which needs fonts of its own
    **dict(zip("ζηθικνξπρςυφχψωΓΘΛΞΠΣΥΦΨΩ", map("${}$".format, GREEK.split()), strict=True)),
}  # fmt: skip
"""Characters that every LaTeX can set, whatever its engine and fonts."""


def _tex(value: Any, none: str = "") -> str:
    if value is None:
        return none
    return "".join(map(_sign, unicodedata.normalize("NFC", shown(value))))


def _sign(character: str) -> str:
    if character in SIGNS or character.isascii():
        return SIGNS.get(character, character)
    plain = unicodedata.normalize("NFKD", character)  # a wide % is one
    if "LATIN" in unicodedata.name(character, "") and ord(character) < 0x180:
        accented = unicodedata.normalize("NFD", character) == plain != character
        if (accented and "\u0328" not in plain) or character in "æÆœŒøØłŁßı":
            return character
    known = "".join(SIGNS.get(sign, sign) for sign in plain)
    if not known.isascii():
        return f"{{[U+{ord(character):04X}]}}"
    form, bare = unicodedata.decomposition(character).partition(" ")[0], known.replace("$", "")
    if form in ("<super>", "<sub>"):  # 10² is not 102
        return f"${'^' if form == '<super>' else '_'}{{{bare}}}$"
    if form == "<fraction>":
        return r"$\frac{{{}}}{{{}}}$".format(*bare.split("/"))
    return known


# --- Figures ---


def _drawings(
    folder: Path, section: report.Section, file: str | Path | None
) -> Iterator[report.Figure]:
    rows, store = Rows(section.rows, folder), Store(folder)
    path = _shipped(rows[0].get("experiment")) if file is None else Path(file)
    if path is None:
        yield from drawn(rows, store)
        return
    module, scale = experiment.load(path), rows[0].get("scale")
    with raised_in(path):
        yield from experiment.pictures(
            path, module, rows, store, scale, lambda: module.cells(scale, None)
        )


def _shipped(name: Any) -> Path | None:
    """The file of bdjax's own experiment `name`; None where it is none."""
    return shipped.file(name) if name in shipped.names() else None


def _sized(figure: matplotlib.figure.Figure) -> str:
    """Gives a figure the width of a column, or of the page where it was drawn wide; returns the
    environment that holds it. What is smaller keeps its size.
    """
    width, height = figure.get_size_inches()
    place, room = ("figure", COLUMN) if width <= NARROW else ("figure*", PAGE)
    shrink = min(1.0, room / width)
    text = max(shrink, SMALLEST)
    figure.set_size_inches(width * shrink, height * (shrink + text) / 2)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for which in ("major", "minor"):  # ticks that are made while drawing
                size = axis.get_tick_params(which).get("labelsize", STYLE["xtick.labelsize"])
                axis.set_tick_params(which, labelsize=float(size) * text)
    ticks = {
        label
        for axes in figure.axes
        for label in (*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both"))
    }
    for words in figure.findobj(lambda one: isinstance(one, Text) and one not in ticks):
        words.set_fontsize(words.get_fontsize() * text)  # type: ignore[attr-defined]
    for line in figure.findobj(lambda one: isinstance(one, Line2D)):
        line.set(linewidth=line.get_linewidth() * text, markersize=line.get_markersize() * text)  # type: ignore[attr-defined]
    return place


def _saved(figure: matplotlib.figure.Figure, kind: str) -> bytes:
    """A figure as a file that is equal whenever it is written; letters are in it."""
    buffer = io.BytesIO()
    undated = {"CreationDate": None} if kind == "pdf" else {"Date": None}
    with matplotlib.rc_context(FONTS), any_letter():
        figure.savefig(buffer, format=kind, metadata=undated, dpi=300)
    return buffer.getvalue()


def _placed(one: report.Figure, name: str, environment: str) -> str:
    caption = ". ".join(part.rstrip(".") for part in (one.title, one.caption) if part)
    text = [rf"\begin{{{environment}}}", r"  \centering"]
    text += [rf"  \includegraphics{{figures/{name}.pdf}}", rf"  \caption{{{_tex(caption)}.}}"]
    return "\n".join([*text, rf"\end{{{environment}}}", ""])


# --- BibTeX ---


class Source(NamedTuple):
    """What a method is cited by. `where`: its journal, or "In …", its conference; "" where it has
    none but arXiv; `title` too is "" where none stands with the method.
    """

    authors: tuple[str, ...]
    year: int
    title: str
    where: str
    arxiv: str | None

    @property
    def key(self) -> str:
        """`gu2017badnets`, or, without a title, `guothers2017`."""
        last = [name.split()[-1] for name in self.authors]
        words = re.findall(r"\w{3,}", self.title)
        text = f"{last[0]}{self.year}{words[0]}" if words else f"{''.join(last)}{self.year}"
        plain = unicodedata.normalize("NFKD", text.lower())
        return re.sub(r"[^a-z0-9]", "", plain)


class Used(NamedTuple):
    """A method that rows use, and its source: None where none stands with it, or it is not at
    hand.
    """

    kind: str
    name: str
    known: bool
    source: Source | None


_REFERENCE = re.compile(r'Reference: (?P<authors>[^"]+), "(?P<title>[^"]+)"(?:, (?P<where>.+))?\.')


@door
def reference(entry: Entry) -> Source | None:
    """The source of a registered method; None where its docstring cites none."""
    if entry.year is None:
        return None
    alike = [one for one in registry.entries() if one[2:5] == entry[2:5]]  # the same citation
    for one in (entry, *alike):
        for paragraph in (inspect.getdoc(one.cls) or "").split("\n\n"):
            if said := _REFERENCE.fullmatch(" ".join(paragraph.split())):
                names = re.split(r", | and ", said["authors"])
                where = said["where"] or ""
                return Source(tuple(names), entry.year, said["title"], where, entry.arxiv)
    paper = re.sub(r"^after ", "", entry.paper)
    names = ("others" if name == "al." else name for name in re.split(r" & | et (?=al\.)", paper))
    return Source(tuple(names), entry.year, "", "", entry.arxiv)


@door
def used(rows: Iterable[Row]) -> list[Used]:
    """The attacks, defenses, nets and data of rows, those within others too, by kind and name."""
    names: set[tuple[str, str]] = set()
    known = {(entry.kind, entry.name): entry for entry in registry.entries()}
    kinds = {name: kind for kind, name in known}

    def look(kind: str | None, value: Any) -> None:
        if isinstance(value, Mapping):
            if isinstance(name := value.get("name"), str):
                kind = kind if kind and ((kind, name) in known or name not in kinds) else None
                if place := kind or kinds.get(name):
                    names.add((place, name))
            value = list(value.values())
            kind = None
        if isinstance(value, (list, tuple)):
            for one in value:
                look(kind, one)

    for row in rows:
        config = row.get("config") or {}
        for part in registry.KINDS:
            look(part, config.get(part) or ({"name": row[part]} if row.get(part) else None))
    return [
        Used(kind, name, entry is not None, None if entry is None else reference(entry))
        for kind, name in sorted(names, key=lambda n: (registry.KINDS.index(n[0]), n[1]))
        for entry in [known.get((kind, name))]
    ]


@door
def bibtex(rows: Iterable[Row]) -> str:
    """BibTeX of exactly what rows use, each entry once; what has none is named in a comment."""
    users: dict[Source, list[str]] = {}
    lacking = []
    for one in used(rows):
        words = f"{one.kind} {shown(one.name)}"
        if one.source is None:
            lacking.append(f"% {words}: {'cites nothing' if one.known else 'not at hand'}")
        else:
            users.setdefault(one.source, []).append(words)
    keys = _keys()
    found = [f"% {', '.join(words)}\n{_entry(one, keys[one])}" for one, words in users.items()]
    return "\n".join([*found, *lacking]) + "\n"


def _keys() -> dict[Source, str]:
    """The key of every source that a registered method has: `key`, with a, b … where several have
    one.
    """
    alike: dict[str, list[Source]] = {}
    for source in sorted({s for entry in registry.entries() if (s := reference(entry))}, key=str):
        alike.setdefault(source.key, []).append(source)
    return {
        source: key + (_letters(i) if len(some) > 1 else "")
        for key, some in alike.items()
        for i, source in enumerate(some)
    }


def _field(text: str) -> str:
    """As `_tex`; BibTeX counts a brace that is escaped, too."""
    found = _tex(text).replace(r"\{", r"\textbraceleft{}")
    return found.replace(r"\}", r"\textbraceright{}")


def _entry(source: Source, key: str) -> str:
    conference = source.where.startswith("In ")
    kind = "inproceedings" if conference else "article" if source.where else "misc"
    fields = {
        "author": " and ".join(map(_field, source.authors)),
        "title": f"{{{_field(source.title)}}}" if source.title else "",
        "booktitle" if conference else "journal": _field(source.where.removeprefix("In ")),
        "year": str(source.year),
        "eprint": source.arxiv or "",
        "archiveprefix": "arXiv" if source.arxiv else "",
    }
    lines = ",\n".join(f"  {name} = {{{text}}}" for name, text in fields.items() if text)
    return f"@{kind}{{{key},\n{lines}\n}}\n"
