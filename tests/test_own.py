"""Nothing of the user's is touched: every command that writes, against every kind of place that is
not bdjax's, in a working directory full of other things.
"""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from planted import command as bdjax

from bdjax import checkpoints, cli, own, report, store, sweep
from bdjax.checkpoints import save_model
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.store import Store
from bdjax.types import BadInput

ROW = {
    "run": "0" * 16, "experiment": "e", "scale": "smoke", "table": "T", "row": "r",
    "dataset": "d", "model": "m", "attack": "a", "defense": None, "seed": 0, "config": {},
    "metrics": {"acc_test": 0.5}, "reported": {}, "seconds": {"compile": 0.0, "run": 1.0},
    "oracle": False, "substitute": None,
}  # fmt: skip
EXPERIMENT = """
    from bdjax import registry
    from bdjax.models.shamshiri import Ffnn
    from bdjax.study import Cell
    from bdjax.train import Recipe

    TITLE, SCALES = "small", ("smoke",)

    def cells(scale, seeds):
        data = registry.make("dataset", "fashion-mnist-sample", train_size=500, test_size=100)
        yield Cell("T", "r", data, Ffnn(hidden=(8,)), Recipe(epochs=1))
"""


def net(path: Path) -> Path:
    """A small net, saved."""
    made = Ffnn(hidden=(4,))
    model = build(made, (28, 28, 1), 10)
    save_model(path, made, model, model.init(jax.random.key(0)))
    return path


def results(path: Path, *rows: dict) -> Path:
    Store(path).append(rows or (ROW,))
    return path


def unmarked(path: Path) -> Path:
    """As version 0.1 would have left it: without manifests."""
    for manifest in list(path.rglob(own.FILES)):
        manifest.unlink()
    return path


def tree(folder: Path) -> dict[str, object]:
    """All that is in a folder, to the byte."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        what = own.kind(path)
        found[str(path.relative_to(folder))] = {
            "file": lambda p: p.read_bytes(),
            "link": os.readlink,
        }.get(what or "", lambda p, what=what: what)(path)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Outside of the user's tree: a net, results, an experiment."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.py").write_text(textwrap.dedent(EXPERIMENT))
    net(folder / "net")
    case = {"metrics": {**ROW["metrics"], "size": 1.0, "low_s": 1.0, "high_s": 1.0}}
    results(folder / "results", {**ROW, **case})  # a benchmark's, too
    return folder


@pytest.fixture
def user(made, tmp_path, monkeypatch):
    """The user's working directory, full of things; nothing may be computed in it."""
    home = tmp_path / "home"
    here = home / "work"
    (here / "docs" / "deep").mkdir(parents=True)
    (here / "docs" / "letter.txt").write_text("dear")
    (here / "docs" / "deep" / "table.csv").write_text("a,b\n")
    (here / "file").write_text("a file")
    (here / "empty").mkdir()
    (home / "precious").write_text("x")
    (here / "loop").symlink_to(here / "loop")
    (here / "link").symlink_to(here / "empty")
    (here / "tfjs").mkdir()
    (here / "tfjs" / "model.json").write_text('{"format": "layers-model", "modelTopology": {}}')
    shutil.copytree(made / "net", here / "net+")
    (here / "net+" / "notes.txt").write_text("mine")
    unmarked(shutil.copytree(made / "net", here / "old+"))
    (here / "old+" / "variables" / "notes.txt").write_text("mine")
    shutil.copytree(made / "net", here / "edited")
    (here / "edited" / "model.json").write_text("{}")
    for name, content in {
        "table.csv": "x,y\n1,2\n", "table.md": "# Mine\n", "index.html": "<p>mine</p>",
        "report.json": "{}", "results.jsonl": "my results", "progress.json": "[]",
        ".results.lock": "mine", ".results.jsonl.lock": "mine", ".bdjax-files": "mine",
        "arrays": "mine", "partial": "mine", "figures": "mine", "audit.json": "{}", "steps": "mine",
    }.items():  # fmt: skip
        (here / f"has {name}").mkdir()
        (here / f"has {name}" / name).write_text(content)
        (here / f"is {name}" / name / "sub").mkdir(parents=True)
        (here / f"is {name}" / name / "sub" / "x").write_text("x")
        (here / f"to {name}").mkdir()
        (here / f"to {name}" / name).symlink_to(here / "file")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("BDJAX_DATA_DIR", str(tmp_path / "cache"))

    def computed(*_, **__):
        raise AssertionError("computed before --out was tried")

    for where, name in ((sweep.Runner, "_group"), (sweep.Runner, "defend"), (report, "page")):
        monkeypatch.setattr(where, name, computed)
    monkeypatch.setattr("benchmarks.measure.run", computed)
    monkeypatch.setattr("bdjax.audits.images_of", computed)
    return here


