"""What a gateway knows of every job where there are several gateways and groups.

Four times a second it asks the database what has changed, so that all gateways show the same list,
whoever changed it. It also sees to it that jobs of dead groups are given out again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from opensora_sp.server.board import WHOLE_LOOK_SECONDS, Board, Entry, rounded
from opensora_sp.server.durable import JobQueue
from opensora_sp.server.engine_process import Health
from opensora_sp.server.job_store import JobResult, JobSpec, JobStore
from opensora_sp.server.shared_link import QueueLost
from opensora_sp.server.shared_queue import SharedQueue
from opensora_sp.server.shared_rows import Group, Row
from opensora_sp.server.shared_store import SharedStore
from opensora_sp.server.sweeper import Sweeper

TIDY_SECONDS = 600.0
# A job that was deleted here is not shown again by a look that had begun before.
FORGOTTEN_SECONDS = 60.0
MOST_PRICES = 1000
NOBODY = "no group is there to make it"
log = logging.getLogger(__name__)


class GatewayQueue:
    """The shared queue as the routes of a gateway use it."""

    def __init__(self, queue: SharedQueue, store: SharedStore) -> None:
        self._queue, self._store = queue, store
        # Jobs of which nobody knows whether they are queued: their clients were told that they
        # are not.
        self.unsure: set[str] = set()
        # Jobs of which nobody knows whether they are deleted: their clients were told likewise.
        self._deleted: set[str] = set()

    def put(self, job_id: str, priority: int) -> None:
        """Add a job that is written down."""
        try:
            self._queue.put(self._store.portable(self._store.spec(job_id)))
        except QueueLost:
            self.unsure.add(job_id)
            raise

    def withdraw_unsure(self) -> None:
        """Undo or finish what was done by calls of which the answer was lost. Raises QueueLost."""
        for job_id in list(self.unsure):
            self._queue.remove(job_id)
            self.unsure.discard(job_id)
        for job_id in list(self._deleted):
            if self._queue.row(job_id) is None:
                # A group may write there now, and removes what is left. Else it is an orphan.
                self._store.forget(job_id)
            self._deleted.discard(job_id)

    def cancel(self, job_id: str) -> None:
        """Take it out; a group that makes it hears of it within a second."""
        try:
            self._queue.remove(job_id)
        except QueueLost:
            self._deleted.add(job_id)
            raise

    def forget(self, job_id: str) -> None:
        """Remove a job that has ended."""
        self.cancel(job_id)

    def ended_before(self, moment: float) -> list[str]:
        """No job: rows and folders of deleted jobs go by themselves."""
        return []


class SharedBoard(Board):
    """All jobs, kept in step with the database. `lost`: why it does not answer now, or None.

    price: what a job of a list costs on this gateway's engine, for who queues a list knows no
    engine.
    """

    others = True

    def __init__(
        self,
        store: JobStore,
        queue: SharedQueue,
        engine: str = "",
        price: Callable[[JobSpec], Mapping[str, Any] | None] = lambda spec: None,
    ) -> None:
        # All that asks the one-machine queue is written anew here.
        super().__init__(store, cast(JobQueue, queue), engine)
        self._price = price
        self._prices: dict[str, Mapping[str, Any] | None] = {}
        self._queue = queue
        self._looking = threading.Lock()
        self.groups: Sequence[Group] = ()
        self.lost: str | None = None
        self._since: int | None = None
        self._contact = -1
        # Rows of jobs that have not ended; attempts and results of all.
        self._rows: dict[str, Row] = {}
        self._attempts: dict[str, int] = {}
        # When a job was deleted here, and the time in its spec: one that is sent again has another.
        self._forgotten: dict[str, tuple[float, float]] = {}
        self._sweeper, self._tidied = Sweeper(queue), 0.0
        self._said: set[str] = set()
        # Called with every look that the database answers.
        self.on_contact: list[Callable[[], None]] = []

    def load(self) -> None:
        """Read every job. Raises QueueLost."""
        self._catch_up(begins=True)
        ended = [(e.spec, e.result) for e in self._entries.values() if e.result is not None]
        for spec, result in sorted(ended, key=lambda pair: pair[1].finished_at):
            self.estimator.learn(spec, result)
        self._show()

    def attempt_of(self, job_id: str) -> int:
        """The attempt that has a job, or whose output is the job's; 0 where nobody took it."""
        return self._attempts.get(job_id, 0)

    def result_of(self, job_id: str) -> JobResult | None:
        """How a job ended."""
        entry = self.get(job_id)
        return None if entry is None else entry.result

    def seek(self, job_id: str) -> Entry | None:
        """One job, from the database where another gateway has just queued it.

        Raises QueueLost.
        """
        try:
            JobStore.folder(self._store, job_id)
        except KeyError:
            return None
        row = self._queue.row(job_id)
        if row is not None:
            with self._looking:
                self._take_in(row, begins=False)
        return self.get(job_id)

    def remove(self, job_id: str) -> bool:
        """A job is gone. False where it was gone before."""
        entry = self.get(job_id)
        if entry is not None:
            self._forgotten[job_id] = time.monotonic(), entry.spec.created_at
        self._rows.pop(job_id, None)
        self._attempts.pop(job_id, None)
        return super().remove(job_id)

    def video(self, entry: Entry) -> dict[str, Any]:
        """A job as the API shows it, with the group that makes it, or why none can."""
        more = {"group": entry.group or None}
        if entry.waits:
            more["waiting_for"] = entry.waits
        return super().video(entry) | more

    def queue_seconds(self, priority: int) -> float | None:
        """Seconds until every job that a new one would wait for has ended; None where unknown."""
        seconds = super().queue_seconds(priority)
        return None if seconds is None else seconds / max(1, len(self.ready()))

    def ready(self) -> list[Group]:
        """The groups that take jobs now."""
        return [group for group in self.groups if group.alive and group.state == "ready"]

    def group_counts(self) -> dict[str, int]:
        """How many groups are in each state; dead: not heard of for longer than their lease."""
        found = dict.fromkeys(("ready", "starting", "draining", "dead"), 0)
        for group in self.groups:
            found[group.state if group.alive else "dead"] += 1
        return found

    def health(self) -> Health:
        """How the groups are, all together. Any thread may ask; costs nothing."""
        if self.lost is not None:
            return Health("starting", "the queue's database does not answer")
        if self.ready():
            return Health("ready")
        return Health("starting", "" if any(g.alive for g in self.groups) else "no group is there")

    def look(self) -> None:
        """Bring every job in step with the database; give out again what dead groups had."""
        with self._looking:
            self._look()

    def _look(self) -> None:
        try:
            self._catch_up()
            self._sweeper.sweep()
            for each in self.on_contact:
                each()
            now = time.monotonic()
            if now - self._tidied > TIDY_SECONDS:
                self._tidied = now
                self._queue.tidy()
        except QueueLost as error:
            if self.lost is None:
                log.warning("the queue's database does not answer; it is tried again: %s", error)
            self.lost = str(error)
            return
        if self.lost is not None:
            log.info("the queue's database answers again")
            self.lost = None
        self._show()

    def _catch_up(self, *, begins: bool = False) -> None:
        """Take in what has changed in the database since the last look."""
        whole = self._since is None
        rows, since = self._queue.changes(self._since)
        self.groups = self._queue.groups()
        if not whole and self._queue.link.contact != self._contact:
            # Contact was lost meanwhile, for how long nobody knows: rows may have gone.
            whole = True
            rows, since = self._queue.changes(None)
        contact = self._queue.link.contact
        if whole and not begins:
            there = {row.id for row in rows}
            fresh = time.time() - FORGOTTEN_SECONDS  # may be on its way into the database
            for entry in self.all():
                if entry.spec.id not in there and entry.spec.created_at < fresh:
                    self.remove(entry.spec.id)
        old = time.monotonic() - FORGOTTEN_SECONDS
        # Copies: requests delete jobs meanwhile.
        for job_id, (moment, _) in self._forgotten.copy().items():
            if moment < old:
                self._forgotten.pop(job_id, None)
        for row in rows:
            self._take_in(row, begins=begins)
        # Only now: where something was raised above, the next look sees the same rows again.
        self._since, self._contact = since, contact

    def _take_in(self, row: Row, *, begins: bool) -> None:
        job_id = row.id
        if row.state == "gone":
            self._rows.pop(job_id, None)
            if self.get(job_id) is not None:
                self.remove(job_id)
            return
        _, deleted = self._forgotten.get(job_id, (0.0, None))
        if deleted == row.spec.created_at:
            return
        row = self._priced(row)
        entry = self.get(job_id)
        if entry is not None and entry.spec.created_at != row.spec.created_at:
            super().remove(job_id)  # it was deleted and sent again between two looks
            entry = None
        if row.attempt:
            self._attempts[job_id] = row.attempt
        if row.state == "ended":
            self._rows.pop(job_id, None)
            ended = _ended(row)
            if entry is None and begins:
                self._put(ended)
                return
            if entry is None:
                entry = Entry(row.spec, "queued")
                self._put(entry)
            elif entry.result is not None and entry.result != row.result:
                entry = self._begun_again(entry, row)
            if entry.result is None:
                self._keep(entry, ended)
            return
        if self._rows.get(job_id) != row:
            self._changed = True
        self._rows[job_id] = row
        if entry is None:
            self._put(Entry(row.spec, "queued"))
        elif not entry.live:
            self._begun_again(entry, row)

    def _priced(self, row: Row) -> Row:
        """A row with what its job costs here, asked once for each shape: a list has few."""
        cost = row.spec.shown.get("cost")
        if not isinstance(cost, Mapping) or "engine" in cost:
            return row
        shape = str(cost.get("shape"))
        if shape not in self._prices:
            if len(self._prices) >= MOST_PRICES:
                self._prices.clear()
            self._prices[shape] = self._price(row.spec)
        found = self._prices[shape]
        if found is None:
            return row
        return replace(row, spec=replace(row.spec, shown=row.spec.shown | {"cost": found}))

    def _begun_again(self, ended: Entry, row: Row) -> Entry:
        """A job that had failed is made once more: how it ended is no more."""
        entry = Entry(row.spec, "queued")
        self._keep(ended, entry)
        self._changed = True
        return entry

    def _show(self) -> None:
        """Work out places, progress and times left of all jobs that have not ended."""
        late = time.monotonic() - self._whole_look > WHOLE_LOOK_SECONDS
        rows = list(self._rows.copy().values())  # a copy: requests delete jobs meanwhile
        taken = [row for row in rows if row.state == "taken"]
        makers = {(group.name, group.epoch): group for group in self.groups}
        if not (self._changed or late):
            for row in taken:
                entry = self.get(row.id)
                if entry is not None and entry.live:
                    found = _taken(row, makers)
                    eta = entry.eta_s if found.status == "queued" else None
                    self._keep(entry, replace(found, place=entry.place, eta_s=eta))
            return
        self._changed, self._whole_look = False, time.monotonic()
        live = sorted(rows, key=_place)
        places = {row.id: place for place, row in enumerate(live)}
        now = {row.id: _taken(row, makers) for row in taken}
        waiting = [now.get(row.id) or self.get(row.id) for row in live]
        etas = self._etas(entry for entry in waiting if entry is not None)
        stuck = self._unmakeable({row.shape for row in live if row.state == "queued"})
        for row in live:
            entry = self.get(row.id)
            if entry is None or not entry.live:
                continue
            found = now.get(row.id) or Entry(row.spec, "queued", waits=stuck.get(row.shape, ""))
            eta = None if found.progress is not None else etas.get(row.id)
            self._keep(entry, replace(found, place=places[row.id], eta_s=rounded(eta)))

    def _etas(self, entries: Iterable[Entry]) -> dict[str, float]:
        """Seconds until each has ended, as if every group could make every job.

        entries: those that are made first, then the others in their order.
        """
        found: dict[str, float] = {}
        groups, until = max(1, len(self.ready())), 0.0
        for entry in entries:
            left = None if entry.waits else self.estimator.left(entry)
            if left is None:
                if entry.waits:
                    continue
                break
            until += left
            found[entry.spec.id] = left if entry.progress is not None else until / groups
        return found

    def _unmakeable(self, shapes: set[str]) -> dict[str, str]:
        """Why no living group can make a job, by shape. The groups have judged that themselves."""
        alive = [group for group in self.groups if group.alive]
        if not alive:
            return dict.fromkeys(shapes, NOBODY)
        found = {
            shape: f"no group that is there can make it: {alive[0].unfit[shape]}"
            for shape in shapes
            if all(shape in group.unfit for group in alive)
        }
        for shape in found.keys() - self._said:
            log.warning("jobs of %s wait: %s", shape, found[shape])
        self._said = set(found)
        return found


def _place(row: Row) -> tuple[bool, int, float, str]:
    return row.state != "taken", row.priority, row.created_at, row.id


def _taken(row: Row, makers: dict[tuple[str, int], Group]) -> Entry:
    """A job that a group has. Until its first sign of life about it, it is still queued."""
    group = makers.get((row.group or "", row.epoch or 0))
    mine = group is not None and group.job == row.id and group.attempt == row.attempt
    progress = group.progress if group is not None and mine else None
    status = "queued" if progress is None else "in_progress"
    return Entry(row.spec, status, progress, group=row.group or "")


def _ended(row: Row) -> Entry:
    assert row.result is not None
    status = "failed" if row.result.error is not None else "completed"
    return Entry(row.spec, status, None, row.result, group=row.group or "")
