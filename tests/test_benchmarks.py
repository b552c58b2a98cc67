"""The benchmarks: what they count, print and keep. Nothing here asserts how fast anything is."""

import json

import jax
import jax.numpy as jnp
import pytest

from bdjax import mesh
from bdjax.cli import main
from bdjax.types import BadInput
from benchmarks import measure
from benchmarks.__main__ import bench, names


def test_the_exponent_is_the_slope_and_peak_memory_counts_what_is_held():
    assert measure.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert measure.exponent([5], [1.0]) != measure.exponent([5], [1.0])  # NaN
    program = jax.jit(lambda x: x + 1).lower(jnp.ones(1000)).compile()
    assert mesh.held(program) >= 2 * 4000


def test_a_case_is_measured_in_its_baseline():
    case = measure.Case(
        "a, b", 4, lambda x: x @ x, (jnp.ones((8, 8)),), flops=1024.0, baseline=("one", lambda: 0)
    )
    found = measure.run(case, 3)
    assert found["size"] == 4 and found["low_s"] <= found["run_s"] <= found["high_s"]
    assert found["rate"] == pytest.approx(4 / found["run_s"])
    assert found["times_one"] > 0 and found["matmul_share"] > 0 and "ratio" not in found


def test_bench_prints_what_scripts_rely_on_keeps_it_and_compares(tmp_path, capsys, monkeypatch):
    bench(("fine_pruning",), scale="smoke", json_=True, repeats=1, out=tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert {"case", "ours_s", "rival_s", "ratio", "matmul_share", "device"} <= set(found)
    assert found["case"] == "Fine-Pruning, channels = 8" and found["ours_s"] > 0

    def again(case, repeats):
        raise AssertionError("measured twice")

    monkeypatch.setattr(measure, "run", again)
    bench(("fine_pruning",), scale="smoke", repeats=1, out=tmp_path, compare=tmp_path)
    text = capsys.readouterr().out
    assert "1.00" in text and (tmp_path / "index.html").exists()


def test_bad_words_are_one_line(capsys):
    assert {
        "train",
        "neural_cleanse",
        "strip",
        "ensemble",
        "abs",
        "mntd",
        "fine_pruning",
        "sweep",
    } <= set(names())
    with pytest.raises(BadInput, match="nearest name is 'strip'"):
        bench(("stripp",))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "strip", "--repeats", "0"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
