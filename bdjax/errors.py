"""What is wrong with the user's input, and how it is said; nothing here needs jax, so that
`bdjax --help` and `bdjax status` answer at once.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class BadInput(ValueError):
    """The user's input is wrong: the message is one line that says what to do. The command line
    exits with code 2.
    """


def shortened(value: Any) -> str:
    """Any text as a part of an error line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error line: which known name was meant."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; the nearest name is '{found[0]}'" if found else ""
