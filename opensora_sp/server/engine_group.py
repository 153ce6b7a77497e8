"""The warm engine: ranks that hold the models and make one job after the other.

Started by `opensora-sp serve`, under torchrun or alone. Rank 0 takes jobs from the durable queue
and tells the others. Between jobs all ranks meet every second, so that none waits in a
collective.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base.errors import (
    Cancelled,
    SharedFault,
    SharedPromptFault,
    SigningError,
    UserError,
)
from opensora_sp.request.request import Job
from opensora_sp.server.batches import gather, joined
from opensora_sp.server.beat import Beat, drain_path
from opensora_sp.server.durable import Worker
from opensora_sp.server.job_reporter import JobReporter
from opensora_sp.server.job_store import JobStore
from opensora_sp.server.logs import about_job
from opensora_sp.server.served import served_shapes, write_facts
from opensora_sp.server.settings import SIGNS_NOTHING, GroupSettings
from opensora_sp.server.step_previews import StepPreviews, fitted_colours

if TYPE_CHECKING:
    from opensora_sp.models.latent_colours import LatentColours
    from opensora_sp.server.group_worker import GroupWorker

TICK_SECONDS = 1.0
LOCK_SECONDS = 60.0
log = logging.getLogger(__name__)


def serve_jobs(settings: GroupSettings, first: Job) -> int:
    """Open the engine for `first`, then make jobs until a signal comes. On every rank."""
    from opensora_sp.jobs.open import open_engine

    serves = served_shapes(settings, first)
    with _only_engine(settings.place), open_engine(first, serves) as engine:
        leads = engine.whole.leads
        if leads and engine.warm is not None:
            write_facts(settings.place, engine.warm, settings.digest())
        store, worker = _queue_of(settings, engine)
        beat = Beat(settings.place, engine.whole.control) if leads else None
        try:
            for size in settings.warmup:
                _warm_up(engine, settings, size)
            colours = fitted_colours(engine, first.tasks[0].request)
            if worker is not None and beat is not None:
                worker.start()
                beat.state = "ready"
                log.info("the engine is ready: %d ranks", engine.whole.world_size)
            engine.whole.control.barrier()
            while True:
                job_id = _next_job(worker, settings) if worker is not None else None
                job_id = engine.whole.control.meet(job_id)
                if job_id is None:
                    continue
                with _making(beat, job_id), _making(worker, job_id):
                    _make(engine, settings, store, worker, job_id, colours)
                # The ranks meet while rank 0 waits for a database that does not answer.
                while not engine.whole.control.meet(_ended(worker, store, job_id)):
                    pass
        finally:
            if beat is not None:
                beat.close()
            if worker is not None:
                worker.close()


def _queue_of(settings: GroupSettings, engine: Any) -> tuple[JobStore, Worker | GroupWorker | None]:
    """Where this rank finds jobs, and what takes them: on rank 0 alone."""
    whole = engine.whole
    if not settings.shared:
        executor = f"engine-{settings.save_dir.name}"
        return JobStore(settings.save_dir), (
            Worker(settings.queue, executor) if whole.leads else None
        )
    from opensora_sp.server.group_worker import GroupStore, GroupWorker

    store = GroupStore(settings)
    if not whole.leads:
        return store, None
    return store, GroupWorker(settings, store, whole.control, whole.device, engine.warm)


def _next_job(worker: Worker | GroupWorker, settings: GroupSettings) -> str | None:
    """The next job, or None after a while without one. A server that is stopped begins none."""
    if drain_path(settings.place).exists():
        time.sleep(TICK_SECONDS)
        return None
    return worker.next(TICK_SECONDS)


def _ended(worker: Worker | GroupWorker | None, store: JobStore, job_id: str) -> bool | None:
    """Tell the queue, on rank 0, that a job has ended; False: tell it again."""
    return None if worker is None else worker.done(deleted=store.cancel_asked(job_id))


@contextmanager
def _making(beat: Beat | Worker | GroupWorker | None, job_id: str) -> Iterator[None]:
    """A job is made in this block, as the sign of life and the log say."""
    if beat is not None:
        beat.idle = False
    try:
        with about_job(job_id):
            yield
    finally:
        if beat is not None:
            beat.idle = True


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
    worker: Worker | GroupWorker | None,
    job_id: str,
    colours: LatentColours | None,
) -> None:
    """Make a job, with those behind it that have its shape where the server allows. Collective.

    colours: for previews, on rank 0.
    """
    control = engine.whole.control
    found: dict[str, Any] | None = None
    if worker is not None:
        behind = worker.behind(job_id) if settings.batch_jobs > 1 else ()
        found = gather(settings, store, job_id, behind, worker.attempts(job_id))
        if job_id in found:
            worker.prepare(job_id, found[job_id], engine)
        store.put_together(found)
    found = control.broadcast_object(found)
    reporters = {name: JobReporter(store, name, engine.whole.leads) for name in found}
    if any(isinstance(job, str) for job in found.values()):  # it stands alone then
        reporters[job_id].failed(found[job_id])
    else:
        _make_together(engine, store, found, reporters, colours)
    if worker is not None:
        store.put_together(())


def _make_together(
    engine: Any,
    store: JobStore,
    jobs: dict[str, Job],
    reporters: dict[str, JobReporter],
    colours: LatentColours | None,
) -> None:
    """Make jobs of one shape, or write down in a line why one could not be made. Collective.

    One that is cancelled is taken out, and the others go on from the same step. Where a batch
    fails, each of it is made alone, so that one's fault is not the others'.
    """
    whole = engine.whole
    while jobs:
        alone = len(jobs) == 1
        try:
            told = [reporters[job_id] for job_id in jobs]
            _run(engine, joined(jobs.values(), engine.settings), told, colours)
        except Cancelled:
            pass
        except (SharedFault, SharedPromptFault) as error:  # every rank has it, and goes on
            if alone:
                reporters[next(iter(jobs))].failed(_told(error))
                _left(whole, store, jobs)  # nothing of it stays where it was deleted meanwhile
                return
            log.warning("%d jobs made together failed, each is made alone: %s", len(jobs), error)
            for job_id, job in _left(whole, store, jobs).items():
                _make_together(engine, store, {job_id: job}, reporters, colours)
            return
        except UserError as error:  # this rank alone: the others may wait for it for ever
            # Where one was deleted while it was written, its folder is gone and no other is hurt.
            deleted = any(store.cancel_asked(job_id) for job_id in jobs)
            if whole.world_size > 1 or not deleted:
                if alone:
                    reporters[next(iter(jobs))].failed(_told(error), "engine_error")
                raise
        jobs = _left(whole, store, jobs)


def _told(error: Exception) -> str:
    """What clients are told of it; what names a certificate's files is logged alone."""
    if not isinstance(error, SigningError) and not isinstance(error.__cause__, SigningError):
        return str(error)
    log.error("%s", error)
    return SIGNS_NOTHING


