"""Bad input of every kind, made by rule: each command and flag, kind of file and entry from Python
gets what does not belong there. One line and exit code 2, or `BadInput`; or it is one of the kinds
in `FINE`, each with its reason. No traceback, no hang, nothing of the user's touched.

What a command or function takes is read from its own definition, so that a new one is covered.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import math
import os
import pkgutil
import random
import re
import shutil
import socket
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import row
from test_own import tree
from test_schema import seconds

import bdjax
from bdjax import audits, cli, own, progress, registry, repairs, report, scans
from bdjax.attacks.badnets import BadNets
from bdjax.checkpoints import save_model
from bdjax.datasets import prepared
from bdjax.datasets.files import Npz
from bdjax.foreign import safetensors
from bdjax.models.layers import build
from bdjax.models.shamshiri import Ffnn
from bdjax.store import Store
from bdjax.study import Cell
from bdjax.sweep import Runner
from bdjax.train import Recipe, begin, clean_set, poisoned_set
from bdjax.types import BadInput, Split, Splits, Victim

KEY = jax.random.key(0)
NET = Ffnn(hidden=(4,))
MODEL = build(NET, (8, 8, 1), 4)
VARIABLES = MODEL.init(KEY)
HUNG = 60
"""Seconds: what takes longer has hung. An accepted case takes one or two."""

# --- Every command and its flags, from their own definitions ---

COMMANDS = cli.COMMANDS | {"bench": cli._bench()}
GOOD = {
    "file": "EXP", "folder": "RESULTS", "folders": "RESULTS", "checkpoint": "NET", "name": "mnist",
    "names": "fine_pruning", "net": "NET", "out": "OUT", "data_dir": "OUT",
    "images": "DATA", "import.file": "WEIGHTS",
}  # fmt: skip
"""What is right for a parameter of this name, or of this one of a command; words in capitals are
made by `world`.
"""
MORE = {
    "run": ["--scale", "smoke", "--quiet"], "sweep": ["--scale", "smoke", "--quiet"],
    "report": ["--x", "seed", "--y", "row", "--metric", "acc_test"], "bench": ["--scale", "smoke"],
    "train": ["--dataset", "npz", "--dataset.path", "DATA", "--model", "ffnn"],
    "import": ["--arch", "ffnn", "--arch.hidden", "4", "--preprocess", "0-1", "--size", "8", "8",
               "1"],
    "defend": ["--defense", "retraining"], "audit": ["--dataset", "DATA"],
    "repair": ["--defense", "last-layer-unlearning"],
    "study": ["--attack", "badnets", "--dataset", "DATA", "--model", "ffnn"],
    "poison": ["--dataset", "npz", "--dataset.path", "DATA", "--attack.size", "2"],
}  # fmt: skip
"""What else makes a command line of each command that ends soon."""


class Flag(NamedTuple):
    command: str
    name: str
    flag: str
    kind: str
    positional: bool


def parameters(made: Any) -> dict[str, Any]:
    """The annotations of what a command takes."""
    hints = typing.get_type_hints(made, include_extras=True)
    names = (
        [field.name for field in dataclasses.fields(made)]
        if dataclasses.is_dataclass(made)
        else list(inspect.signature(made).parameters)
    )
    return {name: hints[name] for name in names}


def flags() -> Iterator[Flag]:
    """Each flag of each command, and what kind of value it takes."""
    for command, made in COMMANDS.items():
        for name, hint in parameters(made).items():
            notes = getattr(hint, "__metadata__", ())
            called = next((note.name for note in notes if getattr(note, "name", None)), name)
            positional = cli.Words in notes
            flag = called if positional else f"--{called.replace('_', '-')}"
            yield Flag(command, called, flag, kind_of(hint), positional)
        yield Flag(command, "plugin", "--plugin", "path", False)
        for kind in cli.CHOICES.get(command, ()):
            yield Flag(command, kind, f"--{kind}", "method", False)


def kind_of(hint: Any) -> str:
    """What is typed for an annotation."""
    inner = [hint]
    for part in inner:
        inner += [arg for arg in typing.get_args(part) if not isinstance(arg, str)]
    if hint is Any or "Callable" in str(hint):
        return "function"  # or what a computation leaves behind
    if registry.ranges(hint):
        return "numbers" if any(typing.get_origin(part) is tuple for part in inner) else "number"
    if bool in inner:
        return "bool"
    if any(typing.get_origin(part) is Literal for part in inner):
        return "choice"
    return "path" if Path in inner else "text"


FLAGS = list(flags())
NAMED = {"arch": "resnet18", "dataset": "fashion-mnist-sample"}
NAMED |= {"attack": "badnets", "defense": "fine-pruning"}
"""Methods for flags that take none if not given."""


def base(command: str) -> list[str]:
    """A command line that is right."""
    words = ["data", "prepare"] if command == "data" else [command]
    mine = [flag for flag in FLAGS if flag.command == command and flag.name in GOOD]
    words += [good(flag) for flag in mine if flag.positional]
    words += MORE.get(command, [])
    for flag in mine:
        words += [] if flag.positional else [flag.flag, good(flag)]
    return words


def good(flag: Flag) -> str:
    """What is right for a flag."""
    return GOOD.get(f"{flag.command}.{flag.name}", GOOD[flag.name])


# --- What does not belong there ---

ODD = [
    "", " ", "-", "--", "---", "\t", "a\nb", "\udcff", "a\0b", "n" * 5_000, "ünï¢ødé💥",
    "\x1b[31mred", "[bold]", "None", "{}", "$HOME", "%s", "{0}", "*", "a" * 300,
]  # fmt: skip
"""For every kind of value."""
PLACES = [
    "nowhere", "file", "file/", "file/x", "docs", "docs/", "empty", ".", "..", "../", "~", "~x y",
    "loop", "loop/x", "fifo", "sock", "/dev/null", "/dev/zero", "/dev/urandom",
    "/dev/full", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "dangling", "closed",
    "closed/x", "binary", "latin.py", "nul.py", "mine.npz", "mine.h5", "image.png", "list.py",
    "json.json", "EXP", "NET", "RESULTS", "DATA", "NET/model.json", "RESULTS/results.jsonl",
    "NET/variables", "NET/x", "https://example.org/x", "file:///etc/passwd",
]  # fmt: skip
NUMBERS = [
    "nan", "inf", "-inf", "1e400", "-1e400", "-0", "-1", "0", "1.5", "1e3", "1.", ".5",
    "18446744073709551616", "4294967296", "2147483648", "9" * 400, "0x10", "0b1", "１", "१", "²",
    "1_0", " 1", "1 ", "1,2", "1 2", "true", "+1", "1j", "٣", "1/2", "--1",
]  # fmt: skip
HOSTILE: dict[str, list[str]] = {
    "number": [*ODD, *NUMBERS],
    "numbers": ["x", "1 x", "", "nan nan", "-1", "1,2", "\udcff"],
    "path": [*ODD, *PLACES],
    "text": [*ODD, *NUMBERS, *PLACES[:12], "seed", "attack.rate", "config", "metrics", "0/0", "1/0",
             "0/1/2", "-1/2", "0/-1", "off", "auto", "smoke", "paper", "SMOKE", "acc_test",
             "__class__", "config.attack", "../x", ",", ",,", ":", "x,1,0", "x:1,a,b"],
    "choice": [*ODD, "nothing", "Given", "given ", "0", "nan", "attack", "smoke,cpu"],
    "bool": ["=", "=maybe", "=1", "=None", "=true", "=False", " maybe", " 1"],
    "function": ["x", "print", ""],
    "method": [*ODD, ":", "::", ":cpu", "none:", "none:cpu", "NAME:", "NAME:nopreset", "__init__",
               "NAME:cpu:cpu", "NAME ", " NAME", "NAMEX", "OTHER", "../NAME", "NAME.py", "1",
               "NAME/NAME", "NAME,NAME"],
}  # fmt: skip


class Case(NamedTuple):
    """A command line, the flag that is looked at, what kind of value that takes, and the value."""

    args: tuple[str, ...]
    flag: str
    kind: str
    value: str

    @property
    def name(self) -> str:
        return f"{' '.join(self.args[:1])} {self.flag}={self.value[:30]!r} ({self.kind})"


def without(args: list[str], flag: str) -> list[str]:
    """`args` without a flag, and its value where it has one."""
    if flag not in args:
        return args
    at = args.index(flag)
    valued = at + 1 < len(args) and not args[at + 1].startswith("--")
    return [*args[:at], *args[at + 1 + valued :]]


def ended(flag: str, kind: str, value: str) -> list[str]:
    """The end of a command line that gives `value` to `flag`."""
    if kind == "bool":
        return [flag, value.strip()] if value[0] == " " else [flag + value]
    return [flag, *(value.split(" ") if kind == "numbers" else [value])]


def of_values() -> Iterator[Case]:
    for flag in FLAGS:
        args = base(flag.command)
        for value in HOSTILE[flag.kind]:
            if flag.kind == "method":
                name = cli.CHOICES[flag.command][flag.name] or NAMED[flag.name]
                other = next(e.name for e in registry.entries() if e.kind != flag.name)
                value = value.replace("NAME", name).replace("OTHER", other)
            if flag.positional:
                at = 2 if flag.command == "data" else 1
                words = [*args[:at], value, *args[at + (flag.name in GOOD) :]]
            else:
                words = [*without(args, flag.flag), *ended(flag.flag, flag.kind, value)]
            yield Case(tuple(words), flag.flag, flag.kind, value)


def of_grammar() -> Iterator[Case]:
    """Flags that are there twice, that lack their value, that nobody or another command knows."""
    for flag in FLAGS:
        args, one = base(flag.command), flag.flag
        if flag.positional:
            found = {"as a flag": [*args, f"--{one}"], "absent": args[:1]}
        else:
            value = [] if flag.kind == "bool" else ["1"]
            plain = without(args, one)
            found = {
                "twice": [*plain, one, *value, one, *value],
                "twice, by =": [*plain, one, *value, f"{one}=1" if value else one],
                "no value": [*plain, one, *([] if value else ["1"])],
                "short": [*plain, one[:-1], *value], "upper": [*plain, one.upper(), *value],
                "one dash": [*plain, one[1:], *value], "no dash": [*plain, one[2:], *value],
                "dotted": [*plain, f"{one}.x", *value], "no-no-": [*plain, f"--no-no-{one[2:]}"],
            }  # fmt: skip
            if "-" in one[2:]:
                low = f"--{one[2:].replace('-', '_')}"
                found["twice, by _"] = [*plain, one, *value, low, *value]
        for what, words in found.items():
            yield Case(tuple(words), one, "grammar", what)
    for command in COMMANDS:
        args = base(command)
        mine = {flag.flag for flag in FLAGS if flag.command == command}
        for other in sorted({flag.flag for flag in FLAGS if not flag.positional} - mine):
            yield Case((*args, other, "1"), other, "grammar", "another's")
        for word in ("--x", "-x", "--", "---", "-", "--=", "--=1", "=", "@file", "--help=1", "-h1"):
            yield Case((*args, word), word, "grammar", "unknown")
            yield Case((word, *args), word, "grammar", "before")
        yield Case((args[0].upper(), *args[1:]), args[0], "grammar", "upper")
        yield Case((args[0][:-1], *args[1:]), args[0], "grammar", "short")
        yield Case((*args, *args), args[0], "grammar", "twice")
    for word in ODD:
        yield Case((word,), "", "grammar", word)


def of_methods() -> Iterator[Case]:
    """Each field of each registered method that is not one number (`test_values` has these), with
    one in four of the values of its kind, others for the next.
    """
    turn = itertools.count()
    for entry in registry.entries():
        command = next((c for c, kinds in cli.CHOICES.items() if entry.kind in kinds), None)
        assert command, f"no command takes a {entry.kind}"
        args = without(base(command), f"--{entry.kind}")
        if entry.kind == "dataset":
            args = without(args, "--dataset.path")
        for path, hint in parts(entry.cls, entry.kind):
            flag, kind = f"--{path.replace('_', '-')}", kind_of(hint)
            for value in HOSTILE[kind][next(turn) % 4 :: 4] if kind != "number" else []:
                more = [f"--{entry.kind}", entry.name]
                if "path" in registry.hints(entry.cls) and path != "dataset.path":
                    more += ["--dataset.path", "DATA"]
                yield Case((*args, *more, *ended(flag, kind, value)), flag, f"field {kind}", value)


def parts(cls: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, hint in registry.hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from parts(hint, f"{path}.{name}")
        elif not any(dataclasses.is_dataclass(part) for part in typing.get_args(hint)):
            yield f"{path}.{name}", hint


LINES = [*of_values(), *of_grammar(), *of_methods()]

# --- The world that they meet ---

EXPERIMENT = """
from bdjax.datasets.files import Npz
from bdjax.models.shamshiri import Ffnn
from bdjax.study import Cell
from bdjax.train import Recipe

