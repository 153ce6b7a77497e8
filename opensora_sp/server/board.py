"""What the gateway knows of every job, in memory: read from the store once, then kept in step.

A look at the queue every quarter of a second is all that watching costs, however many clients poll.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opensora_sp.server.durable import JobQueue, QueuedJob
from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec, JobStore
from opensora_sp.server.protocol import video_json

LOOK_SECONDS = 0.25
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One job. status: queued, in_progress, completed or failed."""

    spec: JobSpec
    status: str
    progress: JobProgress | None = None
    result: JobResult | None = None
    place: int | None = None

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.status in ("queued", "in_progress")


class Board:
    """All jobs. Reading never waits for the disk; `look` brings it in step with the queue.

    kept_seconds: how long ended jobs are kept; 0 for ever.
    """

    def __init__(self, store: JobStore, jobs: JobQueue) -> None:
        self._store, self._jobs = store, jobs
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        # Called with every job that completes or fails, in the thread that looks.
        self.on_end: list[Callable[[Entry], None]] = []
        self.kept_seconds = 0.0

    def load(self) -> None:
        """Read every job; one that was written but never queued is queued now."""
        specs = []
        for job_id in list(self._store.ids()):
            try:
                spec = self._store.spec(job_id)
            except (KeyError, TypeError):
                log.warning("the folder of %s is damaged; it is left out", job_id)
                continue
            if self._store.result(job_id) is None and self._store.cancel_asked(job_id):
                self._store.delete(job_id)  # the server was killed while it was deleted
                continue
            specs.append(spec)
        known = self._jobs.find([spec.id for spec in specs])
        for spec in specs:
            result = self._store.result(spec.id)
            if result is None and spec.id not in known:
                self._jobs.put(spec.id, spec.priority)
            self._entries[spec.id] = self._entry(spec, known.get(spec.id), result)
        self.look()

    def start(self) -> None:
        """Look again and again, in a thread of its own."""
        threading.Thread(target=self._run, name="board", daemon=True).start()

    def close(self) -> None:
        """Stop looking."""
        self._end.set()

    def add(self, spec: JobSpec) -> Entry:
        """A new job that is written and queued."""
        entry = Entry(spec, "queued")
        with self._lock:
            self._entries[spec.id] = entry
        return entry

    def remove(self, job_id: str) -> None:
        """A job is gone."""
        with self._lock:
            self._entries.pop(job_id, None)

    def get(self, job_id: str) -> Entry | None:
        """One job."""
        return self._entries.get(job_id)

    def all(self) -> list[Entry]:
        """Every job, newest first."""
        with self._lock:
            entries = list(self._entries.values())
        return sorted(entries, key=lambda e: (-e.spec.created_at, e.spec.id))

    def counts(self) -> dict[str, int]:
        """How many jobs have each status."""
        counts = {"queued": 0, "in_progress": 0, "completed": 0, "failed": 0}
        with self._lock:
            for entry in self._entries.values():
                counts[entry.status] += 1
        return counts

    def video(self, entry: Entry) -> dict[str, Any]:
        """A job as the API shows it."""
        return video_json(
            entry.spec,
            entry.status,
            entry.progress,
            entry.result,
            place=entry.place,
            kept_seconds=self.kept_seconds,
        )

    def look(self) -> None:
        """Bring every job that has not ended in step with the queue and the store."""
        live = self._jobs.live()
        places = {job.id: place for place, job in enumerate(live)}
        by_id = {job.id: job for job in live}
        with self._lock:
            watched = [entry for entry in self._entries.values() if entry.live]
        for entry in watched:
            job_id = entry.spec.id
            result = self._store.result(job_id)
            found = self._entry(entry.spec, by_id.get(job_id), result)
            if not found.live or job_id in by_id:
                self._keep(entry, replace(found, place=places.get(job_id)))
                continue
            # Not live any more and without a result: it ended between the two looks, or the
            # queue gave it up.
            ended = self._jobs.find([job_id]).get(job_id)
            result = self._store.result(job_id)
            if result is None and ended is not None and ended.status == "ended":
                result = JobResult(
                    finished_at=time.time(),
                    error="the engine ended too often while it was made; it is given up",
                    error_code="engine_ended",
                )
                self._store.put_result(job_id, result)
            if result is not None:
                self._keep(entry, self._entry(entry.spec, ended, result))

    def _entry(self, spec: JobSpec, job: QueuedJob | None, result: JobResult | None) -> Entry:
        if result is not None:
            status = "failed" if result.error is not None else "completed"
            return Entry(spec, status, None, result)
        if job is None or job.status != "in_progress":
            return Entry(spec, "queued")
        progress = self._store.progress(spec.id)
        # Taken by the engine, but not begun: for a client it is still queued.
        return Entry(spec, "queued" if progress is None else "in_progress", progress)

    def _keep(self, before: Entry, entry: Entry) -> None:
        if entry == before:
            return
        with self._lock:
            if entry.spec.id not in self._entries:
                return
            self._entries[entry.spec.id] = entry
        if before.live and not entry.live:
            for tell in self.on_end:
                tell(entry)

    def _run(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception:
                log.exception("looking at the queue failed; it is tried again")