OWNS = {  # commands that write a folder whole
    "train": lambda made: ["train", "--out"],
    "defend": lambda made: ["defend", f"{made}/net", "--out"],
    "repair": lambda made: ["repair", f"{made}/net", "--dataset", "fashion-mnist-sample", "--out"],
    "import": lambda made: ["import", f"{made}/net.onnx", "--out"],
    "poison": lambda made: ["poison", "--dataset", "fashion-mnist-sample", "--attack", "badnets",
                            "--out"],
}  # fmt: skip
BESIDE = {  # commands that write into a folder
    "run": lambda made: ["run", f"{made}/small.py", "--scale", "smoke", "--out"],
    "sweep": lambda made: ["sweep", f"{made}/small.py", "--scale", "smoke", "--out"],
    "report": lambda made: ["report", f"{made}/results", "--out"],
    "bench": lambda made: ["bench", "fine_pruning", "--scale", "smoke", "--out"],
    "audit": lambda made: ["audit", f"{made}/net", "--dataset", "fashion-mnist-sample", "--out"],
}
PREPARES = {"data": lambda made: ["data", "prepare", "mnist", "--data-dir"]}
ANY = ["", "file", "file/x", "/dev/null", "/dev/null/x", "n" * 300, "a\0b", "loop", "loop/x",
       "new/" + "n" * 300, "\ud800"]  # fmt: skip
WHOLE = [".", "./", "..", "../", "empty/..", "/", "~", "docs", "docs/", "docs/deep", "docs/..",
         "tfjs", "net+", "old+", "edited", "link", "link/", "link/.."]  # fmt: skip
AUDIT = ["audit.json", "index.html", ".bdjax-files", "steps"]
PAGE = ["table.csv", "table.md", "index.html", ".bdjax-files"]
RUN = [*PAGE, "report.json", "results.jsonl", "progress.json", ".results.lock",
       ".results.jsonl.lock", "arrays", "partial"]  # fmt: skip


def refused(capsys, user, args, out):
    before = tree(user.parent)
    code, _, err = bdjax(capsys, *args, str(user.parent) if out == "~" else out)
    assert code == 2, err
    assert len(err.splitlines()) == 1 and "\x1b" not in err, err
    assert tree(user.parent) == before
    return err


@pytest.mark.parametrize("command", [*OWNS, *BESIDE, *PREPARES])
def test_no_command_writes_where_it_cannot(user, made, capsys, monkeypatch, command):
    args = (OWNS | BESIDE | PREPARES)[command](made)
    for out in ANY:
        refused(capsys, user, args, out)
    with monkeypatch.context() as patch:

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        for out in ("new", "new/tree/of/folders", "empty"):
            assert "the disk is full" in refused(capsys, user, args, out)


@pytest.mark.parametrize("command", OWNS)
def test_a_folder_that_is_owned_whole_holds_nothing_else(user, made, capsys, command):
    for out in WHOLE:
        refused(capsys, user, OWNS[command](made), out)


