"""Memory that a CPU computation frees and asks for again stays in the process meanwhile.

The C library gives a large block back to the system when it is freed. The system hands out the
next one page by page, and fills each with zeros first. A step of the transformer frees and asks for
gigabytes, and this took up to a tenth of its time (docs/speed.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

from opensora_sp.base.free_memory import free_bytes
from opensora_sp.base.launcher import read_launch

# Of glibc's <malloc.h>: parameters and values with which freed memory stays, and the usual ones.
# glibc raises its thresholds by itself up to the usual ones here, and no more once one was set.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEPING = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
_USUAL = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 * 2**20), (_TRIM_THRESHOLD, 64 * 2**20))
# Where one of these is set, the user has decided. GLIBC_TUNABLES counts if it is about malloc.
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


class _Keepers:
    """How many threads compute now with what they free kept; the C library is told for all."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._count = 0

    def join(self) -> bool:
        """One more, unless the C library cannot be told or the user has decided."""
        with self._lock:
            if _user_decided(os.environ) or not keep_freed(True):
                return False
            self._count += 1
            return True

    def leave(self) -> None:
        """One less; after the last all goes back."""
        with self._lock:
            self._count -= 1
            if not self._count:
                keep_freed(False)


_keepers = _Keepers()


@contextmanager
def freed_memory_kept(device: torch.device, needed: float) -> Iterator[bool]:
    """Keep what is freed within a `with` block for the next who asks, and give it back at its end.

    needed: bytes that one rank may hold within the block, with what lies unused between blocks of
    other sizes. Yields whether memory is kept: on a CPU, by glibc, where the machine has so much
    free for each of its ranks, and where the user has not set how memory is allocated. In threads
    other than the main one glibc gives blocks of over 64 MB back all the same.
    """
    kept = device.type == "cpu" and _is_there(needed) and _keepers.join()
    try:
        yield kept
    finally:
        if kept:
            _keepers.leave()


def _is_there(needed: float) -> bool:
    return needed * read_launch().local_world_size <= free_bytes(torch.device("cpu"))


def keep_freed(on: bool) -> bool:
    """Freed blocks stay in the process from now on, or as usual large ones do not; those go now.

    Returns whether the C library can be told so.
    """
    library = _glibc()
    if library is None:
        return False
    # Large blocks come from the heap too, and its free end is not given back.
    for parameter, value in _KEEPING if on else _USUAL:
        library.mallopt(parameter, value)
    if not on:
        library.malloc_trim(0)
    return True


def _user_decided(environ: Mapping[str, str]) -> bool:
    return "glibc.malloc" in environ.get("GLIBC_TUNABLES", "") or any(
        name in environ for name in _CHOICES
    )


def _glibc() -> Any:
    """The C library of this process, None where it is not glibc."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # not a POSIX system
        return None
    needed = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return library if all(hasattr(library, name) for name in needed) else None
