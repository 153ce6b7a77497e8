"""A group's side of the shared queue, on rank 0: what it takes, makes and publishes.

A thread gives a sign of life every second, with the progress of the job, and hears whether the job
is still this group's. Where it is not, the ranks leave it at the next step.
"""

from __future__ import annotations

import logging
import platform
import shutil
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opensora_sp.base.errors import Stopped, UserError
from opensora_sp.server.beat import BEAT_SECONDS, drain_path, sign_of, stuck
from opensora_sp.server.durable import QueuedJob
from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec, JobStore
from opensora_sp.server.served import why_not
from opensora_sp.server.settings import GroupSettings
from opensora_sp.server.shared_link import QueueLost
from opensora_sp.server.shared_queue import SharedQueue
from opensora_sp.server.shared_rows import Claim
from opensora_sp.server.shared_store import (
    SEEN_SECONDS,
    SharedStore,
    holds_token,
    read_token,
    remove_other_attempts,
    take_over,
)
from opensora_sp.server.sweeper import Sweeper

if TYPE_CHECKING:
    from opensora_sp.parallel.control import ControlPlane
    from opensora_sp.planner.warm import WarmEngine

# How long an idle group waits for word of a new job in one go; the sign of life waits as long.
WAIT_SECONDS = 0.2
RETRY_SECONDS = 1.0
# Shapes that a group keeps in mind as too large for it, and those of them that it tells of with its
# sign of life. Where more are queued, those that it forgets are judged again.
MOST_UNFIT, MOST_TOLD = 10_000, 200
log = logging.getLogger(__name__)


class GroupStore(SharedStore):
    """The folders of jobs as the group sees them that makes one of them.

    The result goes to the database, and the progress with the next sign of life.
    """

    def __init__(self, settings: GroupSettings) -> None:
        super().__init__(settings.save_dir, self._number, self._ended)
        self.claim: Claim | None = None
        self.told: JobProgress | None = None
        self.made: JobResult | None = None
        # Set by the sign of life: this claim is another attempt's by now, or was deleted. It may
        # come when the next job has begun, which is not lost then.
        self.lost: Claim | None = None
        # Wakes whoever gives the sign of life: a job has begun.
        self.news = threading.Event()

    def begin(self, claim: Claim | None) -> None:
        """Make this job from here on; None: none."""
        self.claim, self.told, self.made = claim, None, None

    def spec(self, job_id: str) -> JobSpec:
        """What was asked for."""
        if self.claim is not None and self.claim.id == job_id:
            return self.local(self.claim.spec)
        return super().spec(job_id)

    def put_progress(self, job_id: str, progress: JobProgress) -> None:
        """Keep it for the next sign of life; the first of a job is told at once."""
        first, self.told = self.told is None, progress
        if first:
            self.news.set()

    def put_result(self, job_id: str, result: JobResult) -> None:
        """Keep it until it is published; the preview goes."""
        self.made = result
        self.preview(job_id).unlink(missing_ok=True)

    def cancel_asked(self, job_id: str) -> bool:
        """Whether it was deleted or another attempt has it, as the database says."""
        return self.claim is not None and self.lost is self.claim

    def delete(self, job_id: str) -> None:
        """Leave it: what stays of it is decided when the queue has been asked."""

    def _number(self, job_id: str) -> int:
        return self.claim.attempt if self.claim is not None and self.claim.id == job_id else 0

    def _ended(self, job_id: str) -> JobResult | None:
        return self.made if self.claim is not None and self.claim.id == job_id else None


