"""What a run leaves behind: an append-only `results.jsonl`, arrays for figures, and models as Orbax
checkpoints.

Everything but the JSONL is written to a temporary name and renamed. A line is written in one piece
and fsynced; a line torn by a crash is cut off by the next writer. Nothing that is read back can run
code: JSON, `.npz` without pickles, Orbax arrays.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bdjax import registry
from bdjax.datasets.base import data_dir
from bdjax.models.layers import build
from bdjax.types import BadInput, Model, Variables


@contextmanager
def explained(path: Path, action: str = "write"):
    """Turns the system's complaints about `path` into one clear line."""
    try:
        yield
    except OSError as error:
        reason = (
            "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        )
        raise BadInput(f"cannot {action} {path}: {reason}") from error


@contextmanager
def renamed(path: Path):
    """A temporary sibling of `path` that becomes `path` when the block ends well, and vanishes when
    it does not. A folder that was there before is moved aside whole, and deleted only when the new
    one stands.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) / path.name
        try:
            yield temporary
            if path.is_dir():  # which no rename replaces
                os.rename(path, temporary.parent / "before")
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary.parent, ignore_errors=True)


class Store:
    """A results folder. `shard`: (i, n) where this process is one of n that share the work: it has
    a results file of its own.
    """

    def __init__(self, folder: str | Path, shard: tuple[int, int] | None = None):
        self.folder, self.shard = Path(folder), shard
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, "permission denied")
        self.suffix = "" if shard is None else f"-{shard[0]}-of-{shard[1]}"
        self.results = self.folder / f"results{self.suffix}.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """The finished rows of all shards, each run once; a torn last line is left out."""
        return read_rows(result_files(self.folder))

    @contextmanager
    def locked(self):
        """Keeps the shard for this process: a second one that wants it is refused. The lock dies
        with the process.
        """
        path = self.folder / f".results{self.suffix}.lock"
        with explained(path):
            file = open(path, "a+")  # noqa: SIM115
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                shard = "" if self.shard is None else f" (shard {self.shard[0]}/{self.shard[1]})"
                line = (
                    f"{self.folder}{shard} is being worked on by {owner}: wait for it, or give "
                    "each its own --shard i/n"
                )
                raise BadInput(line) from None
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows whose run is not there yet; on return they are on the disk. Safe with several
        writers.
        """
        with explained(self.results), open(self.results, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = {row["run"] for row in read_rows([self.results])}
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if whole != end:
                file.truncate(whole)
            new = {row["run"]: row for row in rows if row["run"] not in known}.values()
            text = "".join(
                json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in new
            ).encode()
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)  # all of it or nothing
                raise

    def save_arrays(self, run: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Arrays of a run, for its figures."""
        with renamed(self.folder / "arrays" / f"{run}.npz") as path:
            np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    def arrays(self, run: str) -> dict[str, np.ndarray]:
        """The arrays of a run; empty where it left none."""
        path = self.folder / "arrays" / f"{run}.npz"
        return dict(np.load(path, allow_pickle=False)) if path.exists() else {}


def result_files(folder: Path) -> list[Path]:
    """The results files of a folder, that of an unsharded run first."""
    return [
        path
        for path in (folder / "results.jsonl", *sorted(folder.glob("results-*-of-*.jsonl")))
        if path.exists()
    ]


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of results files, each run once; a torn last line is left out."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                found.setdefault(row["run"], _renamed(row))
            except (ValueError, KeyError, TypeError):
                continue
    return list(found.values())


FORMER = {
    "mntd": {"auroc": "shadow_auroc"},
    "activation-clustering": {"auroc": "auroc_pooled"},
    "spectral-signatures": {"auroc": "auroc_pooled"},
}
"""Metrics, by defense, that rows of 0.1 have under another name."""


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    names = FORMER.get(row.get("defense") or "", {})
    if names and isinstance(row.get("metrics"), dict):
        row["metrics"] = {names.get(name, name): v for name, v in row["metrics"].items()}
    return row


def recall(name: str) -> dict[str, Any]:
    """What was measured on this machine and kept in the file `name` of the user's cache."""
    try:
        found = json.loads((data_dir() / name).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(name: str, key: str, value: Any) -> None:
    """Keeps `value` for `recall`; a cache that cannot be written is no error."""
    with contextlib.suppress(BadInput), renamed(data_dir() / name) as path:
        path.write_text(json.dumps({**recall(name), key: value}, indent=1))


def save_tree(path: Path, tree: Any) -> None:
    """A pytree of arrays as an Orbax checkpoint; as `.npz` where JAX knows of other hosts: Orbax
    would wait for them, and let the first one alone write.
    """
    leaves = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    with renamed(path) as temporary:
        if jax.process_count() > 1:
            temporary.mkdir()
            np.savez(temporary / "leaves.npz", **leaves)  # type: ignore[arg-type]
        else:
            with _checkpointer() as checkpointer:
                checkpointer.save(temporary.absolute(), leaves)


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def load_tree(path: Path, like: Any) -> Any:
    """The pytree saved at `path`, with the structure of `like`; `BadInput` where it is damaged or
    of other shapes.
    """
    try:
        if (path / "leaves.npz").exists():
            saved = dict(np.load(path / "leaves.npz", allow_pickle=False))
        else:
            with _checkpointer() as checkpointer:
                saved = checkpointer.restore(path.absolute())
        leaves = [np.asarray(saved[name]) for name in sorted(saved)]
    except Exception as error:
        raise BadInput(f"the checkpoint {path} is damaged or incomplete: {_line(error)}") from error
    expected, structure = jax.tree.flatten(like)
    shapes = [(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in expected]
    if shapes != [(leaf.shape, leaf.dtype) for leaf in leaves]:
        raise BadInput(f"the checkpoint {path} does not fit the model that its description names")
    return jax.tree.unflatten(structure, leaves)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def save_model(
    path: str | Path, net: Any, model: Model, variables: Variables, **about: Any
) -> None:
    """A model folder: `model.json` (the net, its images, and `about`: attack, dataset, metrics …),
    arrays and `variables`.
    """
    arrays: dict[str, np.ndarray] = {}
    described = {
        "net": net,
        "shape": model.shape,
        "classes": model.classes,
        "masks": sorted(variables.get("masks", {})),
    }
    text = json.dumps(registry.describe({**described, **about}, arrays), indent=1)
    with renamed(Path(path)) as temporary:
        save_tree(temporary / "variables", variables)
        np.savez(temporary / "arrays.npz", **arrays)  # type: ignore[arg-type]
        (temporary / "model.json").write_text(text)


def load_model(path: str | Path) -> tuple[Any, Model, Variables, dict[str, Any]]:
    """`(net, model, variables, about)` of a model folder; `attack`, `dataset`, `recipe` and
    `defenses` (those applied, in order) in `about` are revived.
    """
    path = Path(path)
    if not (path / "model.json").is_file():
        raise BadInput(
            f"{path} is no model folder: it has no model.json (`bdjax train --out {path}` makes "
            "one)"
        )
    try:
        about = json.loads((path / "model.json").read_text())
        arrays = dict(np.load(path / "arrays.npz", allow_pickle=False))
        net = registry.revive("model", about.pop("net"), arrays)
        shape, classes = tuple(map(int, about.pop("shape"))), int(about.pop("classes"))
        masked = list(about.pop("masks"))
        for kind in ("attack", "dataset", "recipe"):
            about[kind] = registry.revive(kind, about.get(kind), arrays)
        about["defenses"] = registry.revive("defense", about.get("defenses", []), arrays)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{path}: the model's description is damaged: {_line(error)}") from error
    model = build(net, shape, classes)  # type: ignore[arg-type]
    for defense in about["defenses"]:
        model = defense.wrap(model)
    like = dict(jax.eval_shape(model.init, jax.random.key(0)))
    if masked:
        probe = jax.ShapeDtypeStruct((1, *shape), np.float32)
        acts = jax.eval_shape(lambda v, x: model.apply(v, x).acts, like, probe)
        like["masks"] = {
            site: jax.ShapeDtypeStruct(acts[site].shape[-1:], np.float32) for site in masked
        }
    return net, model, load_tree(path / "variables", like), about


def writable(folder: Path) -> None:
    """Raises `BadInput` now, rather than after hours of work, where `folder` cannot be made."""
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")
