"""Tables in LaTeX, vector figures and BibTeX, from rows whose numbers are known."""

import ast
import inspect
import re
import shutil
import subprocess

import pytest

from bdjax import cli, figures, latex, registry, report, shipped
from bdjax.attacks.badnets import BadNets
from bdjax.rows import read_rows, result_files
from bdjax.store import Store
from bdjax.types import BadInput


def row(name, defense=None, seed=0, acc=0.9, asr=0.5, attack="badnets", **fields):
    config = {
        "dataset": {"name": "fashion-mnist-sample"}, "model": {"name": "cnn"}, "recipe": {"lr": 1},
        "attack": {"name": attack, "rate": 0.1}, "defense": defense and {"name": defense},
    }  # fmt: skip
    return {
        "run": registry.digest(name, defense, seed), "experiment": "mine", "scale": "cpu",
        "table": "Table_I", "row": name, "dataset": "fashion-mnist-sample", "model": "cnn",
        "attack": attack, "defense": defense, "seed": seed, "config": config,
        "metrics": {"acc_test": acc, "asr_nt": asr}, "reported": {}, "oracle": False,
        "seconds": {"compile": 3.0, "run": 40.0}, "substitute": None,
        "device": "cpu (2 cores)", "jax": "0.10.2", "commit": "abc1234", "victim": f"v{seed}",
    } | fields  # fmt: skip


TWIN = {"victim": "0" * 16, "asr_nt": 0.0}
ROWS = [
    *(row("no defense & 100 %", None, s, 0.95, 0.99, twin=TWIN) for s in range(2)),
    row("Fine-Pruning", "fine-pruning", 0, 0.92, 0.20, reported={"asr_nt": 0.002}),
    row("Fine-Pruning", "fine-pruning", 1, 0.94, 0.30),
    *(row("retraining", "retraining", s, 0.93, 0.60) for s in range(2)),
    *(row("a dead net", "autoencoder", s, 0.10, 0.00) for s in range(2)),
    *(row("told the target", "nc-pruning", s, 0.93, 0.01, oracle=True) for s in range(2)),
]


@pytest.fixture
def folder(tmp_path):
    Store(tmp_path / "mine").append(ROWS)
    return tmp_path / "mine"


def test_a_table_has_mean_and_deviation_the_best_and_what_made_it():
    text = latex.latex([report.Section("mine", ROWS)])
    assert r"Fine-Pruning & fine-pruning & \textbf{93.0 $\pm$ 1.4} & 0.2 & " in text
    assert r"\textbf{25.0 $\pm$ 7.1} \\" in text
    assert text.count(r"\textbf{") == 3  # retraining has the same accuracy; neither trap is marked
    assert r"told the target\textsuperscript{a}" in text and r"{a}oracle." in text
    assert r"no defense \& 100 \% & --" in text
    for known in ("n = 2", "scale cpu", "device cpu (2 cores)", "jax 0.10.2", "commit abc1234"):
        assert known in text
    assert r"\caption{Table\_I." in text and text.count("{") == text.count("}") + text.count(
        r"\{"
    ) - text.count(r"\}")


def test_a_defense_alone_or_level_with_all_is_not_the_best():
    alone = [row("no defense"), row("strip", "fine-pruning", acc=0.8)]
    level = [*alone, row("other", "retraining", acc=0.8)]
    for rows in (alone, level):
        assert "textbf" not in latex.latex([report.Section("mine", rows)])


def test_many_metrics_stand_below_one_another():
    metrics = {f"a_long_name_of_metric_{i}": i / 7 for i in range(12)}
    lines = [row("with", metrics=metrics), row("without", metrics={"acc_test": 0.5})]
    text = latex.latex([report.Section("mine", lines)])
    heads = re.findall(r"a long name of metric \d+", text)
    assert sorted(set(heads)) == sorted(heads) and len(heads) == 12
    assert text.count(r"\begin{tabular}") > 1
    assert len(re.findall(r"^  without", text, re.M)) == 1  # where it has nothing, it is not named


