"""Retention: ended jobs are removed by age and by size, and what deleted jobs left is swept up."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from opensora_sp.server.board import Board, Entry
from opensora_sp.server.durable import Jobs
from opensora_sp.server.job_store import JobStore

SWEEP_SECONDS = 60.0
ORPHANS_EVERY = 60  # sweeps
DAY_SECONDS = 86_400.0
# A folder without a job, and a queue's row without one, may still be written to for this long.
ORPHAN_SECONDS = 3600.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What is kept of ended jobs; 0 for no limit.

    days: since they ended. gb: GB (1e9 bytes) of all jobs' folders together.
    """

    days: float = 0.0
    gb: float = 0.0

    @property
    def seconds(self) -> float:
        """How long they are kept; 0 for ever."""
        return self.days * DAY_SECONDS


class Retention:
    """Removes what is beyond `kept`, oldest first, and never a job that has not ended.

    remove: removes everything of an ended job.
    """

    def __init__(
        self,
        store: JobStore,
        jobs: Jobs,
        board: Board,
        kept: Kept,
        remove: Callable[[Entry], None],
    ) -> None:
        self._store, self._jobs, self._board = store, jobs, board
        self._kept, self._remove = kept, remove
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Sweep now and every minute, orphans every hour, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop sweeping."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def sweep(self, now: float) -> list[str]:
        """Remove what is too old or too much at `now`, seconds since 1970; the ids that went."""
        everything = self._board.all()
        ended = sorted(
            (entry for entry in everything if not entry.live and entry.result is not None),
            key=_finished_at,
        )
        doomed: list[Entry] = []
        if self._kept.days:
            oldest = now - self._kept.seconds
            doomed = [entry for entry in ended if _finished_at(entry) < oldest]
        if self._kept.gb:
            rest = ended[len(doomed) :]
            sizes = {entry.spec.id: self._store.size(entry.spec.id) for entry in everything}
            total = sum(sizes.values()) - sum(sizes[entry.spec.id] for entry in doomed)
            while rest and total > self._kept.gb * 1e9:
                total -= sizes[rest[0].spec.id]
                doomed.append(rest.pop(0))
        for entry in doomed:
            job_id = entry.spec.id
            self._remove(entry)
            log.info("%s is removed: it ended the longest ago", job_id, extra={"job": job_id})
        return [entry.spec.id for entry in doomed]

    def sweep_orphans(self, now: float) -> None:
        """Remove folders and rows of the queue that belong to no job."""
        known = {entry.spec.id for entry in self._board.all()}
        for job_id in list(self._store.orphans(now - ORPHAN_SECONDS)):
            self._store.delete(job_id)
            log.info("the folder of %s is removed: it holds no job", job_id)
        for job_id in self._jobs.ended_before(now - ORPHAN_SECONDS):
            if job_id not in known and not (self._store.folder(job_id) / "job.json").exists():
                self._jobs.forget(job_id)

    def _run(self) -> None:
        for number in itertools.count():
            try:
                self.sweep(time.time())
                if number % ORPHANS_EVERY == 0:
                    self.sweep_orphans(time.time())
            except Exception:
                log.exception("removing old jobs failed; it is tried again")
            if self._end.wait(SWEEP_SECONDS):
                return


def _finished_at(entry: Entry) -> float:
    assert entry.result is not None
    return entry.result.finished_at
