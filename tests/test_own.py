"""Nothing of the user's is touched: every command that writes, against every kind of place that is
not bdjax's, in a working directory full of other things.
"""

import errno
import json
import os
import shutil
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from bdjax import cli, own, report, store, sweep
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.store import Store, save_model
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
    from bdjax.sweep import Cell
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
    Store(path).append(rows or [ROW])
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


def bdjax(capsys, *args: str) -> tuple[int, str, str]:
    try:
        cli.main(list(args))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Outside of the user's tree: a net, results, an experiment."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.py").write_text(textwrap.dedent(EXPERIMENT))
    net(folder / "net")
    results(folder / "results")
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
        "arrays": "mine", "partial": "mine", "figures": "mine",
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
    return here


OWNS = {  # commands that write a folder whole
    "train": lambda made: ["train", "--out"],
    "defend": lambda made: ["defend", f"{made}/net", "--out"],
}
BESIDE = {  # commands that write into a folder
    "run": lambda made: ["run", f"{made}/small.py", "--scale", "smoke", "--out"],
    "sweep": lambda made: ["sweep", f"{made}/small.py", "--scale", "smoke", "--out"],
    "report": lambda made: ["report", f"{made}/results", "--out"],
    "bench": lambda made: ["bench", "fine_pruning", "--scale", "smoke", "--out"],
}
PREPARES = {"data": lambda made: ["data", "prepare", "mnist", "--data-dir"]}
ANY = ["", "file", "file/x", "/dev/null", "/dev/null/x", "n" * 300, "a\0b", "loop", "loop/x",
       "new/" + "n" * 300, "\ud800"]  # fmt: skip
WHOLE = [".", "./", "..", "../", "empty/..", "/", "~", "docs", "docs/", "docs/deep", "docs/..",
         "tfjs", "net+", "old+", "edited", "link", "link/", "link/.."]  # fmt: skip
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
    names = PAGE if command == "report" else RUN
    if command != "bench":
        names = [*names, "figures"]
    for name in names:
        for how in ("has", "is", "to"):
            if (how, name) in (("is", "arrays"), ("is", "partial"), ("is", "figures")):
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


def test_new_empty_and_own_folders_are_taken(user, made):
    for out in ("new", "a/b/c", "empty", "n" * 250):
        before = tree(user)
        assert own.whole(Path(out)) == user / out
        assert tree(user) == before
    kept = {k: v for k, v in tree(user).items() if k.split("/")[0] not in ("new", "empty")}
    for out in ("new", "new", "empty", "empty"):
        net(Path(out))
    assert kept.items() <= tree(user).items() and {"new", "empty"} >= {
        name.split("/")[0] for name in tree(user).keys() - kept.keys()
    }
    assert store.load_model("new") and store.load_model("empty")
    moved = Path("new").rename("moved")
    net(unmarked(moved))  # a net of 0.1
    assert (moved / own.FILES).exists()


def test_what_version_01_left_is_taken(tmp_path, made):
    """Results, their page, checkpoints, and what it was writing when it was killed."""
    figure = report.Figure("curve", "A curve", "Sample.", report.plots.curves([1], {"a": [0.1]}))
    folder = results(tmp_path / "out")
    report.write(folder, [ROW], [figure])
    store.remember("lanes.json", "x", 1)
    hashed = "0123456789abcdef"
    Store(folder).save_arrays(hashed, {"a": np.zeros(3)})
    for part in ("partial", "prepared"):
        store.save_tree(folder / part / hashed, {"a": np.zeros(3)})
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
        store.load_tree(folder / "prepared" / hashed, {"a": np.zeros(3)})["a"].tolist() == [0] * 3
    )
    report.write(folder, [ROW], [figure])
    Store(folder).save_arrays(hashed, {"a": np.ones(3)})
    store.save_tree(folder / "partial" / hashed, {"a": np.ones(3)})
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
    store.save_tree(tmp_path / "c", np.zeros(3))
    (tmp_path / "c" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    own.remove(tmp_path / "c", store.old_checkpoint)
    with pytest.raises(BadInput, match=r"holds notes\.txt"):
        store.save_tree(tmp_path / "c", np.ones(3))
    assert tree(tmp_path) == before


def test_what_a_killed_process_moved_aside_comes_back_and_the_rest_is_swept(tmp_path):
    with own.saving(tmp_path) as living:
        killed = tmp_path / f"{own.SAVING}abcdefgh"
        shutil.copytree(living, killed)
        (killed / "new" / "net").mkdir()
        net(killed / "before" / "net")
        (tmp_path / f"{own.SAVING}mine").mkdir()
        (tmp_path / f"{own.SAVING}mine" / "letter").write_text("dear")
        own.sweep(tmp_path)
        assert living.exists() and not killed.exists() and (tmp_path / f"{own.SAVING}mine").exists()
    assert store.load_model(tmp_path / "net") and not living.exists()


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
