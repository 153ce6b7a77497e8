"""Handles Ctrl-C and SIGTERM for the length of a block; ends a process without unwinding.

Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def default_signals() -> AbstractContextManager[None]:
    """Let Ctrl-C and SIGTERM end this process at once while the block runs."""
    return handled_signals(signal.SIG_DFL)


@contextmanager
def handled_signals(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM handled so while the block runs; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def leave(code: int) -> NoReturn:
    """End this process without unwinding: threads of a broken group could wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
