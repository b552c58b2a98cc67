"""The experiments from end to end at scale smoke, as a user starts them: every row, table and
figure, no result.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from bdjax import experiment
from bdjax.rows import Rows
from bdjax.store import Store
from bdjax.types import BadInput

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


PAPERS = (
    "shamshiri2023", "cheng2019", "strip_neural_cleanse", "veldanda2020", "ye2021", "audit_zoo",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", PAPERS)
def test_smoke(name, tmp_path):
    file, out = EXPERIMENTS / f"{name}.py", tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "bdjax",
        "run",
        str(file),
        "--scale",
        "smoke",
        "--out",
        str(out),
        "--quiet",
    ]
    # Its programs run once: compiling them is all that takes time. The user's data folder is none
    # of a test's business.
    own = {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("level=1", "level=0"),
        "JAX_NUM_CPU_DEVICES": "1",
        "BDJAX_DATA_DIR": str(tmp_path),
    }
    done = subprocess.run(
        command, text=True, capture_output=True, env={**os.environ, **own}, check=False
    )
    assert done.returncode == 0, done.stderr
    module = experiment.load(file)
    rows = Store(out).rows()
    assert {row["run"] for row in rows} == {cell.run_id for cell in module.cells("smoke")}
    assert not [row for row in rows if "error" in row]
    tables, page = (out / "table.md").read_text(), (out / "index.html").read_text()
    for row in rows:
        assert f"## {row['table']}" in tables
    for _, verdict, numbers in module.trends(Rows(rows)):
        assert verdict in ("reproduced", "partly", "not") and numbers
    drawn = sorted(path.stem for path in (out / "figures").glob("*.png"))
    assert drawn and page.count("<img") == len(drawn)


BEGIN = "TITLE, SCALES = 'Odd', ('smoke',)\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = (", "is not Python"),
        ("1 / 0\n", "line 1: ZeroDivisionError: division by zero"),
        ("raise SystemExit('no')\n", "line 1: SystemExit: no"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines"),
        (BEGIN, "defines no cells"),
        (f"{BEGIN}def cells(scale, seeds):\n    return []\n", "has no cells at scale smoke"),
        (f"{BEGIN}def cells(scale, seeds):\n    yield 3\n", "cells gives int, not Cell"),
        (f"{BEGIN}def cells(scale, seeds):\n    return [][0]\n", "line 3: IndexError"),
        (f"{BEGIN}def cells(scale):\n    return []\n", "cells.scale. is to be cells.scale, seeds"),
        (f"{BEGIN}cells = None\n", "is not a function"),
        (f"{BEGIN}cells = lambda *a: []\nfigures = []\n", "figures .. is not a function"),
        (f"{BEGIN}def cells(scale, seeds): ...\ndef trends(): ...\n", "is to be trends.rows."),
    ],
)
def test_an_odd_file_is_told_of_in_one_line(text, line, tmp_path):
    file = tmp_path / "odd.py"
    file.write_text(text)
    with pytest.raises(BadInput, match=line) as caught:
        experiment.run(file, "smoke", tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.py"]


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("trends", None, r"trends gives None, not a list of Trend\(claim, verdict, numbers\)"),
        ("trends", [("claim", "not")], r"trends gives \('claim', 'not'\), not a list of Trend"),
        ("trends", [("claim", "yes", "1")], "trends: verdict 'yes' is not one of reproduced, "),
        ("trends", [("claim", "not", 1)], "trends: numbers 1 is not a string"),
        ("figures", 3, r"figures gives 3, not a list of Figure\(name, title, caption, figure\)"),
        ("figures", [("a", "b", "c", 3)], "figures: figure 3 is not of class Figure"),
    ],
)
def test_odd_figures_and_claims_are_told_of_in_one_line(name, given, line, tmp_path):
    module = SimpleNamespace(**{name: lambda *_: given})
    with pytest.raises(BadInput, match=line):
        if name == "trends":
            experiment.claims(module, [])  # type: ignore[arg-type]
        else:
            path, store = tmp_path / "odd.py", Store(tmp_path)
            experiment.pictures(path, module, Rows(), store, "cpu", list)  # type: ignore[arg-type]


def test_figures_of_one_name_are_told_apart(tmp_path):
    two = [("a", "One", "", Figure()), ("a", "Two", "", Figure())]
    module = SimpleNamespace(figures=lambda *_: iter(two))
    found = experiment.pictures(tmp_path, module, Rows(), Store(tmp_path), "cpu", list)  # type: ignore[arg-type]
    assert [one.name for one in found] == ["a", "a-2"]


def test_a_file_that_is_no_python(tmp_path):
    (tmp_path / "odd.txt").write_text("hello")
    with pytest.raises(BadInput, match="does not end in"):
        experiment.run(tmp_path / "odd.txt", "smoke", tmp_path / "out")


CELL = """
from bdjax import Cell
from bdjax.datasets.sample import Sample
from bdjax.models.shamshiri import Ffnn
from bdjax.train import Recipe

TITLE, SCALES = "Mine", ("smoke",)


def cells(scale, seeds):
    data = Sample(train_size=100, test_size=50)
    yield Cell("T", "row", data, Ffnn(hidden=(4,)), Recipe(epochs=EPOCHS, batch=32))
"""


def test_a_folder_that_two_files_of_one_name_share_says_so(tmp_path, capsys):
    files = [tmp_path / name / "mine.py" for name in "ab"]
    for epochs, file in enumerate(files, 1):
        file.parent.mkdir()
        file.write_text(CELL.replace("EPOCHS", str(epochs)))
    (cell,) = experiment.load(files[0]).cells("smoke", None)
    row = {"run": cell.run_id, "seed": 0, "metrics": {}, "seconds": {"compile": 0.0, "run": 0.0}}
    row |= {"experiment": "mine", "scale": "smoke", **cell.place}
    row |= dict.fromkeys(("dataset", "model", "attack", "defense"), None)
    Store(tmp_path / "out").append([row])
    for file in files:
        experiment.run(file, "smoke", tmp_path / "out", dry_run=True)
        said = capsys.readouterr().err
        assert (f"are of no cell of {file}: they stay" in said) == (file == files[1]), said
