"""A sweep on a Ray cluster: the rows of a local run, whatever dies on the way."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from bdjax import datasets, engine, progress
from bdjax.cli import main
from bdjax.datasets.sample import Sample
from bdjax.engine import Mail, Receiver, Sender, Share, packed, share, unpack
from bdjax.store import Store
from bdjax.types import BadInput


def node(alive=True, **resources):
    return {"Alive": alive, "NodeID": "n", "Resources": resources}


@pytest.mark.parametrize(
    "nodes, devices, made",
    [
        ([node(), node(CPU=8), node(CPU=2)], None, Share("cpu", 1, {"num_cpus": 2})),
        ([node(CPU=4)], 2, Share("cpu", 2, {"num_cpus": 4})),
        ([node(CPU=9), node(CPU=9, GPU=8)], None, Share("gpu", 1, {"num_cpus": 1, "num_gpus": 1})),
        ([node(CPU=9, GPU=8)], 4, Share("gpu", 4, {"num_cpus": 1, "num_gpus": 4})),
        ([node(CPU=9), node(CPU=9, TPU=4), node(False, CPU=9, TPU=1)], None,
         Share("tpu", 4, {"num_cpus": 1, "resources": {"TPU": 4}})),
    ],
)  # fmt: skip
def test_a_task_takes_what_a_worker_has(nodes, devices, made):
    assert share(nodes, devices) == made and len(made.places) == made.devices


def test_a_cluster_on_which_no_task_can_run_is_refused():
    with pytest.raises(BadInput, match="no node of the Ray cluster has a CPU, GPU or TPU"):
        share([node(), node(False, CPU=4)])
    with pytest.raises(BadInput, match="devices 16: no node of the Ray cluster has so many"):
        share([node(CPU=9, GPU=8)], 16)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--engine", "dask"], "give ray or ray:ADDRESS"),
        (["--engine", "ray", "--shard", "0/2"], "leave --shard and --hosts away"),
        (["--engine", "ray"], r"pip install 'bdjax\[ray\]'"),
    ],
)
def test_mistakes_are_one_line(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = str(Path(__file__).parents[1] / "experiments" / "sweep_defenses.py")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", file, "--scale", "smoke", "--out", str(tmp_path / "out"), *args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    with pytest.raises(BadInput, match=words):
        raise BadInput(err)


def test_what_is_asked_waits_for_its_own_answer():
    async def talk():
        mail = Mail()
        asked = [asyncio.ensure_future(mail.ask((i, "what"))) for i in range(3)]
        first = await mail.take()
        for number, (i, _) in reversed(first):
            await mail.answer(number, [10 * i])
        later = asyncio.ensure_future(mail.take())
        again = asyncio.ensure_future(mail.ask((7, "more")))
        ((number, _),) = await later
        await mail.answer(number, [None])
        return [await one for one in asked], await again

    assert asyncio.run(talk()) == ([[0], [10], [20]], [None])


def test_cells_are_sent_without_their_images():
    source, sources = Sample(train_size=600, test_size=200), {}
    sender = Sender(box := io.BytesIO(), sources)
    sender.dump([source, Sample(train_size=600, test_size=200), Sample(train_size=500)])
    assert sender.used == {0, 1} and len(box.getvalue()) < 100
    here = [object(), object()]
    found = Receiver(io.BytesIO(box.getvalue()), dict(enumerate(here))).load()  # type: ignore[arg-type]
    assert found == [here[0], here[0], here[1]]


def test_a_given_data_set_needs_no_files(monkeypatch):
    monkeypatch.setattr(datasets.base, "_given", {})
    nowhere = datasets.source("fashion-mnist-sample", train_size=333, test_size=222)
    data = Sample(train_size=600, test_size=200).load()
    datasets.base.give(nowhere, data)
    assert nowhere.load() is data and Sample(train_size=333, test_size=222).load() is data


def test_folders_are_packed_and_odd_ones_refused(tmp_path):
    (tmp_path / "victims").mkdir()
    files = {"arrays/d/0": np.arange(9, dtype=np.uint8), "members.json": np.zeros(0, np.uint8)}
    unpack(path := tmp_path / "victims" / ("0" * 16), files)
    found = packed(path)
    assert found.keys() == files.keys() and all((found[k] == files[k]).all() for k in files)
    for name, odd in (("1" * 16, "../x"), ("1" * 16, "/x"), ("..", "x"), ("1" * 15, "x")):
        with pytest.raises(BadInput, match="has not packed this"):
            unpack(tmp_path / "victims" / name, {odd: files["members.json"]})
    assert [p.name for p in (tmp_path / "victims").glob("[!.]*")] == ["0" * 16]


# --- Real clusters. What a worker writes is logged, so that it is seen what was made twice. ---

PLUGIN = """
    import jax
    import jax.numpy as jnp
    import bdjax
    from bdjax.registry import replace

    @bdjax.defense("clip-to-clean")
    class ClipToClean(bdjax.Repair):
        '''Clips weights to what it has prepared.'''

        limit: float = 1.0

        def prepare(self, key, model, clean):
            return replace(self, ["limit"], clean.image.astype(jnp.float32).mean() / 255)

        def __call__(self, key, model, variables, clean):
            limit = jnp.asarray(self.limit, jnp.float32)
            weights = jax.tree.map(lambda w: jnp.clip(w, -limit, limit), variables["params"])
            return bdjax.Repaired({**variables, "params": weights}, {"limit": limit})
