"""What belongs to the user: only what bdjax itself wrote is ever replaced or removed.

A folder that bdjax writes keeps a manifest, `.bdjax-files`: one line of JSON for each file, with
its name and the digest of what was written. A file is bdjax's while some line has its name and its
content. A net or a checkpoint is a folder that bdjax owns whole: its manifest names all that is in
it. Version 0.1 kept no manifest; what it wrote is known by its content (`old` below).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from bdjax.errors import BadInput, shortened

FILES = ".bdjax-files"
SAVING = ".bdjax-saving-"
"""How the folders begin in which something is being written."""
FULL = re.compile("ENOSPC|EDQUOT|No space left on device|[Dd]isk quota exceeded")

Old = Callable[[Path], bool]
"""Whether something that no manifest names was written by version 0.1."""


def never(path: Path) -> bool:
    """Version 0.1 wrote no such thing."""
    return False


def full(error: BaseException | None) -> bool:
    """Whether the disk was full, whatever a library made of it."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)) or FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def at_home(path: str | Path) -> Path:
    """`path`, its `~` written out where it is somebody's home; raises `BadInput` where it can be
    nothing's.
    """
    if fault := name_fault(path):
        raise BadInput(f"path{fault}")
    return Path(os.path.expanduser(path))


def name_fault(value: str | Path) -> str | None:
    """Why no file can have the name `value`, or nobody can have meant it, as the end of a line."""
    text = str(value)
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        return f" '{shortened(text)}' is no text: no file that bdjax takes has such a name"
    if re.match(r"[a-z][a-z0-9+.-]*:/", text):
        return f" '{shortened(text)}' is an address: give a file or folder of this machine"
    if len(text) > 4_000 or any(len(part.encode()) > 255 for part in Path(text).parts):
        return f" '{shortened(text)}' is too long: no file can have this name"
    return None


def nameable(path: Path) -> bool:
    """Whether the system can have such a name at all."""
    try:
        return b"\0" not in os.fsencode(path)
    except ValueError:
        return False


@contextmanager
def explained(path: Path, action: str = "write"):
    """Turns the system's complaints about `path` into one clear line."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if full(error):
            reason = "the disk is full"
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif isinstance(error, ValueError) and not nameable(path):
            reason = "no file can have this name"
        else:
            raise
        raise BadInput(f"cannot {action} {path}: {reason}") from error


def kind(path: Path) -> str | None:
    """What stands at `path` itself: file, folder, link, other, or None for nothing."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    for word, test in (("file", stat.S_ISREG), ("folder", stat.S_ISDIR), ("link", stat.S_ISLNK)):
        if test(mode):
            return word
    return "other"


# --- The manifest ---


def digest(path: Path) -> str:
    """The digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def walk(folder: Path) -> Iterator[tuple[str, str | None]]:
    """All that is in `folder` and below it: names, and digests of files; a folder has None, what is
    neither has its kind.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, what = Path(entry.path), kind(Path(entry.path))
        if what == "folder":
            yield entry.name, None
            yield from ((f"{entry.name}/{name}", mark) for name, mark in walk(path))
        else:
            yield entry.name, digest(path) if what == "file" else what


def noted(folder: Path) -> set[tuple[str, str | None]] | None:
    """The names and digests in a folder's manifest; None where it has none."""
    path = folder / FILES
    if kind(path) != "file":
        return None
    found = set()
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            entry = json.loads(line)
            found.add((entry["name"], entry["digest"]))
    return found


def note(folder: Path, files: Mapping[str, str | None]) -> None:
    """Adds to a folder's manifest. A line is one write, so that several processes may add."""
    path, known = _manifest(folder), noted(folder)
    lines = [
        json.dumps({"format": 1, "name": name, "digest": mark}) + "\n"
        for name, mark in files.items()
        if (name, mark) not in (known or ())
    ]
    with open(path, "ab") as file:
        # A line that a crash tore ends here.
        file.write("".join(["\n" if known is not None else "", *lines]).encode() if lines else b"")


def _manifest(folder: Path) -> Path:
    path = folder / FILES
    what = kind(path)
    if what not in (None, "file") or (what and path.stat().st_size and not noted(folder)):
        raise BadInput(f"{path} is no manifest of bdjax: move it, or write elsewhere")
    return path


def foreign(path: Path, folder: bool, old: Old = never) -> str | None:
    """Why what stands at `path` may not be replaced by a file, or a `folder`; None where it may:
    nothing is there, an empty folder for a folder, or what bdjax wrote.
    """
    what = kind(path)
    if what is None:
        return None
    if what != ("folder" if folder else "file"):
        return {
            "file": "is a file",
            "folder": "is a folder",
            "link": "is a symbolic link",
            "other": "is neither a file nor a folder",
        }[what]
    if not folder:
        known = noted(path.parent) or set()
        if path.name not in {name for name, _ in known}:
            return None if old(path) else "was not written by bdjax"
        changed = (path.name, digest(path)) not in known
        return "was changed after bdjax wrote it" if changed else None
    known = noted(path)
    if known is None:
        return None if not os.listdir(path) or old(path) else "was not written by bdjax"
    for name, mark in walk(path):
        if name != FILES and (name, mark) not in known:
            return f"holds {name}, which bdjax did not write so"
    return None


# --- Writing ---


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """A new folder within `folder` for what is being written, with `new` in it; it vanishes at the
    end. What is put into its `before` comes back where nothing has taken its place.

    It is locked while its process lives: `clear` removes what a killed one left.
    """
    while True:
        place = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
        lock = FileLock(place / "lock")
        try:
            lock.acquire(timeout=0)
            (place / "new").mkdir()
            break
        except (Timeout, FileNotFoundError):  # swept away just now
            lock.release()
        except BaseException:
            lock.release()
            shutil.rmtree(place, ignore_errors=True)
            raise
    try:
        yield place
    finally:
        lock.release()
        _clear(place)


