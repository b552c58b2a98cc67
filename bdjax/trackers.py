"""Finished rows told to the trackers that people use, one event a row, without a network:
TensorBoard's files, Weights & Biases offline, MLflow in a folder.

What their own variables say (`WANDB_MODE`, `MLFLOW_TRACKING_URI`) goes before that.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from bdjax.progress import say_once
from bdjax.rows import Row, measured
from bdjax.store import Store
from bdjax.types import BadInput

Log = Literal["tensorboard", "wandb", "mlflow"]
Tell = Callable[[str, Row, dict[str, float], dict[str, np.ndarray]], None]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def tracker(
    log: str, store: Store, experiment: str
) -> Callable[[Iterable[Row], Mapping[str, np.ndarray]], None]:
    """What tells `log` of finished rows: their metrics, tags and configuration, the curves among
    their arrays, and the loss of a victim's training by epoch, which is given by the victim's name.
    Raises `BadInput` where the package is not there.
    """
    if log not in PACKAGES:
        raise BadInput(f"log '{log}' is not one of {', '.join(PACKAGES)}")
    try:
        module = importlib.import_module(PACKAGES[log])
    except ImportError as error:
        raise BadInput(f"--log {log} needs {PACKAGES[log]}: pip install 'bdjax[{log}]'") from error
    made = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[log]
    with _answering(log):
        tell: Tell = made(module, store, experiment)
    heard = False

    def told(rows: Iterable[Row], losses: Mapping[str, np.ndarray]) -> None:
        nonlocal heard
        for row in rows:
            metrics = {k: float(v) for k, v in row["metrics"].items() if measured(v)}
            arrays = store.arrays(row["run"]).items()
            curves = {k: v for k, v in arrays if k.endswith(("curve", "loss")) and np.ndim(v) == 1}
            if not row.get("defense") and row.get("victim") in losses:
                curves["train_loss"] = losses[row["victim"]]
            name = f"{row.get('table')}, {row.get('row')}, seed {row.get('seed')}"
            try:
                with _answering(log):
                    tell(name, row, metrics, curves)
                heard = True
            except BadInput as error:
                if not heard:
                    raise
                say_once(f"bdjax: {error}; the rows are kept all the same")

    return told


@contextmanager
def _answering(log: str) -> Iterator[None]:
    """A tracker's own complaint, such as of a key or a server, as one line."""
    try:
        yield
    except Exception as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"--log {log}: {what[:300]}") from error


def _points(curves: Mapping[str, np.ndarray]) -> Iterator[tuple[str, int, float]]:
    """Name, step and value of each point that was measured."""
    for curve, values in curves.items():
        for step, value in enumerate(values):
            if np.isfinite(value):
                yield curve, step, float(value)


def _about(row: Row) -> dict[str, Any]:
    fields = ("table", "row", "dataset", "model", "attack", "defense", "seed", "error")
    return {f: row[f] for f in fields if row.get(f) is not None} | dict(row.get("tags") or {})


def _tensorboard(module: Any, store: Store, experiment: str) -> Tell:
    def tell(name: str, row: Row, metrics: Mapping[str, float], curves: Mapping[str, Any]) -> None:
        folder = store.folder / "tensorboard" / row["run"]
        with module.SummaryWriter(str(folder)) as writer:
            writer.add_text("row", json.dumps({"name": name, **_about(row)}))
            writer.add_text("config", json.dumps(row.get("config")))
            for metric, value in metrics.items():
                writer.add_scalar(metric, value, 0)
            for curve, step, value in _points(curves):
                writer.add_scalar(curve, value, step)

    return tell


def _wandb(module: Any, store: Store, experiment: str) -> Tell:
    def tell(name: str, row: Row, metrics: Mapping[str, float], curves: Mapping[str, Any]) -> None:
        run = module.init(
            project=experiment,
            name=name,
            dir=str(store.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config={**_about(row), "config": row.get("config")},
            reinit="finish_previous",
        )
        steps: dict[int, dict[str, float]] = {}
        for curve, step, value in _points(curves):
            steps.setdefault(step, {})[curve] = value
        for step, values in sorted(steps.items()):
            run.log(values, step=step)
        run.summary.update(metrics)
        run.finish()

    return tell


def _mlflow(module: Any, store: Store, experiment: str) -> Tell:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # 3.17 wants to be told so
    place = (store.folder / "mlruns").resolve().as_uri()
    client = module.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", place))

    def tell(name: str, row: Row, metrics: Mapping[str, float], curves: Mapping[str, Any]) -> None:
        known = client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else client.create_experiment(experiment)
        run = client.create_run(place, run_name=name).info.run_id
        for tag, value in _about(row).items():
            client.set_tag(run, tag, str(value))
        client.log_dict(run, row.get("config") or {}, "config.json")
        for metric, value in metrics.items():
            client.log_metric(run, metric, value)
        for curve, step, value in _points(curves):
            client.log_metric(run, curve, value, step=step)
        client.set_terminated(run, "FAILED" if row.get("error") else "FINISHED")

    return tell