TITLE, SCALES = "Small", ("smoke",)


def cells(scale, seeds):
    yield Cell("T", "r", Npz(path={data!r}), Ffnn(hidden=(4,)), Recipe(epochs=0))
"""
BOARD = dict.fromkeys(("shard", "devices", "doing"), "") | dict.fromkeys(
    ("total", "rows", "before", "groups", "group", "failed"), 1
)


def world(folder: Path) -> dict[str, str]:
    """A home full of things, and right ones beside it: what the words in capitals stand for."""
    here = folder / "home" / "work"
    (here / "docs" / "deep").mkdir(parents=True)
    (here / "empty").mkdir()
    for name, content in {
        "file": b"a file", "docs/letter.txt": b"dear", "docs/deep/table.csv": b"a,b\n",
        "../precious": b"x", "binary": bytes(range(256)), "latin.py": b"# caf\xe9\nx = 1\n",
        "nul.py": b"x = 1\0", "list.py": b"[1, 2]\n", "json.json": b'{"a": [1, 2]}',
        "mine.h5": b"\x89HDF\r\n\x1a\n" + b"0" * 64, "image.png": b"\x89PNG\r\n\x1a\n" + b"0" * 64,
    }.items():  # fmt: skip
        (here / name).write_bytes(content)
    np.savez(here / "mine.npz", image=np.zeros((4, 8, 8, 1), np.uint8), label=np.arange(4))
    (here / "loop").symlink_to(here / "loop")
    (here / "dangling").symlink_to(here / "not there")
    os.mkfifo(here / "fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made, contextlib.chdir(here):
        made.bind("sock")
    (here / "closed").mkdir(mode=0o500)

    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (80, 8, 8, 1), np.uint8), np.arange(80) % 4
    np.savez(folder / "data.npz", image=image, label=label)
    about = {"attack": BadNets(size=2), "recipe": Recipe(epochs=0), "seed": 0}
    about["dataset"] = Npz(path=str(folder / "data.npz"))
    save_model(folder / "net", NET, MODEL, VARIABLES, **about)
    weights = VARIABLES["params"]
    tensors = {
        f"{layer}.{'weight' if leaf == 'kernel' else leaf}": np.asarray(value).T
        for layer in weights
        for leaf, value in weights[layer].items()
    }
    (folder / "w.safetensors").write_bytes(safetensors.written(tensors))
    (folder / "small.py").write_text(EXPERIMENT.format(data=str(folder / "data.npz")))
    facts = {"metrics": {"acc_test": 0.9}, "defense": "strip", "attack": "badnets"}
    rows = [row(f"{i:016x}", seed=i, **facts | {"row": f"R{i % 2}"}) for i in range(4)]
    Store(folder / "results").append(rows)
    progress.Board(folder / "results" / "progress.json", **BOARD).write()
    return {"EXP": "small.py", "NET": "net", "RESULTS": "results", "DATA": "data.npz",
            "WEIGHTS": "w.safetensors"}  # fmt: skip


class Accepted(BaseException):
    """Raised where long work would begin."""


def accept(*_, **__):
    raise Accepted


def within(folder: Path, *_, **__):
    """Stands before `own.saving`: a test writes nowhere else."""
    place = Path(os.environ["HOME"]).parents[1]
    assert Path(os.path.realpath(folder)).is_relative_to(place), folder
    return SAVING(folder)


SAVING = own.saving
CUT = {
    (Runner, "_data"): accept, (prepared, "_builder"): accept,
    (importlib.import_module("benchmarks.__main__"), "_alone"): accept,
    (own, "saving"): within, (progress, "saving"): within, (audits, "images_of"): accept,
    (repairs, "divide"): accept, (scans, "_of"): accept,
}  # fmt: skip
"""Where commands begin long work, or write."""


class Place:
    """A world for many cases, one after the other."""

    def __init__(self, folder: Path):
        self.folder, self.words, self.count = folder, world(folder), 0
        os.chdir(folder / "home" / "work")
        self.before = self.snapshot()

    def snapshot(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for name in ("home", "net"):
            found |= {f"{name}/{file}": what for file, what in tree(self.folder / name).items()}
        rows = self.folder / "results" / "results.jsonl"  # a report may stand beside them
        return found | {"rows": rows.read_bytes()}

    def said(self, case: Case) -> list[str]:
        self.count += 1
        words = self.words | {"OUT": f"out/{self.count}"}
        found = []
        for word in case.args:
            first, slash, rest = word.partition("/")
            word = f"{self.folder / words[first]}{slash}{rest}" if first in words else word
            found.append(word)
        return found

    def run(self, case: Case) -> str | None:
        """What is wrong with how a command line ended; "accepted" where it was taken."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        try:
            with (
                seconds(HUNG), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
            ):  # fmt: skip
                cli.main(self.said(case))
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Accepted:
            pass
        except BaseException as error:
            self.touched(False)
            return f"{type(error).__name__}: {str(error)[:300]}"
        if fault := self.touched(code == 0):
            return fault
        if code == 0:
            return "accepted"
        text = err.getvalue()
        *remarks, last = text.splitlines() or [""]
        good = code == 2 and last.startswith("bdjax: ") and len(text) < 1_500
        good = good and all(line.isprintable() for line in [*remarks, last])
        good = good and all("are odd and left out" in line for line in remarks)
        return None if good else f"code {code}: {text[-300:]!r}"

    def touched(self, accepted: bool) -> str | None:
        """What was done to the user's things; what is new goes away."""
        now = self.snapshot()
        if now == self.before:
            return None
        fault = next((f"touched {n}" for n, v in self.before.items() if now.get(n) != v), None)
        if fault is None and not accepted:
            fault = f"left {min(now.keys() - self.before.keys())}"
        os.chdir(self.folder.parent)
        shutil.rmtree(self.folder)
        self.__init__(self.folder)
        return fault


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The user's home, and where commands stop: nothing leaves the folder that they stand in."""
    folder = tmp_path_factory.mktemp("world") / "place"
    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("BDJAX_DATA_DIR", str(folder.parent / "cache"))
        patch.setenv("COLUMNS", "120")
        patch.setattr(tempfile, "tempdir", str(folder.parent))
        for (owner, name), cut in CUT.items():
            patch.setattr(owner, name, cut)
        yield Place(folder)
        os.chdir(here)


