"""The durable queue of jobs: DBOS over SQLite in the save directory.

The gateway puts jobs in and looks (`JobQueue`); the engine's rank 0 takes them out one by one
(`Worker`). A job that was taken and not ended is given out again when the engine is back.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

QUEUE, WORKFLOW = "videos", "make_video"
APPLICATION, VERSION = "opensora-sp", "1"
# How often the engine may end in one job before the job is given up.
MOST_ATTEMPTS = 5
GIVEN_UP = "the engine ended too often while it was made; it is given up"
POLL_SECONDS = 0.1

log = logging.getLogger(__name__)


def sqlite_url(save_dir: Path) -> str:
    """The queue of a save directory."""
    return f"sqlite:///{save_dir.resolve()}/queue.sqlite"


@dataclass(frozen=True)
class QueuedJob:
    """A job as the queue sees it. status: queued, in_progress, ended or cancelled."""

    id: str
    status: str
    priority: int
    created_at: float


_STATUS = {
    "ENQUEUED": "queued",
    "DELAYED": "queued",
    "PENDING": "in_progress",
    "SUCCESS": "ended",
    "ERROR": "ended",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "ended",
    "CANCELLED": "cancelled",
}


class Jobs(Protocol):
    """What the routes of a gateway and the retention need of a queue; see `JobQueue`."""

    def put(self, job_id: str, priority: int) -> None:
        """Add a job that is written down."""

    def cancel(self, job_id: str) -> None:
        """Take out one that has not ended."""

    def forget(self, job_id: str) -> None:
        """Remove one that has ended."""

    def ended_before(self, moment: float) -> list[str]:
        """Ids of jobs that ended before `moment`, s since 1970, and may have left rows behind."""


class JobQueue:
    """The gateway's side. Its calls take milliseconds and may block: use them in a thread."""

    def __init__(self, url: str) -> None:
        import dbos

        dbos.run_dbos_database_migrations(system_database_url=url, schema="dbos")
        self._client = dbos.DBOSClient(
            system_database_url=url,
            serializer=dbos.DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
        )
        self._client.register_queue(QUEUE, worker_concurrency=1, polling_interval_sec=POLL_SECONDS)

    def put(self, job_id: str, priority: int) -> None:
        """Add a job. The same id twice is one job."""
        self._client.enqueue(
            {
                "workflow_name": WORKFLOW,
                "queue_name": QUEUE,
                "workflow_id": job_id,
                "app_version": VERSION,
                "priority": priority,
                "application_name": APPLICATION,
            },
            job_id,
        )

    def cancel(self, job_id: str) -> None:
        """Take it out; one that is being made is not given out again."""
        self._client.cancel_workflow(job_id)

    def live(self) -> list[QueuedJob]:
        """Jobs that are queued or being made, in the order in which they are taken."""
        found = self._client.list_workflows(
            status=["ENQUEUED", "DELAYED", "PENDING"], load_input=False, load_output=False
        )
        jobs = [_as_job(status) for status in found]
        return sorted(jobs, key=queue_place)

    def taken(self) -> list[QueuedJob]:
        """The jobs that the engine has, in no order: cheap, however many wait."""
        found = self._client.list_workflows(status="PENDING", load_input=False, load_output=False)
        return [_as_job(status) for status in found]

    def find(self, job_ids: Iterable[str]) -> dict[str, QueuedJob]:
        """The jobs of these ids that the queue knows."""
        wanted = list(job_ids)
        if not wanted:
            return {}
        found = self._client.list_workflows(
            workflow_ids=wanted, load_input=False, load_output=False
        )
        return {status.workflow_id: _as_job(status) for status in found}

    def ended_before(self, moment: float) -> list[str]:
        """Ids of all jobs that the queue knows and nothing changed since `moment`, s since 1970.

        They have ended or were cancelled.
        """
        ended = [raw for raw, status in _STATUS.items() if status in ("ended", "cancelled")]
        found = self._client.list_workflows(status=ended, load_input=False, load_output=False)
        return [one.workflow_id for one in found if (one.updated_at or 0) / 1000 < moment]

    def give_back(self, job_ids: Iterable[str]) -> None:
        """Queue again what the engine had of these jobs, once it was ended in order.

        How often it was taken is counted from zero then: a job is given up for the engines that
        ended in it, and not for the servers that were stopped.
        """
        mine = set(job_ids)
        for job in self.taken():
            if job.id in mine:
                self._client.resume_workflow(job.id, queue_name=QUEUE)

    def forget(self, job_id: str) -> None:
        """Remove every trace of a job that has ended."""
        self._client.delete_workflow(job_id)

    def close(self) -> None:
        """Give the database back."""
        self._client.destroy()


