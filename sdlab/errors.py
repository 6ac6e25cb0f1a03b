"""`BadInput`, the one error that a user's files and settings can cause, and the pieces its sentences are made of."""

import contextlib
import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control, line ends, halves of a character
BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother, BRIEF.maxlong = 2, 80, 80, 40


class BadInput(ValueError):
    """A user's input cannot be used: one sentence that says what was found, what is allowed and what to do."""


def brief(value: Any) -> str:
    """`repr` of a value, shortened: a foreign file may hold a text of any length and a list of any depth."""
    with contextlib.suppress(Exception):  # Python refuses to print whole numbers of more than 4300 digits
        return BRIEF.repr(value)
    return "too long to be shown"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """` Did you mean `x`?` with the most similar known name, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean `{near[0]}`?" if near else ""


def printable(text: str) -> str:
    """The text with control characters, line ends and undecodable bytes written as escapes."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def first_line(said: object, length: int = 200) -> str:
    """The printable first line of an error or of another object's text; the type's name if there is no text."""
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return printable(lines[0])[:length]


def first_words(said: object) -> str:
    return first_line(said, 100)
