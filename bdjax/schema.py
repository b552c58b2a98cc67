"""What each kind of file holds, and the one way in which it is read: nothing that comes from a disk
is trusted.

A file says its `format`; 0, without the field, is what bdjax 0.1 wrote. It is read where its
meaning is the same, and refused in one line where it is not or where a newer bdjax wrote it. JSON
has no infinity and no NaN: infinite numbers are the strings "inf" and "-inf", and what was not
measured is NaN in Python and null in files.
"""

import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdjax.errors import BadInput

DEPTH = 64
"""The deepest nesting of a JSON file."""
SMALL, LARGE = 1 << 24, 1 << 30
"""The most bytes of a description and of a results file."""
RATIO = 100
"""How many times its own size an archive of more than `LARGE` bytes may unpack to: images pack to a
tenth.
"""
DEFLATE = 1032
"""The most that deflate packs into a byte."""


class Newer(BadInput):
    """The file was written by a later version of bdjax."""


class Number(NamedTuple):
    """A number from `low` to `high`."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False


class Text(NamedTuple):
    """A string that the regular expression `form` matches, in words: `what`."""

    form: str
    what: str


class Measured(NamedTuple):
    """A number that may be infinite, or absent: NaN."""


class Maybe(NamedTuple):
    """Something of a form, or null."""

    form: Any


class Kind(NamedTuple):
    """A kind of file. `format`: that this version writes; `form`: see `fitted`; `hint`: what to do
    about an odd file; `most`: bytes; `old`: makes today's form of an older one.
    """

    format: int
    form: Any
    hint: str = ""
    most: int = SMALL
    old: Callable[[Any], Any] = lambda value: value


COUNT, SEED, SECONDS = Number(0, 2**53, True), Number(0, 2**32 - 1, True), Number(0)
NAME = Text(r"[\w-]{1,100}", "a name of letters and digits")
"""Part of a file's name: no path."""
HASH = Text("[0-9a-f]{16}", "a hash of 16 hex digits")
SHARE = {"hits": COUNT, "n": COUNT, **dict.fromkeys(("share", "low", "high"), Number(0, 1))}
"""A share of nets, and its 95 % interval."""
VERDICT = Text("reproduced|partly|not|open", "reproduced, partly, not or open")
FORMER = {
    "mntd": {"auroc": "shadow_auroc"},
    "activation-clustering": {"auroc": "auroc_pooled"},
    "spectral-signatures": {"auroc": "auroc_pooled"},
}
"""Metrics, by defense, that rows of 0.1 have under another name."""
PLACE = {
    "table": str | None,
    "row": str | None,
    "reported?": {...: Measured()},
    **dict.fromkeys(("tags?", "set?"), dict),
    **dict.fromkeys(("experiment?", "scale?", "substitute?"), str | None),
}
"""Where a row is shown: `bdjax.identity.PLACE`."""


HOW = {
    "flags": [str], "precision": str, "vectors?": str, "lanes?": {...: Number(1, 2**31, True)},
    "patches?": [str],
}  # fmt: skip
"""By what, besides the code, the digits of a number may differ: `mesh.how`, the lanes of the
programs of each stage, and the stages whose convolutions were products of patches.
"""


def _renamed(row: Any) -> Any:
    names = FORMER.get(str(row.get("defense")), {}) if isinstance(row, dict) else {}
    if not names or not isinstance(row.get("metrics"), dict):
        return row
    return row | {"metrics": {names.get(name, name): v for name, v in row["metrics"].items()}}


