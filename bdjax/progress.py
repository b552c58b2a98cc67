"""Progress with an ETA: a rich bar on a terminal, plain lines elsewhere, nothing under `--quiet`."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Any


class Progress(AbstractContextManager):
    """`with Progress(total, "training") as bar: bar.step("epoch 3")`."""

    def __init__(self, total: float, label: str, quiet: bool = False):
        self.total, self.label, self.quiet = total, label, quiet
        self.done, self.start, self.spoke = 0.0, time.monotonic(), time.monotonic()
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Rich

            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "ETA")
            self.bar = Rich(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                            console=Console(stderr=True), transient=True)  # fmt: skip
            self.task = self.bar.add_task(label, total=total, note="")
            self.bar.start()

    def step(self, note: str = "", amount: float = 1) -> None:
        """`amount` more is done; `note` says what."""
        self.done += amount
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        elif not self.quiet and (now - self.spoke > 10 or self.done >= self.total) and now - self.start > 10:
            self.spoke = now
            left = (now - self.start) / self.done * (self.total - self.done)
            line = f"{self.label}: {self.done:g}/{self.total:g}, {now - self.start:.0f} s, ETA {left:.0f} s"
            print(f"{line} {note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
