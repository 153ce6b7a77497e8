"""JSON from outside the program: its size is limited before parsing, and its types are checked.

Everything that a person, a file, another process or the network gives as JSON is read here. What is
refused is the same everywhere: too many bytes, bytes that are not UTF-8, what JSON does not allow
(NaN is not JSON), nesting beyond 64 levels, long numbers, and one key twice.

Imports no torch, because planning and the first checks of a run read such files too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import ValueType, shown

MOST_BYTES = 64 * 2**20
_DEEPEST = 64
_LONGEST_NUMBER = 40  # characters; sizes, counts and measures are shorter
_LONGEST_REASON = 160


class NotJson(ValueError):  # noqa: N818 (what the text is, said of it)
    """The text is not JSON that is read. Its message is said of the text: "is nested too deeply".

    key: the key that is there twice, if that is what is wrong.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def parse_json(raw: bytes | str, *, most_bytes: int = MOST_BYTES) -> Any:
    """The value that bytes in UTF-8, or a text, hold.

    Raises NotJson for more than `most_bytes` (characters of a text), bytes that are not UTF-8, what
    is not JSON, nesting deeper than 64 levels, a number of over 40 characters or beyond a float,
    and a key that is twice in one object. Half a character (a lone surrogate) is not refused,
    because Python writes those bytes of a path so that are not UTF-8.
    """
    if len(raw) > most_bytes:
        raise NotJson(f"has {len(raw)} bytes: at most {most_bytes} are read")
    too_deep = f"is nested too deeply: {_DEEPEST} levels are read"
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
        content = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=_fraction,
        )
    except RecursionError:
        raise NotJson(too_deep) from None
    except NotJson:
        raise
    except ValueError as problem:
        reason = " ".join(str(problem).split())[:_LONGEST_REASON]
        raise NotJson(f"is not readable JSON: {reason}") from None
    if _is_deeper(content, _DEEPEST):
        raise NotJson(too_deep)
    return content


def parse_object(
    raw: bytes | str,
    what: str,
    *,
    error: type[UserError] = UserError,
) -> dict[str, Any]:
    """The object that bytes or a text hold. Raises `error`, which begins with `what`."""
    try:
        content = parse_json(raw)
    except NotJson as problem:
        raise error(f"{what} {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{what} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_object(
    path: Path,
    what: str | None = None,
    *,
    most_bytes: int = MOST_BYTES,
    error: type[UserError] = UserError,
) -> dict[str, Any]:
    """The object in a JSON file.

    what: how a message names the file, by default its path. Raises `error` for a file that is not
    regular or larger than `most_bytes`, and for what `parse_json` refuses or is not an object.
    """
    said = str(path) if what is None else what
    return parse_object(_read(path, said, most_bytes, error), said, error=error)


def _read(path: Path, said: str, most_bytes: int, error: type[UserError]) -> bytes:
    try:
        if access.exists(path) and not access.is_file(path):
            raise UserError(f"{said} is not a regular file")
        size = path.stat().st_size
        if size > most_bytes:
            raise UserError(
                f"{said} has {size} bytes: at most {most_bytes} are read, no such file is larger"
            )
        return access.read_bytes(path, limit=most_bytes, what=said)
    except UserError as problem:
        raise error(str(problem)) from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{said} cannot be read: {reason}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise NotJson(f"is not readable JSON: the key {shown(key)} is there twice", key)
        found[key] = value
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _whole(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _fraction(text: str) -> float:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters")
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text} is too large")
    return value


def _is_deeper(content: Any, levels: int) -> bool:
    """Whether anything is nested deeper. Goes level by level, so it needs no recursion."""
    layer = [content]
    for _ in range(levels):
        layer = [inner for value in layer for inner in _inside(value)]
        if not layer:
            return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check_keys(
    content: Mapping[str, Any],
    kinds: Mapping[str, ValueType],
    where: str,
    *,
    error: type[UserError] = UserError,
) -> None:
    """Raise `error`, naming file and key, for a value that is not of its key's type.

    kinds: the value type of each key. Keys may be absent. where: the file, and for an object inside
    it the key with a dot, such as "config.json: vae_2d."
    """
    for key, kind in kinds.items():
        if key in content and not kind.legal(content[key]):
            raise error(f"{where}{key} {shown(content[key])} is not {kind.allowed}")


def inner_object(
    content: Mapping[str, Any], key: str, where: str, *, error: type[UserError] = UserError
) -> dict[str, Any]:
    """The object under a key; empty where the key is absent or null. Raises `error` for others."""
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise error(f"{where}{key} {shown(value)} is not an object")
    return value
