"""Cells to rows: shared programs and victims, resuming, failures that stay where they are."""

import collections
import errno
import itertools
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from platform import machine

import jax
import numpy as np
import pytest

from bdjax import experiment, mesh, progress, registry, report, schema, sweep
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.inputs.strip import Strip
from bdjax.defenses.repair.fine_pruning import FinePruning
from bdjax.defenses.samples.spectral_signatures import SpectralSignatures
from bdjax.defenses.train.lpsf import Lpsf
from bdjax.models.shamshiri import Ffnn
from bdjax.progress import Terminated
from bdjax.registry import replace
from bdjax.store import Store
from bdjax.study import Cell, chain, grid, sample, zipped
from bdjax.sweep import Runner, groups
from bdjax.train import Recipe, predict, stamped
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
    assert [row["run"] for row in rows] == [cell.run_id for cell in CELLS]
    assert len({row["run"] for row in rows}) == len(CELLS)
    wanted = (
        "run experiment scale table row dataset model attack defense seed config metrics reported "
        "seconds oracle "
    )
    for row in json.loads(json.dumps(rows)):
        assert set((wanted + "substitute device jax commit").split()) <= set(row)
        assert {"acc_test", "asr_all", "asr_nt"} <= set(row["metrics"])
        assert {"compile", "run"} == set(row["seconds"])
        assert (row["dataset"], row["model"], row["attack"]) == (
            "fashion-mnist-sample",
            "ffnn",
            "badnets",
        )
        assert row["oracle"] is False
    assert rows[0]["config"]["attack"]["rate"] == 0.0 and rows[1]["config"]["attack"]["rate"] == 0.2


def test_the_victim_of_several_defenses_is_trained_once(unbroken):
    runner, _ = unbroken
    (members,) = (runner.store.folder / "victims").glob("*/members.json")
    assert len(json.loads(members.read_text())["victims"]) == 5  # LPSF trains its own
    assert not (runner.store.folder / "partial").exists() or not list(
        (runner.store.folder / "partial").iterdir()
    )


def test_cells_that_differ_in_numbers_share_one_program(unbroken):
    runner, _ = unbroken
    epochs = [key for key in runner.programs if key[0] is sweep._epoch]
    assert len(epochs) == 1


def test_a_judge_of_samples_is_measured_by_what_is_trained_without_its_suspects(tmp_path):
    """Nearly all rows are suspects: one of each class is left to train on."""
    cells = list(grid(BASE, defense=(None, SpectralSignatures(remove=1.0))))
    before, after = Runner(Store(tmp_path), "test", quiet=True).run(cells)
    before, after = before["metrics"], after["metrics"]
    assert after["recall"] > 0.9 and after["asr_nt"] < before["asr_nt"] / 2
    assert after["acc_test"] < before["acc_test"] - 0.1


