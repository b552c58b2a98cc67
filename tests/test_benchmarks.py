"""The benchmarks: what they count, print and keep. Nothing here asserts how fast anything is."""

import ast
import dataclasses
import importlib
import inspect
import json
import math
import stat
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import row

from bdjax import mesh
from bdjax.cli import main
from bdjax.sweep import check
from bdjax.types import BadInput, Split
from benchmarks import accelerator, measure, peers, pod
from benchmarks.__main__ import APART, bench, names
from benchmarks.sides import anomaly, ours, rates, study


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


@pytest.mark.long
def test_the_benchmark_of_devices_goes_on_too(tmp_path, capsys):
    """Though its rows are measured in a process of their own."""
    for _ in range(2):
        bench(("devices",), scale="smoke", json_=True, repeats=1, out=tmp_path)
    first, second = np.array_split(capsys.readouterr().out.splitlines(), 2)
    assert len(first) == 4 and [*first] == [*second]


def group(*seconds):
    return tuple(pod.Stage(s, i == 0) for i, s in enumerate(seconds))


def test_a_pod_takes_the_groups_as_its_hosts_become_free():
    lines = [[group(30.0), group(20.0), group(20.0), group(5.0)]]
    found = pod.simulate(lines, pod.World(hosts=2, start=1.0))
    assert found == (41.0, 5.0, 75.0, 0.0, 0, 82.0)  # one has 30 + 5, the other 20 + 20
    assert found.metrics["efficiency"] == pytest.approx(75 / 82)
    own = [[group(30.0), group(5.0)], [group(20.0), group(20.0), group(1.0)]]
    assert pod.simulate(own, pod.World(hosts=2, start=1.0)) == (42.0, 6.0, 76.0, 0.0, 0, 84.0)


