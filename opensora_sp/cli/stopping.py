"""Ctrl-C and SIGTERM: the first leaves in order, the second ends the process at once."""

import signal
from contextlib import AbstractContextManager
from types import FrameType
from typing import NoReturn

from opensora_sp.base.errors import Stopped
from opensora_sp.parallel.watchdog.signals import STOP_SIGNALS, handled_signals


def stoppable() -> AbstractContextManager[None]:
    """While the block runs, a signal raises Stopped in it, which leaves through every `with`."""
    return handled_signals(_stop)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once
    raise Stopped(number)