def _names(case: Case) -> bool:
    """Whether a value is a name that a new folder can have, or a folder of the world."""
    return case.value in PLACES or (case.value in ODD and case.value.isprintable())


NAMES = ("out", "data_dir")
FINE: dict[str, Callable[[Case], bool]] = {
    "what is right anyway, or the same as no flag": lambda c: (
        c.value in base(c.args[0]) or c.value in ("smoke", "paper", "off", "auto", "seed")
    ),
    "None is the word for a flag that is not given": lambda c: c.value == "None",
    "a folder to write in may have any name, and stand beside other things": lambda c: (
        c.kind == "path" and c.flag.removeprefix("--").replace("-", "_") in NAMES and _names(c)
    ),
    "whole numbers may have a sign, and zeros": lambda c: (
        c.kind == "number" and re.fullmatch(r"[+-]?0*\d{1,10}", c.value) is not None
    ),
    "a share, or minutes, may be a fraction": lambda c: (
        c.flag in ("--alpha", "--minutes", "--agreement") and c.value in ("1.5", "1e3", "1.", ".5")
    ),
    "the table that a folder of results holds is results as well": lambda c: (
        c.args[0] == "report" and c.value == "RESULTS/results.jsonl"
    ),
    "bdjax's own net, of which it may make another": lambda c: (
        c.args[0] == "import" and c.value in ("NET", "NET/variables")
    ),
    "-- ends the flags": lambda c: c.flag == "--" or c.value == "--",
    "a site meets the net when its program is traced, before anything is trained": lambda c: (
        c.kind == "field text" and c.flag.endswith(".site")
    ),
    "where a path is looked for that is not found as it stands": lambda c: (
        c.kind == "field text" and c.flag == "--dataset.data-dir"
    ),
    "a pattern that all rows fit": lambda c: c.flag == "--only" and c.value == "*",
    "one of two shards": lambda c: c.value == "1/2",
    "a positional of which there may be none": lambda c: (
        c.value == "absent" and c.args[0] in ("list", "bench")
    ),
}
"""Why a value that looks odd is taken."""