"""
EXPERIMENT = """
    import os, signal, time
    from pathlib import Path

    import jax
    from bdjax import registry, sweep
    from bdjax.attacks.badnets import BadNets
    from bdjax.defenses.repair.fine_pruning import FinePruning
    from bdjax.defenses.train.lpsf import Lpsf
    from bdjax.models.shamshiri import Ffnn
    from bdjax.study import Cell, grid
    from bdjax.train import Recipe, predict, stamped

    TITLE, SCALES, HERE = "for a cluster", ("smoke",), Path({here!r})
    sweep.CHECKPOINT_EVERY = 0.0

    def once(name):
        try:
            (HERE / name).unlink()
            return True
        except FileNotFoundError:
            return False

    def written(write):
        def wrapped(path, tree):
            if path.parent.name == "partial" and tree[0].epoch[0] == 2 and once("die"):
                write(path, tree)
                os.kill(os.getpid(), signal.SIGKILL)
            with open(HERE / "log", "a") as log:
                epoch = tree[0].epoch[0] if path.parent.name == "partial" else ""
                log.write(f"{{path.parent.name}} {{path.name}} {{epoch}}\\n")
            return write(path, tree)
        return wrapped

    def slow(load):
        def wrapped(path, like):
            time.sleep(1 if (HERE / "slow").exists() else 0)
            return load(path, like)
        return wrapped

    sweep.save_tree, sweep.write_tree = written(sweep.save_tree), written(sweep.write_tree)
    sweep.load_tree = slow(sweep.load_tree)

    @registry.pytree
    class Doubt:
        power: float = 1.0

        def __call__(self, key, model, variables, attack, clean, test):
            images = test.image if attack is None else stamped(attack, 1, test.image, key)
            sure = jax.nn.softmax(predict(model, variables, images)).max(-1)
            return {{"sure": sure.mean(), "each": sure}}

    def cells(scale, seeds):
        data = registry.make("dataset", "fashion-mnist-sample", train_size=220, test_size=100)
        recipe, pruning = Recipe(epochs=4, batch=32), FinePruning(recipe=Recipe(epochs=1, batch=20))
        clip = registry.make("defense", "clip-to-clean")
        for width in (8, 12):
            for attack in (BadNets(), None):
                cell = Cell(f"width {{width}}", "net", data, Ffnn((width,)), recipe, attack)
                both = list(grid(cell, seed=range(seeds or 2)))
                yield from grid(both, probe=(Doubt(),))
                yield from grid(both, defense=(pruning, clip, Lpsf(links=8)))
