"""Finished rows as trackers get them."""

import dataclasses

import numpy as np
import pytest

import bdjax
from bdjax import trackers
from bdjax.attacks.badnets import BadNets
from bdjax.datasets.sample import Sample
from bdjax.models.shamshiri import Ffnn
from bdjax.store import Store
from bdjax.types import BadInput

ROW = {
    "run": "abc", "table": "T", "row": "r", "seed": 0, "metrics": {"acc_test": 0.5, "x": None},
    "config": {"model": {"name": "cnn"}}, "tags": {"net": "CNN"},
}  # fmt: skip


def test_an_absent_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package_here")
    with pytest.raises(BadInput, match=r"--log wandb needs .*pip install 'bdjax\[wandb\]'"):
        trackers.tracker("wandb", Store(tmp_path), "mine")
    with pytest.raises(BadInput, match="not one of tensorboard, wandb, mlflow"):
        trackers.tracker("other", Store(tmp_path), "mine")


def test_tensorboard_gets_metrics_and_curves(tmp_path, monkeypatch):
    board = pytest.importorskip("tensorboardX")
    said = []
    real = board.SummaryWriter.add_scalar

    def add(self, tag, value, step):
        said.append((tag, value, step))
        real(self, tag, value, step)

    monkeypatch.setattr(board.SummaryWriter, "add_scalar", add)
    store = Store(tmp_path)
    monkeypatch.setattr(Store, "arrays", lambda self, run: {"acc_curve": np.array([1.0, 0.5])})
    trackers.tracker("tensorboard", store, "mine")(
        [ROW | {"victim": "v"}, ROW | {"victim": "v", "defense": "strip"}],
        {"v": np.array([np.nan, 0.7, 0.25])},  # it went on from a checkpoint
    )
    plain = [("acc_test", 0.5, 0), ("acc_curve", 1.0, 0), ("acc_curve", 0.5, 1)]
    assert said == [*plain, ("train_loss", 0.7, 1), ("train_loss", 0.25, 2), *plain]
    assert list((tmp_path / "tensorboard" / "abc").glob("events.out.*"))


def test_a_tracker_that_fails_is_one_line_and_later_ends_no_run(tmp_path, monkeypatch, capsys):
    """Of a key that is missing, of a server that goes away."""
    up = []

    def made(module, store, experiment):
        def tell(*_):
            if not up.pop():
                raise RuntimeError("no key is there\nlog in")

        return tell

    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "json")
    monkeypatch.setattr(trackers, "_mlflow", made)
    told = trackers.tracker("mlflow", Store(tmp_path), "mine")
    up[:] = [False]
    with pytest.raises(BadInput, match=r"^--log mlflow: no key is there$"):
        told([ROW], {})
    up[:] = [True, False, True]
    told([ROW] * 3, {})
    said = "bdjax: --log mlflow: no key is there; the rows are kept all the same\n"
    assert not up and capsys.readouterr().err == said


def test_mlflow_gets_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    trackers.tracker("mlflow", Store(tmp_path), "mine")([ROW], {})
    (run,) = (tmp_path / "mlruns").glob("*/*/metrics/acc_test")
    assert " 0.5 " in run.read_text()


def test_a_run_tells_of_the_loss_of_each_epoch(tmp_path, monkeypatch):
    """From the training to the tracker, whatever package is there."""
    said = {}

    def tell(module, store, experiment):
        return lambda name, row, metrics, curves: said.update({row["row"]: (metrics, curves)})

    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "json")
    monkeypatch.setattr(trackers, "_mlflow", tell)
    cell = bdjax.Cell("T", "no defense", Sample(train_size=400, test_size=100), Ffnn(hidden=(8,)),
                      bdjax.Recipe(epochs=3, batch=50), BadNets())  # fmt: skip
    cells = [
        cell,
        dataclasses.replace(cell, row="filtered", defense=bdjax.make("defense", "strip", n=10)),
    ]
    bdjax.run(cells, out=tmp_path / "out", quiet=True, log="mlflow")
    metrics, curves = said["no defense"]
    assert {"acc_test", "asr_nt"} <= metrics.keys()
    assert curves["train_loss"].shape == (3,) and curves["train_loss"][2] < curves["train_loss"][0]
    assert "train_loss" not in said["filtered"][1] and "far" in said["filtered"][0]
