"""Kinds of values: how one is read from text, what is legal, and the one line that refuses it.

Flags, YAML keys and the Python API all pass through the same kinds, so a value is legal in one
place exactly when it is legal in the others.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import redacted

_TRUE = frozenset({"true", "t", "yes", "y", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "0"})
_LONGEST_SHOWN = 80
# Separators, C0 and C1 controls, line and paragraph separators, and what turns the direction of
# text around: a terminal would obey them, and a name would look like another one.
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
LONGEST_PATH = 4095  # bytes; what Linux takes
LONGEST_STEM = 200  # bytes; leaves room for a number, an extension and a temporary suffix in 255


def shown(value: object) -> str:
    """The value as an error line shows it: quoted, on one line, shortened, without secrets."""
    try:
        text = redacted(repr(value))  # before it is shortened, which could leave half a password
    except (ValueError, RecursionError):  # a whole number of over 4300 digits, lists in lists
        text = f"<a {type(value).__name__} too long to show>"
    if len(text) <= _LONGEST_SHOWN:
        return text
    # The middle goes: a path is told apart by its end.
    half = (_LONGEST_SHOWN - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


@dataclass(frozen=True)
class ValueType:
    """One kind of value.

    `read` turns text into a value and raises ValueError where it cannot; `legal` judges a value
    that is already typed; `allowed` completes the sentence "... is not ...".
    """

    metavar: str
    allowed: str
    read: Callable[[str], Any]
    legal: Callable[[Any], bool]

    def parse(self, name: str, text: str) -> Any:
        """The value that `text` stands for; raises UserError naming `name` and what is legal."""
        try:
            value = self.read(text)
        except ValueError:
            raise self._refusal(name, text) from None
        if not self.legal(value):
            raise self._refusal(name, text)
        return value

    def check(self, name: str, value: Any) -> None:
        """Raises UserError where a typed value is not legal."""
        if not self.legal(value):
            raise self._refusal(name, value)

    def _refusal(self, name: str, value: object) -> UserError:
        return UserError(f"{name} {shown(value)} is not {self.allowed}")


def integer(low: int, high: int | None = None) -> ValueType:
    """Whole numbers from `low` to `high`, both included."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text.strip()):
            raise ValueError(text)
        return int(text)

    def legal(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and value >= low and (high is None or value <= high)

    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    return ValueType("N", f"a whole number {limits}", read, legal)


def number(
    low: float, high: float = math.inf, *, above: bool = False, metavar: str = "X"
) -> ValueType:
    """Finite numbers of at least `low`, or strictly above it, and at most `high`."""

    def read(text: str) -> float:
        if "_" in text:
            raise ValueError(text)
        return float(text)

    def legal(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number that no float holds
            return False
        return finite and (value > low if above else value >= low) and value <= high

    limits = f"above {low:g}" if above else f"of at least {low:g}"
    limits += "" if math.isinf(high) else f" and at most {high:g}"
    return ValueType(metavar, f"a finite number {limits}", read, legal)


def boolean() -> ValueType:
    """True true t yes y 1, or False false f no n 0, in any case."""

    def read(text: str) -> bool:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError(text)
        return word in _TRUE

    return ValueType("BOOL", "true or false", read, lambda value: isinstance(value, bool))


def choice(*names: str) -> ValueType:
    """One of a few names."""
    allowed = f"one of {', '.join(names)}"
    return ValueType("{" + ",".join(names) + "}", allowed, str.strip, lambda value: value in names)


def text(*, empty: bool = True, metavar: str = "TEXT") -> ValueType:
    """Text that can be written as UTF-8; on a command line other bytes arrive as surrogates."""

    def legal(value: Any) -> bool:
        return isinstance(value, str) and _encodable(value) and (empty or bool(value.strip()))

    return ValueType(
        metavar, "valid UTF-8 text" if empty else "text with something in it", str, legal
    )


def path(metavar: str = "PATH") -> ValueType:
    """A path that a file system could hold; `~` is expanded because YAML has no shell to do it."""

    def read(text: str) -> str:
        expanded = os.path.expanduser(text)
        # Without HOME and an entry of the user a folder named ~ would be made.
        if expanded == text and text.partition(os.sep)[0] == "~":
            raise ValueError(text)
        return expanded

    def legal(value: Any) -> bool:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            return False
        try:
            if len(os.fsencode(value)) > LONGEST_PATH:
                return False
            return all(len(os.fsencode(part)) <= 255 for part in value.split(os.sep))
        except UnicodeEncodeError:  # half a surrogate pair, which YAML can write
            return False

    return ValueType(metavar, "a usable path", read, legal)


def file_stem() -> ValueType:
    """The beginning of a file's name: no folder, not hidden, short enough for a suffix."""

    def legal(value: Any) -> bool:
        if not isinstance(value, str) or not value.strip() or not _encodable(value):
            return False
        return (
            not _NOT_IN_NAMES.search(value)
            and not value.startswith((".", "-"))
            and len(value.encode("utf-8")) <= LONGEST_STEM
        )

    allowed = f"a plain file name of at most {LONGEST_STEM} bytes, without a folder, control "
    allowed += "characters, or a dot or dash at its beginning"
    return ValueType("NAME", allowed, str, legal)


def optional(kind: ValueType, word: str = "none") -> ValueType:
    """The same kind, or nothing at all, which is written as `word`."""

    def read(text: str) -> Any:
        return None if text.strip().lower() == word else kind.read(text)

    return ValueType(
        kind.metavar,
        f"{kind.allowed} or {word}",
        read,
        lambda value: value is None or kind.legal(value),
    )


def _encodable(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
