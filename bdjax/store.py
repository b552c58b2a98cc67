"""What a run leaves behind: an append-only `results.jsonl`, arrays for figures, and models as Orbax
checkpoints.

Everything but the JSONL is written to a temporary name and renamed, and replaces only what bdjax
wrote (`bdjax.own`). A line is written in one piece and fsynced; a line torn by a crash is cut off
by the next writer. Nothing that is read back can run code: JSON, `.npz` without pickles, Orbax
arrays.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

from bdjax import __version__, own, registry
from bdjax.datasets.base import data_dir
from bdjax.models.layers import build
from bdjax.own import explained, renamed
from bdjax.progress import kept
from bdjax.types import BadInput, Model, Variables

FOLDERS = ("arrays", "victims", "partial", "prepared")
"""Parts of a results folder; what they hold is named by hashes."""


class Store:
    """A results folder; it is made by the first that writes. `shard`: (i, n) where this process is
    one of n that share the work: it has a results file of its own.
    """

    def __init__(self, folder: str | Path, shard: tuple[int, int] | None = None):
        self.folder, self.shard = Path(folder), shard
        self.suffix = "" if shard is None else f"-{shard[0]}-of-{shard[1]}"
        self.results = self.folder / f"results{self.suffix}.jsonl"
        self.progress = self.folder / f"progress{self.suffix}.json"
        self.lock = FileLock(self.folder / f".results{self.suffix}.lock", timeout=0)

    def rows(self) -> list[dict[str, Any]]:
        """The finished rows of all shards, each run once; a torn last line is left out."""
        return read_rows(result_files(self.folder))

    def ready(self) -> None:
        """Raises `BadInput` now, rather than after hours of work, where a run cannot write here
        beside what is there.
        """
        own.beside(self.folder, [self.progress.name], FOLDERS, _progress)
        for path in (self.results, self.folder / "results.jsonl"):
            with explained(path):
                _appendable(path)
                _lockable(path.with_name(f".{path.name}.lock"))
        with explained(self.folder):
            _lockable(Path(self.lock.lock_file))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the shard for this process: a second one that wants it is refused. The lock dies
        with the process. What killed ones left half-written is removed.
        """
        path = Path(self.lock.lock_file)
        owner = path.with_suffix(".owner")
        with explained(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            _lockable(path)
            try:
                self.lock.acquire()
            except Timeout:
                words = owner.read_text() if _owner(owner) else "another process"
                shard = "" if self.shard is None else f" (shard {self.shard[0]}/{self.shard[1]})"
                line = (
                    f"{self.folder}{shard} is being worked on by {words}: wait for it, or give "
                    "each its own --shard i/n"
                )
                raise BadInput(line) from None
        try:
            with contextlib.suppress(BadInput), renamed(owner, _owner) as new:
                # A full disk: the lock holds all the same.
                new.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            self.sweep()
            yield
        finally:
            self.lock.release()

    def sweep(self) -> None:
        """Removes what killed processes were writing here; what a living one writes stays."""
        for folder in (self.folder, *(self.folder / name for name in (*FOLDERS, "figures"))):
            if folder.is_dir():
                own.sweep(folder)
                _sweep_old(folder)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows whose run is not there yet; on return they are on the disk. Safe with several
        writers.
        """
        path = self.folder / f".{self.results.name}.lock"
        with explained(self.results):
            self.folder.mkdir(parents=True, exist_ok=True)
            _lockable(path)
            with FileLock(path).acquire(poll_interval=0.01):
                end, glue = _appendable(self.results)
                known = {row["run"] for row in read_rows([self.results])} if end else set()
                new = {row["run"]: row for row in rows if row["run"] not in known}.values()
                text = "".join(
                    json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in new
                )
                with open(self.results, "ab") as file:
                    try:
                        file.truncate(end)
                        file.write(glue + text.encode())
                        file.flush()
                        os.fsync(file.fileno())
                    except OSError:
                        file.truncate(end)  # all of it or nothing
                        raise

    def save_arrays(self, run: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Arrays of a run, for its figures."""
        with renamed(self.folder / "arrays" / f"{run}.npz", zipfile.is_zipfile) as path:
            np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    def arrays(self, run: str) -> dict[str, np.ndarray]:
        """The arrays of a run; empty where it left none."""
        path = self.folder / "arrays" / f"{run}.npz"
        return dict(np.load(path, allow_pickle=False)) if path.exists() else {}


@contextmanager
def unfinished(*decides: Any) -> Iterator[Store]:
    """A results folder in the user's cache, which the same `decides` (all that decides the result)
    find again after an interruption: removed when the block ends well. A folder that goes away at
    once, and words that say so, where the cache cannot be written.
    """
    name = registry.digest(decides, __version__, jax.__version__)
    store = Store(data_dir() / "unfinished" / name)
    try:
        store.ready()
    except BadInput as error:
        words = f"nothing is kept ({error}): the same command begins anew"
        with kept(words), tempfile.TemporaryDirectory(prefix="bdjax-") as folder:
            yield Store(folder)
        return
    own.sweep(store.folder.parent)
    words = f"what was finished is kept in {store.folder}; the same command goes on from there"
    with kept(words), store.locked():
        try:
            yield store
        except Exception:  # such as a mistake of the user's, before anything was done
            if not any((store.folder / name).exists() for name in ("results.jsonl", *FOLDERS)):
                _discard(store.folder)
            raise
        _discard(store.folder)


def _discard(folder: Path) -> None:
    if _all_known(folder):
        with contextlib.suppress(BadInput):
            own.discard(folder)


def _all_known(folder: Path) -> bool:
    """Whether a results folder holds nothing but what a run writes."""
    return all(
        path.parent.name in FOLDERS and HASHED.fullmatch(path.name)
        if path.parent != folder
        else path.name in FOLDERS or RUNNING.fullmatch(path.name)
        for part in (folder, *(folder / name for name in FOLDERS))
        for path in (part.iterdir() if own.kind(part) == "folder" else ())
    )


def _appendable(path: Path) -> tuple[int, bytes]:
    """Where the next row of a results file goes, and what must stand before it: a line that a crash
    tore is to be cut off. Raises `BadInput` where the file holds something else than rows.
    """
    what = own.kind(path)
    if what is None:
        return 0, b""
    if what != "file":
        own.refuse(path, folder=False)
    text = path.read_bytes()
    end = text.rfind(b"\n") + 1
    tail, begun = text[end:], b'{"run": "'
    try:
        if tail and json.loads(tail)["run"]:
            return len(text), b"\n"
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    torn = tail.startswith(begun) or begun.startswith(tail)
    if not torn or (text[:end].strip() and not read_rows([path])):
        raise BadInput(f"{path} holds no results of bdjax: it stays as it is; write elsewhere")
    return end, b""


def _lockable(path: Path) -> None:
    what = own.kind(path)
    if what not in (None, "file") or (what and path.stat().st_size and not _owner(path)):
        raise BadInput(f"{path} is no lock of bdjax: it stays as it is; write elsewhere")


def _owner(path: Path) -> bool:
    """Whether a file says which process works here."""
    with contextlib.suppress(OSError, ValueError):
        return re.fullmatch(r"process \d+ on [\w.-]{1,255}", path.read_text()) is not None
    return False


def _json(path: Path) -> Any:
    """What a small file of JSON holds; None where it is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_bytes()) if own.kind(path) == "file" else None
    return None


def _progress(path: Path) -> bool:
    found = _json(path)
    return isinstance(found, dict) and {"state", "host", "started", "updated"} <= set(found)


def _remembered(path: Path) -> bool:
    found = _json(path)
    return isinstance(found, dict) and all(
        isinstance(value, dict) and {"lanes", "tried"} <= set(value) for value in found.values()
    )


# --- What version 0.1 wrote, which kept no manifest ---

CHECKPOINT = re.compile(
    r"(?:variables/|arrays/)?(?:_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|"
    r"leaves\.npz|manifest\.ocdbt|d|d/[0-9a-f]+|ocdbt\.process_\d+(?:/manifest\.ocdbt|/d|"
    r"/d/[0-9a-f]+)?|array_metadatas(?:/process_\d+)?)|variables|arrays"
)
SAVED = re.compile(
    r"\.([0-9a-f]{16}(?:\.npz)?|table\.csv|table\.md|index\.html|report\.json|.+\.png)\.[a-z0-9_]{8}"
)
HASHED = re.compile(rf"[0-9a-f]{{16}}(\.npz)?|{own.FILES}|{own.SAVING}.*")
RUNNING = re.compile(
    rf"results\.jsonl|progress\.json|\.results\.(lock|owner|jsonl\.lock)|net|{own.FILES}|"
    rf"{own.SAVING}.*"
)
BEATEN = re.compile(r"\.progress(?:-\d+-of-\d+)?\.json\.\d+")


def old_checkpoint(path: Path, *more: str) -> bool:
    """Whether a folder holds the files of a checkpoint of 0.1, those of `more`, and nothing
    else.
    """
    names = {name for name, _ in own.walk(path)}
    return any(name.endswith(("_METADATA", "leaves.npz")) for name in names) and all(
        name in more or CHECKPOINT.fullmatch(name) for name in names
    )


def old_victims(path: Path) -> bool:
    """Whether a folder holds victims of 0.1."""
    return isinstance(_json(path / "members.json"), list) and old_checkpoint(path, "members.json")


def old_model(path: Path) -> bool:
    """Whether a folder is a net of 0.1 and holds nothing else. Others have a `model.json` too."""
    about = _json(path / "model.json")
    if not isinstance(about, dict) or not isinstance(about.get("net"), dict):
        return False
    right = isinstance(about["net"].get("name"), str) and {"shape", "classes", "masks"} <= {*about}
    return right and old_checkpoint(path, "model.json", "arrays.npz")


def _sweep_old(folder: Path) -> None:
    """Removes what killed processes of 0.1 were writing in a part of a results folder."""
    for place in list(folder.iterdir()):
        what = own.kind(place)
        if what == "file" and BEATEN.fullmatch(place.name) and _progress(place):
            place.unlink()
        if what != "folder" or not (name := SAVED.fullmatch(place.name)):
            continue
        if all(p.name == "before" or p.name.startswith(name[1]) for p in place.iterdir()):
            if (place / "before").exists() and not os.path.lexists(folder / name[1]):
                os.rename(place / "before", folder / name[1])
            shutil.rmtree(place, ignore_errors=True)


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
                found.setdefault(row["run"], row)
            except (ValueError, KeyError, TypeError):
                continue
    return list(found.values())


def recall(name: str) -> dict[str, Any]:
    """What was measured on this machine and kept in the file `name` of the user's cache."""
    try:
        found = json.loads((data_dir() / name).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(name: str, key: str, value: Any) -> None:
    """Keeps `value` for `recall`; a cache that cannot be written is no error."""
    with contextlib.suppress(BadInput), renamed(data_dir() / name, _remembered) as path:
        path.write_text(json.dumps({**recall(name), key: value}, indent=1))


def save_tree(path: Path, tree: Any) -> None:
    """A pytree of arrays as an Orbax checkpoint; as `.npz` where JAX knows of other hosts: Orbax
    would wait for them, and let the first one alone write.
    """
    with renamed(path, old_checkpoint) as temporary:
        write_tree(temporary, tree)


def write_tree(path: Path, tree: Any) -> None:
    """`save_tree` into a folder that is itself being written."""
    leaves = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    if jax.process_count() > 1:
        path.mkdir()
        np.savez(path / "leaves.npz", **leaves)  # type: ignore[arg-type]
    else:
        with _silent("absl"), _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), leaves)


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Orbax's threads log the traceback of what it raises here as well."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


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
    with renamed(own.whole(Path(path), old_model), old_model) as temporary:
        temporary.mkdir()
        write_tree(temporary / "variables", variables)
        np.savez(temporary / "arrays.npz", **arrays)  # type: ignore[arg-type]
        (temporary / "model.json").write_text(text)


def copy_model(path: Path, to: Path) -> None:
    """A model folder once more."""
    with renamed(own.whole(to, old_model), old_model) as temporary:
        shutil.copytree(path, temporary)


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
