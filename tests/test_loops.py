"""Long searches are kept while they run, and go on from there, bit for bit."""

import json
import math
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import loops, mesh, registry, sweep, target
from bdjax.attacks.badnets import BadNets
from bdjax.defenses.inputs.nc_filter import NcFilter
from bdjax.defenses.invert.abs import Abs
from bdjax.defenses.invert.neural_cleanse import NeuralCleanse
from bdjax.defenses.repair.nc_unlearning import NcUnlearning
from bdjax.models.shamshiri import Cnn
from bdjax.progress import Stop
from bdjax.registry import replace
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.sweep import Runner
from bdjax.train import Recipe

DATA = registry.make("dataset", "fashion-mnist-sample", train_size=400, test_size=100)
NET = Cnn("VALID", hidden=16, features=(4, 4))
BASE = Cell("T", "victim", DATA, NET, Recipe(epochs=1, batch=50), BadNets())
JUDGES = {
    "folded labels": NeuralCleanse(steps=3, batches=2, seeds=2),
    "one label after another": NeuralCleanse(steps=3, batches=2, seeds=2, lanes=1),
    "few labels of many": NeuralCleanse(
        steps=9, batches=1, screen=4, screen_patience=1, screen_overlap=0.0
    ),
    "neurons": Abs(images=5, top=2, per_site=2, steps=5),
    "a repair that starts from one": NcUnlearning(nc=NeuralCleanse(steps=3, batches=2)),
    "a filter that starts from one": NcFilter(nc=NeuralCleanse(steps=3, batches=2)),
}


@pytest.mark.parametrize("name", [entry.name for entry in registry.entries("defense")])
def test_every_defense_that_searches_is_known_by_its_judge(name):
    """To be kept while it runs, and for the steps that a rehearsal counts."""
    made = registry.make("defense", name)
    described = json.dumps(registry.describe(made))
    judges = [part for part in sweep.nested(made) if isinstance(part, NeuralCleanse | Abs)]
    searches = re.findall(r'"name": "(?:abs|neural-cleanse)"', described)
    assert len(searches) == len(judges)
    steps = [float(found) for found in re.findall(r'"steps": ([\d.]+)', described)]
    items = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), made)
    assert target._steps((items,)) == max(steps, default=1)


def run(folder, cell, monkeypatch, at=None):
    """The row, its arrays and the steps of a run that is stopped after step `at`."""
    made = []

    def step(self, state):
        made.append(1)
        if len(made) == at:
            self.stop.asked = signal.SIGINT
        return real(self, state)

    real = loops.Loops.step
    with monkeypatch.context() as patch:
        patch.setattr(loops.Loops, "step", step)
        store = Store(folder)
        try:
            (row,) = Runner(store, "test", quiet=True).run([cell])
        except KeyboardInterrupt:
            return None, None, len(made)
        return row["metrics"], store.arrays(cell.run_id), len(made)


@pytest.mark.long
@pytest.mark.parametrize("name", JUDGES)
def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch, name):
    cell = replace(BASE, ["defense"], JUDGES[name])
    monkeypatch.setattr(sweep, "LASTING", math.inf)
    plain = run(tmp_path / "plain", cell, monkeypatch)
    assert plain[2] == 0
    monkeypatch.setattr(sweep, "LASTING", 0.0)
    monkeypatch.setattr(loops, "EVERY", 0.0)
    whole = run(tmp_path / "whole", cell, monkeypatch)
    folder, done = tmp_path / "stopped", 0
    for at in (1, (whole[2] - 1) // 2):
        row, _, steps = run(folder, cell, monkeypatch, at)
        assert row is None and steps == at
        assert list((folder / "partial").iterdir())
        done += steps
    row, arrays, steps = run(folder, cell, monkeypatch)
    assert steps == whole[2] - done
    assert row == whole[0] == plain[0]
    assert arrays.keys() == whole[1].keys() == plain[1].keys()
    for key in arrays:
        assert np.array_equal(arrays[key], whole[1][key], equal_nan=True)
        assert np.array_equal(arrays[key], plain[1][key], equal_nan=True)
    assert not any(p.is_dir() for p in (folder / "partial").iterdir())


def test_what_was_written_before_a_kill_is_enough(tmp_path, monkeypatch):
    """Every second step is on disk when the process is gone."""
    seen = []

    def search(kept):
        start = lambda v: (v, jnp.zeros((), jnp.int32))  # noqa: E731
        with kept.within(tmp_path / "search"):
            program = jax.jit(
                lambda x: mesh.drain(
                    start, lambda s: (s[0] * 1.5, s[1] + 1), lambda s: s[1] >= 5, x, 1
                )
            )
            return jax.tree.map(np.asarray, program(jnp.arange(1.0, 4.0)))

    def step(self, state):
        seen.append(float(state[0]))
        if len(seen) == 7:  # the process is gone
            self.stopped = True
            return np.bool_(True)
        self.saved = -math.inf if len(seen) % 2 else math.inf
        return real(self, state)

    real = loops.Loops.step
    monkeypatch.setattr(loops.Loops, "step", step)
    search(loops.Loops(Stop()))
    assert len(seen) == 7
    value, steps = search(loops.Loops(Stop()))
    assert np.allclose(value, 1.5**5 * np.arange(1.0, 4.0)) and (steps == 5).all()
    assert len(seen) == 7 + 15 - 5
    loops.forget(tmp_path / "search")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("search")]


def test_only_what_lasts_is_kept(monkeypatch):
    model = sweep.build(NET, (28, 28, 1), 10)
    short, long = NeuralCleanse(steps=2, batches=2), NeuralCleanse(seeds=3)
    assert not sweep.lasts(short, model)
    deep = sweep.build(registry.make("model", "preact-resnet18"), (32, 32, 3), 10)
    assert sweep.lasts(long, deep)