@pytest.mark.parametrize("command", BESIDE)
def test_beside_other_things_nothing_of_theirs_is_replaced(user, made, capsys, command):
    names = {"report": PAGE, "audit": AUDIT}.get(command, RUN)
    if command not in ("bench", "audit"):
        names = [*names, "figures"]
    for name in names:
        for how in ("has", "is", "to"):
            if (how, name) in (("is", part) for part in ("arrays", "partial", "figures", "steps")):
                continue  # a folder may have more in it
            err = refused(capsys, user, BESIDE[command](made), f"{how} {name}")
            assert f"{how} {name}" in err, err


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
@pytest.mark.parametrize("command", [*OWNS, *BESIDE, *PREPARES])
def test_a_read_only_parent_is_known_at_the_start(user, made, capsys, command):
    user.chmod(0o500)
    try:
        refused(capsys, user, (OWNS | BESIDE | PREPARES)[command](made), "new")
    finally:
        user.chmod(0o700)


def test_what_is_read_is_not_replaced(made, tmp_path, capsys):
    """A repaired net does not take the place of the one that it was made of, nor a poisoned set."""
    shutil.copytree(made / "net", tmp_path / "net")
    out = [str(tmp_path / "net"), str(tmp_path / "net" / "sub" / "..")]
    assert bdjax(capsys, "poison", "--dataset", "fashion-mnist-sample", "--attack", "badnets",
                 "--dataset.train-size", "100", "--out", str(tmp_path / "set"))[0] == 0  # fmt: skip
    again = ["poison", "--dataset", str(tmp_path / "set"), "--attack", "badnets", "--out",
             str(tmp_path / "set")]  # fmt: skip
    before = tree(tmp_path)
    for args in (
        ["repair", out[0], "--dataset", "fashion-mnist-sample", "--out", out[1]],
        ["defend", out[0], "--defense", "fine-pruning:cpu", "--out", out[0]],
        ["import", f"{out[0]}/variables", "--out", out[0]],
        again,
    ):
        code, _, err = bdjax(capsys, *args)
        assert code == 2 and "is read, and" in err and err.count("\n") == 1, err
    assert tree(tmp_path) == before


def test_new_empty_and_own_folders_are_taken(user, made):
    for out in ("new", "a/b/c", "empty", "n" * 250):
        before = tree(user)
        assert own.whole(Path(out), "model.json") == user / out
        assert tree(user) == before
    kept = {k: v for k, v in tree(user).items() if k.split("/")[0] not in ("new", "empty")}
    for out in ("new", "new", "empty", "empty"):
        net(Path(out))
    assert kept.items() <= tree(user).items() and {"new", "empty"} >= {
        name.split("/")[0] for name in tree(user).keys() - kept.keys()
    }
    assert checkpoints.load_model("new") and checkpoints.load_model("empty")
    moved = Path("new").rename("moved")
    net(unmarked(moved))  # a net of 0.1
    assert (moved / own.FILES).exists()


def test_what_version_01_left_is_taken(tmp_path, made):
    """Results, their page, checkpoints, and what it was writing when it was killed."""
    figure = report.Figure("curve", "A curve", "Sample.", report.plots.curves([1], {"a": [0.1]}))
    folder = results(tmp_path / "out")
    report.write(folder, [ROW], [figure])
    store.remember("lanes", "x", {"lanes": 1, "tried": 1})
    hashed = "0123456789abcdef"
    Store(folder).save_arrays(hashed, {"a": np.zeros(3)})
    for part in ("partial", "prepared"):
        checkpoints.save_tree(folder / part / hashed, {"a": np.zeros(3)})
    unmarked(folder)
    (folder / ".results.lock").write_text("process 12 on a-host")
    (folder / "progress.json").write_text(
        '{"state": "running", "started": 1, "updated": 2, "host": "h"}'
    )
    leftover = folder / "partial" / f".{hashed}.abc_12x8"
    shutil.copytree(folder / "partial" / hashed, leftover / f"{hashed}.orbax-checkpoint-tmp")
    moved = folder / "prepared" / f".{hashed}.abc_12x8"
    moved.mkdir()
    (folder / "prepared" / hashed).rename(moved / "before")
    mine = folder / "partial" / f".{hashed}.abc_12x9"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    Store(folder).ready()
    report.ready(folder, "report.json")
    with Store(folder).locked():
        pass
    assert not leftover.exists() and not moved.exists() and (mine / "letter.txt").exists()
    assert (
        checkpoints.load_tree(folder / "prepared" / hashed, {"a": np.zeros(3)})["a"].tolist()
        == [0] * 3
    )
    report.write(folder, [ROW], [figure])
    Store(folder).save_arrays(hashed, {"a": np.ones(3)})
    checkpoints.save_tree(folder / "partial" / hashed, {"a": np.ones(3)})
    assert Store(folder).arrays(hashed)["a"].tolist() == [1] * 3
    own.remove(folder / "partial" / hashed)
    assert not (folder / "partial" / hashed).exists()


