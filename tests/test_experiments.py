"""The experiments from end to end at scale smoke, as a user starts them: every row, table and
figure, no result.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bdjax import experiment

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


LONG = ("cheng2019", "strip_neural_cleanse", "veldanda2020", "ye2021")


@pytest.mark.parametrize(
    "name", ["shamshiri2023", *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
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
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {cell.run for cell in module.cells("smoke")}
    assert not [row for row in rows if "error" in row]
    tables, page = (out / "table.md").read_text(), (out / "index.html").read_text()
    for row in rows:
        assert f"## {row['table']}" in tables
    for _, verdict, numbers in module.trends(rows):
        assert verdict in ("reproduced", "partly", "not") and numbers
    drawn = sorted(path.stem for path in (out / "figures").glob("*.png"))
    assert drawn and page.count("<img") == len(drawn)