def test_programs_that_were_not_used_for_long_are_let_go(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sweep, "PROGRAMS", 2)
    monkeypatch.setattr(
        sweep, "compiled", lambda fn, *_: made.append(fn) or (lambda shared, x: x + shared)
    )
    runner = Runner(Store(tmp_path), "test", quiet=True, widths=collections.defaultdict(lambda: 1))
    for fn in (min, max, min, abs, max, min):
        assert runner._call("defend", fn, None, 1, np.arange(3))[2] == 3  # type: ignore[arg-type]
    assert made == [min, max, abs, max, min] and {key[0] for key in runner.programs} == {max, min}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_programs_are_let_go_before_memory_maps_run_out():
    """The compiler crashes where none is left, and the process with it."""
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 200_000:
        pytest.skip("this machine has maps enough")
    programs = dict.fromkeys(range(5))
    assert not sweep.crowded()
    sweep.make_room(programs)
    assert len(programs) == 5
    ways = itertools.cycle((mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE))  # or they are merged
    maps = [mmap.mmap(-1, 4096, mmap.MAP_PRIVATE, way) for _, way in zip(range(most // 2), ways)]
    assert sweep.crowded()
    sweep.make_room(programs)
    assert not programs
    for one in maps:
        one.close()
    assert not sweep.crowded()


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


def test_a_row_says_by_what_its_digits_may_differ(unbroken, tmp_path, monkeypatch):
    """Flags, precision, vectors and lanes; a page says what is not usual."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_dump_to=/nowhere")
    rows = Runner(Store(tmp_path), "test", quiet=True, lanes=2).run(CELLS[:2])
    for row in rows:
        assert row["how"]["flags"] == ["--xla_cpu_enable_fast_math=false"]
        assert row["how"]["precision"] == "float32"
        assert row["how"]["vectors"] == mesh.vectors()
        assert set(row["how"]["lanes"].values()) == {2}
    page = report.page([report.Section("T", [*unbroken[1], *rows])], "mixed")
    assert "--xla_cpu_enable_fast_math=false" in page and "lanes" in page
    assert mesh.vectors() in page


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_vectors_are_those_of_the_cpu():
    assert mesh.vectors().lower() in [*Path("/proc/cpuinfo").read_text().split(), machine()]


def test_a_run_that_goes_on_has_the_programs_of_the_plan(tmp_path, monkeypatch):
    """Where runs go side by side, what is done leaves a place that is filled."""
    cells = [*grid(BASE, seed=range(3)), *grid(DEFENDED[0], seed=range(3))]
    real, widths = sweep.compiled, []

    def compiled(fn, model, shared, items, *rest):
        widths.append((fn.__name__, len(jax.tree.leaves(items)[0])))
        return real(fn, model, shared, items, *rest)

    monkeypatch.setattr(sweep, "compiled", compiled)
    whole = Runner(Store(tmp_path / "whole"), "test", quiet=True, lanes=3).run(cells)
    planned, store = {*widths}, Store(tmp_path / "left")
    assert {width for _, width in planned} == {3}
    widths.clear()
    store.append([row for row in whole if row["seed"] != 2])
    left = Runner(store, "test", quiet=True, lanes=3).run(cells)
    assert table(left) == table(whole) and {*widths} == planned
    assert [row["how"] for row in left] == [row["how"] for row in whole]
    stages = [{*row["how"]["lanes"]} for row in whole]
    assert stages == 3 * [{"train", "evaluate"}] + 3 * [{"train", "defend", "evaluate"}]


def test_lanes_and_devices_change_no_result(unbroken, tmp_path):
    _, rows = unbroken
    four = Runner(
        Store(tmp_path / "4"), "test", quiet=True, devices=jax.local_devices(), lanes=2
    ).run(CELLS[:4])
    for one, other in zip(rows, four, strict=False):
        for name, value in one["metrics"].items():
            assert value == pytest.approx(other["metrics"][name], abs=0.02), name


def test_a_diverged_cell_fails_alone(tmp_path):
    base = replace(replace(BASE, ["recipe", "optimizer"], "sgd"), ["recipe", "lr"], 0.05)
    cells = list(grid(base, recipe__weight_decay=(0.0, 1e6)))
    good, bad = Runner(Store(tmp_path), "test", quiet=True).run(cells)
    assert "error" not in good and good["metrics"]["acc_test"] > 0.4
    assert "diverged" in bad["error"] and bad["metrics"] == {}


def test_grid_over_any_field():
    made = list(grid(BASE, attack__rate=(0.1, 0.2), recipe__epochs=(1, 2), seed=(0,)))
    assert [(c.attack.rate, c.recipe.epochs) for c in made] == [
        (0.1, 1),
        (0.1, 2),
        (0.2, 1),
        (0.2, 2),
    ]
    assert len({c.run_id for c in made}) == 4
    with pytest.raises(BadInput, match="no field 'rte'"):
        list(grid(BASE, attack__rte=(1,)))


def test_zipped_sampled_and_chained():
    made = list(zipped(BASE, seed=(0, 1), attack__target=(3, 7)))
    assert [(c.seed, c.attack.target) for c in made] == [(0, 3), (1, 7)]
    with pytest.raises(BadInput, match="differ in length: seed 2, attack__target 1"):
        list(zipped(BASE, seed=(0, 1), attack__target=(3,)))
    both = list(
        grid(zipped(BASE, seed=(0, 1), attack__target=(3, 7)), attack__rate=iter((0.1, 0.2)))
    )
    assert [(c.seed, c.attack.target, c.attack.rate) for c in both] == [
        (0, 3, 0.1), (0, 3, 0.2), (1, 7, 0.1), (1, 7, 0.2),
    ]  # fmt: skip
    drawn = list(
        sample(BASE, 20, attack__rate=lambda rng: rng.uniform(0, 0.1), attack__target=(1, 2))
    )
    assert len({c.attack.rate for c in drawn}) == 20 and {c.attack.target for c in drawn} == {1, 2}
    assert all(0 <= c.attack.rate <= 0.1 for c in drawn)
    again = sample(BASE, 20, attack__rate=lambda rng: rng.uniform(0, 0.1), attack__target=(1, 2))
    assert [c.run_id for c in again] == [c.run_id for c in drawn]
    assert len(list(chain(made, both, made))) == 8


def test_shards_part_the_victims_and_keep_their_defenses():
    cells = [
        *grid(BASE, seed=range(5)),
        *grid(DEFENDED, seed=range(5)),
        *grid(replace(BASE, ["model"], Ffnn((8,)))),
    ]
    whole = [cell.run_id for group in groups(cells * 2, 4) for cell in group]
    assert sorted(whole) == sorted({cell.run_id for cell in cells})  # each once
    assert [len({c.victim_id for c in group}) for group in groups(cells, 4)] == [3, 2, 1]
    parts = [[cell for group in groups(cells, 4, (i, 3)) for cell in group] for i in range(3)]
    assert sorted(cell.run_id for part in parts for cell in part) == sorted(whole)
    victims = [{cell.victim_id for cell in part} for part in parts]
    assert (
        [len(v) for v in victims] == [2, 2, 2]
        and not victims[0] & victims[1]
        and not victims[1] & victims[2]
    )


# --- What it survives. All tables are those of one unbroken run. ---

EXPERIMENT = """
    from bdjax import registry
    from bdjax.attacks.badnets import BadNets
    from bdjax.defenses.repair.fine_pruning import FinePruning
    from bdjax.models.shamshiri import Ffnn
    from bdjax.study import Cell, grid
    from bdjax.train import Recipe, predict, stamped

    TITLE, SCALES = "a small one", ("smoke",)

    def cells(scale, seeds):
        data = registry.make("dataset", "fashion-mnist-sample", train_size=220, test_size=100)
        recipe = Recipe(epochs=3, batch=32)
        for width in (8, 12):
            cell = Cell("T", f"width {width}", data, Ffnn(hidden=(width,)), recipe, BadNets())
            pruning = FinePruning(recipe=Recipe(epochs=1, batch=20))
            yield from grid(cell, seed=range(seeds or 2), defense=(None, pruning))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of 8 cells, the command that sweeps it in a process of its own, and its table."""
    folder = tmp_path_factory.mktemp("small")
    file = folder / "small.py"
    file.write_text(textwrap.dedent(EXPERIMENT))
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [
        sys.executable,
        "-m",
        "bdjax",
        "sweep",
        str(file),
        "--scale",
        "smoke",
        "--quiet",
        "--out",
    ]

    def start(*args: object) -> subprocess.Popen:
        words = [*command, *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(words, text=True, env=environment, **pipes))
        return started[-1]

    started: list[subprocess.Popen] = []
    first = start(folder / "whole")
    assert first.wait(100) == 0, first.communicate()
    rows = Store(folder / "whole").rows()
    assert len(rows) == 8
    yield file, start, table(rows)
    for process in started:
        process.kill()  # where a test failed


def test_kill_9_at_three_random_moments_and_the_same_table(small, tmp_path):
    _, start, whole = small
    rng, results, counts = random.Random(time.time_ns()), tmp_path / "results.jsonl", []
    for killed in range(3):
        process, until = start(tmp_path), time.monotonic() + 100
        # it has begun
        while time.monotonic() < until and not (tmp_path / "progress.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        (tmp_path / "progress.json").unlink()
        time.sleep(rng.uniform(0, 1 + killed))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        counts.append(len(Store(tmp_path).rows()))
    assert counts == sorted(counts)
    process = start(tmp_path)
    assert process.wait(120) == 0, process.communicate()
    runs = [json.loads(line)["run"] for line in results.read_text().splitlines()]
    assert len(runs) == len(set(runs)) == 8
    assert table(Store(tmp_path).rows()) == whole
    for name in ("results.jsonl", "table.csv", "table.md", "index.html"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.long
def test_two_hosts_started_by_jax_distributed_and_one_that_dies(small, tmp_path):
    """They meet at the start; then host 0 is killed, and host 1 ends without it. Host 0's part is
    done later.
    """
    _, start, whole = small
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [start(tmp_path, "--hosts", f"{address},2,{i}") for i in range(2)]
    until = time.monotonic() + 100
    while time.monotonic() < until and not (tmp_path / "progress-0-of-2.json").exists():
        assert hosts[0].poll() is None, hosts[0].communicate()
        time.sleep(0.02)
    os.kill(hosts[0].pid, signal.SIGKILL)
    hosts[0].communicate()
    assert hosts[1].wait(100) == 0, hosts[1].communicate()
    assert "the page is written by the shard that ends last" in hosts[1].communicate()[0]
    mine = Store(tmp_path, (1, 2)).results
    assert mine.read_text().count("\n") == 4 and not (tmp_path / "index.html").exists()
    assert len(report.load(tmp_path).rows) == len(Store(tmp_path).rows()) >= 4
    again = start(tmp_path, "--shard", "0/2")
    assert again.wait(100) == 0, again.communicate()
    assert table(Store(tmp_path).rows()) == whole
    runs = [
        json.loads(line)["run"] for line in (tmp_path / "results.jsonl").read_text().splitlines()
    ]
    assert len(runs) == len(set(runs)) == 8 and (tmp_path / "index.html").exists()


def test_a_second_process_on_the_same_shard_is_refused(small, tmp_path):
    file, *_ = small
    with Store(tmp_path, (0, 2)).locked():
        line = rf"\(shard 0/2\) is being worked on by process {os.getpid()} on .*--shard i/n"
        with pytest.raises(BadInput, match=line):
            experiment.run(file, "smoke", tmp_path, quiet=True, shard="0/2")
        with Store(tmp_path, (1, 2)).locked(), Store(tmp_path).locked():
            pass
    with Store(tmp_path, (0, 2)).locked():
        pass


def exhausted(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")


FEW = list(grid(BASE, seed=range(2), attack__rate=(0.0, 0.2)))


def test_out_of_memory_halves_the_lanes(unbroken, tmp_path, monkeypatch, capsys):
    _, rows = unbroken
    real = sweep.compiled

    def compiled(fn, model, shared, items, lanes, *rest):
        return (
            exhausted
            if lanes > 2 and fn is sweep._epoch
            else real(fn, model, shared, items, lanes, *rest)
        )

    monkeypatch.setattr(sweep, "compiled", compiled)
    runner = Runner(Store(tmp_path), "test", lanes=4)
    found = runner.run(FEW)
    assert (
        "out of memory: epoch goes on with 2 lanes a device instead of 4" in capsys.readouterr().err
    )
    assert not runner.unfit and [row["run"] for row in found] == [row["run"] for row in rows[:4]]
    for one, other in zip(rows, found, strict=False):
        assert one["metrics"] == pytest.approx(other["metrics"], abs=0.02)
        assert other["halved"] and "halved" not in one
    # What is done to such a victim later is marked too, what trains a net of its own is not.
    later = [replace(FEW[0], ["defense"], DEFENDED[i].defense) for i in (0, 2)]
    found = Runner(Store(tmp_path), "test", quiet=True, lanes=1).run(later)
    assert [row.get("halved", False) for row in found] == [True, False]


def test_out_of_memory_in_mid_training_goes_on_from_the_checkpoint(unbroken, tmp_path, monkeypatch):
    """The second epoch of three runs out of memory, after its states were given away."""
    _runner, rows = unbroken
    epochs = []

    def compiled(fn, model, shared, items, lanes, devices, donate=()):
        if fn is not sweep._epoch:
            return real(fn, model, shared, items, lanes, devices, donate)
        program = real(fn, model, shared, items, 1, devices, donate)

        def run(shared, *items):
            epochs.append(int(np.asarray(items[-1].epoch)[0]))
            out = program(shared, *items)
            return exhausted() if lanes == 2 and epochs[-1] == 1 else out

        return run

    real = sweep.compiled
    monkeypatch.setattr(sweep, "compiled", compiled)
    monkeypatch.setattr(sweep, "CHECKPOINT_EVERY", 0.0)
    found = Runner(Store(tmp_path), "test", quiet=True, lanes=2).run(FEW)
    assert epochs == [0, 1, 1, 2]
    assert (
        table(found) == {row["run"]: table(rows)[row["run"]] for row in found} and len(found) == 4
    )


def test_what_does_not_fit_is_halved_then_left_out_and_named(small, tmp_path, monkeypatch, capsys):
    file, _, whole = small
    real = sweep.compiled

    def compiled(fn, model, shared, items, lanes, *rest):
        many = len(jax.tree.leaves(items)[0]) > 1
        broken = (fn is sweep._epoch and many) or fn is sweep._defended
        return exhausted if broken else real(fn, model, shared, items, lanes, *rest)

    monkeypatch.setattr(sweep, "compiled", compiled)
    with pytest.raises(
        BadInput,
        match=r"4 runs do not fit into the memory of cpu .*: fine-pruning on ffnn; take smaller",
    ):
        experiment.run(file, "smoke", tmp_path, devices=1)
    assert "2 runs go on as 1 and 1" in capsys.readouterr().err
    undefended = {run: line for run, line in table(Store(tmp_path).rows()).items()}
    assert len(undefended) == 4 and undefended.items() <= whole.items()


def hear(runner):
    """Waits until the runner knows of the signal that was just sent."""
    until = time.monotonic() + 10
    while runner.stop.asked is None and time.monotonic() < until:
        time.sleep(0.001)


def test_sigterm_saves_at_the_next_epoch_and_goes_on_bit_for_bit(unbroken, tmp_path, monkeypatch):
    whole, rows = unbroken
    runner = Runner(Store(tmp_path), "test", quiet=True, programs=whole.programs)

    class Bar(sweep.Progress):
        def step(self, note="", amount=1):
            super().step(note, amount)
            if self.done == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                hear(runner)

    with monkeypatch.context() as patch, pytest.raises(Terminated):
        patch.setattr(sweep, "Progress", Bar)
        runner.run(CELLS)
    assert progress.boards(tmp_path)[0]["state"] == "stopped" and not runner.store.rows()
    (saved,) = (tmp_path / "partial").iterdir()
    assert len(list(saved.iterdir())) > 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert table(
        Runner(Store(tmp_path), "test", quiet=True, programs=whole.programs).run(CELLS)
    ) == table(rows)


def test_ctrl_c_stops_after_what_is_running(unbroken, tmp_path):
    whole, rows = unbroken
    store = Store(tmp_path)

    def interrupt(_):
        os.kill(os.getpid(), signal.SIGINT)
        hear(runner)

    runner = Runner(store, "test", quiet=True, programs=whole.programs, on_rows=interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run(CELLS)
    # On a CPU one victim is judged after another: that which was running is the last.
    assert [row["run"] for row in store.rows()] == [CELLS[0].run_id]
    assert table(Runner(store, "test", quiet=True, programs=whole.programs).run(CELLS)) == table(
        rows
    )


def test_a_second_ctrl_c_ends_a_process_that_does_not_listen():
    code = (
        "import time, threading; from bdjax.progress import Stop\nwith Stop() as stop:\n "
        "print('ready', flush=True); time.sleep(0.5); threading.Event().wait(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert (
        process.stdout is not None
        and process.stderr is not None
        and process.stdout.readline() == "ready\n"
    )
    process.send_signal(signal.SIGINT)
    assert (
        "SIGINT: stopping after what is running; once more stops at once"
        in process.stderr.readline()
    )
    process.send_signal(signal.SIGINT)  # at once, as `timeout` does: the same wish
    time.sleep(2 * progress.TOGETHER)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.communicate()


def test_a_full_disk_is_one_line_and_then_it_goes_on(unbroken, tmp_path, monkeypatch):
    whole, rows = unbroken

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    runner = Runner(Store(tmp_path), "test", quiet=True, programs=whole.programs)
    with (
        monkeypatch.context() as patch,
        pytest.raises(BadInput, match=r"results\.jsonl: the disk is full"),
    ):
        patch.setattr(os, "fsync", full)
        runner.run(CELLS)
    assert table(runner.run(CELLS)) == table(rows)


# --- Looking at it ---


def test_lanes_are_measured_once_and_remembered(unbroken, tmp_path, monkeypatch):
    _, rows = unbroken
    tried = []
    monkeypatch.setenv("BDJAX_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(mesh, "default_lanes", lambda items: items)  # as on an accelerator

    def widest(seconds, most, first):
        tried.append(most)
        assert first == most  # all of them fit
        assert seconds(2) > 0
        return 2

    monkeypatch.setattr(mesh, "widest", widest)
    two = list(grid(BASE, seed=range(2), attack__rate=(0.0, 0.2)))
    first = Runner(Store(tmp_path / "a"), "test", quiet=True, lanes="auto")
    found = first.run(two)
    assert tried == [4, 4, 4] and set(first.widths.values()) == {2}  # begin, epoch, evaluate
    for one, other in zip(rows, found, strict=False):
        assert one["metrics"] == pytest.approx(other["metrics"], abs=0.02)
    kept = schema.read_json(tmp_path / "cache" / "lanes.json", "lanes")
    assert kept.pop("format") == 1
    entries = [{**entry, "patches": type(entry["patches"])} for entry in kept.values()]
    assert entries == [{"lanes": 2, "tried": 4, "patches": bool}] * 3
    assert all("cpu" in name for name in kept)
    Runner(
        Store(tmp_path / "b"), "test", quiet=True, lanes="auto", programs=dict(first.programs)
    ).run(two)
    again = Runner(Store(tmp_path / "c"), "test", quiet=True, lanes="auto")
    model, shared = again._data(two[0])
    items = again._stacked([(jax.random.key(0), two[0].recipe, sweep.bound(two[0], shared))] * 4)
    assert again._lanes("key", 4, sweep._begin, model, shared, items) == 2
    assert len(tried) == 3


@pytest.mark.parametrize("faster", [True, False])
def test_the_form_of_convolutions_is_measured_remembered_and_said(
    unbroken, tmp_path, monkeypatch, faster
):
    _, rows = unbroken
    real = sweep.compiled
    monkeypatch.setenv("BDJAX_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(mesh, "default_lanes", lambda items: items)  # as on an accelerator
    monkeypatch.setattr(mesh, "widest", lambda seconds, most, first: 2)

    def compiled(*args):
        program, slow = real(*args), mesh.patches.value != faster
        return lambda *given: time.sleep(slow * 0.5) or program(*given)

    monkeypatch.setattr(sweep, "compiled", compiled)
    monkeypatch.setattr(sweep, "bytes_with", lambda *_: 1.0)
    cells = [*grid(BASE, seed=range(2), attack__rate=(0.0, 0.2))]
    store = Store(tmp_path / "a")
    found = Runner(store, "test", quiet=True, lanes="auto").run(cells)
    kept = schema.read_json(tmp_path / "cache" / "lanes.json", "lanes")
    kept.pop("format")
    assert {entry["patches"] for entry in kept.values()} == {faster}
    for one, other in zip(rows, found, strict=False):
        assert other["how"].get("patches", []) == ["train", "evaluate"] * faster
        assert one["metrics"] == pytest.approx(other["metrics"], abs=0.02)
    # What is computed later with these victims says how they were trained.
    later = [replace(cells[0], ["defense"], DEFENDED[0].defense)]
    (row,) = Runner(store, "test", quiet=True, lanes=1).run(later)
    assert row["how"].get("patches", []) == ["train"] * faster


def test_a_cpu_is_not_probed(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, "widest", lambda *_: pytest.fail("a probe"))
    runner = Runner(Store(tmp_path), "test", quiet=True, lanes="auto")
    assert runner._lanes("key", 8, sweep._epoch, None, (), ()) == 1  # type: ignore[arg-type]


def test_dry_run_prints_and_trains_nothing(small, tmp_path, capsys, monkeypatch):
    file, *_ = small
    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("it runs"))
    experiment.run(file, "smoke", tmp_path / "out", dry_run=True, devices=1)
    out = capsys.readouterr().out
    assert (
        "8 cells, 4 victims, 2 groups on 1 × cpu; 8 to do" in out and "unknown for 8 cells" in out
    )
    assert "fine-pruning" in out and "MB at least" in out and not (tmp_path / "out").exists()
    experiment.run(
        file, "smoke", file.parent / "whole", dry_run=True, devices=1, shard="1/2", seeds=4
    )
    out = capsys.readouterr().out
    assert (
        "8 cells, 4 victims, 2 groups on 1 × cpu, shard 1/2; 4 to do" in out
        and "unknown" not in out
    )


def test_status_from_files_alone(small, tmp_path, capsys):
    file, *_ = small
    progress.status(file.parent / "whole")
    out = capsys.readouterr().out
    assert (
        "done" in out and "2/2" in out and "8/8" in out and "8 rows are there, 0 are to come" in out
    )
    (facts,) = progress.boards(file.parent / "whole")
    for i, silent in enumerate((0, 3600)):
        now = {
            **facts,
            "state": "running",
            "rows": 4,
            "shard": f"{i}/2",
            "updated": time.time() - silent,
        }
        (tmp_path / f"progress-{i}-of-2.json").write_text(
            json.dumps({**now, "started": now["updated"] - 60})
        )
    (tmp_path / "progress-7-of-8.json").write_text("{torn")
    progress.status(tmp_path)
    out = capsys.readouterr().out
    # 4 of 8 rows in a minute
    assert "4.0" in out and "60 s" in out and "silent for 60 min: killed?" in out
    with pytest.raises(BadInput, match=r"no progress\.json"):
        progress.status(tmp_path / "nowhere")


@registry.pytree
class Doubt:
    """How sure a net is of stamped images: an example of a probe."""

    power: float = 1.0

    def __call__(self, key, model, variables, attack, clean, test):
        images = stamped(attack, 1, test.image, key)
        sure = jax.nn.softmax(predict(model, variables, images)).max(-1) ** self.power
        return {"sure": sure.mean(), "each": sure}


def test_a_probe_measures_the_net_that_the_row_is_about(tmp_path):
    pruned = replace(DEFENDED[0], ["row"], "pruned")
    cells = [replace(c, ["probe"], Doubt(p)) for c in (BASE, pruned) for p in (1.0, 2.0)]
    assert (
        len({c.run_id for c in (BASE, *cells)}) == 5
        and len({c.victim_id for c in (BASE, *cells)}) == 1
    )
    rows = Runner(Store(tmp_path), "test", quiet=True).run(cells)
    sure = [row["metrics"]["sure"] for row in rows]
    assert sure[1] < sure[0] and sure[3] < sure[2] and sure[0] != sure[2]
    assert [row["config"]["probe"]["power"] for row in rows] == [1.0, 2.0, 1.0, 2.0]
    each = Store(tmp_path).arrays(cells[1].run_id)["each"]
    assert np.isclose(each.mean(), sure[1], atol=1e-6)


def test_a_run_that_went_on_keeps_the_seconds_of_all_its_parts(tmp_path):
    clean = replace(BASE, ["attack"], None)
    experiment.run(list(grid(clean, seed=range(1))), out=tmp_path, quiet=True)
    one = schema.read_json(tmp_path / "report.json", "report")["seconds"]
    experiment.run(list(grid(clean, seed=range(2))), out=tmp_path, quiet=True)
    two = schema.read_json(tmp_path / "report.json", "report")["seconds"]
    assert one["train"] > 0 and two["train"] > one["train"] and two["total"] > one["total"]
    assert two["total"] >= sum(s for stage, s in two.items() if stage != "total") - 0.1
    # What another shard took is added, not lost.
    other = {**progress.boards(tmp_path)[0], "shard": "1/2", "seconds": {"train": 1000.0}}
    (tmp_path / "progress-1-of-2.json").write_text(schema.dump(other, "progress"))
    experiment.run(list(grid(clean, seed=range(2))), out=tmp_path, quiet=True)
    three = schema.read_json(tmp_path / "report.json", "report")["seconds"]
    assert three["train"] == pytest.approx(two["train"] + 1000, abs=1)