def judged(place: Place, cases: list[Case]) -> list[str]:
    """The faults of `cases`: what went wrong, and what was taken without a reason."""
    faults = []
    for case in cases:
        found = place.run(case)
        if (
            case.args[0] == "import"
            and case.value == "NET"
            and str(found).startswith("touched net/")
        ):
            found = "accepted"  # it is replaced, as is said of --out
        if found == "accepted":
            found = None if any(fine(case) for fine in FINE.values()) else "taken without a reason"
        faults += [f"{case.name}: {found}"] if found else []
    return faults


SHARE = 89
"""One in so many is tried by a bare pytest."""
SOME = random.Random(0).sample(LINES, len(LINES) // 3)
"""What the long tests try: half an hour would go by with all of them."""


def test_a_right_command_line_of_each_command_is_taken(place):
    for command in COMMANDS:
        case = Case(tuple(base(command)), "", "right", "")
        assert place.run(case) == "accepted", command


def test_a_share_of_all_bad_command_lines(place):
    assert not judged(place, LINES[::SHARE])


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
def test_a_third_of_all_bad_command_lines(place, part):
    assert not judged(place, SOME[part::8])


# --- Every entry from Python ---

RNG = np.random.default_rng(0)
DATA = Split(RNG.integers(0, 256, (12, 8, 8, 1), np.uint8), np.arange(12, dtype=np.int32) % 4)
RECIPE = Recipe(epochs=0)
ATTACK = BadNets(size=2)
ROWS = [row("0" * 16, seed=0, experiment="e"), row("1" * 16, seed=1, experiment="e")]
SOURCE = registry.make("dataset", "fashion-mnist-sample", train_size=100, test_size=20)
CELL = Cell("T", "r", SOURCE, NET, RECIPE, ATTACK)
SPLITS = Splits(DATA, DATA, DATA)

ODD_VALUES: dict[str, Any] = {
    "None": None, "text": "x", "no text": "", "bytes": b"x", "0": 0, "-1": -1, "1.5": 1.5,
    "nan": math.nan, "huge": 10**400, "True": True, "list": [], "words": ["x"], "dict": {},
    "odd dict": {"params": 1}, "tuple": (1,), "object": object(), "type": int, "function": print,
    "empty": np.zeros(0), "NaNs": np.full((2, 2), math.nan), "objects": np.array([None, "x"]),
    "strings": np.array(["x"]), "complex": np.ones((2, 8, 8, 1), np.complex64),
    "old key": jax.random.PRNGKey(0), "keys": jax.random.split(KEY, 2), "key": KEY,
    "a net": NET, "a model": MODEL, "a recipe": RECIPE, "an attack": ATTACK, "a split": DATA,
    "a long name": "n" * 5_000, "NUL": "a\0b", "surrogate": "\udcff", "escape": "\x1b[31m",
}  # fmt: skip


def splits() -> dict[str, Any]:
    """Splits that disagree with themselves or with the model."""
    image, label = DATA.image, DATA.label
    split: Any = Split
    unit = image.astype(np.float32) / 255
    return {
        "none": split(image[:0], label[:0]), "NaN": split(unit * math.nan, label),
        "0 to 255": split(image.astype(np.float32), label), "bool": split(image > 9, label),
        "NCHW": split(image.transpose(0, 3, 1, 2), label), "3-D": split(image[..., 0], label),
        "RGB": split(image.repeat(3, -1), label), "big": split(image.repeat(2, 1), label),
        "int64": split(image.astype(np.int64), label), "label -1": split(image, label - 1),
        "objects": split(image.astype(object), label), "a list": split(image.tolist(), label),
        "label 4": split(image, label + 1), "one label": split(image, 1),
        "float labels": split(image, label.astype(np.float32)), "no labels": split(image, None),
        "text labels": split(image, label.astype(str)), "5 labels": split(image, label[:5]),
        "2-D labels": split(image, label[:, None]), "no images": split(None, label),
        "a dict": {"image": image, "label": label}, "a pair": (image, label), "a set": SOURCE,
    }  # fmt: skip


def trainsets() -> dict[str, Any]:
    """Training sets that cannot be."""
    whole, poisoned = clean_set(DATA), poisoned_set(KEY, DATA, ATTACK, 4)
    plan = whole.plan
    return {
        "a split": DATA, "no plan": whole._replace(plan=None), "bare": whole._replace(image=None),
        "short": whole._replace(plan=plan._replace(label=plan.label[:5])),
        "label 9": whole._replace(plan=plan._replace(label=plan.label + 9)),
        "source -1": whole._replace(plan=plan._replace(source=plan.source - 1)),
        "source 99": whole._replace(plan=plan._replace(source=plan.source + 99)),
        "size 0": whole._replace(plan=plan._replace(size=jnp.asarray(0))),
        "size 99": whole._replace(plan=plan._replace(size=jnp.asarray(99))),
        "no key": poisoned._replace(key=None), "name": whole._replace(attack="badnets"),
        "old key": poisoned._replace(key=jax.random.PRNGKey(0)),
    }  # fmt: skip


def variables() -> dict[str, Any]:
    """Variables of no net, or of another."""
    other = build(Ffnn(hidden=(5,)), (8, 8, 1), 4).init(KEY)
    return {
        "another's": other, "bare": VARIABLES["params"], "no params": {"params": {}},
        "a mask": {**VARIABLES, "masks": {"x": np.ones(4, np.float32)}},
        "short mask": {**VARIABLES, "masks": {"penultimate": np.ones(3, np.float32)}},
        "texts": jax.tree.map(lambda _: "x", VARIABLES),
        "Nones": jax.tree.map(lambda _: None, VARIABLES), "in a list": [VARIABLES],
    }  # fmt: skip


RIGHT: dict[str, Any] = {
    "key": KEY, "model": MODEL, "variables": VARIABLES, "split": DATA, "clean": DATA, "test": DATA,
    "data": clean_set(DATA), "recipe": RECIPE, "attack": ATTACK, "x": DATA.image, "kind": 1,
    "images": DATA.image, "classes": 4, "batch": 250, "state": begin(KEY, MODEL, RECIPE),
    "epochs": 0, "net": NET, "shape": (8, 8, 1), "name": "mnist", "preset": None, "base": CELL,
    "count": 2, "draw": 0, "axes": {"seed": (0, 1)}, "rows": ROWS, "row": "R", "metric": "acc_test",
    "path": "nowhere", "folder": "nowhere", "folders": ["nowhere"], "cells": [CELL], "y": None,
    "store": Store("nowhere"), "experiment": "e", "table": None, "dataset": SOURCE, "seed": 0,
    "reported": {}, "self": None, "fields": {}, "scale": "smoke", "out": None, "seeds": None,
    "train.data": DATA, "run.study": "../../small.py", "load_model.path": "../../net", "width": 80,
    "file": "nowhere.onnx", "found": "nowhere", "audit.net": "nowhere", "repair_net.net": "nowhere",
    "scan_set.net": "nowhere", "scan_images.net": "nowhere",
    "scan_images.images": "nowhere", "scan_images.clean": SOURCE, "module": nn.Dense(4),
    "word": "mnist",
    "sections": [report.Section("T", ROWS)], "entry": registry.entries("attack")[0],
    "load.folder": "../../results", "merge.folders": ["../../results"], "write.folder": "made",
}  # fmt: skip
"""What is right for a parameter of this name, or of this name of this function."""
OF = {
    "split": splits,
    "clean": splits,
    "test": splits,
    "data": trainsets,
    "variables": variables,
}
"""Further odd values."""


class Entry(NamedTuple):
    """A call from Python with one odd value."""

    door: str
    call: Callable
    given: dict[str, Any]
    part: str
    hint: Any
    what: str
    value: Any

    @property
    def name(self) -> str:
        return f"{self.door}({self.part}={self.what})"


def guarded() -> Iterator[tuple[str, Callable]]:
    """All functions behind `registry.door`, of all modules, and classes whose making is."""
    for found in pkgutil.walk_packages(bdjax.__path__, "bdjax."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for name, made in vars(module).items():
            if getattr(made, "__module__", None) != found.name:
                continue
            inner = vars(made).get("__init__") if inspect.isclass(made) else made
            if (
                getattr(inner, "__globals__", None) is vars(registry)
                and inspect.unwrap(typing.cast(Callable, inner)) is not inner
            ):
                yield f"{found.name.removeprefix('bdjax.')}.{name}", made


def arguments(door: str, call: Callable) -> dict[str, Any]:
    """Right ones for all parameters of a function."""
    given = {}
    for name, parameter in inspect.signature(call).parameters.items():
        value = RIGHT.get(f"{door.rpartition('.')[2]}.{name}", RIGHT.get(name, parameter.default))
        assert value is not inspect.Parameter.empty, f"say in RIGHT what {name} of {door} may be"
        given[name] = value
    return given


def called(call: Callable, given: dict[str, Any]) -> None:
    """`call(**given)`; a generator to its end."""
    if isinstance(call, functools.partial):  # of `made`: all by name
        call(**given)
        return
    given = dict(given)
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            more = given.pop(name)
            given |= more if isinstance(more, dict) else {"seed": more}
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            more = given.pop(name)
            call = functools.partial(call, *given.values(), more)
            given = {}
    made = call(**given)
    if inspect.isgenerator(made):
        for _ in made:
            pass


def staged(call: Callable) -> Callable:
    """`call` traced and not computed: its checks see what it is given, nothing runs."""

    @functools.wraps(call)
    def traced(*args, **kwargs):
        def whole():
            call(*args, **kwargs)

        jax.eval_shape(whole)

    return traced


def cut(cls: type, name: str) -> Callable:
    """The method `name` of a registered class, which ends behind its checks."""

    def body(self, *_, **__):
        raise Accepted

    inner = inspect.unwrap(getattr(cls, name))
    body.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
    return getattr(type(cls.__name__, (cls,), {name: body})(), name)


def doors() -> Iterator[tuple[str, Callable]]:
    """What takes values from Python."""
    for name, call in guarded():
        yield name, staged(call) if name.startswith("train.") else call
    yield from {"Cell": Cell, "Runner": Runner, "Runner.run": Runner(Store("new"), "e").run}.items()
    for entry in registry.entries("defense"):
        yield f"{entry.name}.call", cut(entry.cls, "__call__")
    for entry in registry.entries("attack"):
        yield f"{entry.name}.train", cut(entry.cls, "train")


def entries() -> Iterator[Entry]:
    for door, call in doors():
        given = arguments(door, call)
        for part, parameter in inspect.signature(call).parameters.items():
            hint = parameter.annotation
            own = splits if door.endswith(".train") and part == "data" else OF.get(part, dict)
            for what, value in {**ODD_VALUES, **own()}.items():
                if "Callable" in str(hint) and what == "function":
                    continue  # what it does is the user's
                yield Entry(door, call, given, part, hint, what, value)
    for entry in registry.entries("defense"):  # nets meet variables where they are called
        call = entry.cls()
        given = arguments("call", call)
        for what, value in variables().items() if "variables" in given else ():
            yield Entry(entry.name, staged(call), given, "variables", Any, what, value)
    for entry in registry.entries():
        for field, hint in registry.hints(entry.cls).items():
            make = functools.partial(made, entry)
            for what, value in ODD_VALUES.items():
                yield Entry(f"make {entry.name}", make, {}, field, hint, what, value)


def made(entry: registry.Entry, **fields) -> Any:
    return registry.make(entry.kind, entry.name, None, **fields)


ENTRIES = list(entries())


def tried(entry: Entry) -> str | None:
    """What is wrong with how a call took an odd value; "accepted" where it did."""
    try:
        with (
            seconds(HUNG), contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # fmt: skip
            called(entry.call, entry.given | {entry.part: entry.value})
    except BadInput as error:
        return None if "\n" not in str(error) and len(str(error)) < 6_000 else f"long: {error}"
    except Accepted:
        return "accepted"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "accepted"


def test_every_public_function_is_behind_a_door():
    """But for the decorators and what declares a field, which stand where classes are made."""
    for name in bdjax.__all__:
        made = getattr(bdjax, name)
        if inspect.isfunction(made) and inspect.unwrap(made).__module__ != "bdjax.registry":
            assert made.__globals__ is vars(registry), name
    victim, wrong = Victim(MODEL, VARIABLES, ATTACK), "is not of class"
    for call, line in (
        (lambda: bdjax.judge(0, victim, None, SPLITS), "judge: key 0 is no key"),  # type: ignore[arg-type]
        (lambda: bdjax.judge(KEY, MODEL, None, SPLITS), f"judge: victim .* {wrong} Victim"),  # type: ignore[arg-type]
        (lambda: bdjax.judge(KEY, victim, "strip", SPLITS), f"defense 'strip' {wrong} Defense"),  # type: ignore[arg-type]
        (lambda: bdjax.judge(KEY, victim, None, DATA), f"data .* {wrong} Splits or of class Da"),  # type: ignore[arg-type]
        (lambda: bdjax.changed(CELL, {}), "changed: cells .* is not a list"),  # type: ignore[arg-type]
        (lambda: bdjax.run([3]), f"run: study 3 {wrong} Cell"),  # type: ignore[list-item]
        (lambda: bdjax.run(3), "run: study 3 is not a string or a list"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BadInput, match=line):
            call()
    found = bdjax.judge(KEY, victim, None, SPLITS).metrics
    assert jax.jit(lambda key: bdjax.judge(key, victim, None, SPLITS).metrics)(KEY) == found


def fits(hint: Any, value: Any, right: Any) -> bool:
    """Whether an annotation allows a value: told otherwise than the checks tell it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is right or origin is Literal:
        return value is right or value in args
    if value is None:
        return type(None) in args or (hint is Any and right is None)
    if found := registry.ranges(hint):
        return any(_number(kinds, limit, value) for kinds, limit in found) or (
            isinstance(value, tuple) and all(fits(hint, one, right) for one in value)
        )
    if origin in (typing.Union, types.UnionType):
        return any(fits(arg, value, right) for arg in args)
    if origin in (Mapping, Sequence, Iterable):
        allowed = {Mapping: dict, Sequence: (list, tuple), Iterable: (list, tuple, dict)}[origin]
        inner = value.values() if origin is Mapping and isinstance(value, dict) else value
        return isinstance(value, allowed) and all(fits(args[-1], one, right) for one in inner)
    if origin is tuple:
        return value == ()
    if origin is Callable or "Callable" in str(hint):
        return callable(value)
    if getattr(hint, "_is_protocol", False):
        return value is ATTACK
    if hint in (Any, jax.Array):
        return type(value) is type(right) and np.shape(value) == np.shape(right)
    return isinstance(value, hint if isinstance(hint, type) else origin or type(right))


def _number(kinds: set[type], limit: Any, value: Any) -> bool:
    if isinstance(value, (jax.Array, np.ndarray)):
        return bool(kinds & {jax.Array, np.ndarray}) and value.dtype in (np.float64, np.uint32)
    whole = isinstance(value, int) or float in kinds
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and whole
        and (limit is None or limit.low <= value <= limit.high)
    )  # fmt: skip


def allowed(entry: Entry) -> str | None:
    """Why an odd value is taken; None where there is no reason."""
    door, part, what = entry.door, entry.part, entry.what
    if part == "variables" and (door == "train.begin" or door.endswith((".call", ".train"))):
        return "variables meet the net where it is called: see the whole calls of defenses"
    if what not in ODD_VALUES:
        if door in ("train.clean_set", "train.poisoned_set") and what in ("NCHW", "RGB", "big"):
            return "images of any shape, until they meet a net"
        if door == "train.clean_set" and what == "label 4":
            return "as many classes as there are, until they meet a net"
        if door in ("autoencoder", "input-anomaly"):
            return "a defense that never looks at the net"
        if door == "mm-bd.call" and what == "none":
            return "a judge that needs no images"
        return None
    none = entry.what in ("list", "dict", "tuple", "empty")
    if none and door.startswith(("study.", "Runner.run")):
        return "none of something, of which there may be any number"
    if door in ("train.poisoned_set", "train.evaluate") and part == "attack" and what == "None":
        return "no attack: the clean twin"
    return "its annotation" if fits(entry.hint, entry.value, entry.given.get(part)) else None


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_bad_calls_from_python(place, whole):
    faults = []
    for entry in ENTRIES[:: 3 if whole else 53]:
        found = tried(entry)
        place.touched(True)
        if found == "accepted":
            found = None if allowed(entry) else "taken without a reason"
        faults += [f"{entry.name}: {found}"] if found else []
    assert not faults
