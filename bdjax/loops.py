"""Long searches that are kept while they run: the loops of a compiled program, on disk."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bdjax import mesh, own
from bdjax.checkpoints import load_tree, save_tree
from bdjax.progress import Stop

EVERY = 60.0
"""Seconds between two writes."""


class Loop(NamedTuple):
    """A loop of the program that runs, by its number, and its last state; None before a step."""

    number: int
    state: Any


class Loops:
    """Keeps the states of the loops of `mesh.drain`, of which a program runs one after another: a
    checkpoint a loop. A program that is begun again takes each loop up where it was kept, and
    computes what it would have. Where `stop` is asked for, what runs is kept and `stopped`: all
    loops end at once, and what the program returns is worth nothing.
    """

    def __init__(self, stop: Stop) -> None:
        self.stop, self.stopped = stop, False
        self.place: Path | None = None
        self.writing: Future | None = None

    @contextmanager
    def within(self, place: Path | None) -> Iterator[None]:
        """Inside, programs are kept in folders named as `place` and a number; None: they are
        not.
        """
        self.place, self.stopped = place, False
        self.running, self.ended, self.saved = Loop(-1, None), {}, time.monotonic()
        with ThreadPoolExecutor(1) as self.writer, mesh.keeping(self if place else None):
            try:
                yield
                if self.writing is not None:
                    self.writing.result()
            finally:
                self.place = self.writing = None

    def start(self, state: Any) -> tuple[Any, Any]:
        """The state from which a loop goes on, and whether it is to end."""
        if self.running.state is not None:
            self.ended[self.running.number] = self.running.state
        self.running = Loop(self.running.number + 1, None)
        assert self.place is not None
        path = _path(self.place, self.running.number)
        if path.exists():
            state = load_tree(path, state)
        return state, np.bool_(self.stopped)

    def step(self, state: Any) -> Any:
        """Takes note of a state; whether the loop is to end."""
        self.running = self.running._replace(state=state)
        self.stopped |= self.stop.asked is not None
        if self.stopped or time.monotonic() - self.saved > EVERY:
            self._save()
        return np.bool_(self.stopped)

    def _save(self) -> None:
        if self.writing is not None:
            self.writing.result()
        states = {**self.ended, self.running.number: self.running.state}
        # Copied now, as the program reuses the memory; written while it runs.
        copied = jax.tree.map(np.array, states)
        assert self.place is not None
        self.writing = self.writer.submit(_write, self.place, copied)
        if self.stopped:
            self.writing.result()
        self.ended, self.saved = {}, time.monotonic()


def _write(place: Path, states: dict[int, Any]) -> None:
    for number, state in states.items():
        save_tree(_path(place, number), state)


def _path(place: Path, number: int) -> Path:
    return place.with_name(f"{place.name}-{number}")


def forget(place: Path) -> None:
    """Removes what was kept of a program that has ended."""
    for path in place.parent.glob(f"{place.name}-*"):
        own.remove(path)