def test_a_page_that_somebody_changed_stays(tmp_path, capsys):
    folder = results(tmp_path / "out")
    for _ in range(2):  # its own page is written again
        assert bdjax(capsys, "report", str(folder))[0] == 0
    (folder / "notes.txt").write_text("mine")
    (folder / "table.md").write_text((folder / "table.md").read_text() + "my remark\n")
    before = tree(folder)
    code, _, err = bdjax(capsys, "report", str(folder))
    assert code == 2 and "table.md was changed after bdjax wrote it" in err
    assert tree(folder) == before


def test_a_checkpoint_with_something_else_in_it_is_not_replaced_or_removed(tmp_path):
    checkpoints.save_tree(tmp_path / "c", np.zeros(3))
    (tmp_path / "c" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    own.remove(tmp_path / "c", checkpoints.old_checkpoint)
    with pytest.raises(BadInput, match=r"holds notes\.txt"):
        checkpoints.save_tree(tmp_path / "c", np.ones(3))
    assert tree(tmp_path) == before


def test_what_a_killed_process_moved_aside_comes_back_and_the_rest_is_swept(tmp_path):
    with own.saving(tmp_path) as living:
        killed = tmp_path / f"{own.SAVING}abcdefgh"
        shutil.copytree(living, killed)
        (killed / "new" / "net").mkdir()
        net(killed / "before" / "net")
        (tmp_path / f"{own.SAVING}mine").mkdir()
        (tmp_path / f"{own.SAVING}mine" / "letter").write_text("dear")
        own.clear(tmp_path)
        assert living.exists() and not killed.exists() and (tmp_path / f"{own.SAVING}mine").exists()
    assert checkpoints.load_model(tmp_path / "net") and not living.exists()


def test_a_results_file_is_cut_only_where_a_crash_tore_it(tmp_path):
    whole = json.dumps(ROW)
    for text, count in ((whole, 2), (f"{whole}\n" + whole[:40], 2), (whole[:5], 1), ("", 1)):
        folder = tmp_path / str(len(text))
        folder.mkdir()
        (folder / "results.jsonl").write_text(text)
        Store(folder).append([{**ROW, "run": "1" * 16}])
        assert len(Store(folder).rows()) == count
    for text in ("mine", f"{whole}\nmine", "a\nb\n", '{"mine": 1}\n', "\0" * 20):
        (folder / "results.jsonl").write_text(text)
        with pytest.raises(BadInput, match="holds no results of bdjax"):
            Store(folder).append([{**ROW, "run": "1" * 16}])
        assert (folder / "results.jsonl").read_text() == text


def test_reading_makes_no_folder(tmp_path, capsys):
    folder = results(tmp_path / "out")
    before = tree(folder)
    code, _, err = bdjax(capsys, "report", str(folder), "--out", str(tmp_path / "page"))
    assert code == 0, err
    assert tree(folder) == before and (tmp_path / "page" / "index.html").exists()
    assert Store(tmp_path / "nothing").rows() == [] and not (tmp_path / "nothing").exists()


def test_a_full_disk_in_any_words_is_one_line(tmp_path):
    for error in (
        ValueError("RESOURCE_EXHAUSTED: write failed [OS error 28: ENOSPC No space left]"),
        RuntimeError("saving failed"),
    ):
        if isinstance(error, RuntimeError):
            error.__cause__ = OSError(errno.ENOSPC, "full")
        with (
            pytest.raises(BadInput, match=r"cannot write .*: the disk is full"),
            own.renamed(tmp_path / "x"),
        ):
            raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("leaves", ["one", "many"])
def test_a_disk_that_fills_while_a_checkpoint_is_written_is_one_line(tmp_path, leaves):
    """A real one: whatever Orbax's threads log and raise."""
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    code = (
        "import sys, numpy as np; from pathlib import Path; from bdjax import checkpoints, types\n"
        "leaf = np.random.default_rng(0).random((400, 400))\n"
        "tree = {f'a{i}': row for i, row in enumerate(leaf)} if sys.argv[2] == 'many' else leaf\n"
        "try: checkpoints.save_tree(Path(sys.argv[1]), tree)\n"
        "except types.BadInput as error: print(error); print(*Path(sys.argv[1]).parent.iterdir())"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "c"), leaves]
    shell = [*mount[:2], "sh", "-c", f'{" ".join(mount[2:])} && exec "$@"', "sh", *words]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [f"cannot write {tmp_path}/c: the disk is full", ""]
    assert not done.stderr


