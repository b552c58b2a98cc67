"""The commands as a user types them, and one clear line for every mistake."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from planted import row

from bdjax import cli, registry
from bdjax.progress import Board, ended

SMALL = [
    "--dataset", "fashion-mnist-sample", "--dataset.train-size", "1000", "--dataset.test-size",
    "200", "--model", "ffnn", "--model.hidden", "32", "--recipe.epochs", "2", "--recipe.batch",
    "32", "--quiet",
]  # fmt: skip


def bdjax(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        cli.main(list(args))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_list_json(capsys):
    code, out, _ = bdjax(capsys, "list", "--json")
    rows = json.loads(out)
    assert code == 0
    assert all(
        set(row) == {"kind", "name", "paper", "year", "arxiv", "file", "plugin"} for row in rows
    )
    assert {row["kind"] for row in rows} == {"attack", "defense", "model", "dataset"}
    assert {"badnets", "neural-cleanse", "fine-pruning", "db-covidnet", "cnn"} <= {
        row["name"] for row in rows
    }
    assert all(row["name"] == row["name"].lower() and "_" not in row["name"] for row in rows)


def test_list_one_kind(capsys):
    code, out, _ = bdjax(capsys, "list", "defenses")
    assert code == 0 and "strip" in out and "badnets" not in out


def test_python_m_bdjax():
    done = subprocess.run(
        [sys.executable, "-m", "bdjax", "list", "attacks", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout)[0]["kind"] == "attack"


QUICK = """
import sys
from bdjax.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted({"jax", "flax", "orbax", "matplotlib", "rich.live"} & set(sys.modules)), "end")
"""


@pytest.mark.parametrize("command", ["--help", "status"])
def test_help_and_status_do_without_jax(tmp_path, command):
    args = [command]
    if command == "status":
        with Board(tmp_path / "progress.json", shard="", total=3, rows=2, before=1, groups=2,
                   group=1, failed=0, doing="a net", devices="1 × cpu"):  # fmt: skip
            (tmp_path / "results.jsonl").write_text(json.dumps(row("abc")) + "\n")
            args.append(str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", QUICK, *args], capture_output=True, text=True, check=True
    )
    *said, imported = done.stdout.splitlines()
    assert imported == "end"
    if command == "status":
        assert "1 × cpu" in "".join(said)
        assert said[-1] == "1 rows are there, 1 are to come from these"
    else:
        found = {line.split()[0] for line in said if line.startswith("  ") and line[2] != " "}
        assert found == set(cli.COMMANDS)
        assert "any defense" in done.stdout


def test_status_without_a_run_is_one_line(tmp_path):
    line = [sys.executable, "-m", "bdjax", "status", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"bdjax: {tmp_path} has no progress")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("command", ["--help", "list", "report"])
def test_an_output_on_a_full_disk_is_one_line(tmp_path, command):
    args = [command]
    if command == "report":
        (tmp_path / "results.jsonl").write_text(json.dumps(row("abc")) + "\n")
        args.append(str(tmp_path))
    line = [sys.executable, "-m", "bdjax", *args]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
        both = subprocess.run(line, stdout=full, stderr=full)
    said = "bdjax: cannot write the output: the disk is full\n"
    assert (done.returncode, done.stderr, both.returncode) == (2, said, 2)


def test_train_then_defend_then_the_saved_model_is_the_repaired_one(capsys, tmp_path):
    victim, repaired = str(tmp_path / "victim"), str(tmp_path / "repaired")
    code, out, err = bdjax(
        capsys, "train", *SMALL, "--attack", "badnets", "--attack.target", "2", "--out", victim
    )
    assert code == 0, err
    code, out, err = bdjax(
        capsys, "defend", victim, "--defense", "fine-pruning", "--out", repaired, "--quiet"
    )
    assert code == 0, err
    printed = {
        line.split()[0]: line.split()[1] for line in out.splitlines() if len(line.split()) == 2
    }

    from bdjax.checkpoints import load_model
    from bdjax.train import predict

    _, model, variables, about = load_model(repaired)
    test = about["dataset"].load().test
    acc = float((predict(model, variables, test.image).argmax(-1) == test.label).mean())
    assert acc == pytest.approx(about["metrics"]["acc_test"], abs=1e-6)
    assert acc == pytest.approx(float(printed["acc_test"]), abs=1e-4)
    assert "masks" in variables
    assert not np.array_equal(
        load_model(victim)[2]["params"]["logits"]["kernel"], variables["params"]["logits"]["kernel"]
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--attack", "badnet"], "unknown attack 'badnet'; the nearest name is 'badnets'"),
        (["train", "--model", "cn"], "unknown model 'cn'"),
        (["train", "--dataset", "fashion-mnist-samples"], "nearest name is 'fashion-mnist-sample'"),
        (["train", "--attack", "badnets:patern"], "no preset 'patern'"),
        (["train", *SMALL, "--attack.rate", "1.5"], r"--attack.rate 1.5 is outside \[0, 1\]"),
        (["train", *SMALL, "--attack.rate", "nan"], "rate nan"),
        (
            ["train", *SMALL, "--attack.target", "10"],
            "target label 10 is not one of the 10 classes",
        ),
        (["train", *SMALL, "--attack.size", "30"], "trigger outside the image"),
        (
            ["train", *SMALL, "--attack.color", "1", "1"],
            "color has 2 values for images of 1 channel",
        ),
        (["train", *SMALL[:-3], "--recipe.batch", "0"], "--recipe.batch 0 is outside"),
        (["defend", "nowhere"], "nowhere is no model folder"),
        (["defend", "nowhere", "--defense", "neural-clean"], "nearest name is 'neural-cleanse'"),
        (["run", "experiments/shamshiri2032.py"], "nearest name is 'experiments/shamshiri2023.py'"),
        (["run", "experiments/shamshiri2023.py", "--scale", "huge"], "no scale 'huge'"),
        (
            ["sweep", "experiments/sweep_defense.py"],
            "nearest name is 'experiments/sweep_defenses.py'",
        ),
        (
            ["sweep", "experiments/sweep_defenses.py", "--shard", "2/2"],
            "the 2 shards are 0/2 to 1/2",
        ),
        (["sweep", "experiments/sweep_defenses.py", "--shard", "one"], "not of the form i/n"),
        (
            ["sweep", "experiments/sweep_defenses.py", "--lanes", "many"],
            "lanes 'many' is not a whole number from 1 to \\d+, nor auto",
        ),
        (["run", "experiments/shamshiri2023.py", "--lanes", "foo"], "number .*, nor auto"),
        (
            ["sweep", "experiments/sweep_defenses.py", "--devices", "99"],
            "devices 99: this process has",
        ),
        (
            ["sweep", "experiments/sweep_defenses.py", "--hosts", "here,2"],
            "host '' is not a whole number from 0 to \\d+ .give off, auto or ADDRESS:PORT",
        ),
        (["sweep", "experiments/sweep_defenses.py", "--hosts", "foo"], "ADDRESS:PORT,COUNT,INDEX"),
        (["list", "defense"], "'all', 'attacks'"),
        (
            ["sweep", "experiments/sweep_defenses.py", "--hosts", "auto", "--shard", "0/2"],
            "leave --shard away",
        ),
        (["status", "nowhere"], "nowhere has no progress.json"),
        (["data", "prepare", "fasion-mnist"], "fashion-mnist"),
        (["data", "erase", "mnist"], "data prepare NAME"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_get_one_clear_line_and_code_2(capsys, tmp_path, args, words):
    import re

    folder = tmp_path / "out"
    extra = ["--out", str(folder)] if args[0] in ("train", "run", "sweep") else []
    code, _, err = bdjax(capsys, *args, *extra)
    assert code == 2
    assert re.search(words, err), err
    assert len(err.strip().splitlines()) == 1
    assert not folder.exists(), "nothing half-written"


def test_numbers_on_the_command_line_have_their_range_there():
    """So that what is out of it is said of the flag, not of a function behind it."""
    for name, command in cli.COMMANDS.items():
        for field in dataclasses.fields(command) if dataclasses.is_dataclass(command) else ():
            hint = registry.hints(command)[field.name]
            numbers = [kinds & {int, float} for kinds, limit in registry.ranges(hint) if not limit]
            assert not any(numbers), f"{name} --{field.name}"


def test_no_resume_refuses_a_folder_that_has_rows(capsys, tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(row("a")) + "\n")
    code, _, err = bdjax(
        capsys, "sweep", "experiments/sweep_defenses.py", "--out", str(tmp_path), "--no-resume"
    )
    assert code == 2 and "has 1 rows: give another --out" in err


def test_signals_have_their_exit_codes(capsys, monkeypatch):
    from bdjax.progress import Terminated

    for stop, expected, word in (
        (KeyboardInterrupt, 130, "interrupted"),
        (Terminated, 143, "terminated"),
    ):

        def stopped(_, stop=stop):
            raise stop

        monkeypatch.setattr(cli, "command", stopped)
        code, _, err = bdjax(capsys, "sweep", "x.py")
        assert code == expected and f"{word}; nothing is kept" in err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_in_a_callback_is_not_lost(number, code, capsys):
    """Python drops what a callback of the garbage collector raises; JAX has one."""

    def hit(*_):
        gc.callbacks.remove(hit)
        os.kill(os.getpid(), number)
        for _ in range(1000):  # Python answers signals between two instructions
            pass

    def call():
        gc.callbacks.append(hit)
        gc.collect()
        time.sleep(20)
        pytest.fail("it was lost")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # & of a shell ignores it
    try:
        with pytest.raises(SystemExit) as stop:
            ended(call)
    finally:
        signal.signal(signal.SIGINT, before)
    err = capsys.readouterr().err
    assert stop.value.code == code and len(err.splitlines()) == 1, err


def test_an_interrupted_process_does_not_wait_for_the_program_that_runs():
    code = """
