"""What the gateway knows of every job, in memory: read from the store once, then kept in step.

A look at the queue every quarter of a second is all that watching costs, however many clients poll:
what a job looks like to a client is worked out when it changes, and the order of jobs is kept.
"""

from __future__ import annotations

import bisect
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opensora_sp.server.durable import GIVEN_UP, JobQueue, QueuedJob, queue_place
from opensora_sp.server.estimate import Estimator
from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec, JobStore
from opensora_sp.server.protocol import video_json

LOOK_SECONDS = 0.25
# A look at the jobs that the engine has is cheap; one at all that wait costs more with every job.
# It is made when something changed, and at least this often.
WHOLE_LOOK_SECONDS = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One job. status: queued, in_progress, completed or failed.

    place: how many jobs are before it. eta_s: seconds until it has ended, None where unknown.
    group: which group makes or made it, where there are several. waits: why none can make it now.
    """

    spec: JobSpec
    status: str
    progress: JobProgress | None = None
    result: JobResult | None = None
    place: int | None = None
    eta_s: float | None = None
    group: str = ""
    waits: str = ""

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.status in ("queued", "in_progress")


class Board:
    """All jobs. Reading never waits for the disk; `look` brings it in step with the queue.

    kept_seconds: how long ended jobs are kept; 0 for ever. others: whether other gateways have the
    same jobs, so that `seek` may find one that is not here yet.
    """

    others = False

    def __init__(self, store: JobStore, jobs: JobQueue, engine: str = "") -> None:
        self._store, self._jobs = store, jobs
        self.estimator = Estimator(engine)
        self._entries: dict[str, Entry] = {}
        # (created_at, id) of every job, oldest first.
        self._order: list[tuple[float, str]] = []
        self._bodies: dict[str, tuple[Entry, bytes]] = {}
        self._counts: Counter[str] = Counter()
        self._queued_of: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._changed = True
        self._taken: set[str] = set()
        self._whole_look = 0.0
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
            self._put(self._entry(spec, known.get(spec.id), result))
        ended = [(e.spec, e.result) for e in self._entries.values() if e.result is not None]
        for spec, result in sorted(ended, key=lambda pair: pair[1].finished_at):
            self.estimator.learn(spec, result)
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
        self._put(entry)
        return entry

    def remove(self, job_id: str) -> bool:
        """A job is gone. False where it was gone before."""
        with self._lock:
            entry = self._entries.pop(job_id, None)
            self._bodies.pop(job_id, None)
            if entry is None:
                return False
            self._count(entry, -1)
            del self._order[bisect.bisect_left(self._order, _key(entry))]
            self._changed = True
            return True

    def get(self, job_id: str) -> Entry | None:
        """One job."""
        return self._entries.get(job_id)

    def seek(self, job_id: str) -> Entry | None:
        """One job, looked for where other gateways put theirs too. May take milliseconds."""
        return self.get(job_id)

    def group_counts(self) -> dict[str, int]:
        """How many groups of a shared queue are in each state; empty without such a queue."""
        return {}

    def all(self) -> list[Entry]:
        """Every job, newest first."""
        with self._lock:
            return [self._entries[job_id] for _, job_id in reversed(self._order)]

    def page(
        self,
        after: Entry | None,
        limit: int,
        *,
        newest_first: bool = True,
        shows: Callable[[Entry], bool] = lambda entry: True,
    ) -> tuple[list[Entry], bool]:
        """Up to `limit` of the jobs that follow `after`, and whether there are more of them.

        shows: whether a job is one of those that are listed. Costs a page, not the whole list.
        """
        found: list[Entry] = []
        step = -1 if newest_first else 1
        with self._lock:
            place = len(self._order) - 1 if newest_first else 0
            if after is not None:
                place = bisect.bisect_left(self._order, _key(after))
                here = place < len(self._order) and self._order[place] == _key(after)
                place += step if here or newest_first else 0  # it may have gone meanwhile
            while 0 <= place < len(self._order):
                entry = self._entries[self._order[place][1]]
                place += step
                if not shows(entry):
                    continue
                if len(found) == limit:
                    return found, True
                found.append(entry)
        return found, False

    def counts(self) -> dict[str, int]:
        """How many jobs have each status."""
        statuses = ("queued", "in_progress", "completed", "failed")
        with self._lock:
            return {status: self._counts[status] for status in statuses}

    def queued_of(self, owner: str) -> int:
        """How many jobs of an owner are queued."""
        with self._lock:
            return self._queued_of[owner]

    def video(self, entry: Entry) -> dict[str, Any]:
        """A job as the API shows it: made from the entry alone, as `body` keeps it."""
        return video_json(
            entry.spec,
            entry.status,
            entry.progress,
            entry.result,
            place=entry.place,
            eta_s=entry.eta_s,
            kept_seconds=self.kept_seconds,
        )

    def body(self, entry: Entry) -> bytes:
        """`video` as JSON. It is worked out once for every change of a job, not for every poll."""
        known = self._bodies.get(entry.spec.id)
        if known is not None and known[0] is entry:
            return known[1]
        body = json.dumps(self.video(entry), ensure_ascii=False, separators=(",", ":")).encode()
        with self._lock:
            if self._entries.get(entry.spec.id) is entry:
                self._bodies[entry.spec.id] = (entry, body)
        return body

    def queue_seconds(self, priority: int) -> float | None:
        """Seconds until every job that a new one would wait for has ended; None where unknown."""
        with self._lock:
            before = [
                entry
                for entry in self._entries.values()
                if entry.live and (entry.progress or entry.spec.priority <= priority)
            ]
        etas = self.estimator.etas(sorted(before, key=lambda entry: entry.progress is None))
        return max(etas.values(), default=0.0) if len(etas) == len(before) else None

    def look(self) -> None:
        """Bring every job that has not ended in step with the queue and the store."""
        taken = {job.id: job for job in self._jobs.taken()}
        late = time.monotonic() - self._whole_look > WHOLE_LOOK_SECONDS
        if not (self._changed or late or set(taken) != self._taken):
            for job_id, job in taken.items():
                entry = self._entries.get(job_id)
                if entry is not None and entry.live:
                    found = self._entry(entry.spec, job, self._store.result(job_id))
                    eta = entry.eta_s if found.status == "queued" else None
                    self._keep(entry, replace(found, place=entry.place, eta_s=eta))
            return
        self._changed, self._taken, self._whole_look = False, set(taken), time.monotonic()
        self._look_at_all()

    def _look_at_all(self) -> None:
        with self._lock:
            watched = [entry for entry in self._entries.values() if entry.live]
        if not watched:
            return
        live = self._jobs.live()
        with self._lock:
            created = {entry.spec.id: entry.spec.created_at for entry in self._entries.values()}
        live.sort(key=lambda job: (*queue_place(job), created.get(job.id, 0.0)))
        places = {job.id: place for place, job in enumerate(live)}
        by_id = {job.id: job for job in live}
        for job_id in self._store.together():  # those behind the first are queued as they are made
            if job_id in by_id:
                by_id[job_id] = replace(by_id[job_id], status="in_progress")
        waiting = [entry for entry in watched if entry.spec.id in places]
        etas = self.estimator.etas(sorted(waiting, key=lambda entry: places[entry.spec.id]))
        for entry in watched:
            job_id = entry.spec.id
            job = by_id.get(job_id)
            if job is not None:
                # Only one that was begun can have ended: the others' folders are not looked into.
                begun = job.status == "in_progress" or entry.progress is not None
                result = self._store.result(job_id) if begun else None
                found = self._entry(entry.spec, job, result)
                eta = None if found.progress is not None else etas.get(job_id)
                self._keep(entry, replace(found, place=places[job_id], eta_s=rounded(eta)))
                continue
            # Not live any more: it ended between the two looks, or the queue gave it up. One that
            # has just been added may not be in the queue yet.
            ended = self._jobs.find([job_id]).get(job_id)
            result = self._store.result(job_id)
            if result is None and ended is not None and ended.status == "ended":
                result = JobResult(
                    finished_at=time.time(),
                    error=GIVEN_UP,
                    error_code="engine_ended",
                )
                self._store.put_result(job_id, result)
            if result is not None:
                self._keep(entry, self._entry(entry.spec, ended, result))
            else:
                self._changed = True

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
            self._count(self._entries[entry.spec.id], -1)
            self._count(entry, 1)
            self._entries[entry.spec.id] = entry
            if not entry.live:
                self._changed = True  # those behind it move up

        if entry.result is not None and before.result is None:
            self.estimator.learn(entry.spec, entry.result)

        if before.live and not entry.live:
            for tell in self.on_end:
                tell(entry)

    def _put(self, entry: Entry) -> None:
        with self._lock:
            self._entries[entry.spec.id] = entry
            bisect.insort(self._order, _key(entry))
            self._count(entry, 1)
            self._changed = True

    def _count(self, entry: Entry, by: int) -> None:
        self._counts[entry.status] += by
        if entry.status == "queued":
            self._queued_of[entry.spec.owner] += by
            if not self._queued_of[entry.spec.owner]:
                del self._queued_of[entry.spec.owner]

    def _run(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception:
                self._changed = True
                log.exception("looking at the queue failed; it is tried again")


def _key(entry: Entry) -> tuple[float, str]:
    return entry.spec.created_at, entry.spec.id


def rounded(seconds: float | None) -> float | None:
    """As exact as it is known: a client is not told of every quarter of a second."""
    if seconds is None:
        return None
    return float(round(seconds)) if seconds >= 10 else round(seconds, 1)
