"""When an engine that has ended is started again, and when it is given up. No process, no clock."""

from __future__ import annotations

from collections import deque

# An engine that has ended is started again after this time, doubled each time up to the second.
RESTART_SECONDS, MOST_RESTART_SECONDS = 0.5, 30.0
# After so many ends in a row, each before it was ready or within a minute, it is given up.
MOST_QUICK, QUICK_SECONDS = 10, 60.0
# After so many ends within this time without one completed job it is given up too. A job that ends
# the engine is given up after five, so a few such jobs do not end the server.
MOST_FRUITLESS, WINDOW_SECONDS = 20, 24 * 3600.0
# The command line's exit code for a mistake that a person has to mend.
REFUSED = 2


class Restarts:
    """Told of every end of the engine. count: how often it was started again."""

    def __init__(self) -> None:
        self.count = 0
        self._quick = 0
        self._wait = RESTART_SECONDS
        self._fruitless: deque[float] = deque()
        self._completed = 0

    def ended(
        self, now: float, *, code: int, was_ready: bool, lasted: float, completed: int
    ) -> float | str:
        """Seconds to wait before the next start, or why there is none, in a line.

        now: seconds on a clock that never goes back. lasted: seconds from the start to the end.
        completed: jobs completed since the server was started.
        """
        why = f"the engine ended with exit code {code}; its messages say why"
        if code == REFUSED and not was_ready:
            return why
        self._quick = 0 if was_ready and lasted > QUICK_SECONDS else self._quick + 1
        if self._quick >= MOST_QUICK:
            return f"{why}. It ended {self._quick} times in a row, each soon after its start"
        if completed > self._completed:
            self._fruitless.clear()
        self._completed = completed
        self._fruitless.append(now)
        while now - self._fruitless[0] > WINDOW_SECONDS:
            self._fruitless.popleft()
        if len(self._fruitless) >= MOST_FRUITLESS:
            return f"{why}. It ended {len(self._fruitless)} times without completing a job"
        first = self._quick <= 1
        self._wait = RESTART_SECONDS if first else min(MOST_RESTART_SECONDS, self._wait * 2)
        self.count += 1
        return self._wait
