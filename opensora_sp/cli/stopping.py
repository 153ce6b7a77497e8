"""Ctrl-C and SIGTERM: the first leaves in order, the second ends the process at once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from opensora_sp.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """While the block runs, a signal raises Stopped in it, which leaves through every `with`."""
    before = {number: signal.signal(number, _stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once
    raise Stopped(number)


def leave(code: int) -> NoReturn:
    """End this process without unwinding: threads of a broken group could wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
