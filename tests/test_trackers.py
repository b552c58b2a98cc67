"""Finished rows as trackers get them."""

import numpy as np
import pytest

from bdjax import trackers
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
    trackers.tracker("tensorboard", store, "mine")([ROW])
    assert said == [("acc_test", 0.5, 0), ("acc_curve", 1.0, 0), ("acc_curve", 0.5, 1)]
    assert list((tmp_path / "tensorboard" / "abc").glob("events.out.*"))
