"""Atomic output files: a file appears whole or not at all. Errors of writing are one line."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opensora_sp.base.errors import UserError
from opensora_sp.base.processes import Process, this_node

# The name holds the writer's node and process, so that others can remove what it left behind.
_NAME = re.compile(r"\.opensora-sp-(?P<node>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{16}\.tmp")
_unfinished: set[Path] = set()


@contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on a clean exit.

    On any exception the temporary file is removed and `path` stays as it was. A missing directory
    is created. Errors of the body pass through unchanged.

    Raises:
        UserError: the directory cannot be made, the name is not possible there or is of something
            else than a file, such as /dev/null, which renaming would replace, or renaming fails.
    """
    path = Path(os.path.abspath(path))
    # The temporary name does not contain the final one, which may already be of maximal length.
    token = secrets.token_hex(8)
    temporary = path.parent / f".opensora-sp-{this_node()}-{os.getpid()}-{token}.tmp"
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name that is too long would otherwise fail only at the end, after hours of work.
        with suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(0, "a directory has that name")
            if not stat.S_ISREG(mode):
                raise FileExistsError(0, "a device or a pipe has that name")
    _unfinished.add(temporary)
    try:
        yield temporary
        with reported(path):
            _sync(temporary)  # quota and network file systems report late errors here
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # a disk that has become read-only keeps it; the error says why
            temporary.unlink(missing_ok=True)
        raise
    finally:
        _unfinished.discard(temporary)


def remove_unfinished() -> None:
    """Remove this process's temporary files. Call it before an exit that does not unwind."""
    for path in list(_unfinished):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files that killed processes of this machine left in a directory."""
    with suppress(OSError):
        for path in directory.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is None or name["node"] != this_node():
                continue
            # The start time is not known here, so a later process with the same number counts as
            # the writer. The file then stays until that process ends too, which does no harm.
            if Process(int(name["pid"]), "", name["node"]).state() == "gone":
                path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn an error of the system or FFmpeg, while `path` is written, into one UserError line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_ffmpeg_error(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write {path}: {reason}; free space there or choose another place or name"
        ) from error


def is_ffmpeg_error(error: Exception) -> bool:
    """Whether the error comes from FFmpeg."""
    import av

    return isinstance(error, av.FFmpegError)
