"""JSON from outside the program: its size is limited before parsing, and its types are checked.

Imports no torch, because planning and the first checks of a run read such files too.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import ValueType, shown

MOST_BYTES = 64 * 2**20
_DEEPEST = 64
_LONGEST_NUMBER = 40  # characters; sizes, counts and measures are shorter


def read_object(
    path: Path,
    what: str | None = None,
    *,
    most_bytes: int = MOST_BYTES,
    error: type[UserError] = UserError,
) -> dict[str, Any]:
    """The object in a JSON file.

    what: how a message names the file, by default its path. Raises `error` for a file that is not
    regular, larger than `most_bytes`, not UTF-8, not JSON (NaN is not JSON), nested deeper than 64
    levels, or not an object.
    """
    said = str(path) if what is None else what
    try:
        # Checked before opening: opening a pipe would wait, and a device has no end.
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{said} is not a regular file")
        if found.st_size > most_bytes:
            raise error(
                f"{said} has {found.st_size} bytes: at most {most_bytes} are read, no such file "
                "is larger"
            )
        with path.open("rb") as file:
            raw = file.read(most_bytes + 1)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{said} cannot be read: {reason}") from None
    try:
        content = json.loads(
            raw.decode("utf-8-sig"),
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=_fraction,
        )
    except RecursionError:
        raise error(f"{said} is nested too deeply: {_DEEPEST} levels are read") from None
    except ValueError as problem:
        reason = " ".join(str(problem).split())[:160]
        raise error(f"{said} is not readable JSON: {reason}") from None
    if _is_deeper(content, _DEEPEST):
        raise error(f"{said} is nested too deeply: {_DEEPEST} levels are read")
    if not isinstance(content, dict):
        raise error(f"{said} must hold a JSON object, not a {type(content).__name__}")
    return content


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