KINDS = {
    "model": Kind(
        1,
        {
            "net": dict,
            "shape": (Number(1, 2**16, True),) * 3,
            "classes": Number(1, 2**31 - 1, True),
            "masks": [str],
            "pixels?": [Number()],
            "seed?": SEED,
            "fingerprint?": HASH,
            "metrics?": {...: Measured()},
            "attack?": dict | None,
            "dataset?": dict | None,
            "recipe?": dict | None,
            "defenses?": [dict],
            "origin?": dict | None,
            "triggered?": dict | None,
        },
        "the net has to be trained, or copied, again",
    ),
    "row": Kind(
        2,
        {
            "run": NAME,
            **PLACE,
            "also?": [PLACE],
            "code?": Maybe({...: Maybe(HASH)}),
            "written?": SECONDS,
            "metrics": {...: Measured()},
            "seconds": {"compile": SECONDS, "run": SECONDS},
            "seed?": Number(0, 2**53, True),
            "config?": Maybe({"attack?": dict | None, "defense?": dict | None}),
            "victim?": NAME,
            "plan?": Maybe({"asked": COUNT, "poisoned": COUNT}),
            "test?": Maybe({"n": Number(1, 2**53, True), "majority": Number(0, 1)}),
            "twin?": Maybe({"victim": NAME, "asr_nt": Measured()}),
            "labels?": Maybe({"flagged?": [str], "target?": [str]}),
            "how?": Maybe(HOW),
            **dict.fromkeys(("oracle?", "kept?", "halved?"), bool),
            **dict.fromkeys(("device?", "jax?", "commit?"), str | None),
            **dict.fromkeys(("dataset?", "model?", "attack?", "defense?"), str | None),
            **dict.fromkeys(("error?", "verdict?"), str | None),
        },
        most=LARGE,
        old=_renamed,
    ),
    "report": Kind(
        1,
        {
            "title": str,
            "notes": [str],
            "trends": [(str, VERDICT, str)],
            "seconds": {...: SECONDS},
            "command": str | None,
            "figures": [(str, str, str)],
            "metrics?": [(str, str, Maybe(Text("high|low", "high or low")), str, str)],
        },
        "delete it, the rows are in results.jsonl",
    ),
    "progress": Kind(
        1,
        {
            **dict.fromkeys(("state", "shard", "devices", "doing", "host"), str),
            **dict.fromkeys(("started", "updated"), Number(0, 2**53)),
            **dict.fromkeys(("total", "rows", "before", "groups", "group", "failed"), COUNT),
            **dict.fromkeys(("nodes?", "tasks?", "retries?"), COUNT),
            "workers?": {...: str},
            "seconds?": {...: Number(0, 2**53)},
        },
    ),
    "poison": Kind(
        1,
        {
            "attack": dict,
            "dataset": dict,
            "fingerprint": HASH,
            "seed": SEED,
            "shape": (Number(1, 2**16, True),) * 3,
            "classes": Number(1, 2**31 - 1, True),
            "names": [str],
            "rows": {...: COUNT},
            "counts": {...: COUNT},
            "notes": [str],
        },
    ),
    "audit": Kind(
        1,
        {
            "key": HASH,
            "version": str,
            "net": {
                "name": str,
                "shape": (Number(1, 2**16, True),) * 3,
                "classes": Number(1, 2**31 - 1, True),
                "parameters": COUNT,
                "unverified": str | None,
            },
            "data": {
                "name": str,
                "searched": COUNT,
                "held": COUNT,
                "labelled": bool,
                "accuracy": Maybe(Number(0, 1)),
                "names": [str],
            },
            "alpha": Number(0, 1),
            "minutes": Number(0),
            "verdict": {
                "word": Text("infected|undecided|no sign", "a verdict"),
                "reason": str,
                "judge": str | None,
                "label": Maybe(COUNT),
                "name": str | None,
                "p_value": Measured(),
                "complete": bool,
                "suspect?": Maybe(COUNT),
            },
            "null": Text("parametric|references", "parametric or references"),
            "power": Maybe(SHARE),
            "false_alarms": Maybe(SHARE),
            "references": Maybe(
                {
                    "each": COUNT,
                    "accuracy": Number(0, 1),
                    "wanted": Number(0, 1),
                    "took": COUNT,
                    "seconds": SECONDS,
                    "why": str | None,
                }
            ),
            "judges": [
                {
                    "judge": str,
                    "settings": dict,
                    "word": Text("infected|undecided|no sign", "a verdict"),
                    "index": Measured(),
                    "p_value": Measured(),
                    "seeds": [{"p_value": Measured(), "index": Measured(), "labels": [COUNT]}],
                    "labels": [
                        {
                            "label": COUNT,
                            "name": str,
                            "flagged": bool,
                            "norm": Measured(),
                            "moved": Measured(),
                            "pixels": Maybe(COUNT),
                        }
                    ],
                    "neuron": Maybe({"site": str, "channel": COUNT, "label": COUNT}),
                    "seconds": SECONDS,
                }
            ],
            "screened": Maybe(
                {"labels": COUNT, "leaders": [str], "order": [COUNT], "seconds": SECONDS}
            ),
            "not_tried": [{"judge": str, "reason": str}],
            "seconds": SECONDS,
        },
        "delete it: the same command writes it again from its steps",
    ),
    "members": Kind(
        2,
        {
            "victims": [NAME],
            "code?": Maybe({...: Maybe(HASH)}),
            "halved?": bool,
            "how?": Maybe(HOW),
        },
        "delete its folder, its victims are trained again",
        old=lambda value: {"victims": value} if isinstance(value, list) else value,
    ),
    "lanes": Kind(
        1,
        {...: {"lanes": Number(1, 2**31, True), "tried": Number(1, 2**31, True), "patches?": bool}},
        "delete it",
    ),
    # Arrays: the names that a file must hold.
    "leaves": Kind(1, (), "delete it"),
    "arrays": Kind(1, (), "delete it, the rows are in results.jsonl"),
    "decoded": Kind(1, ("train_image", "train_label", "test_image", "test_label"), "delete it"),
    # The user's own: a format of ours is not in them.
    "npz": Kind(0, ("image", "label"), "give `image` [N, H, W, C] and `label` [N]"),
    "reference": Kind(0, ("image", "logits"), "give `image` [N, H, W, C] and `logits` [N, K]"),
    "h5": Kind(0, ("data", "label"), "give `data` [N, C, H, W] and `label` [N]"),
}