@pytest.mark.parametrize("name", ["_$%&#{}~^\\", "σ ≥ 0.5 → ∞", "Ünïcode 漢", "％＆＿＃＄｛＾＼"])
def test_any_name_becomes_what_latex_can_set(name):
    text = latex.latex([report.Section("mine", [row(name)])])
    assert all(ord(c) < 0x180 for c in text)
    assert ("[U+6F22]" in text) == ("漢" in name)
    line = next(line for line in text.splitlines() if "badnets" in line or r"\%" in line)
    bare = re.sub(r"\\[A-Za-z]+|\\.|[$]\\[a-z]+[$]", "", line).rstrip("\\ ")
    assert not re.search(r"[%#_^~]", bare), line


@pytest.mark.parametrize("name", ["[x] y", "*z", "［wide", "🦊 fox"])
def test_no_name_is_taken_for_an_option_of_the_line_before(name):
    text = latex.latex([report.Section("mine", [row("a"), row(name)])])
    assert not re.search(r"^ *[\[*]", text, re.M), text


def test_keys_of_two_papers_of_a_name_and_year_differ_and_braces_are_even(own_names):
    """BibTeX counts a brace that is escaped, too."""
    for name, arxiv, title in (("one-of-lee", "2501.00001", "An odd } brace"),
                               ("two-of-lee", "2502.00002", "An odd { brace")):  # fmt: skip
        doc = f'Theirs (Lee et al., 2025, arXiv:{arxiv}).\n\nReference: A Lee, "{title}".'
        registry.attack(name)(type(name.title().replace("-", ""), (BadNets,), {"__doc__": doc}))
    lines = [row("1", attack="one-of-lee"), row("2", attack="two-of-lee")]
    text = latex.bibtex(lines)
    keys = re.findall(r"^@\w+\{(\w+),", text, re.M)
    assert {"lee2025odda", "lee2025oddb"} <= {*keys}, keys
    assert text.count("{") == text.count("}")
    table = latex.latex([report.Section("mine", lines)], cite=True)
    assert r"\cite{lee2025odda}" in table and r"\cite{lee2025oddb}" in table


def test_bibtex_has_exactly_what_was_used():
    text = latex.bibtex(ROWS)
    keys = re.findall(r"^@\w+\{(\w+),", text, re.M)
    assert sorted(keys) == sorted(set(keys)) == [
        "gu2017badnets", "liu2017neural", "liu2018fine", "shamshiri2023defense",
        "wang2019neural", "xiao2017fashion",
    ]  # fmt: skip
    assert "% defense retraining" not in text  # one entry for two methods of a paper
    assert "% defense autoencoder, defense retraining\n@inproceedings{liu2017neural" in text
    assert "author = {Tianyu Gu and Brendan Dolan-Gavitt and Siddharth Garg}" in text
    assert "eprint = {1708.06733}" in text
    absent = latex.bibtex([row("x", attack="not-there")])
    assert "% attack not-there: not at hand" in absent
    nested = row("x") | {"config": {"attack": {"name": "multi-trigger", "parts": [
        {"name": "blended"}]}}}  # fmt: skip
    assert "chen2017targeted" in latex.bibtex([nested])


def test_every_method_that_cites_a_paper_has_its_title_and_papers_have_one_key():
    found: dict[str, latex.Source] = {}
    for entry in registry.entries():
        source = latex.reference(entry)
        assert (source is None) == (entry.year is None)
        if source is not None and entry.plugin is None:
            assert source.title, f"{entry.kind} {entry.name}: add a Reference to its docstring"
            assert found.setdefault(source.key, source) == source
            last = source.authors[0].split()[-1]
            assert last in entry.paper, f"{entry.name}: {entry.paper} is not by {last}"


