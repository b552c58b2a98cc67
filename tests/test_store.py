"""Nothing is lost, doubled or half-written, and nothing that is read back runs code."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from planted import row

from bdjax.attacks.blended import Blended
from bdjax.checkpoints import load_model, load_tree, save_model, save_tree
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.store import Store, renamed
from bdjax.types import BadInput

HERE = Path(__file__).parent


def test_rows_come_back_once_and_in_order(tmp_path):
    store = Store(tmp_path / "out")
    store.append([row("a", x=1), row("b", x=2)])
    store.append([row("a", x=3), row("c", x=4)])
    assert [(row["run"], row["x"]) for row in store.rows()] == [("a", 1), ("b", 2), ("c", 4)]


def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path):
    store = Store(tmp_path)
    store.append([row("a")])
    with open(store.results, "ab") as file:
        file.write(b'{"run": "torn", "metr')
    assert [row["run"] for row in store.rows()] == ["a"]
    store.append([row("b")])
    assert [json.loads(line)["run"] for line in store.results.read_text().splitlines()] == [
        "a",
        "b",
    ]


def test_two_processes_on_one_store_double_nothing(tmp_path):
    code = (
        "import sys; from bdjax.store import Store; from planted import row;"
        "s = Store(sys.argv[1]); [s.append([row(str(i), by=sys.argv[2])]) for i in range(60)]"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=HERE)
        for name in "ab"
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    runs = [
        json.loads(line)["run"] for line in (tmp_path / "results.jsonl").read_text().splitlines()
    ]
    assert sorted(map(int, runs)) == list(range(60))


def test_kill_9_while_appending_leaves_a_store_that_loads(tmp_path):
    code = (
        "import sys; from bdjax.store import Store; from planted import row;"
        "s = Store(sys.argv[1])\ni = 0\nwhile True: s.append([row(str(i), pad='x' * 5000)]); i += 1"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=HERE)
    until = time.monotonic() + 60
    while time.monotonic() < until and len(Store(tmp_path).rows()) < 5:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = Store(tmp_path)
    count = len(store.rows())
    assert count >= 5
    store.append([row("after")])
    assert len(store.rows()) == count + 1


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "thing"
    path.write_text("old")
    with pytest.raises(RuntimeError), renamed(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thing"]


def test_full_disk_is_one_clear_line_and_leaves_whole_lines(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append([row("a")])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(BadInput, match=r"cannot write .*the disk is full"),
    ):
        patch.setattr(os, "fsync", full)
        store.append([row("b")])
    assert [row["run"] for row in store.rows()] == ["a"]
    store.append([row("b")])
    assert len(store.rows()) == 2


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        Store(tmp_path / "file" / "out").ready()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    net = Ffnn(hidden=(8,))
    model = build(net, (28, 28, 1), 10)
    variables = {
        **model.init(jax.random.key(0)),
        "masks": {"penultimate": np.arange(8, dtype=np.float32) % 2},
    }
    path = tmp_path_factory.mktemp("model") / "m"
    image = np.random.default_rng(0).random((28, 28, 1), np.float32)
    save_model(
        path,
        net,
        model,
        variables,
        attack=Blended(pattern="image", image=image, alpha=0.3),
        metrics={"acc": 0.5},
    )
    return path, net, variables, image


def test_a_model_comes_back_whole(saved):
    path, net, variables, image = saved
    again, model, loaded, about = load_model(path)
    assert again == net and model.classes == 10 and about["metrics"] == {"acc": 0.5}
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, variables), loaded)
    np.testing.assert_array_equal(about["attack"].image, image)
    assert about["attack"].alpha == 0.3
    model.apply(loaded, np.zeros((1, 28, 28, 1), np.float32))


@pytest.mark.parametrize(
    "damage",
    ["missing", "no json", "bad json", "unknown net", "truncated", "other shape", "pickle"],
)
def test_damaged_models_are_refused_in_one_line(saved, tmp_path, damage):
    import shutil

    path = tmp_path / "m"
    if damage != "missing":
        shutil.copytree(saved[0], path)
    text = (saved[0] / "model.json").read_text()
    match damage:
        case "no json":
            (path / "model.json").unlink()
        case "bad json":
            (path / "model.json").write_text(text[: len(text) // 2])
        case "unknown net":
            (path / "model.json").write_text(text.replace('"ffnn"', '"fnn"'))
        case "truncated":
            for file in (path / "variables").rglob("*"):
                if file.is_file() and file.stat().st_size > 1000:
                    file.write_bytes(file.read_bytes()[:500])
        case "other shape":
            (path / "model.json").write_text(text.replace('"classes": 10', '"classes": 11'))
        case "pickle":

            class Evil:
                def __reduce__(self):
                    return (os.mkdir, (str(tmp_path / "pwned"),))

            np.savez(path / "arrays.npz", a0=np.array([Evil()], dtype=object))
    with pytest.raises(BadInput) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_kill_9_while_saving_a_checkpoint(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from bdjax.checkpoints import save_tree\ni = 0\n"
        "while True:\n save_tree(Path(sys.argv[1]) / 'c', np.full(200_000, i, np.float32)); i "
        "+= 1; print(i, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    tree = load_tree(tmp_path / "c", np.zeros(200_000, np.float32))
    assert len(np.unique(tree)) == 1


def test_nothing_is_deleted_before_the_new_checkpoint_stands(tmp_path, monkeypatch):
    deleted, rmtree = [], shutil.rmtree

    def look(path, **options):
        deleted.append(load_tree(tmp_path / "c", np.zeros(3)).tolist())
        rmtree(path, **options)

    save_tree(tmp_path / "c", np.zeros(3))
    monkeypatch.setattr("bdjax.checkpoints.shutil.rmtree", look)
    save_tree(tmp_path / "c", np.ones(3))
    assert deleted
    assert all(leaves == [1, 1, 1] for leaves in deleted)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_round_trip_keeps_types(tmp_path):
    tree = {"a": np.arange(3, dtype=np.int32), "b": (np.float32(2.5), np.zeros((2, 1), np.float32))}
    save_tree(tmp_path / "t", tree)
    chex.assert_trees_all_equal(load_tree(tmp_path / "t", tree), tree)