def _left(whole: Any, store: JobStore, jobs: dict[str, Job]) -> dict[str, Job]:
    """Those that have not ended. Of those that are cancelled nothing stays. Collective."""
    left: list[str] | None = None
    if whole.leads:
        left = []
        for job_id in jobs:
            if store.cancel_asked(job_id):
                store.delete(job_id)
            elif store.result(job_id) is None:
                left.append(job_id)
    return {job_id: jobs[job_id] for job_id in whole.control.broadcast_object(left)}


def _run(
    engine: Any, job: Any, reporters: Sequence[JobReporter], colours: LatentColours | None
) -> None:
    """Make every task of the job; reporters: of the tasks, in their order."""
    from opensora_sp.jobs.prepare import check_encoder, encode_all_text, unfinished
    from opensora_sp.jobs.run import make_batch
    from opensora_sp.jobs.schedule import deal
    from opensora_sp.server.costs import Costs

    of = dict(zip((task.output for task in job.tasks), reporters, strict=True))
    job, works = unfinished(job, engine.whole, engine.digests)
    engine.pipeline.models.clock.seconds.clear()
    begun = {task.output: work.start for work in works for task in work.tasks}
    together = {task.output: len(work.tasks) for work in works for task in work.tasks}
    for task in job.tasks:
        of[task.output].begin(job, begun.get(task.output), together.get(task.output, 1))
        if task.output not in begun:
            of[task.output].completed(task, engine)
    if not works:
        return
    check_encoder(engine.whole, job, works)
    encode_all_text(engine.pipeline, deal(works, 1))
    for work in works:
        told = [of[task.output] for task in work.tasks]

        def on_step_end(step: int, t: float, latents: Any, told: Any = told) -> bool:
            asked = [one.on_step_end(step, t, latents) for one in told]  # each is told of the step
            return any(asked)

        def seen(told: Any = told) -> None:
            for one in told:
                one.previewed()

        previews = StepPreviews([one.preview_file for one in told], colours, seen)
        costs = Costs(engine.whole)
        make_batch(engine, job, work, None, on_step_end=on_step_end, previews=previews)
        peaks, bytes_sent = costs.of_all_ranks()
        for place, task in enumerate(work.tasks):
            # What a batch sent is counted once, with the first of it.
            sent = bytes_sent if place == 0 else None
            of[task.output].completed(task, engine, peaks, sent, together=len(work.tasks))


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