# --- Interruptions: what is said of them is true ---

SMALL = [
    "--dataset", "fashion-mnist-sample", "--dataset.train-size", "500", "--dataset.test-size",
    "100", "--model", "ffnn", "--model.hidden", "8", "--recipe.batch", "50", "--quiet",
]  # fmt: skip
FOUR = [*SMALL, "--recipe.epochs", "4"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BDJAX_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "unfinished"


def weights(path: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.load_model(path)[2])]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A net that was trained, and one that was repaired, without interruption."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:  # workers would wait for each other
        patch.setenv("BDJAX_DATA_DIR", str(folder / "cache"))
        cli.main(["train", *FOUR, "--out", str(folder / "net")])
        cli.main(["defend", str(folder / "net"), "--quiet", "--out", str(folder / "repaired")])
    return folder


def hear(runner) -> None:
    until = time.monotonic() + 10
    while runner.stop.asked is None and time.monotonic() < until:
        time.sleep(0.001)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_train_goes_on_from_where_it_was_stopped(
    unbroken, cache, capsys, monkeypatch, number, code
):
    runners, epochs, call = [], [], sweep.Runner._call

    def counted(runner, stage, fn, *args, **options):
        runners.append(runner)
        epochs.append(fn is sweep._epoch)
        return call(runner, stage, fn, *args, **options)

    class Bar(sweep.Progress):
        def step(self, note="", amount=1):
            super().step(note, amount)
            if self.done == 2:
                os.kill(os.getpid(), number)
                hear(runners[-1])

    monkeypatch.setattr(sweep.Runner, "_call", counted)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "Progress", Bar)
        found, _, err = bdjax(capsys, "train", *FOUR, "--out", "net")
    assert found == code and sum(epochs) == 2
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert f"kept in {folder}; the same command goes on from there" in err.splitlines()[-1]
    assert not Path("net").exists()
    epochs.clear()
    assert bdjax(capsys, "train", *FOUR, "--out", "net")[0] == 0
    assert sum(epochs) == 2 and not list(cache.iterdir())
    for a, b in zip(weights(Path("net")), weights(unbroken / "net"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_repaired_net_that_could_not_be_saved_is_not_repaired_again(
    unbroken, cache, capsys, monkeypatch
):
    args = ["defend", str(unbroken / "net"), "--quiet", "--out", "repaired"]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "copy_model", stopped)
        code, _, err = bdjax(capsys, *args)
    assert code == 130 and f"is kept in {cache}" in err and "the same command goes on" in err
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Runner, "defend", stopped)
        assert bdjax(capsys, *args)[0] == 0
    assert not list(cache.iterdir())
    for a, b in zip(weights(Path("repaired")), weights(unbroken / "repaired"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_defend_is_stopped_between_its_programs(unbroken, cache, capsys, monkeypatch):
    prepared = sweep.Runner._prepared

    def asked(runner, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        hear(runner)
        return prepared(runner, *args)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.Runner, "_prepared", asked)
        code, _, err = bdjax(capsys, "defend", str(unbroken / "net"), "--quiet")
    assert code == 143 and f"is kept in {cache}" in err
    assert bdjax(capsys, "defend", str(unbroken / "net"), "--quiet")[0] == 0
    assert not list(cache.iterdir())


def test_a_mistake_leaves_nothing_in_the_cache(unbroken, cache, capsys):
    assert bdjax(capsys, "train", *FOUR, "--attack.row", "27", "--out", "net")[0] == 2
    assert not [path for path in cache.rglob("*") if path.is_dir()]


def test_without_a_cache_nothing_is_kept_and_it_is_said(cache, capsys, monkeypatch):
    cache.parent.write_text("a file")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.Runner, "_group", stopped)
    code, _, err = bdjax(capsys, "train", *FOUR, "--out", "net")
    assert code == 130 and "nothing is kept (" in err and "begins anew" in err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, sweep.Stop])