def _as_job(status: Any) -> QueuedJob:
    return QueuedJob(
        id=status.workflow_id,
        status=_STATUS[status.status],
        priority=status.priority or 0,
        created_at=(status.created_at or 0) / 1000,
    )


def queue_place(job: QueuedJob) -> tuple[bool, int, float]:
    """The place of a job: what is being made first, then as the queue gives jobs out.

    SQLite keeps whole seconds: jobs of one second are told apart by what their specs say.
    """
    return job.status != "in_progress", job.priority, job.created_at


class Worker:
    """The engine's side, on rank 0: DBOS takes a job in a thread, the main thread makes it.

    executor: a name that stays the same when this engine is started again, so that it gets back
    the jobs that it had.
    """

    def __init__(self, url: str, executor: str) -> None:
        import dbos

        self.idle = True  # whether no job is made
        self._dbos: Any = dbos
        self._jobs: queue.Queue[tuple[str, threading.Event]] = queue.Queue()
        self._done: threading.Event | None = None
        self._now = ""
        self._quiet = _QuietAboutDeleted()
        logging.getLogger("dbos").addFilter(self._quiet)
        self._app = self._dbos.DBOS(
            config={
                "name": APPLICATION,
                "system_database_url": url,
                "application_version": VERSION,
                "executor_id": executor,
                "serializer": self._dbos.DBOSPortableJSONSerializer(),
                "log_level": "WARNING",
                "run_migrations": True,
                "use_listen_notify": False,  # of Postgres alone
            }
        )
        make: Callable[[str], None] = self._hand_over
        self._dbos.DBOS.workflow(name=WORKFLOW, max_recovery_attempts=MOST_ATTEMPTS)(_plain(make))

    def start(self) -> None:
        """Begin to take jobs; those that this engine had come first."""
        self._dbos.DBOS.launch()
        self._dbos.DBOS.register_queue(
            QUEUE,
            worker_concurrency=1,
            polling_interval_sec=POLL_SECONDS,
            on_conflict="always_update",
        )

    def next(self, seconds: float) -> str | None:
        """The next job, or None after so many seconds without one. Then call `done`."""
        try:
            self._now, self._done = self._jobs.get(timeout=seconds)
        except queue.Empty:
            return None
        return self._now

    def behind(self, job_id: str) -> list[QueuedJob]:
        """The jobs that come after this one, in the order of the queue."""
        # One that DBOS took when this one's predecessor was cancelled waits in `_jobs`: PENDING.
        found = self._dbos.DBOS.list_workflows(
            queue_name=QUEUE, status=["ENQUEUED", "PENDING"], load_input=False, load_output=False
        )
        jobs = sorted(map(_as_job, found), key=queue_place)
        return [job for job in jobs if job.id != job_id]

    def attempts(self, job_id: str) -> int:
        """How often a job was given, this time too."""
        found = self._dbos.DBOS.list_workflows(
            workflow_ids=[job_id], load_input=False, load_output=False
        )
        return max((status.recovery_attempts or 1 for status in found), default=1)

    def prepare(self, job_id: str, job: Any, engine: Any) -> None:
        """Before a job is made: what was saved of it lies where it goes on."""

    def done(self, *, deleted: bool = False) -> bool:
        """The job that `next` gave has ended: its result is written, or it is deleted. True."""
        if deleted:
            self._quiet.jobs.append(self._now)
        if self._done is not None:
            self._done.set()
            self._done = None
        return True

    def close(self) -> None:
        """Take no more jobs. One that is being made stays the queue's, and is given out again."""
        self._dbos.DBOS.destroy()

    def _hand_over(self, job_id: str) -> None:
        """In DBOS's thread: wait until the main thread has made the job."""
        made = threading.Event()
        self._jobs.put((job_id, made))
        made.wait()


class _QuietAboutDeleted(logging.Filter):
    """Drops what DBOS says when a job that was deleted while it was made returns.

    That is a warning and a traceback. The gateway has said in a line that it is deleted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.jobs: deque[str] = deque(maxlen=100)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is kept."""
        said = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            said += str(record.exc_info[1])
        return not any(job_id in said for job_id in self.jobs)


def _plain(method: Callable[[str], None]) -> Callable[[str], None]:
    """A function of its own: DBOS keeps workflows by function."""

    def make_video(job_id: str) -> None:
        method(job_id)

    return make_video