class GroupWorker:
    """Takes jobs of the shared queue one by one; the main thread makes them."""

    def __init__(
        self,
        settings: GroupSettings,
        store: GroupStore,
        control: ControlPlane,
        device: Any,
        warm: WarmEngine | None,
    ) -> None:
        self._settings, self._store, self._control, self._warm = settings, store, control, warm
        self._queue = SharedQueue(
            settings.queue, f"opensora-sp {settings.group_name}", listens=True
        )
        self._about = {
            "ranks": settings.ranks,
            "device": device.type,
            "card": card_of(device),
            "host": socket.gethostname(),
            "serves": list(settings.serves),
        }
        self._token = read_token(settings.save_dir)
        self._epoch = 0
        self._replaced = False
        self._unsure = False
        self._said_lost = False
        # Shapes that this group can make, and those that it cannot, with the reason.
        self._fit: set[str] = set()
        self._unfit: dict[str, str] = {}
        self._refused = 0  # how often a shape was judged not to fit
        self._sweeper = Sweeper(self._queue)
        self.idle, self.state = True, "starting"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="group beat", daemon=True)

    def start(self) -> None:
        """Begin as a group. Raises UserError where another has its name."""
        name, lease = self._settings.group_name, self._settings.lease_s
        end: float | None = None
        while True:
            try:
                found = self._queue.register(name, self._settings.parent, self._about, lease)
            except QueueLost as error:
                self._say_lost(error)
                found, end = None, None
            if found is not None:
                break
            # The group of that name may have been killed just now: its lease has to end first.
            if end is None:
                end = time.monotonic() + lease + 5
            if time.monotonic() > end:
                raise UserError(f"--group-name {name}: a group of that name lives; give another")
            time.sleep(RETRY_SECONDS)
        self._epoch, self.state = found, "ready"
        self._beat()
        self._thread.start()

    def next(self, seconds: float) -> str | None:
        """The next job that fits, or None after so many seconds without one. Then call `done`."""
        if self._replaced:
            raise RuntimeError(f"another engine has begun as the group {self._settings.group_name}")
        end = time.monotonic() + seconds
        try:
            self._sweeper.sweep()  # an idle group looks after the dead, where no gateway does
        except QueueLost as error:
            self._say_lost(error)
        while (left := end - time.monotonic()) > 0:
            try:
                claim = self._claim(end)
                self._said_lost = False
                if claim is None:
                    self._wait(end)
                    continue
            except QueueLost as error:
                self._say_lost(error)
                time.sleep(min(RETRY_SECONDS, max(0.0, left)))
                continue
            self._store.begin(claim)
            self._see(claim)
            return claim.id
        return None

    def behind(self, job_id: str) -> Sequence[QueuedJob]:
        """No job: groups that share a queue make one job at a time."""
        return ()

    def attempts(self, job_id: str) -> int:
        """The number of this attempt."""
        return 1 if self._store.claim is None else self._store.claim.attempt

    def prepare(self, job_id: str, job: Any, engine: Any) -> None:
        """Bring over what an earlier attempt has saved."""
        claim = self._store.claim
        if claim is not None and claim.attempt > 1 and not isinstance(job, str):
            take_over(self._store, job_id, claim.attempt, job, engine)

    def done(self, *, deleted: bool = False) -> bool:
        """Publish how the job ended; False where the database does not answer: call again.

        deleted: as the other kind of queue needs it; here the database knows.
        """
        claim, made = self._store.claim, self._store.made
        if claim is None:
            return True
        try:
            if made is not None:
                state = self._queue.publish(claim, made)
            else:
                state = self._queue.let_go(self._settings.group_name, self._epoch, claim)
        except QueueLost as error:
            self._say_lost(error)
            time.sleep(RETRY_SECONDS)
            return False
        self._said_lost = False
        self._settle(claim, state, made)
        self._store.begin(None)
        return True

    def close(self) -> None:
        """Take no more jobs. One that is being made is given out again.

        Where an error ends the engine, the end counts among those of the job.
        """
        error = sys.exc_info()[0]
        orderly = error is None or issubclass(error, (Stopped, KeyboardInterrupt, SystemExit))
        for _ in range(3 if self._store.made is not None else 0):
            if self.done():  # why a job ended the engine is the job's result
                break
        self._end.set()
        self._store.news.set()
        if self._thread.is_alive():
            self._thread.join(5)
        try:
            if orderly and self._epoch and not self._replaced:
                self._queue.leave(self._settings.group_name, self._epoch)
        except QueueLost as lost:
            self._say_lost(lost)
        self._queue.close()

    def _wait(self, end: float) -> None:
        """Until there is word of a new job, or that time on `time.monotonic`."""
        while (left := end - time.monotonic()) > 0:
            # In short pieces: the sign of life goes through the same connection.
            if self._queue.link.wait(min(WAIT_SECONDS, left)):
                return

    def _claim(self, end: float) -> Claim | None:
        """A job that fits; None without one, or none by `end`: the ranks have to meet then."""
        if not holds_token(self._settings.save_dir, self._token):
            log.error("--save-dir %s is not there: no job is taken", self._settings.save_dir)
            time.sleep(RETRY_SECONDS)
            return None
        if self._unsure:  # a claim of which the answer was lost may have been made
            self._queue.give_back(self._settings.group_name, self._epoch)
            self._unsure = False
        while True:
            judged = self._refused
            try:
                claim = self._queue.claim(
                    self._settings.group_name, self._epoch, self._unfit, self._fits
                )
            except QueueLost:
                self._unsure = True
                raise
            if claim is not None or self._refused == judged or time.monotonic() > end:
                return claim

    def _fits(self, shape: str, spec: JobSpec) -> bool:
        """Whether this group's devices can make a job, by the planner."""
        if shape in self._fit:
            return True
        try:
            arguments = self._store.local(spec).arguments
            job = self._settings.job(arguments, self._settings.save_dir)
            reason = why_not(job, self._warm)
        except UserError:
            return True  # it is made, and fails with what is wrong with it
        if reason is None:
            if shape:
                self._fit.add(shape)
            return True
        if len(self._unfit) >= MOST_UNFIT:
            self._unfit.pop(next(iter(self._unfit)))
        self._unfit[shape] = reason
        self._refused += 1
        return False

    def _see(self, claim: Claim) -> None:
        """Wait a little until the folder of a job is seen here: another machine wrote it.

        A job of a list has none until a group takes it.
        """
        spec = self._store.local(claim.spec)
        if spec == claim.spec:  # without uploads
            # Its folder may be what was left of one that was deleted and sent again.
            if not (self._store.folder(claim.id) / "job.json").is_file():
                self._store.put_spec(spec)
            return
        end = time.monotonic() + SEEN_SECONDS
        while not (self._store.folder(claim.id) / "job.json").is_file():
            if time.monotonic() > end or self._store.cancel_asked(claim.id):
                return  # what it needs and cannot be found is then said by the job itself
            time.sleep(0.1)

    def _settle(self, claim: Claim, state: str, made: JobResult | None) -> None:
        """Remove what nobody needs any more of a job that this group leaves."""
        store, mine = self._store, self._store.attempt(claim.id, claim.attempt)
        if state == "gone":
            JobStore.delete(store, claim.id)
        elif state == "ended" and made is not None:
            remove_other_attempts(store, claim.id, claim.attempt)
        elif state in ("ended", "ended elsewhere"):
            shutil.rmtree(mine, ignore_errors=True)
        if state in ("queued", "taken", "ended elsewhere"):
            # What it has saved stays until the job has ended: the next attempt may go on from it.
            log.warning(
                "%s, attempt %d: another attempt has the job or will get it; nothing of this one "
                "is published",
                claim.id, claim.attempt,
            )  # fmt: skip

    def _beat(self) -> None:
        claim = self._store.claim
        draining = drain_path(self._settings.place).exists()
        held = self._queue.beat(
            self._settings.group_name,
            self._epoch,
            state="draining" if draining else self.state,
            claim=claim,
            progress=self._store.told,
            unfit=dict(list(self._unfit.copy().items())[-MOST_TOLD:]),
        )
        if held is None:
            self._replaced = True
        if not held and claim is not None:
            self._store.lost = claim

    def _run(self) -> None:
        while not self._end.is_set():
            self._store.news.wait(BEAT_SECONDS)
            self._store.news.clear()
            # Ranks that stand still are no living group, though this thread runs.
            if stuck(sign_of(self._control, self.state, idle=self.idle), 0.0) is not None:
                continue
            try:
                self._beat()
            except QueueLost as error:
                self._say_lost(error)
            except Exception:
                log.exception("the group's sign of life could not be given; it is tried again")

    def _say_lost(self, error: QueueLost) -> None:
        if not self._said_lost:
            self._said_lost = True
            log.warning("the queue's database does not answer; it is tried again: %s", error)


def card_of(device: Any) -> str:
    """The name of a device, as its backend or the system tells it."""
    import torch

    backend = getattr(torch, device.type, None)
    try:
        return str(backend.get_device_name(device))  # type: ignore[union-attr]
    except Exception:  # a backend without it says no more than its type
        return platform.machine() if device.type == "cpu" else device.type