@pytest.mark.parametrize(
    ("args", "where", "words"),
    [
        (BESIDE["run"], (sweep.Runner, "_group"), "kept in out; the same command goes on"),
        (BESIDE["sweep"], (sweep.Runner, "_group"), "kept in out; the same command goes on"),
        (
            lambda made: ["sweep", *BESIDE["run"](made)[1:-1], "--no-resume", "--out"],
            (sweep.Runner, "_group"),
            "the same command without --no-resume goes on",
        ),
        (BESIDE["report"], (report, "_documents"), "the same command writes all of them"),
        (BESIDE["bench"], "benchmarks.__main__._alone", "kept in out; the same command goes on"),
        (
            lambda made: ["bench", "fine_pruning", "--scale", "smoke", "--compare"],
            "benchmarks.__main__._alone",
            "nothing is kept without --out",
        ),
        (PREPARES["data"], "bdjax.datasets.prepared._originals", "begins anew, with the files"),
        (lambda made: ["status"], "bdjax.progress.status", "nothing is kept"),
        (lambda made: ["list"], "bdjax.registry.entries", "nothing is kept"),
    ],
)
def test_every_command_says_what_an_interruption_leaves(
    made, cache, capsys, monkeypatch, args, where, words, stop
):
    if stop is sweep.Stop:
        from bdjax.progress import Terminated as stop

    def stopped(*_, **__):
        raise stop

    command = args(made)
    out = "out" if command[-1] in ("--out", "--data-dir") else str(made / "results")
    with monkeypatch.context() as patch:
        if isinstance(where, str):
            patch.setattr(where, stopped)
        else:
            patch.setattr(*where, stopped)
        code, _, err = bdjax(capsys, *command, *([] if command == ["list"] else [out]))
    assert code == (130 if stop is KeyboardInterrupt else 143), err
    line = err.strip().splitlines()[-1]
    assert line.startswith("bdjax: ") and words in line, err


@pytest.mark.long
def test_after_kill_9_the_same_train_gives_the_same_net(cache, tmp_path, capsys):
    args = ["train", *SMALL, "--recipe.epochs", "1000", "--out"]
    cli.main([*args, "whole"])
    code = (
        "import sys; from bdjax import cli, sweep; sweep.CHECKPOINT_EVERY = 0.0; "
        "cli.main(sys.argv[1:])"
    )
    root = Path(own.__file__).parents[1]
    for _ in range(2):
        words = [sys.executable, "-c", code, *args, str(tmp_path / "net")]
        process, until = subprocess.Popen(words, cwd=root), time.monotonic() + 100
        while time.monotonic() < until and not list(cache.glob("*/partial/[0-9a-f]*")):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
        process.kill()
        process.wait()
        assert list(cache.glob("*/partial")) and not Path("net").exists()
    assert bdjax(capsys, *args, "net")[0] == 0
    assert not list(cache.iterdir())
    for a, b in zip(weights(Path("net")), weights(Path("whole")), strict=True):
        np.testing.assert_array_equal(a, b)