import jax, bdjax.__main__ as entry
from bdjax import cli
def command(_):
    grow = lambda i, x: jax.numpy.sin(x @ x)
    jax.jit(lambda x: jax.lax.fori_loop(0, 2**31 - 1, grow, x))(jax.numpy.ones((9, 9)))
    raise KeyboardInterrupt
cli.command = command
entry.sys.argv[1:] = ["train"]
entry.process()
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100
    )
    assert found.returncode == 130 and "interrupted" in found.stderr


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = bdjax(capsys, "train", *SMALL, "--out", str(tmp_path / "file" / "model"))
    assert code == 2 and "cannot write" in err


def test_every_method_is_named_cited_and_revived(own_names):
    for entry in registry.entries():
        assert entry.kind == "dataset" or (entry.paper and entry.year), (
            f"{entry.name}: no citation in its first paragraph"
        )
        assert (registry.Path(registry.__file__).parents[1] / entry.file).is_file()
        try:
            made = entry.cls()
        except TypeError:
            continue  # fields without defaults: a path, say
        arrays: dict = {}
        described = json.loads(json.dumps(registry.describe(made, arrays)))
        assert registry.digest(registry.revive(entry.kind, described, arrays)) == registry.digest(
            made
        )


def test_importing_the_core_imports_little():
    code = (
        "import sys, bdjax.sweep; heavy = {'matplotlib', 'tyro', 'tensorflow_datasets', "
        "'tensorflow', 'h5py', 'sklearn', 'PIL', 'torch', 'jinja2', 'orbax'} & "
        "set(sys.modules); print(sorted(heavy)); sys.exit(bool(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