"""


def lines(folder):
    """What must be the same however a run went, and the arrays."""
    aside = ("seconds", "written", "commit")
    rows = {
        row["run"]: json.dumps({k: v for k, v in row.items() if k not in aside}, sort_keys=True)
        for row in Store(folder).rows()
    }
    arrays = {run: Store(folder).arrays(run) for run in rows}
    return {
        run: (row, {k: v.tobytes() for k, v in arrays[run].items()}) for run, row in rows.items()
    }


class Sweep:
    """The experiment, the cluster, and processes that sweep."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "small.py"
        self.file.write_text(textwrap.dedent(EXPERIMENT.format(here=str(folder))))
        (folder / "clip.py").write_text(textwrap.dedent(PLUGIN))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_NUM_CPU_DEVICES"] = "1"
        self.started: list[subprocess.Popen] = []

    def start(self, out, *args):
        command = [sys.executable, "-m", "bdjax", "sweep", str(self.file), "--scale", "smoke"]
        command += ["--quiet", "--plugin", "clip.py", "--out", str(out)]
        words = [*command, *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.started.append(subprocess.Popen(words, text=True, cwd=self.folder, **pipes))
        return self.started[-1]

    @contextlib.contextmanager
    def instead(self, name, *replaced):
        """Another experiment: this one with something replaced."""
        kept, self.file = self.file, self.folder / name
        self.file.write_text(kept.read_text().replace(*replaced))
        yield
        self.file = kept

    def done(self, process, code=0):
        out = process.communicate(timeout=300)
        assert process.returncode == code, out
        return out

    def log(self):
        return (self.folder / "log").read_text().split("\n")[:-1]

    def fresh(self, *marks):
        for name in ("log", "die", "slow"):
            (self.folder / name).unlink(missing_ok=True)
        for name in marks:
            (self.folder / name).touch()


def until(found, process, seconds=100):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def facts(out):
    try:
        return json.loads((out / "progress.json").read_text())
    except (OSError, ValueError):
        return {}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    before = dict(os.environ)
    sweep = Sweep(tmp_path_factory.mktemp("small"))
    try:
        sweep.done(sweep.start(sweep.folder / "whole", "--devices", 1))
        sweep.whole = lines(sweep.folder / "whole")
        assert len(sweep.whole) == 32
        sweep.victims = [line for line in sweep.log() if not line.startswith("partial")]
        yield sweep
    finally:
        for process in sweep.started:
            process.kill()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def cluster(small):
    """A head without CPUs, and two workers of one CPU each."""
    utils = pytest.importorskip("ray.cluster_utils")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    made = utils.Cluster()
    size = {"object_store_memory": 100 << 20}
    made.add_node(num_cpus=0, include_dashboard=False, **size)
    made.more = lambda: made.add_node(num_cpus=1, **size)
    for _ in range(2):
        made.more()
    made.engine = f"ray:{made.address}"
    yield made
    made.shutdown()


def working(cluster):
    """The processes on a node that compute a group now, by node."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = (stat.parent / "cmdline").read_bytes()
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if words.startswith(b"ray::work"):
            found[parent] = int(stat.parent.name)
    raylets = {n.all_processes["raylet"][0].process.pid: n for n in cluster.worker_nodes}
    return {raylets[parent]: pid for parent, pid in found.items() if parent in raylets}


@pytest.mark.ray
def test_the_rows_of_a_cluster_are_those_of_a_local_run(small, cluster, tmp_path, capsys):
    small.fresh()
    out = small.done(small.start(tmp_path, "--engine", cluster.engine))[0]
    assert "page: " in out and (tmp_path / "index.html").exists()
    assert lines(tmp_path) == small.whole
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 32
    # Nothing was made twice: not a victim, and not what a defense has prepared.
    assert sorted(x for x in small.log() if not x.startswith("partial")) == sorted(small.victims)
    victims = {path.name for path in (small.folder / "whole" / "victims").iterdir()}
    assert {path.name for path in (tmp_path / "victims").iterdir()} == victims
    assert not [path for path in (tmp_path / "partial").iterdir() if path.name[0] != "."]
    (now,) = progress.boards(tmp_path)
    assert (now["nodes"], now["retries"], now["tasks"], now["workers"]) == (2, 0, 0, {})
    progress.status(tmp_path)
    text = capsys.readouterr().out
    assert all(word in text for word in ("nodes", "tasks", "retries", "ETA", "4/4", "32/32"))
    # With all victims there a cluster adds a defense, and computes nothing else.
    (small.folder / "more").mkdir()
    with small.instead("more/small.py", "defense=(", "defense=(None, "):
        small.fresh()
        small.done(small.start(tmp_path, "--engine", cluster.engine))
    found = lines(tmp_path)
    assert len(found) == 40 and small.whole.items() <= found.items()
    assert not small.folder.joinpath("log").exists()


@pytest.mark.ray
def test_a_killed_worker_and_a_lost_node_change_no_row(small, cluster, tmp_path):
    """One kills itself behind a checkpoint, one is killed, and the node of a third goes away."""
    small.fresh("die", "slow")
    cluster.more()
    process = small.start(tmp_path, "--engine", cluster.engine)
    until(lambda: facts(tmp_path).get("workers"), process)
    status = facts(tmp_path)
    assert status["tasks"] >= 1 and all(name.count(" ") == 1 for name in status["workers"])
    until(lambda: not (small.folder / "die").exists(), process)
    until(lambda: facts(tmp_path).get("rows", 0) >= 2, process)
    node, pid = until(lambda: working(cluster), process).popitem()
    os.kill(pid, signal.SIGKILL)
    gone = until(lambda: [one for one in working(cluster) if one is not node], process)[0]
    cluster.remove_node(gone, allow_graceful=False)
    (small.folder / "slow").unlink()
    small.done(process)
    assert lines(tmp_path) == small.whole
    runs = [json.loads(x)["run"] for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(runs) == len(set(runs)) == 32
    assert progress.boards(tmp_path)[0]["retries"] >= 1
    # The training that was killed behind its second epoch went on with the third.
    epochs = {}
    for part, name, *epoch in (line.split(" ") for line in small.log() if "partial" in line):
        epochs.setdefault((part, name), []).append(epoch)
    assert [["1"], ["3"]] in epochs.values()


@pytest.mark.ray
def test_a_killed_driver_goes_on_and_a_second_one_is_refused(small, cluster, tmp_path):
    small.fresh("slow")
    process = small.start(tmp_path, "--engine", cluster.engine)
    until(lambda: facts(tmp_path).get("rows", 0) >= 2, process)
    err = small.done(small.start(tmp_path, "--engine", cluster.engine), 2)[1]
    assert f"is being worked on by process {process.pid}" in err.splitlines()[-1]
    process.kill()
    process.communicate()
    before = lines(tmp_path)
    assert 2 <= len(before) < 32 and before.items() <= small.whole.items()
    (small.folder / "slow").unlink()
    small.done(small.start(tmp_path, "--engine", cluster.engine))
    assert lines(tmp_path) == small.whole
    runs = [json.loads(x)["run"] for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(runs) == len(set(runs)) == 32


@pytest.mark.ray
def test_memory_errors_halve_the_lanes_and_rows_say_so(small, cluster, tmp_path):
    tight = """
    real = sweep.compiled

    def compiled(fn, model, shared, items, lanes, *more):
        if lanes > 1 and fn is sweep._epoch and model is not SMALL:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(fn, model, shared, items, lanes, *more)

    from bdjax.models.layers import build
    SMALL, sweep.compiled = build(Ffnn((8,)), (28, 28, 1), 10), compiled

    def once("""
    small.fresh()
    with small.instead("tight.py", "def once(", textwrap.dedent(tight).strip()):
        small.done(small.start(tmp_path, "--engine", cluster.engine, "--lanes", 2))
    rows = {row["run"]: row for row in Store(tmp_path).rows()}
    assert rows.keys() == small.whole.keys()
    for row in rows.values():
        trained = row["table"] == "width 12" and row["defense"] != "lpsf"
        assert row.get("halved", False) == trained, row


@pytest.mark.ray
def test_a_machine_without_a_cluster_starts_one_and_sigterm_ends_it(small, tmp_path):
    pytest.importorskip("ray")
    small.fresh("slow")
    process = small.start(tmp_path, "--engine", "ray:local")
    until(lambda: facts(tmp_path).get("rows", 0) >= 2, process)
    process.terminate()
    err = small.done(process, 143)[1]
    assert f"what was finished is kept in {tmp_path}; the same command goes on" in err
    assert 2 <= len(Store(tmp_path).rows()) < 32 and facts(tmp_path)["state"] == "stopped"
    (small.folder / "slow").unlink()
    small.done(small.start(tmp_path, "--engine", "ray:local"))
    assert lines(tmp_path) == small.whole


@pytest.mark.ray
def test_a_worker_with_other_code_is_refused(small, cluster, tmp_path):
    """The file says something else where a worker reads it."""
    other = """
    from bdjax import identity
    real = identity.codes
    if "default_worker.py" in " ".join(__import__("sys").orig_argv):
        identity.codes = lambda cells: {
            run: code | {"training": "0" * 16} for run, code in real(cells).items()
        }

    def once("""
    with small.instead("other.py", "def once(", textwrap.dedent(other).strip()):
        err = small.done(small.start(tmp_path, "--engine", cluster.engine), 2)[1]
    assert "has other code than the driver: install the same there" in err.splitlines()[-1]


@pytest.mark.ray
def test_an_address_without_a_cluster_is_one_line_at_once(small, tmp_path):
    pytest.importorskip("ray")
    begun = time.monotonic()
    err = small.done(small.start(tmp_path, "--engine", "ray:127.0.0.1:1"), 2)[1]
    assert "--engine ray:127.0.0.1:1: " in err.splitlines()[-1] and time.monotonic() - begun < 100
    assert engine.ENGINE.fullmatch("ray:auto")