# --- JSON ---


def parse(raw: bytes) -> Any:
    """The JSON in `raw`; `BadInput` says what is wrong with it, without naming the file."""
    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=_once, parse_constant=_number, parse_float=_number
        )
        # Few brackets cannot be nested deeply, and only an escape makes half a character.
        if raw.count(b"[") + raw.count(b"{") > DEPTH or b"\\u" in raw:
            _shallow(value)
    except RecursionError:
        raise BadInput("is nested too deeply") from None
    except UnicodeError:
        raise BadInput("is not text in UTF-8") from None
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"is not JSON ({error})") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadInput("has a key twice")
    return found


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise BadInput(f'has the number {text[:20]}, which is not finite; give "inf" or null')
    return value


def _shallow(value: Any, depth: int = 0) -> None:
    if depth > DEPTH:
        raise BadInput("is nested too deeply")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, inner in value.items():
            key.encode()
            _shallow(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _shallow(inner, depth + 1)


def fitted(value: Any, form: Any, place: str = "it") -> Any:
    """`value` if it has the form, with what was measured as floats; else `BadInput`, naming the
    place.

    A form is a type, a `Number`, `Text`, `Measured` or `Maybe`, `[form]` for a list, a tuple for a
    list of that length, or a dict: `key?` may be absent, `...` stands for all other keys, which
    are otherwise free.
    """
    match form:
        case Measured():
            if value is None or value in ("inf", "-inf"):
                return math.nan if value is None else float(value)
            if isinstance(value, bool):
                return value
            return fitted(value, Number(), place)
        case Maybe():
            return None if value is None else fitted(value, form.form, place)
        case Number():
            kind = "a whole number" if form.whole else "a number"
            wanted = int if form.whole else (int, float)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise BadInput(f"{place} is not {kind}")
            if not form.low <= value <= form.high or abs(value) > 1e308:
                raise BadInput(f"{place} is outside [{form.low:g}, {form.high:g}]")
        case Text():
            if not isinstance(value, str) or not re.fullmatch(form.form, value):
                raise BadInput(f"{place} is not {form.what}")
        case list() | tuple():
            if not isinstance(value, list):
                raise BadInput(f"{place} is not a list")
            if isinstance(form, tuple) and len(value) != len(form):
                raise BadInput(f"{place} has {len(value)} parts, not {len(form)}")
            forms = form if isinstance(form, tuple) else form * len(value)
            return [fitted(v, f, f"{place}[{i}]") for i, (v, f) in enumerate(zip(value, forms))]
        case dict():
            if not isinstance(value, dict):
                raise BadInput(f"{place} is not an object")
            prefix = "" if place == "it" else f"{place}."
            rest = value.keys() - {str(key).rstrip("?") for key in form}
            forms = {key: form[...] for key in rest} if ... in form else {}
            for key, inner in form.items():
                if key is not ... and (name := key.rstrip("?")) not in value and name == key:
                    raise BadInput(f"{place} has no `{name}`")
                if key is not ... and name in value:
                    forms[name] = inner
            return value | {k: fitted(value[k], f, f"{prefix}{k}"[:100]) for k, f in forms.items()}
        case _:
            # A bool is no int, whatever Python says.
            if not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
                name = getattr(form, "__name__", str(form)).replace("dict", "object")
                raise BadInput(f"{place} is not {name.replace('str', 'text')}")
    return value


def understood(raw: bytes, kind: str) -> dict[str, Any]:
    """The object of a file (or line) of `kind`, its `format` among the keys; `BadInput` says what
    is wrong with it.
    """
    known, value = KINDS[kind], parse(raw)
    made = value.get("format", 0) if isinstance(value, dict) else 0
    if fitted(made, COUNT, "format") > known.format:
        raise Newer(
            f"was written by a newer bdjax (format {made}, this one knows {known.format}): update "
            "bdjax"
        )
    value = known.old(value) if made < known.format else value
    if not isinstance(value, dict):
        raise BadInput("is not an object")
    return {"format": made, **fitted({k: v for k, v in value.items() if k != "format"}, known.form)}


def read_json(path: str | Path, kind: str) -> dict[str, Any]:
    """The JSON file at `path`, of `kind`; one line of `BadInput` where it is not what it should
    be.
    """
    known = KINDS[kind]
    raw = content(path, known.most)
    try:
        return understood(raw, kind)
    except Newer as error:
        raise BadInput(f"{path} {error}") from None
    except BadInput as error:
        hint = f": {known.hint}" if known.hint else ""
        raise BadInput(f"{path} is damaged: {error}{hint}") from None


def dump(value: Mapping[str, Any], kind: str, indent: int | None = None) -> str:
    """`value` as JSON of `kind`; `BadInput` rather than what could not be read again."""
    text = json.dumps(
        finite({**value, "format": value.get("format", KINDS[kind].format)}),
        indent=indent,
        ensure_ascii=False,
        allow_nan=False,
    )
    try:
        understood(text.encode(), kind)
    except (BadInput, UnicodeError) as error:
        reason = error if isinstance(error, BadInput) else "a text in it is not Unicode"
        raise BadInput(f"cannot write this {kind}: {reason}") from None
    return text


def finite(value: Any) -> Any:
    """`value` as JSON has it: infinite numbers as strings, NaN as None."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


# --- Files ---


def content(path: str | Path, most: int = SMALL) -> bytes:
    """The bytes of a plain file of at most `most`. A pipe, which would never end, is not opened."""
    plain_file(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(size) if size <= most else b""
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from error
    if size > most:
        raise BadInput(f"{path} has {gigabytes(size)}; at most {gigabytes(most)} are read")
    return raw


def plain_file(path: str | Path) -> os.stat_result:
    """What the system knows of the plain file at `path`; `BadInput` for anything else there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read {path}: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise BadInput(f"{path} is {what}, not a file")
    return found


def gigabytes(size: float) -> str:
    """`11.6 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# --- Arrays ---


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's share."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows does not say
        size = 8 << 30
    try:
        return min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return size


def most_of(packed: int) -> int:
    """The most bytes that are unpacked from an archive of `packed` bytes: half of the memory, and
    no more than `RATIO` times its size once that is over `LARGE`.
    """
    return min(memory() // 2, max(LARGE, RATIO * packed))


def fits(path: str | Path, size: int, packed: int | None = None) -> None:
    """Raises `BadInput` where the archive at `path`, of `packed` bytes, declares more bytes than
    there is room for.
    """
    packed = os.stat(path).st_size if packed is None else packed
    if size > (most := most_of(packed)):
        raise BadInput(
            f"{path}: declares {gigabytes(size)} in a file of {gigabytes(packed)}; at most "
            f"{gigabytes(most)} are unpacked here: save fewer images, or take a machine with more "
            "memory"
        )


def is_h5(path: str | Path) -> bool:
    """Whether a file is HDF5, by its content; its signature may stand behind a block of the
    user's.
    """
    with open(path, "rb") as file:
        for start in (0, 512, 1024, 2048):
            file.seek(start)
            if file.read(8) == b"\x89HDF\r\n\x1a\n":
                return True
    return False


def read_arrays(
    path: str | Path, kind: str, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays `names` (None: all) of an `.npz` or, by its content, `.h5`, as far as it has them.

    `BadInput`, before anything is unpacked, where it declares more than there is room for, holds
    pickles, or refers to other files.
    """
    known = KINDS[kind]
    plain_file(path)
    try:
        found = _h5(path, names) if is_h5(path) else _npz(path, names)
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise BadInput(
            f"{path}: damaged or not in its format ({' '.join(str(error).split())[:200]})"
            + (f": {known.hint}" if known.format else "")
        ) from error
    if known.format:
        made = found.pop("format", np.zeros((), int))
        if made.dtype.kind not in "iu" or made.ndim:
            raise BadInput(f"{path}: format is not a whole number: {known.hint}")
        if made > known.format:
            raise BadInput(f"{path} was written by a newer bdjax (format {made}): update bdjax")
    if missing := [name for name in known.form if name not in found]:
        raise BadInput(f"{path}: has no {missing[0]}; {known.hint}")
    return found


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], kind: str, packed: bool = False):
    """Arrays as an `.npz` of `kind`."""
    save = np.savez_compressed if packed else np.savez
    save(path, format=np.asarray(KINDS[kind].format), **arrays)  # type: ignore[arg-type]


