"""Detects that this process itself stood still: stopped by SIGSTOP, or on a suspended machine.

Then its peers' silence proves nothing, for time went by in which it could not listen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

TICK_S = 0.25
# Far above what a busy machine delays a thread by, below the shortest --heartbeat-timeout.
STOOD_STILL_S = 1.5


class OwnClock:
    """A clock that somebody ticks often; `restart` is called when time went by without a tick.

    Any thread may ask. restart is called before anybody is told that the process moves again.
    """

    def __init__(
        self, restart: Callable[[], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._restart, self._now = restart, now
        self._lock = threading.Lock()
        self._ticked = now()
        self._halts = 0

    def tick(self) -> None:
        """Time has come this far."""
        with self._lock:
            self._catch_up()

    def halts(self) -> int:
        """How often the process stood still until now, this very moment included."""
        with self._lock:
            if self._now() - self._ticked > STOOD_STILL_S:
                self._catch_up()
            return self._halts

    def _catch_up(self) -> None:
        now = self._now()
        if now - self._ticked > STOOD_STILL_S:
            self._restart()
            self._halts += 1
        self._ticked = now
