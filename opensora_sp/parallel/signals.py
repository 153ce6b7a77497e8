"""Who handles Ctrl-C and SIGTERM for the length of a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


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
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
