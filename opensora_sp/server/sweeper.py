"""Looks for dead groups of a shared queue, and gives out again what they have."""

from __future__ import annotations

import logging
import random
import time

from opensora_sp.server.shared_queue import LEASE_SECONDS, SharedQueue

# The least time between two looks of a process for dead groups, and how far apart those processes
# look that all know the moment from which on a group counts as dead.
SWEEP_SECONDS, SPREAD_SECONDS = 1.0, 1.0
log = logging.getLogger(__name__)


class Sweeper:
    """Gives out again what dead groups have, for a process that calls it often.

    Signs of life come every second, so a group that lives now cannot count as dead before its lease
    is nearly over. Only then the next look is made: as early as one every second would find it.
    A group may come after a look, so the next one is never more than `LEASE_SECONDS` away, beside
    the spread. A group that comes with a shorter lease and dies before that look is found by it,
    so later by what its lease is shorter.
    """

    def __init__(self, queue: SharedQueue) -> None:
        self._queue, self._due = queue, 0.0

    def sweep(self) -> None:
        """Look for dead groups, if it is time. Raises QueueLost."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + SWEEP_SECONDS
        given, seconds = self._queue.give_out_again()
        # Not all processes at the same moment.
        spread = random.random() * SPREAD_SECONDS
        self._due = now + max(SWEEP_SECONDS, min(seconds, LEASE_SECONDS) + spread)
        for job_id, group in given:
            log.warning(
                "%s is given out again: no sign of life of the group %s", job_id, group,
                extra={"job": job_id},
            )  # fmt: skip
