"""What a user gets who installs the package and has no clone: the experiments, too."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bdjax import experiment, identity, shipped
from bdjax.rows import result_files

ROOT = Path(__file__).parents[1]
SAME = """
import json, sys
from bdjax import experiment, identity, registry
found = experiment.load("cheng2019")
(cell, *_) = experiment.load("sweep_defenses").cells("smoke", 1)
print(json.dumps([found.__file__, identity.digest([found.Rates, found.Inside]),
                  registry.plugin_of(found.Rates), cell.run_id]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`python ARGS` with nothing but the built wheel of bdjax on its path, away from the clone."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", place, ROOT], check=True)
    (wheel,) = place.glob("bdjax-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", place / "site", wheel], check=True)
    env = {**os.environ, "PYTHONPATH": str(place / "site")}

    def python(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, *args], cwd=place, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    python.wheel = wheel  # type: ignore[attr-defined]
    return python


@pytest.mark.long
def test_a_wheel_carries_the_experiments_and_their_rows(installed):
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    lost = {p.name for p in (ROOT / "experiments").glob("*.py")} - {Path(n).name for n in names}
    assert not lost
    rows = [path for one in shipped.results("*") for path in result_files(one)]
    assert rows
    assert {
        f"bdjax/_experiments/{p.relative_to(shipped.folder()).as_posix()}" for p in rows
    } <= names
    assert installed.wheel.stat().st_size < 10 << 20
    said = installed("-m", "bdjax", "run", "--list")
    assert all(name in said for name in shipped.names())


@pytest.mark.long
def test_an_installed_experiment_is_the_same_as_in_a_clone(installed):
    here = experiment.load("cheng2019")
    (cell, *_) = experiment.load("sweep_defenses").cells("smoke", 1)
    file, *found = json.loads(installed("-c", SAME))
    assert "_experiments" in file and ROOT not in Path(file).parents
    assert found == [identity.digest([here.Rates, here.Inside]), "cheng2019.py", cell.run_id]


@pytest.mark.long
def test_an_installed_experiment_runs_by_name_and_reports(installed):
    said = installed("-m", "bdjax", "run", "sweep_defenses", "--scale", "smoke", "--quiet")
    assert "page: results/sweep_defenses-smoke/index.html" in said
    installed("-m", "bdjax", "report", "shamshiri2023", "--out", "committed")
