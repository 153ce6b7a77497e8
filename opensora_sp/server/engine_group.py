"""The warm engine: ranks that hold the models and make one job after the other.

Started by `opensora-sp serve`, under torchrun or alone. Rank 0 takes jobs from the durable queue
and tells the others. Between jobs all ranks meet every second, so that none waits in a
collective.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import Cancelled, SharedFault, SharedPromptFault, UserError
from opensora_sp.base.screen import one_line
from opensora_sp.request.request import Job
from opensora_sp.server.checking import without_paths
from opensora_sp.server.durable import Worker
from opensora_sp.server.job_store import JobProgress, JobResult, JobStore
from opensora_sp.server.settings import GroupSettings
from opensora_sp.server.step_previews import StepPreviews, fitted_colours

if TYPE_CHECKING:
    from opensora_sp.jobs.schedule import Work
    from opensora_sp.models.latent_colours import LatentColours

TICK_SECONDS = 1.0
BEAT_SECONDS = 1.0
# The least time between two notes of a job's progress: a note is a small file.
NOTE_SECONDS = 0.3
LOCK_SECONDS = 60.0
log = logging.getLogger(__name__)


def serve_jobs(settings: GroupSettings, first: Job) -> int:
    """Open the engine for `first`, then make jobs until a signal comes. On every rank."""
    from opensora_sp.jobs.open import open_engine

    store = JobStore(settings.save_dir)
    with _only_engine(settings.save_dir), open_engine(first) as engine:
        leads = engine.whole.leads
        worker = (
            Worker(settings.queue, executor=f"engine-{settings.save_dir.name}") if leads else None
        )
        beat = Beat(settings.save_dir) if leads else None
        try:
            for size in settings.warmup:
                _warm_up(engine, settings, size)
            colours = fitted_colours(engine, first.tasks[0].request)
            if worker is not None and beat is not None:
                worker.start()
                beat.state = "ready"
            engine.whole.control.barrier()
            while True:
                job_id = worker.next(TICK_SECONDS) if worker is not None else None
                job_id = engine.whole.control.broadcast_object(job_id)
                if job_id is None:
                    continue
                _make(engine, settings, store, job_id, colours)
                if worker is not None:
                    worker.done()
        finally:
            if beat is not None:
                beat.close()
            if worker is not None:
                worker.close()


def _warm_up(engine: Any, settings: GroupSettings, config: str) -> None:
    """A short job of a configuration, so that the first real one is not the slow one."""
    import tempfile

    from opensora_sp.jobs.run import run_job

    folder = engine.whole.control.broadcast_object(
        tempfile.mkdtemp() if engine.whole.leads else None
    )
    arguments = [f"--config={config}", "--prompt=warm up", "--num-sampling-steps=1"]
    job = settings.job(arguments, Path(folder))
    run_job(engine, replace(job, engine=engine.settings))
    if engine.whole.leads:
        shutil.rmtree(folder, ignore_errors=True)


def _make(
    engine: Any,
    settings: GroupSettings,
    store: JobStore,
    job_id: str,
    colours: LatentColours | None,
) -> None:
    """Make one job, or write down in a line why it could not be made. Collective.

    colours: for its previews, on rank 0.
    """
    whole = engine.whole
    reporter = JobReporter(store, job_id, whole.leads)
    previews = StepPreviews([store.preview(job_id)], colours, reporter.previewed)
    try:
        job = whole.control.broadcast_object(
            _prepare(settings, store, job_id) if whole.leads else None
        )
        if isinstance(job, str):
            raise SharedFault(job)
        if job is None:  # deleted, or made already when the queue gave it out again
            return
        _run(engine, replace(job, engine=engine.settings), reporter, previews)
    except Cancelled:
        return
    except (SharedFault, SharedPromptFault) as error:  # every rank has it, and goes on
        reporter.failed(str(error))
        return
    except UserError as error:  # this rank alone: the others may wait for it for ever
        if whole.world_size == 1 and store.cancel_asked(job_id):
            store.delete(job_id)  # its folder went while it was written
            return
        reporter.failed(str(error), "engine_error")
        raise
    reporter.completed(job, engine)
    if whole.leads and store.cancel_asked(job_id):
        store.delete(job_id)  # deleted while it was decoded: nothing of it stays


def _prepare(settings: GroupSettings, store: JobStore, job_id: str) -> Any:
    """The job to make; None where there is nothing to do, a line where it cannot be made."""
    try:
        if store.result(job_id) is not None or store.cancel_asked(job_id):
            return None
        spec = store.spec(job_id)
    except KeyError:
        return None
    try:
        return settings.job(spec.arguments, store.outputs(job_id))
    except UserError as error:
        return str(error)


def _run(engine: Any, job: Any, reporter: JobReporter, previews: StepPreviews) -> None:
    from opensora_sp.jobs.prepare import check_encoder, encode_all_text, unfinished
    from opensora_sp.jobs.run import make_batch
    from opensora_sp.jobs.schedule import deal

    job, works = unfinished(job, engine.whole, engine.digests)
    engine.pipeline.models.clock.seconds.clear()
    reporter.begin(job, works)
    if not works:
        return
    check_encoder(engine.whole, job, works)
    # Where T5 is in host memory it takes nothing from the others.
    on_cpu = engine.whole.device.type == "cpu" or engine.settings.t5_device == "cpu"
    encode_all_text(engine.pipeline, deal(works, 1), keep_encoder=on_cpu)
    for work in works:
        make_batch(engine, job, work, None, on_step_end=reporter.on_step_end, previews=previews)


class JobReporter:
    """What the store is told of one job, by rank 0 alone; on the others it does nothing."""

    def __init__(self, store: JobStore, job_id: str, leads: bool) -> None:
        self._store, self._id, self._leads = store, job_id, leads
        self._started, self._noted, self._steps, self._done = time.time(), 0.0, 0, 0
        self._first: float | None = None
        self._before, self._preview = 0, 0

    def begin(self, job: Job, works: Sequence[Work]) -> None:
        """The job is made from here on: from the beginning, or from where it was saved."""
        request = job.tasks[0].request
        self._steps = request.steps * request.loop
        if works:
            self._done = works[0].start.clip * request.steps + works[0].start.step
        self._before = self._done
        self._note("text", force=True)

    def on_step_end(self, step: int, t: float, latents: Any) -> bool:
        """After every step: note how far it is; True where the job is to be stopped.

        latents is None: the engine gathers them for previews alone, and only when one is due.
        """
        if not self._leads:
            return False
        self._done += 1
        if self._first is None:
            self._first = time.time()
        last = self._done >= self._steps
        self._note("decoding" if last else "denoising", force=last)
        return self._store.cancel_asked(self._id)

    def previewed(self) -> None:
        """A preview of the last step is there."""
        self._preview = self._done
        self._note("decoding" if self._done >= self._steps else "denoising", force=True)

    def failed(self, reason: str, code: str = "invalid_request") -> None:
        """It cannot be made, for a reason in one line."""
        if self._leads:
            self._store.put_result(
                self._id,
                JobResult(
                    finished_at=time.time(),
                    error=one_line(without_paths(reason, self._store.outputs(self._id))),
                    error_code=code,
                    seconds=time.time() - self._started,
                ),
            )

    def completed(self, job: Any, engine: Any) -> None:
        """Its output is there."""
        if not self._leads:
            return
        clock = engine.pipeline.models.clock
        stages = {name: round(seconds, 4) for name, seconds in clock.seconds.items()}
        self._store.put_result(
            self._id,
            JobResult(
                finished_at=time.time(),
                file=job.tasks[0].output.name,
                seconds=time.time() - self._started,
                stages=stages,
                peak_bytes=_peak_bytes(engine.whole.device),
            ),
        )

    def _note(self, stage: str, *, force: bool = False) -> None:
        moment = time.time()
        if not self._leads or (not force and moment - self._noted < NOTE_SECONDS):
            return
        self._noted = moment
        eta = None
        made = self._done - self._before
        if self._first is not None and made > 1:
            pace = (moment - self._first) / (made - 1)
            eta = round(pace * max(0, self._steps - self._done), 1)
        self._store.put_progress(
            self._id, JobProgress(stage, self._done, self._steps, eta, self._started, self._preview)
        )


def _peak_bytes(device: Any) -> int | None:
    import torch

    module = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "max_memory_allocated"):
        return None
    return int(module.max_memory_allocated())  # type: ignore[union-attr]


class Beat:
    """Rank 0's sign of life for the gateway, a file that a thread writes every second."""

    def __init__(self, save_dir: Path) -> None:
        self.state = "starting"
        self._path, self._end = beat_path(save_dir), threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more signs; the file goes."""
        self._end.set()
        self._thread.join(5)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while True:
            beat = asdict(Sign(os.getpid(), self.state, time.time()))
            try:
                with atomic_output(self._path) as temporary:
                    temporary.write_text(json.dumps(beat), encoding="ascii")
            except UserError as error:
                log.warning(f"the engine's sign of life is not written: {error}")
            if self._end.wait(BEAT_SECONDS):
                return


def beat_path(save_dir: Path) -> Path:
    """The file of an engine's sign of life."""
    return save_dir / "engine.json"


@dataclass(frozen=True)
class Sign:
    """A sign of life. state: starting or ready; at: seconds since 1970."""

    pid: int
    state: str
    at: float


def read_beat(save_dir: Path) -> Sign | None:
    """The engine's last sign of life; None where there is none."""
    try:
        return Sign(**json.loads(beat_path(save_dir).read_text(encoding="ascii")))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def only_one(path: Path, refusal: str, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file, which another process may hold for so many seconds more.

    Raises UserError with `refusal` where it holds it longer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise UserError(refusal) from None
                time.sleep(0.2)
        yield


def _only_engine(save_dir: Path) -> AbstractContextManager[None]:
    """On rank 0, wait for an engine before this one: two must never make the same job."""
    from opensora_sp.base.launcher import read_launch

    if read_launch().rank != 0:
        return nullcontext()
    refusal = f"another engine uses {save_dir}: end it, or give another --save-dir"
    return only_one(save_dir / "engine.lock", refusal, LOCK_SECONDS)
