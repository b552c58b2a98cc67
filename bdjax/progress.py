"""What a run is doing: bars with an ETA, the table of a sweep, `progress.json` for whoever looks
from elsewhere; and how it is asked to stop.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from bdjax import schema
from bdjax.errors import BadInput
from bdjax.own import full, saving

HEARTBEAT = 5.0
"""Seconds between two writes of `progress.json`; a run that was silent for ten times as long is not
alive.
"""


def shown(value: Any) -> str:
    """Text from a file as a terminal may have it: one line, without escapes, control characters and
    marks that turn the direction of writing.
    """
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}"
        for c in str(value)
    )


_said: set[str] = set()


def say_once(line: str) -> None:
    """A line for the user that is not repeated."""
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)


@contextmanager
def silent(logger: str) -> Iterator[None]:
    """Orbax logs of its own, its threads the traceback of what it raises as well, and of each
    write that ends after another has failed.
    """
    log, told = logging.getLogger(logger), sys.unraisablehook
    level = log.level

    def hear(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            told(found)

    log.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = hear
    try:
        yield
        sys.unraisablehook = told  # after a failure the last writes are yet to end
    finally:
        log.setLevel(level)


@contextmanager
def kept(words: str) -> Iterator[None]:
    """Says what an interruption of the block leaves behind, and how to go on: the innermost words
    are those that `bdjax` ends with.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(words)
        raise


def terminal() -> Any:
    """A rich console where bars can move: on a terminal, and in a notebook; None elsewhere."""
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal or console.is_jupyter else None