def test_the_command_writes_what_a_paper_takes_and_keeps_what_is_the_users(folder, tmp_path):
    args = ["report", str(folder), "--latex", "--figures", "pdf,svg", "--bib"]
    cli.main([*args, "--out", str(tmp_path / "out")])
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tables.tex", "references.bib", "figures.tex", "index.html"} <= made
    cited = set(re.findall(r"\\cite\{(\w+)\}", (tmp_path / "out" / "tables.tex").read_text()))
    bib = (tmp_path / "out" / "references.bib").read_text()
    assert cited == set(re.findall(r"^@\w+\{(\w+),", bib, re.M))
    (tmp_path / "out" / "tables.tex").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main([*args, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "tables.tex").read_text() == "mine"


def test_figures_are_vectors_of_a_columns_width_with_their_letters_in_them(folder, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from bdjax import plots\nfrom bdjax.report import Figure\nTITLE, SCALES = 'Mine', {}\n"
        "def cells(scale, seeds): return []\n"
        "def figures(rows, store, scale):\n"
        "    drawing = plots.curves([1, 2, 3], {'a': [1, 2, 3], 'b': [3, 1, 2]}, None, 'x', 'y')\n"
        "    return [Figure('lines', f'{len(rows)} lines', '', drawing)]\n"
    )
    write = {"out": tmp_path / "out", "figures": "pdf,svg", "file": file}
    paths = latex.write([folder], **write)
    pdf = (tmp_path / "out" / "figures" / "lines.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Subtype /Type3" not in pdf
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", pdf)
    assert box is not None and float(box[1]) == pytest.approx(72 * latex.COLUMN)
    svg = (tmp_path / "out" / "figures" / "lines.svg").read_text()
    assert "<text" not in svg and "<image" not in svg
    assert "10 lines" in (tmp_path / "out" / "figures.tex").read_text()
    before = {path: path.read_bytes() for path in paths}
    latex.write([folder], **write)
    assert {path: path.read_bytes() for path in paths} == before


def test_nothing_that_a_folder_names_is_run(tmp_path):
    for name in ("../evil", "evil", None, "a/b"):
        assert latex._shipped(name) is None


def test_wrong_formats_get_one_line(folder):
    with pytest.raises(BadInput, match="figures 'png' is not one of pdf, svg"):
        latex.write([folder], figures="pdf,png")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_sets_the_tables(folder, tmp_path):
    latex.write([folder], tmp_path, tables=True)
    head = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{tables}"
    (tmp_path / "paper.tex").write_text(head + r"\end{document}")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_many_floats_have_room():
    few = [report.Section("mine", [{**row("r"), "table": f"T{i}"} for i in range(40)])]
    many = [report.Section("mine", [{**row("r"), "table": f"T{i}"} for i in range(41)])]
    assert r"\extrafloats" not in latex.latex(few)
    assert latex.latex(many).splitlines()[1] == r"\extrafloats{41}"


def test_our_own_rows_and_captions_have_no_letter_that_latex_cannot_set():
    for name in shipped.names():
        for path in shipped.results(name):
            for one in read_rows(result_files(path)):
                text = latex._tex(f"{one['table']} {one['row']} {one.get('substitute')}")
                assert "[U+" not in text, text
    for module in (figures, report):
        words = [w.value for w in ast.walk(ast.parse(inspect.getsource(module)))
                 if isinstance(w, ast.Constant) and isinstance(w.value, str)]  # fmt: skip
        odd = {w for w in words if "[U+" in latex._tex(w)}
        assert odd <= {*report.MARKS.values()}, odd


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("10⁻³ xⁿ x₁ x²", "10$^{-}$$^{3}$ x$^{n}$ x$_{1}$ x$^2$"),
        ("1½", r"1$\frac{1}{2}$"),
        ("θ φ Σ Ω", r"$\theta$ $\phi$ $\Sigma$ $\Omega$"),
        ("Mądry, Đỗ, Łoś, Erdős", "Madry, D{[U+1ED7]}, Łoś, Erdős"),  # no hook in the plain fonts
        ("f′ ⊙ ŋ", r"f$'$ $\odot$ {[U+014B]}"),
    ],
)
def test_what_letters_become(text, wanted):
    assert latex._tex(text) == wanted


def test_a_table_of_hundreds_of_lines_goes_over_pages_and_a_long_name_over_lines():
    some = {"labels": {"flagged": ["7"], "target": ["3"]}}
    lines = [row(f"row {i:03}", **(some if i == 200 else {})) for i in range(300)]
    text = latex.latex([report.Section("mine", lines)])
    floats = text.split(r"\begin{table}")[1:]
    assert all(one.count(r"\\") <= latex.LINES for one in floats) and len(floats) == 7
    assert all(one.count(r"\toprule") == 1 and "ASR nt" in one for one in floats)
    assert sorted(re.findall(r"row \d{3}", text)) == [f"row {i:03}" for i in range(300)]
    assert [i for i, one in enumerate(floats) if r"\textsuperscript{b}" in one] == [4]
    assert ["flags 7" in one for one in floats] == [i == 4 for i in range(7)]
    name = "a very long name " * 12
    text = latex.latex([report.Section("mine", [row(name), row("short")])])
    assert rf"\begin{{tabular}}{{p{{{5 * latex.LONG}pt}}" in text
