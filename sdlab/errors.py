"""TODO errors."""

import contextlib
import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def first_words(said: object) -> str:
    """Of an error's message, or of what else a foreign file says: a line's beginning, printable."""
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return printable(lines[0])[:100]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean `x`?` with the most similar known name, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean `{near[0]}`?" if near else ""


def printable(text: str) -> str:
    """With what breaks a line, or cannot be written, as its code."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control, line ends, halves of a character


class BadInput(ValueError):
    """Something a user gave or left cannot be used: one sentence with what was found, what is allowed, what to do."""


BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother, BRIEF.maxlong = 2, 80, 80, 40


def brief(value: Any) -> str:
    """A value in a sentence: a file may give one of any length, and depth, which written out would fill the memory."""
    with contextlib.suppress(Exception):  # Python itself writes out no whole number of more than 4300 digits
        return BRIEF.repr(value)
    return "too long to be shown"