def test_a_lost_host_costs_what_was_not_kept():
    kill, world = (45.0, math.inf), pod.World(hosts=2, notice=5.0, away=1000.0)
    # Checkpoints every 30 s are seen by the other host, which has nothing to do from 10 on.
    found = pod.simulate([[group(100.0), group(10.0)]], world, kills=kill)
    assert found == (50 + 70, 120 - 10, 110.0, 15.0, 1, 45 + 120)
    found = pod.simulate([[group(100.0), group(10.0)]], world._replace(shared=False), kills=kill)
    assert found[:5] == (50 + 100, 150 - 10, 110.0, 45.0, 1)
    # Pieces that are done are kept, one that was begun is not.
    found = pod.simulate([[group(10.0, 20.0, 30.0), group(10.0)]], world, kills=kill)
    assert found[:5] == (50 + 30, 80 - 10, 70.0, 15.0, 1)
    # Dealt out beforehand, the host's work waits for the host.
    found = pod.simulate([[group(100.0)], [group(10.0)]], world, kills=kill)
    assert found == (1045 + 70, 1115 - 10, 110.0, 15.0, 1, 2 * 1115 - 1000)
    chance = pod.World(hosts=2, life=40.0, away=5.0)
    found = [pod.simulate([[group(10.0)] * 50], chance, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and found[0].taken > 1
    assert all(one.useful == pytest.approx(500.0) and one.vain > 0 for one in found)


def test_groups_of_a_pod_are_those_of_the_committed_rows():
    kinds = pod.committed()
    assert len(kinds) > 100 and all(stage.seconds > 0 for group in kinds for stage in group)
    ways = pod.dealt(kinds, 4)
    free, shards = ways["as free"][0], ways["beforehand"]
    assert len(free) == 4 * len(kinds) and len(shards) == pod.HOSTS
    both = [sum(pod.length(group) for line in way for group in line) for way in ([free], shards)]
    assert both[0] == pytest.approx(both[1])
    assert pod.length(free[0]) == max(map(pod.length, kinds))


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
    assert set(names()) >= APART
    with pytest.raises(BadInput, match="pod runs alone"):
        bench(("strip", "pod"))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "strip", "--repeats", "0"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", sorted({*names()} - APART))
def test_every_case_of_scale_cpu_can_be_traced(name):
    for case in importlib.import_module(f"benchmarks.{name}").cases(None, "cpu"):
        jax.eval_shape(case.program, *case.args)


# --- Peers ---


def test_every_comparison_names_functions_of_both_sides_that_take_its_settings():
    here = peers.ROOT / "benchmarks" / "sides"
    theirs = {
        name: {
            node.name: [arg.arg for arg in node.args.args]
            for node in ast.parse((here / f"{name}.py").read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        for name in peers.PEERS
    }
    for scale in peers.SIZES:
        found = list(peers.jobs(scale))
        assert len({job.title for job in found}) == len(found)
        for job in found:
            inspect.signature(getattr(ours, job.job)).bind(None, **job.ours)
            first, *others = theirs[job.peer][job.job]
            assert first == "given" and job.theirs.keys() <= {*others}, job.title


def test_the_other_net_has_the_same_weights():
    torch = pytest.importorskip("torch")
    from benchmarks import rivals

    model = ours.net("small")
    variables = jax.jit(model.init)(jax.random.key(0))
    net = rivals.badnets_cnn()
    shapes = {name: tuple(array.shape) for name, array in net.state_dict().items()}
    weights = peers.named("small", model, variables, shapes)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    x = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    with torch.no_grad():
        theirs = net(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    assert np.allclose(model.apply(variables, jnp.asarray(x)).logits, theirs, atol=1e-5)


def test_a_process_answers_and_says_why_it_stops(tmp_path):
    with peers.Process("ours", tmp_path, "none", "known", {}) as process:
        assert process.first["versions"]["jax"] == jax.__version__
    with pytest.raises(peers.Failed, match=r"no-such\.npz"):
        peers.Process("ours", tmp_path, "no-such", "strip", {})


def test_peers_that_are_not_there_are_one_line(tmp_path, capsys):
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 3\n")
    empty.chmod(empty.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(BadInput, match=r"ART: ended with code 3 \(benchmarks/peers"):
        bench(("peers",), scale="smoke", python=empty, only="ART*")
    with pytest.raises(BadInput, match="absent: No such file or directory"):
        bench(("peers",), scale="smoke", python=tmp_path / "absent", only="ART*")
    with pytest.raises(BadInput, match="no comparison fits 'AR'; there are: trojanzoo: "):
        bench(("peers",), scale="smoke", only="AR")
    with pytest.raises(BadInput, match="is no checkout of BackdoorBench"):
        bench(("peers",), scale="smoke", backdoorbench=tmp_path)
    with pytest.raises(BadInput, match="--only is for peers alone"):
        bench(("strip",), only="ART*")


def test_a_row_of_two_sides_says_seconds_results_and_what_is_wrong():
    metrics = {"warm_s": 2.0, "warm_theirs_s": 3.0, "ratio": 1.5}
    results = {"ours": {"norms": [4.0, 9.0, 1.0, 7.0], "index": 3.25}, "theirs": {"recall": 0.04}}
    row = peers.row("ART", "STRIP", "smoke", metrics, results, "a cause", {}, {})
    first, mine, theirs, cause = peers.line(row).split("\n")
    cells = first.removeprefix("ART: STRIP").split()
    assert cells == ["2.000", "3.000", "1.50", *"–––––"] and len(cells) == len(peers.HEADS)
    assert mine.split() == ["ours:", "norms", "1", "…", "5.5", "index", "3.25"]
    assert theirs.split() == ["theirs:", "recall", "0.04"] and cause.endswith("there: a cause")


def test_rates_and_the_index_of_what_others_give():
    assert rates([1, 0, 1, 0], [1, 1, 0, 0]) == {"recall": 0.5, "fpr": 0.5}
    assert anomaly([10.0, 11.0, 12.0, 2.0]) == pytest.approx(8.5 / (1.4826 * 1.0))


def test_the_study_has_43_classes_and_a_command_for_each_step():
    label = np.repeat(np.arange(10), 60)
    image = np.random.default_rng(0).integers(0, 256, (600, 28, 28, 1)).astype(np.uint8)
    found = study.pictures(86, Split(image, label))
    assert found.image.shape == (86, 32, 32, 3)
    assert (np.bincount(found.label) == 2).all() and found.label.max() == 42
    commands = list(study.scripts("cpu"))
    assert len(commands) == 3 * (1 + 4) * 2 and len({there for there, _ in commands}) == 30
    assert "study" in study.ours("cpu", "out") and "--seeds" in study.ours("cpu", "out")


def test_a_command_can_be_killed(tmp_path):
    sleeps = [sys.executable, "-c", "print('on', flush=True); import time; time.sleep(60)"]
    found = study.ended(sleeps, tmp_path, {}, until=2.0)
    assert found.code == -9 and 2 <= found.seconds < 30
    stops = [sys.executable, "-c", "print(1); raise SystemExit(4)"]
    assert study.ended(stops, tmp_path, {})[2:] == (4, "1")


@pytest.mark.parametrize("out", [None, "kept"])
def test_a_benchmark_of_its_own_kind_takes_its_flags_and_tells_what_is_kept(
    out, tmp_path, monkeypatch, capsys
):
    """As the others: JSON a line, and rows that an interruption tells of."""

    def stopped(scale, done):
        yield row("abc")
        raise KeyboardInterrupt

    monkeypatch.setattr(pod, "rows", stopped)
    folder = None if out is None else tmp_path / out
    with pytest.raises(KeyboardInterrupt) as caught:
        bench(("pod",), scale="smoke", json_=True, out=folder)
    said = "nothing is kept without --out" if out is None else f"kept in {folder}"
    assert said in caught.value.__notes__[0]
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["run"] == "abc"
    assert folder is None or (folder / "results.jsonl").read_text().count("\n") == 1
    with pytest.raises(BadInput, match="--devices is not for pod"):
        bench(("pod",), scale="smoke", devices=2)


def test_repeats_are_those_of_the_accelerator_and_none_of_pods(capsys, monkeypatch):
    asked = []

    def plan(scale, repeats):
        asked.append(repeats)
        yield "table", "row", lambda: ({}, {})

    monkeypatch.setattr(accelerator, "plan", plan)
    for repeats in (None, 7):
        bench(("accelerator",), scale="smoke", json_=True, repeats=repeats)
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["config"] == {"repeats": asked[-1]}
    assert asked == [3, 7]
    with pytest.raises(BadInput, match="--repeats is not for pod"):
        bench(("pod",), scale="smoke", repeats=7)
    monkeypatch.setattr(accelerator, "MINUTES", 0.0)
    bench(("accelerator",), scale="smoke", json_=True)
    out, err = capsys.readouterr()
    assert out == "" and "with --out the same command goes on from here" in err


@pytest.mark.parametrize("kind", accelerator.KINDS)
def test_what_an_accelerator_is_shown_can_be_run(kind):
    check(dataclasses.replace(accelerator.BASE, defense=accelerator.KINDS[kind]))
