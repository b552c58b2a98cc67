"""Cells to rows: shared programs and victims, resuming, failures that stay where they are."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from bdjax import registry, sweep
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.defenses.train.lpsf import Lpsf
from bdjax.models.shamshiri import Ffnn
from bdjax.store import Store
from bdjax.sweep import Cell, Runner, grid, replace
from bdjax.train import Recipe
from bdjax.types import BadInput

DATA = registry.make("dataset", "fashion-mnist-sample", train_size=600, test_size=200)
BASE = Cell("T", "victim", DATA, Ffnn(hidden=(16,)), Recipe(epochs=3, batch=32), BadNets())
DEFENDED = [
    replace(BASE, ["defense"], FinePruning(recipe=Recipe(epochs=1, batch=32))),
    replace(BASE, ["defense"], Strip(n=5, inputs=20)),
    replace(BASE, ["defense"], Lpsf(links=8)),
]
CELLS = [*grid(BASE, seed=range(2), attack__rate=(0.0, 0.2)), *DEFENDED]


def table(rows):
    """What must be the same however a run went."""
    return {row["run"]: (row["row"], row["seed"], row["metrics"]) for row in rows}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    runner = Runner(Store(tmp_path_factory.mktemp("whole")), "test", quiet=True)
    return runner, runner.run(CELLS)


def test_rows_have_what_scripts_rely_on(unbroken):
    _runner, rows = unbroken
    assert [row["run"] for row in rows] == [cell.run for cell in CELLS]
    assert len({row["run"] for row in rows}) == len(CELLS)
    wanted = "run experiment scale table row dataset model attack defense seed config metrics reported seconds oracle "
    for row in json.loads(json.dumps(rows)):
        assert set((wanted + "substitute device jax commit").split()) <= set(row)
        assert {"acc_test", "asr_all", "asr_nt"} <= set(row["metrics"])
        assert {"compile", "run"} == set(row["seconds"])
        assert (row["dataset"], row["model"], row["attack"]) == ("fashion-mnist-sample", "ffnn", "badnets")
        assert row["oracle"] is False
    assert rows[0]["config"]["attack"]["rate"] == 0.0 and rows[1]["config"]["attack"]["rate"] == 0.2


def test_the_victim_of_several_defenses_is_trained_once(unbroken):
    runner, _ = unbroken
    assert len(list((runner.store.folder / "victims").iterdir())) == 5  # LPSF trains its own
    assert not (runner.store.folder / "partial").exists() or not list((runner.store.folder / "partial").iterdir())


def test_cells_that_differ_in_numbers_share_one_program(unbroken):
    runner, _ = unbroken
    epochs = [key for key in runner.programs if key[0] is sweep._epoch]
    assert len(epochs) == 1


def test_a_finished_run_does_nothing_again(unbroken, monkeypatch):
    runner, rows = unbroken
    monkeypatch.setattr(Runner, "_group", lambda *_: pytest.fail("nothing is pending"))
    assert table(Runner(runner.store, "test", quiet=True).run(CELLS)) == table(rows)


def test_interrupted_training_goes_on_bit_for_bit(unbroken, tmp_path, monkeypatch):
    """Stopped after the second of three epochs, with a checkpoint after each."""
    monkeypatch.setattr(sweep, "CHECKPOINT_EVERY", 0.0)
    runner, rows = unbroken
    store = Store(tmp_path)
    stopping = Runner(store, "test", quiet=True, programs=runner.programs)

    class Stop(Exception):
        pass

    class Bar(sweep.Progress):
        def step(self, note="", amount=1):
            super().step(note, amount)
            if self.done == 2:
                raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(sweep, "Progress", Bar)
        stopping.run(CELLS)
    assert list((tmp_path / "partial").iterdir()) and not store.rows()
    again = Runner(store, "test", quiet=True, programs=runner.programs).run(CELLS)
    assert table(again) == table(rows)
    assert not list((tmp_path / "partial").iterdir())


def test_lanes_and_devices_change_no_result(unbroken, tmp_path):
    _, rows = unbroken
    four = Runner(Store(tmp_path / "4"), "test", quiet=True, devices=jax.local_devices(), lanes=2).run(CELLS[:4])
    for one, other in zip(rows, four, strict=False):
        for name, value in one["metrics"].items():
            assert value == pytest.approx(other["metrics"][name], abs=0.02), name


def test_a_diverged_cell_fails_alone(tmp_path):
    cells = list(grid(replace(BASE, ["recipe", "optimizer"], "sgd"), recipe__lr=(0.05, 1e30)))
    good, bad = Runner(Store(tmp_path), "test", quiet=True).run(cells)
    assert "error" not in good and good["metrics"]["acc_test"] > 0.4
    assert "diverged" in bad["error"] and bad["metrics"] == {}


def test_grid_over_any_field():
    made = list(grid(BASE, attack__rate=(0.1, 0.2), recipe__epochs=(1, 2), seed=(0,)))
    assert [(c.attack.rate, c.recipe.epochs) for c in made] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]
    assert len({c.run for c in made}) == 4
    with pytest.raises(BadInput, match="no field 'rte'"):
        list(grid(BASE, attack__rte=(1,)))


EXPERIMENT = """
    from bdjax import registry
    from bdjax.attacks.badnets import BadNets
    from bdjax.models.shamshiri import Ffnn
    from bdjax.sweep import Cell, grid
    from bdjax.train import Recipe

    TITLE, SCALES = "a small one", ("smoke",)

    def cells(scale, seeds):
        data = registry.make("dataset", "fashion-mnist-sample", train_size=600, test_size=100)
        for width in (8, 12, 16):
            cell = Cell("T", f"width {width}", data, Ffnn(hidden=(width,)), Recipe(epochs=2, batch=32), BadNets())
            yield from grid(cell, seed=range(seeds or 2))
"""


def test_kill_9_in_the_middle_of_a_run_and_the_same_table(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(textwrap.dedent(EXPERIMENT))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bdjax", "run", str(file), "--scale", "smoke", "--quiet", "--out"]
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL)
    results, until = out / "results.jsonl", time.monotonic() + 200
    while time.monotonic() < until and not (results.exists() and results.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(Store(out).rows()) < 6
    subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    runs = [json.loads(line)["run"] for line in results.read_text().splitlines()]
    assert len(runs) == len(set(runs)) == 6
    assert table(Store(out).rows()) == table(Store(tmp_path / "whole").rows())
    for name in ("results.jsonl", "table.csv", "table.md", "index.html"):
        assert (out / name).stat().st_size > 0
    assert np.isfinite(json.loads(results.read_text().splitlines()[0])["metrics"]["acc_test"])
