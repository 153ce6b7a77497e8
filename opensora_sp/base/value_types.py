"""Value types: how a value is read from text, what is legal, and the line that refuses others.

Flags, YAML keys and the Python API use the same value types, so a value is legal in one of them
exactly when it is legal in the others.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import redacted

_TRUE = frozenset({"true", "t", "yes", "y", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "0"})
_LONGEST_SHOWN = 80
# Path separators, control characters, line separators, characters that change the direction of text
# and surrogates. A terminal would obey them, and a name could look like another one.
NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_PATH = 4095  # bytes; the limit of Linux
LONGEST_STEM = 200  # bytes; leaves room for a number, an extension and a temporary suffix in 255


def shown(value: object) -> str:
    """The value for an error message: quoted, on one line, shortened, without secrets."""
    try:
        text = redacted(repr(value))  # first: shortening could leave half a password
    except (ValueError, RecursionError):  # a whole number of over 4300 digits, lists in lists
        text = f"<a {type(value).__name__} too long to show>"
    if len(text) <= _LONGEST_SHOWN:
        return text
    # The middle is left out, because the end of a path says most.
    half = (_LONGEST_SHOWN - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


@dataclass(frozen=True)
class ValueType:
    """One type of value.

    `read` turns text into a value and raises ValueError where it cannot. `legal` checks a typed
    value. `allowed` completes the sentence "... is not ...". `metavar` is shown in --help.
    `schema` describes legal values in JSON (JSON Schema 2020-12). It may allow more than `legal`,
    never less.
    """

    metavar: str
    allowed: str
    read: Callable[[str], Any]
    legal: Callable[[Any], bool]
    schema: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def parse(self, name: str, text: str) -> Any:
        """The value of `text`. Raises UserError that names `name`, the text and what is legal."""
        try:
            value = self.read(text)
        except ValueError:
            raise self._refusal(name, text) from None
        if not self.legal(value):
            raise self._refusal(name, text)
        return value

    def check(self, name: str, value: Any) -> None:
        """Raise UserError where a typed value is not legal."""
        if not self.legal(value):
            raise self._refusal(name, value)

    def _refusal(self, name: str, value: object) -> UserError:
        return UserError(f"{name} {shown(value)} is not {self.allowed}")


def integer(low: int, high: int | None = None) -> ValueType:
    """Whole numbers from `low` to `high`, both included. `high` None: no upper limit."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text.strip()):
            raise ValueError(text)
        return int(text)

    def legal(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and value >= low and (high is None or value <= high)

    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    schema = {"type": "integer", "minimum": low}
    schema |= {} if high is None else {"maximum": high}
    return ValueType("N", f"a whole number {limits}", read, legal, schema)


def number(
    low: float, high: float = math.inf, *, above: bool = False, metavar: str = "X"
) -> ValueType:
    """Finite numbers from `low` to `high`. `above`: `low` itself is not legal."""

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
    schema = {"type": "number", "exclusiveMinimum" if above else "minimum": low}
    schema |= {} if math.isinf(high) else {"maximum": high}
    return ValueType(metavar, f"a finite number {limits}", read, legal, schema)


def boolean() -> ValueType:
    """true, t, yes, y, 1 or false, f, no, n, 0, in upper or lower case."""

    def read(text: str) -> bool:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError(text)
        return word in _TRUE

    return ValueType(
        "BOOL", "true or false", read, lambda value: isinstance(value, bool), {"type": "boolean"}
    )


def choice(*names: str) -> ValueType:
    """One of the given names."""
    allowed = f"one of {', '.join(names)}"
    metavar = "{" + ",".join(names) + "}"
    schema = {"enum": list(names)}
    return ValueType(metavar, allowed, str.strip, lambda value: value in names, schema)


def text(*, empty: bool = True, metavar: str = "TEXT") -> ValueType:
    """Text that UTF-8 can encode. Other bytes of a command line arrive as surrogates."""

    def legal(value: Any) -> bool:
        return isinstance(value, str) and _encodable(value) and (empty or bool(value.strip()))

    allowed = "valid UTF-8 text" if empty else "text with something in it"
    schema = {"type": "string"} | ({} if empty else {"pattern": r"\S"})
    return ValueType(metavar, allowed, str, legal, schema)


def path(metavar: str = "PATH") -> ValueType:
    """A possible path. `~` is expanded here, because a value of YAML has passed no shell."""

    def read(text: str) -> str:
        expanded = os.path.expanduser(text)
        # Without HOME and a user entry `~` stays, and a folder of that name would be created.
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

    return ValueType(metavar, "a usable path", read, legal, {"type": "string"})


def file_stem() -> ValueType:
    """A file name without its suffix: no folder, not hidden, short enough for a suffix."""

    def legal(value: Any) -> bool:
        if not isinstance(value, str) or not value.strip() or not _encodable(value):
            return False
        return (
            not NOT_IN_NAMES.search(value)
            and not value.startswith((".", "-"))
            and len(value.encode("utf-8")) <= LONGEST_STEM
        )

    allowed = f"a plain file name of at most {LONGEST_STEM} bytes, without a folder, control "
    allowed += "characters, or a dot or dash at its beginning"
    return ValueType("NAME", allowed, str, legal, {"type": "string"})


def optional(kind: ValueType, word: str = "none") -> ValueType:
    """The same type, or None, which is written as `word`, in JSON too: null is no value there."""

    def read(text: str) -> Any:
        return None if text.strip().lower() == word else kind.read(text)

    return ValueType(
        kind.metavar,
        f"{kind.allowed} or {word}",
        read,
        lambda value: value is None or kind.legal(value),
        {"anyOf": [kind.schema, {"enum": [word]}]},
    )


def _encodable(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