# --- Text from files ---

ODD = "=cmd|' /C calc'!A0 \x1b]0;owned\x07\x1b[31m [bold]x[/bold] \u202e <script>"


def test_text_from_files_reaches_no_terminal_sheet_or_page_raw(tmp_path, capsys):
    fields = ("table", "row", "dataset", "model", "attack", "experiment")
    odd = {**ROW, **{field: ODD for field in fields}, "metrics": {ODD: -0.5, "acc_test": 0.5}}
    folder = results(tmp_path / "out", odd, {**odd, "run": "1", "error": ODD, "metrics": {}})
    facts = {"state": ODD, "started": 1.0, "updated": 2.0, "host": ODD, "rows": 1, "before": 0,
             "total": 2, "group": 1, "groups": 1, "failed": 0, "devices": ODD, "doing": ODD,
             "shard": ODD}  # fmt: skip
    (folder / "progress.json").write_text(json.dumps(facts))
    code, said, err = bdjax(capsys, "status", str(folder))
    assert code == 0 and "[bold]x[/bold]" in "".join(said.split("\n")).replace(" ", ""), err
    report.print_table([odd])
    said += capsys.readouterr().out + report.line(odd)
    assert not set(said) & set("\x1b\x07\u202e")
    assert bdjax(capsys, "report", str(folder))[0] == 0
    text = (folder / "table.csv").read_text()
    (head, line) = csv.reader(text.splitlines())
    cells = [cell for cell in [*head, *line] if cell]
    assert not [c for c in cells if c[0] in "=+-@\t\r" and not _number(c)] and "-0.5" in cells
    assert (folder / "index.html").read_text().count("<script>") == 1  # the page's own
    assert "<script>" not in (folder / "table.md").read_text()


def _number(text: str) -> bool:
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


def test_a_page_shows_no_file_from_elsewhere(tmp_path, capsys):
    figure = report.Figure("curve", "A curve", "Sample.", report.plots.curves([1], {"a": [0.1]}))
    secret = results(tmp_path / "secret")
    report.write(secret, [ROW], [figure._replace(name="hidden")])
    png = secret / "figures" / "hidden.png"
    folder = results(tmp_path / "out")
    report.write(folder, [ROW], [figure])
    about = json.loads((folder / "report.json").read_text())
    (folder / "figures" / "link.png").symlink_to(png)
    (folder / "figures" / "text.png").write_text("secret words")
    os.mkfifo(folder / "figures" / "pipe.png")
    for name in (
        str(png.with_suffix("")), "../../secret/figures/hidden", "link", "text", "pipe", "absent",
        "..", "", "a\0b", "n" * 300,
    ):  # fmt: skip
        about["figures"] = [["curve", "Good", ""], [name, "Bad", "caption"]]
        (folder / "report.json").write_text(json.dumps(about))
        section = report.load(folder)
        assert [picture.title for picture in section.pictures] == ["Good"], name
        assert "is left out" in capsys.readouterr().err
    shutil.move(folder / "figures", tmp_path / "figures")
    (folder / "figures").symlink_to(tmp_path / "figures")
    assert not report.load(folder).pictures
    with pytest.raises(BadInput, match="give a name without"):
        report.write(tmp_path / "new", [ROW], [figure._replace(name="../x")])


def test_nothing_needs_what_only_unix_has():
    """Windows has no `fcntl`: the package is imported without it."""
    code = (
        "import sys; sys.modules['fcntl'] = None; sys.modules['filelock'] = type(sys)('filelock')\n"
        "sys.modules['filelock'].FileLock = sys.modules['filelock'].Timeout = Exception\n"
        "import bdjax.own, bdjax.progress, bdjax.types"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [
        path for path in Path(own.__file__).parent.rglob("*.py") if "fcntl" in path.read_text()
    ]