def _clear(place: Path) -> None:
    before = place / "before"
    for kept in list(before.iterdir()) if before.is_dir() else []:
        if not os.path.lexists(place.parent / kept.name):
            os.rename(kept, place.parent / kept.name)
    shutil.rmtree(place, ignore_errors=True)


def clear(folder: Path) -> None:
    """Removes what killed processes were writing in `folder`, and puts back what they had moved
    aside. What another process is writing stays.
    """
    for place in list(folder.glob(f"{SAVING}*")) if folder.is_dir() else []:
        with contextlib.suppress(OSError, Timeout):
            if kind(place) == "folder" and {p.name for p in place.iterdir()} <= {
                "lock",
                "new",
                "before",
            }:
                with FileLock(place / "lock", timeout=0):
                    _clear(place)


@contextmanager
def renamed(path: Path, old: Old = never):
    """A temporary name that becomes `path` when the block ends well, and vanishes when it does not.
    What was there before must be bdjax's own, else `BadInput`; a folder is moved aside whole, and
    deleted only when the new one stands.
    """
    with explained(path):
        if path.name in ("", ".."):
            raise BadInput(f"{path} names nothing that could be written")
        path.parent.mkdir(parents=True, exist_ok=True)
        with saving(path.parent) as place:
            new = place / "new" / path.name
            yield new
            folder = kind(new) == "folder"
            refuse(path, folder, old)
            if not folder:
                note(path.parent, {path.name: digest(new)})
            else:
                note(new, dict(walk(new)))
                if kind(path) == "folder":
                    (place / "before").mkdir()
                    os.rename(path, place / "before" / path.name)
            os.replace(new, path)


def refuse(path: Path, folder: bool, old: Old = never) -> None:
    """Raises `BadInput` where `path` is not bdjax's to replace."""
    if reason := foreign(path, folder, old):
        raise BadInput(f"{path} {reason}: it stays as it is; move it, or write elsewhere")


def remove(path: Path, old: Old = never) -> None:
    """Removes a folder that bdjax wrote; one with anything else in it stays."""
    with explained(path):
        if kind(path) == "folder" and foreign(path, True, old) is None:
            discard(path)


def discard(path: Path) -> None:
    """Removes a folder of which it is known that all is bdjax's."""
    with explained(path), saving(path.parent) as place:
        os.rename(path, place / "new" / path.name)


# --- What can be known at the start ---


def whole(path: Path, main: str, old: Old = never, read: Iterable[str | Path | None] = ()) -> Path:
    """Where a folder that bdjax owns whole, with the file `main` in it, is to stand, as an absolute
    path. Raises `BadInput` unless it can be written there and is new, empty or bdjax's own of the
    same kind: a net is not replaced by what is none, nor is or holds it what is `read`. Leaves
    nothing behind.
    """
    with explained(path):
        if kind(path) == "link":
            raise BadInput(f"{path} is a symbolic link: give the folder itself")
        place = Path(os.path.realpath(path))
        for taken, words in ((os.getcwd(), "working directory"), ("~", "home folder")):
            taken = Path(os.path.realpath(os.path.expanduser(taken)))
            if place == taken or place in taken.parents:
                raise BadInput(
                    f"'{path}' is the {words} or holds it, and bdjax replaces a folder whole: give "
                    "one of its own"
                )
        for given in filter(None, read):
            source = Path(os.path.realpath(at_home(given)))
            if place == source or place in source.parents:
                raise BadInput(f"{given} is read, and {path} would replace it: give another folder")
        refuse(place, True, old)
        if (held := [name for name, _ in noted(place) or ()]) and main not in held:
            raise BadInput(
                f"{path} holds other things of bdjax, such as {held[0]}: give another folder"
            )
        _outside(path, place.parent)
        if os.path.ismount(place):
            raise BadInput(f"{path} is where a disk is mounted: give a folder in it")
        with made(place.parent) as parent:
            clear(parent)
            with saving(parent) as trial:
                _probe(trial)
                if kind(place) is None:
                    (trial / "new" / place.name).mkdir()
                    os.rename(trial / "new" / place.name, place)
                    place.rmdir()
        return place


def beside(folder: Path, files: Iterable[str] = (), folders: Iterable[str] = (), old: Old = never):
    """Raises `BadInput` unless `files` can be written in `folder` beside what is there, and into
    its `folders`; leaves nothing behind.
    """
    with explained(folder):
        if kind(folder) is not None and not folder.is_dir():
            raise BadInput(f"{folder} is no folder: give another")
        _outside(folder, Path(os.path.realpath(folder)))
        _manifest(folder)
        for name in files:
            refuse(folder / name, False, old)
        for name in folders:
            if kind(folder / name) is not None and not (folder / name).is_dir():
                raise BadInput(f"{folder / name} is no folder: move it away, or write elsewhere")
        with made(folder), saving(folder) as trial:
            _probe(trial)


def _outside(path: Path, place: Path) -> None:
    """Raises `BadInput` where `place` is a net's folder or in one: that holds nothing else."""
    for folder in (place, *place.parents):
        if "model.json" in {name for name, _ in noted(folder) or ()}:
            raise BadInput(
                f"{path}: {folder} is a net's own, and holds nothing else: write elsewhere"
            )


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """`folder`, made for as long as the block lasts where it was not there."""
    missing = list(takewhile(lambda path: kind(path) is None, (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def _probe(place: Path) -> None:
    with open(place / "new" / "probe", "wb") as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.fsync(file.fileno())
    os.replace(place / "new" / "probe", place / "new" / "probed")