def check_zip(archive: zipfile.ZipFile) -> None:
    """Raises `ValueError` where entries of an archive overlap, share names, or are packed oddly."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    end = 0
    for entry in entries:
        if entry.header_offset < end:
            raise ValueError("its entries overlap")
        end = entry.header_offset + 30 + entry.compress_size
    if {entry.compress_type for entry in entries} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("it is packed in a way that such files are not")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two entries have one name")


def _npz(path: str | Path, names: Iterable[str] | None) -> dict[str, np.ndarray]:
    wanted = None if names is None else {*names, "format"}
    with zipfile.ZipFile(path) as archive:
        check_zip(archive)
        entries = archive.infolist()
        parts = {
            entry.filename.removesuffix(".npy"): entry
            for entry in entries
            if entry.filename.endswith(".npy")
        }
        parts = {k: entry for k, entry in parts.items() if wanted is None or k in wanted}
        size = 0
        for name, entry in parts.items():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = header(file)
                if dtype.hasobject:
                    raise BadInput(
                        f"{path}: holds pickled objects, which bdjax never loads; save plain arrays"
                    )
                declared = math.prod(shape) * dtype.itemsize
                # Values of no bytes would be as many as anybody likes.
                size += max(declared, entry.file_size, math.prod(shape))
                fits(path, size)
                if min(shape, default=0) < 0 or file.tell() + declared != entry.file_size:
                    raise ValueError(f"{name} is not of the size that its header declares")
        found = {}
        for name, entry in parts.items():
            with archive.open(entry) as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
        return found


def _h5(path: str | Path, names: Iterable[str] | None) -> dict[str, np.ndarray]:
    import h5py

    with h5py.File(path) as file:
        parts = {}
        for name in file if names is None else names:
            if (link := file.get(name, getlink=True)) is None:
                continue
            if not isinstance(link, h5py.HardLink):
                raise BadInput(f"{path}: {name} is a link; save the data in the file itself")
            parts[name] = file[name]
        return h5_arrays(path, parts)


def h5_arrays(
    path: str | Path, parts: Mapping[str, Any], packed: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays of HDF5 data sets, under the rules of `read_arrays`; `packed`: see `fits`."""
    import h5py

    size = 0
    for name, part in parts.items():
        if not isinstance(part, h5py.Dataset) or part.shape is None:
            raise BadInput(f"{path}: {name} is not an array")
        if part.dtype.hasobject:
            raise BadInput(f"{path}: {name} holds objects; save plain numbers")
        if part.external or part.is_virtual:
            raise BadInput(f"{path}: {name} lies in other files; save it in this one")
        size += max(math.prod(part.shape) * part.dtype.itemsize, math.prod(part.shape))
        fits(path, size, packed)
        filters = part.id.get_create_plist()
        used = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]
        packers = [code for code in used if code in (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF)]
        plain = {*packers, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
        if len(packers) > 1 or not plain.issuperset(used):
            raise BadInput(f"{path}: {name} is packed in a way not known here; save it with gzip")
        if packers:  # HDF5 unpacks a chunk to whatever size it has
            part.id.chunk_iter(lambda chunk: fits(path, DEFLATE * chunk.size, packed))
    return {name: np.asarray(part) for name, part in parts.items()}
