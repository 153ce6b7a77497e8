"""Access to the files and folders that people name, with one clear line where it is refused.

For a folder without permission `Path.exists` raises PermissionError or returns False, depending on
the Python version. Both mislead. Files are read with a limit of size, and only where they are
regular files: reading a pipe waits for its writer, and a device may have no end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Literal

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import LONGEST_PATH, shown

# Which addresses are fetched: False none, True public ones, "private" all.
Remote = bool | Literal["private"]

# Bytes of a path that are left for the names of records, outputs and temporary files.
_ROOM_FOR_NAMES = 300

CONFIG_LIMIT = 1 << 20
RECORD_LIMIT = 16 << 20
PROMPTS_LIMIT = 32 << 20
_BLOCK = 1 << 20

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)

AnyPath = str | os.PathLike[str]


def exists(path: AnyPath) -> bool:
    """Whether something is there. Raises UserError where that cannot be seen."""
    return _mode(path) is not None


def is_file(path: AnyPath) -> bool:
    """Whether a regular file, or a link to one, is there. Raises UserError as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def no_file(path: AnyPath) -> str:
    """What is said of a path that is no regular file."""
    return "this is no regular file" if exists(path) else "there is no such file"


def is_dir(path: AnyPath) -> bool:
    """Whether a folder, or a link to one, is there. Raises UserError as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def absolute(path: AnyPath) -> Path:
    """The absolute path. Raises UserError where the working directory has been deleted."""
    try:
        return Path(os.path.abspath(path))
    except FileNotFoundError:
        raise UserError(
            f"{shown(os.fspath(path))}: the working directory has been deleted: change to another "
            "one and run again"
        ) from None


def user_cache(name: str) -> Path | None:
    """`opensora-sp/name` in the user's cache directory; None for a user who has none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = base if os.path.isabs(base) else os.path.join(os.path.expanduser("~"), ".cache")
    # Without HOME and an entry of the user, as in some containers, "~" stays "~".
    return Path(home) / "opensora-sp" / name if os.path.isabs(home) else None


def require_room_for_names(folder: AnyPath, what: str) -> None:
    """Raises UserError where the files of a run would have paths that are too long below it."""
    length = len(os.fsencode(absolute(folder)))
    if length + _ROOM_FOR_NAMES > LONGEST_PATH:
        raise UserError(
            f"{what} {shown(os.fspath(folder))} is a path of {length} bytes, but at most "
            f"{LONGEST_PATH - _ROOM_FOR_NAMES} leave room for file names: choose a shorter one"
        )


def read_bytes(path: AnyPath, *, limit: int, what: str | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    what: how an error names the file, such as `--config 'a.yaml'`. Raises UserError.
    """
    name = what or shown(os.fspath(path))
    try:
        # Opening a pipe would wait for its writer. The flag has no effect on regular files.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            mode = os.fstat(handle).st_mode
            if stat.S_ISDIR(mode):
                raise UserError(f"{name} cannot be read: it is a directory")
            if not stat.S_ISREG(mode):
                raise UserError(f"{name} cannot be read: it is {_sort(mode)}, not a regular file")
            parts, size = [], 0
            while block := file.read(min(_BLOCK, limit + 1 - size)):
                parts.append(block)
                size += len(block)
                if size > limit:
                    raise UserError(
                        f"{name} is larger than {limit / 2**20:g} MiB, the most that is read"
                    )
            return b"".join(parts)
    except PermissionError:
        raise _forbidden(path, what) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {_said(error)}") from None


def read_text(path: AnyPath, *, limit: int, what: str | None = None) -> str:
    """As `read_bytes`, decoded as UTF-8. A byte order mark is dropped.

    Line endings become line feeds, as Python does for text files.
    """
    content = read_bytes(path, limit=limit, what=what)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = what or shown(os.fspath(path))
        raise UserError(f"{name} is not UTF-8 text (byte {error.start})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _mode(path: AnyPath) -> int | None:
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise _forbidden(path, None) from None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise UserError(f"{shown(os.fspath(path))} cannot be looked at: {_said(error)}") from None
    except ValueError as error:  # the path holds a NUL or a character that no file name can have
        raise UserError(f"{shown(os.fspath(path))} is not a path: {_said(error)}") from None


def _forbidden(path: AnyPath, what: str | None) -> UserError:
    name = shown(os.fspath(path))
    said = name if what is None or what.endswith(name) else f"{what}: {name}"
    return UserError(
        f"{said} may not be read (permission denied): it belongs to another user, or its rights or "
        "those of a folder above it leave you out; choose another or have them changed"
    )


def _sort(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "something else"


def _said(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
