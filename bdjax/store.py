"""What a run leaves behind: an append-only `results.jsonl`, arrays for figures, and models as Orbax
checkpoints.

Everything but the JSONL is written to a temporary name and renamed, and replaces only what bdjax
wrote (`bdjax.own`). A line is written in one piece and fsynced; a line torn by a crash is cut off
by the next writer. Nothing that is read back can run code, and none of it is trusted
(`bdjax.schema`): JSON, `.npz` without pickles, Orbax arrays.
"""

import contextlib
import json
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

from bdjax import __version__, own, registry, schema
from bdjax.checkpoints import plain_json
from bdjax.datasets.base import data_dir
from bdjax.identity import PLACE
from bdjax.own import explained, renamed
from bdjax.progress import kept
from bdjax.rows import read_rows, result_files, written
from bdjax.types import BadInput

FOLDERS = ("arrays", "victims", "partial", "prepared")
"""Parts of a results folder; what they hold is named by hashes."""


class Store:
    """A results folder; it is made by the first that writes. `shard`: (i, n) where this process is
    one of n that share the work: it has a results file of its own.
    """

    @registry.door
    def __init__(self, folder: str | Path, shard: tuple[int, int] | None = None):
        self.folder, self.shard = Path(folder), shard
        self.suffix = "" if shard is None else f"-{shard[0]}-of-{shard[1]}"
        self.results = self.folder / f"results{self.suffix}.jsonl"
        self.progress = self.folder / f"progress{self.suffix}.json"
        self.lock = FileLock(self.folder / f".results{self.suffix}.lock", timeout=0)

    def rows(self) -> list[dict[str, Any]]:
        """The finished rows of all shards, as `read_rows` gives them."""
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
                    f"{self.folder}{shard} is being worked on by {words}: wait for it, or share "
                    "the work out by `bdjax sweep --shard i/n`"
                )
                raise BadInput(line) from None
        try:
            with contextlib.suppress(BadInput), renamed(owner, _owner) as new:
                # A full disk: the lock holds all the same.
                new.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            self.clear()
            yield
        finally:
            self.lock.release()

    def clear(self) -> None:
        """Removes what killed processes were writing here; what a living one writes stays."""
        for folder in (self.folder, *(self.folder / name for name in (*FOLDERS, "figures"))):
            if folder.is_dir():
                own.clear(folder)
                _sweep_old(folder)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows whose run is not there yet, or was `written` before; on return they are on the
        disk. Safe with several writers.

        Rows of one run, which is shown in several places, become one line.
        """
        path = self.folder / f".{self.results.name}.lock"
        with explained(self.results):
            self.folder.mkdir(parents=True, exist_ok=True)
            _lockable(path)
            with FileLock(path).acquire(poll_interval=0.01):
                end, glue = _appendable(self.results)
                known = {r["run"]: written(r) for r in read_rows([self.results])} if end else {}
                lines: dict[str, dict[str, Any]] = {}
                for row in rows:
                    if (line := lines.get(row["run"])) is not None:
                        if placed(row) not in (placed(line), *line["also"]):
                            line["also"].append(placed(row))
                    elif row["run"] not in known or written(row) > known[row["run"]]:
                        lines[row["run"]] = {**row, "also": list(row.get("also", []))}
                text = "".join(schema.dump(_lean(row), "row") + "\n" for row in lines.values())
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
            schema.write_arrays(path, arrays, "arrays", packed=True)

    def arrays(self, run: str) -> dict[str, np.ndarray]:
        """The arrays of a run; empty where it left none."""
        path = self.folder / "arrays" / f"{run}.npz"
        return schema.read_arrays(path, "arrays") if path.exists() else {}


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
    own.clear(store.folder.parent)
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


def _progress(path: Path) -> bool:
    found = plain_json(path)
    return isinstance(found, dict) and {"state", "host", "started", "updated"} <= set(found)


def _remembered(path: Path) -> bool:
    found = plain_json(path)
    return isinstance(found, dict) and all(
        isinstance(value, dict) and {"lanes", "tried"} <= set(value) for value in found.values()
    )


# --- What version 0.1 wrote, which kept no manifest ---

SAVED = re.compile(
    r"\.([0-9a-f]{16}(?:\.npz)?|table\.csv|table\.md|index\.html|report\.json|.+\.png)\.[a-z0-9_]{8}"
)
HASHED = re.compile(rf"[0-9a-f]{{16}}(\.npz)?|{own.FILES}|{own.SAVING}.*")
RUNNING = re.compile(
    rf"results\.jsonl|progress\.json|\.results\.(lock|owner|jsonl\.lock)|net|{own.FILES}|"
    rf"{own.SAVING}.*"
)
BEATEN = re.compile(r"\.progress(?:-\d+-of-\d+)?\.json\.\d+")


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


def placed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Where a row is shown."""
    return {name: row[name] for name in PLACE if name in row}


def _lean(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a line of today's format; `_appendable` knows a torn one by its `run`."""
    kept = {k: v for k, v in row.items() if k != "format" and (k != "also" or v)}
    return {"run": kept.pop("run"), **kept}


def recall(name: str) -> dict[str, Any]:
    """What was measured on this machine and kept in the file `name.json` of the user's cache."""
    try:
        found = schema.read_json(data_dir() / f"{name}.json", name)
    except BadInput:  # not there yet, or damaged: it is measured again
        return {}
    return {key: value for key, value in found.items() if key != "format"}


def remember(name: str, key: str, value: Any) -> None:
    """Keeps `value` for `recall`; a cache that cannot be written is no error."""
    file = data_dir() / f"{name}.json"
    with contextlib.suppress(BadInput), renamed(file, _remembered) as path:
        path.write_text(schema.dump({**recall(name), key: value}, name, indent=1))