class Progress(AbstractContextManager):
    """A rich bar on a terminal, plain lines elsewhere: `with Progress(total, "training") as bar:
    bar.step("epoch 3")`.
    """

    def __init__(self, total: float, label: str, quiet: bool = False):
        self.total, self.label, self.quiet = total, label, quiet
        self.done, self.start, self.spoke = 0.0, time.monotonic(), time.monotonic()
        self.bar: Any = None
        if not quiet and (console := terminal()) is not None:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Rich

            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                "ETA",
            )
            self.bar = Rich(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                            console=console, transient=True)  # fmt: skip
            self.task = self.bar.add_task(label, total=total, note="")
            self.bar.start()

    def step(self, note: str = "", amount: float = 1) -> None:
        """`amount` more is done; `note` says what."""
        self.done += amount
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        elif (
            not self.quiet
            and (now - self.spoke > 10 or self.done >= self.total)
            and now - self.start > 10
        ):
            self.spoke = now
            left = (now - self.start) / self.done * (self.total - self.done)
            line = (
                f"{self.label}: {self.done:g}/{self.total:g}, {now - self.start:.0f} s, ETA "
                f"{left:.0f} s"
            )
            print(f"{line} {note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


class Board(AbstractContextManager):
    """The state of a run in `path` (None: nowhere), rewritten every few seconds and, if `live`,
    shown on the terminal.

    `facts`: what `table` shows; `rows` and `before`, the finished rows now and at the start,
    `total`, `group`, `groups`, `failed`, `doing` …
    """

    def __init__(self, path: Path | None = None, live: bool = False, **facts: Any):
        now = time.time()
        self.path, self.console = path, terminal() if live else None
        self.facts = {
            "state": "running",
            "started": now,
            "updated": now,
            "host": socket.gethostname(),
            **facts,
        }
        self.ended = threading.Event()
        self.screen: Any = None

    @property
    def live(self) -> bool:
        """Whether it is shown on a terminal or in a notebook."""
        return self.console is not None

    def tell(self, **facts: Any) -> None:
        """Takes note; it is written with the next heartbeat."""
        self.facts |= facts

    def count(self, **more: int) -> None:
        """Adds to facts that are counted."""
        self.tell(**{name: self.facts.get(name, 0) + value for name, value in more.items()})

    def write(self) -> None:
        """Replaces the file; a full disk does not end a run for it."""
        if self.path is not None:
            self.facts["updated"] = time.time()
            with contextlib.suppress(OSError, BadInput), saving(self.path.parent) as place:
                new = place / "new" / self.path.name
                new.write_text(schema.dump(self.facts, "progress"), encoding="utf-8")
                os.replace(new, self.path)

    def _beat(self) -> None:
        self.write()
        while not self.ended.wait(HEARTBEAT):
            self.write()

    def __enter__(self) -> "Board":
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()
        if self.console is not None:
            from rich.live import Live

            shown = lambda: table([{**self.facts, "updated": time.time()}])  # noqa: E731
            self.screen = Live(get_renderable=shown, console=self.console, refresh_per_second=2)
            self.screen.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.ended.set()
        self.thread.join()
        self.tell(state="done" if kind is None else "stopped", doing="")
        self.write()
        if self.screen is not None:
            self.screen.stop()


def boards(folder: Path) -> list[dict[str, Any]]:
    """What the runs that work on a results folder wrote, one a shard; damaged files are left out,
    and a line tells.
    """
    found = []
    for path in sorted(folder.glob("progress*.json")):
        try:
            found.append(schema.read_json(path, "progress"))
        except BadInput as error:
            print(f"bdjax: left out: {error}", file=sys.stderr)
    return found


def spent(runs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by stage, `total` among them, that runs of a folder have taken, all their parts
    included: of what `boards` gives.
    """
    found: dict[str, float] = {}
    for run in runs:
        for stage, value in (run.get("seconds") or {}).items():
            found[stage] = found.get(stage, 0.0) + value
    return found


def table(facts: Iterable[Mapping[str, Any]]) -> Any:
    """A rich table of runs: groups, rows, rows a minute, ETA, devices, what is being done; of those
    on a cluster also its nodes, the tasks that are running, those that were begun again, and what
    each worker does.
    """
    from rich.table import Table
    from rich.text import Text

    facts = list(facts)
    more = ("nodes", "tasks", "retries") if any("nodes" in run for run in facts) else ()
    heads = ("shard", "state", "groups", "rows", "failed", "rows/min", "ETA", *more, "devices")
    made = Table(*heads, "now", box=None, pad_edge=False)
    for run in facts:
        spent = max(run["updated"] - run["started"], 1e-3)
        rate = (run["rows"] - run["before"]) / spent
        left = run["total"] - run["rows"]
        state, silent = run["state"], time.time() - run["updated"]
        if state == "running" and silent > 10 * HEARTBEAT:
            state = f"silent for {duration(silent)}: killed?"
        running = state == "running" and rate > 0
        cells = (
            run["shard"], state, f"{run['group']}/{run['groups']}", f"{run['rows']}/{run['total']}",
            run["failed"], f"{60 * rate:.1f}" if rate else "",
            duration(left / rate) if running else "", *(run.get(name, "") for name in more),
            run["devices"], run["doing"],
        )  # fmt: skip
        made.add_row(*(Text(shown(cell)) for cell in cells))
        for name, doing in run.get("workers", {}).items():
            made.add_row(*[""] * (len(heads) - 1), *(Text(shown(word)) for word in (name, doing)))
    return made


def status(folder: str | Path) -> None:
    """Prints what the runs that work on `folder` are doing, from its files alone."""
    from rich.console import Console

    from bdjax.rows import read_rows, result_files

    folder = Path(folder)
    if not (found := boards(folder)):
        raise BadInput(
            f"{folder} has no progress.json: give the results folder of `bdjax run` or `bdjax "
            "sweep`"
        )
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table(found))
    rows = len({row["run"] for row in read_rows(result_files(folder))})
    left = sum(run["total"] - run["rows"] for run in found)
    print(f"{rows} rows are there, {left} are to come from these")


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.2 h`, `5.0 days`."""
    for unit, size in (("days", 86400), ("h", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


class Terminated(KeyboardInterrupt):
    """The run was asked to end by SIGTERM: a preempted machine, a job at its time limit."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM ends Python code as Ctrl-C does, so that it is said what is kept; and neither
    is lost where Python drops what is raised: in a callback of the garbage collector, which JAX
    has, or in `__del__`.
    """

    def ended(*_: Any) -> None:
        raise Terminated

    def dropped(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            return before(unraisable)
        terminated = issubclass(unraisable.exc_type, Terminated)
        number = signal.SIGTERM if terminated else signal.SIGINT
        again = threading.Timer(0.05, os.kill, [os.getpid(), number])  # when that is over
        again.daemon = True
        again.start()

    mine = threading.current_thread() is threading.main_thread()
    term = mine and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    before, sys.unraisablehook = sys.unraisablehook, dropped if mine else sys.unraisablehook
    if term:
        signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        sys.unraisablehook = before
        if term:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ended(call: Callable[[], int | None]) -> None:
    """A command, from its beginning to its exit code; see `bdjax.cli.main`."""
    with terminable():
        try:
            code = call()
            print(end="", flush=True)  # at the exit nobody could say what is wrong with it
            if code:
                sys.exit(code)
        except BadInput as error:
            text = shown(error)
            _end(text if len(text) <= 900 else f"{text[:450]} … {text[-350:]}", 2)
        except KeyboardInterrupt as stop:
            asked = isinstance(stop, Terminated)
            words = [
                *getattr(stop, "__notes__", []),
                "nothing is kept; the same command begins anew",
            ]
            what = "terminated" if asked else "interrupted"
            _end(f"{what}; {shown(words[0])}", 143 if asked else 130)
        except OSError as error:  # of the output: what files are in the way says who writes them
            if not (closed := isinstance(error, BrokenPipeError)) and not full(error):
                raise
            with contextlib.suppress(OSError, AttributeError):  # what is left is not tried again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not closed:
                _end("cannot write the output: the disk is full", 2)


def _end(line: str, code: int) -> None:
    with contextlib.suppress(OSError):  # it may go where the disk is full
        print(f"bdjax: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


TOGETHER = 0.5
"""Seconds within which two signals are one wish."""


class Stop(AbstractContextManager):
    """Inside, SIGINT and SIGTERM only ask to stop: `asked` is the signal. The second one ends the
    process at once, but for one that comes within `TOGETHER`: `timeout` signals a process and its
    group.

    Python runs no signal handler while a compiled program runs, which may take minutes; a thread
    listens instead.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    def check(self) -> None:
        """Raises where a stop was asked for: call it where nothing would be lost."""
        if self.asked is not None:
            raise Terminated if self.asked == signal.SIGTERM else KeyboardInterrupt

    def __enter__(self) -> "Stop":
        self.asked, self.before = None, {}
        if threading.current_thread() is threading.main_thread():
            self.heard, self.told = os.pipe()
            os.set_blocking(self.told, False)
            self.before = {
                s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)
            }
            self.earlier = signal.set_wakeup_fd(self.told, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def _listen(self) -> None:
        first = 0.0
        while number := os.read(self.heard, 1)[0]:
            if number not in self.before:
                continue
            if self.asked is not None:
                if time.monotonic() - first < TOGETHER:
                    continue
                # the cursor
                print(
                    "\x1b[?25h" if sys.stderr.isatty() else "", end="", file=sys.stderr, flush=True
                )
                os._exit(128 + number)  # safe at any moment, as kill −9 is
            self.asked, first = signal.Signals(number), time.monotonic()
            line = f"{self.asked.name}: stopping after what is running; once more stops at once"
            print(line, file=sys.stderr, flush=True)
        os.close(self.heard)

    def __exit__(self, *_: Any) -> None:
        if self.before:
            signal.set_wakeup_fd(self.earlier)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            os.write(self.told, b"\0")
            os.close(self.told)
            self.before = {}
