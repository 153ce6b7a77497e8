"""A path or an address given for a reference, as an open file.

Addresses are refused unless allowed, and then bounded in size and time.
"""

from __future__ import annotations

import http.client
import re
import stat
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from opensora_sp.errors import UserError

MAX_REMOTE_BYTES = 512 * 2**20
MAX_REMOTE_SECONDS = 60.0

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_address(path: str | Path) -> bool:
    """Whether this is `scheme://...` rather than a path."""
    return _ADDRESS.match(str(path)) is not None


def check_address(path: str | Path, allow_remote: bool) -> None:
    """Refuse an address that is not allowed or not http(s).

    Raises:
        UserError: it is one of these.
    """
    if not allow_remote:
        raise UserError(
            f"reference {path} is remote: download it and give the file, or pass --allow-remote"
        )
    if not str(path).lower().startswith(("http://", "https://")):
        raise UserError(f"reference {path}: only http:// and https:// addresses can be fetched")


@contextmanager
def open_file(path: str | Path, allow_remote: bool = False) -> Iterator[IO[bytes]]:
    """Open a non-empty regular file, or fetch an address into a temporary one, for reading.

    At most `MAX_REMOTE_BYTES` are fetched in at most `MAX_REMOTE_SECONDS` (plus one silence of
    the same length at the end).

    Raises:
        UserError: one line that says why this file or address cannot be had.
    """
    if is_address(path):
        check_address(path, allow_remote)
        with tempfile.TemporaryFile() as copy:
            _fetch(str(path), copy)
            copy.seek(0)
            yield copy
        return
    with _opened(path) as file:
        yield file


def _opened(path: str | Path) -> IO[bytes]:
    try:
        file = Path(path).expanduser()
        # Asked before opening: opening a pipe would wait for its writer.
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"reference {str(path)!r} is not a file: give an image or a video")
        if status.st_size == 0:
            raise UserError(f"reference {path} is empty: give an image or a video")
        return file.open("rb")
    # ValueError: a NUL in the name; RuntimeError: ~ of somebody unknown.
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read reference {path}: {said(error)}; check the path") from error


def _fetch(address: str, file: IO[bytes]) -> None:
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "opensora-sp"})
        with urllib.request.urlopen(request, timeout=MAX_REMOTE_SECONDS) as answer:
            received = _receive(address, answer, file)
            if answer.length:  # what the server announced and did not send
                raise http.client.IncompleteRead(b"", answer.length)
            if not received:
                raise UserError(f"reference {address} is empty: give an image or a video")
    except TimeoutError as error:
        raise _too_slow(address) from error
    except http.client.IncompleteRead as error:
        raise UserError(f"reference {address} broke off while it was fetched: try again") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"cannot fetch reference {address}: {said(error)}") from error


def _receive(address: str, answer: http.client.HTTPResponse, file: IO[bytes]) -> int:
    deadline = time.monotonic() + MAX_REMOTE_SECONDS
    received = 0
    # read1 returns what one receive brought, so the deadline is seen on a slow line too.
    while block := answer.read1(2**16):
        received += len(block)
        if received > MAX_REMOTE_BYTES:
            raise UserError(
                f"reference {address} is larger than {MAX_REMOTE_BYTES / 2**20:g} MiB: "
                "download it and give the file"
            )
        if time.monotonic() > deadline:
            raise _too_slow(address)
        file.write(block)
    return received


def _too_slow(address: str) -> UserError:
    return UserError(
        f"reference {address} did not arrive within {MAX_REMOTE_SECONDS:g} s: "
        "download it and give the file"
    )


def said(error: BaseException) -> str:
    """What an error says, on one line, without error numbers."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
