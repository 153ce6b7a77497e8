"""A whole job: what is left to make, all texts at once, then output by output.

with open_engine(job) as engine:  # ranks and models; they stay for as many jobs as are wanted
    code = run_job(engine, job)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from opensora_sp.base import faults
from opensora_sp.base.errors import Cancelled, SharedFault, SharedPromptFault, UserError
from opensora_sp.base.screen import result, warn_once
from opensora_sp.engine.clean_estimate import Previews
from opensora_sp.engine.options import StepEnd
from opensora_sp.engine.timing import Clock
from opensora_sp.jobs.finishing import Finishing
from opensora_sp.jobs.identity import Identity, digest, identity_of, latents_identity
from opensora_sp.jobs.notes import Failure, report, say_captions, say_what_begins
from opensora_sp.jobs.open import Engine, show_progress, tidy
from opensora_sp.jobs.outputs import open_outputs, write_run_sheet
from opensora_sp.jobs.prepare import check_encoder, encode_all_text, unfinished
from opensora_sp.jobs.records import Stage, record_path, write_record
from opensora_sp.jobs.saved_latents import StateFiles
from opensora_sp.jobs.saved_progress import SavedProgress
from opensora_sp.jobs.schedule import Work, deal
from opensora_sp.jobs.sheet_sink import RunSheet
from opensora_sp.parallel.session import Session
from opensora_sp.request.request import Job, Task

_log = logging.getLogger(__name__)


def run_job(engine: Engine, job: Job) -> int:
    """Generate every task of the job on this rank and its peers; returns the exit code.

    0: all are there; 1: some could not be made, each is named with its reason. Raises UserError
    for what a person can mend; anything else is a bug.
    """
    pipeline, whole, session = engine.pipeline, engine.whole, engine.pipeline.session
    started, before = time.perf_counter(), dict(pipeline.models.clock.seconds)
    engine.require_same(job.engine)
    show_progress(pipeline, show=job.settings.verbose > 0)
    tidy(whole, job.settings.save_dir)
    failed: list[Failure] = []

    job, works = unfinished(job, whole, engine.digests)
    if works:
        say_what_begins(engine, job, works)
        check_encoder(whole, job, works)
        lists = deal(works, engine.replicas)
        say_captions(pipeline, job, [work for works in lists for work in works])
        encode_all_text(pipeline, lists)
        sheet = RunSheet() if job.settings.sheet and session.leads else None
        finishing = Finishing(pipeline.models.clock)
        with _every_replica(whole), _settled(finishing, pipeline.models.clock):
            for work in lists[session.replica]:
                if session is not whole:
                    with session.control.stage("replica work"):
                        faults.reach("replica-work")
                while work.tasks:
                    try:
                        make_batch(engine, job, work, sheet, finishing=finishing)
                        break
                    except SharedPromptFault as fault:  # the batch is made without that prompt
                        bad = work.tasks[fault.place]
                        failed.append(Failure(bad.output, str(fault)))
                        work = _without(work, bad, engine, sheet, fault)
                with session.control.stage("between outputs"):
                    faults.reach("between-outputs")
        if job.settings.sheet:
            write_run_sheet(pipeline, job, sheet, started, before)
    return report(whole, job, failed)


def make_batch(
    engine: Engine,
    job: Job,
    work: Work,
    sheet: RunSheet | None,
    on_step_end: StepEnd | None = None,
    previews: Previews | None = None,
    finishing: Finishing | None = None,
) -> None:
    """Make the outputs of one batch, from where they stand, and save its state on the way.

    on_step_end, previews: as for `Pipeline.generate_to`. finishing: completes the outputs after
    this returns, and raises here what failed of the batch before; without, they are complete by
    then. Raises SharedPromptFault where one of its prompts is at fault, and Cancelled where
    on_step_end ends it.
    """
    started = time.perf_counter()
    pipeline, leads = engine.pipeline, engine.pipeline.session.leads
    identities = [
        identity_of(task, engine.settings, job.settings, engine.digests) if leads else {}
        for task in work.tasks
    ]
    files = [
        StateFiles(
            task.output,
            latents_identity(identity) if leads else {},
            refined=None if task.original_prompt is None else task.request.prompt,
            about=f"{pipeline.session.device.type}, {pipeline.models.mesh(task.request)}",
        )
        for task, identity in zip(work.tasks, identities, strict=True)
    ]

    def note_stage(stage: Stage) -> None:
        if leads:
            for task, identity in zip(work.tasks, identities, strict=True):
                _write_stage(task, identity, stage)

    progress = SavedProgress(
        pipeline.session,
        files,
        work.start,
        every=job.settings.save_every,
        stops=True,
        on_latents=lambda: note_stage("latents saved"),
        on_step=None if finishing is None else finishing.check,
    )

    def complete() -> None:
        note_stage("done")
        _finish(job, work, files, sheet, time.perf_counter() - started)

    if not work.denoised:
        with pipeline.session.control.stage("save"):
            note_stage("denoising")
    requests = [task.request for task in work.tasks]
    with open_outputs(
        pipeline,
        job,
        work.tasks,
        sheet,
        finishing=finishing,
        done=complete,
        numbers=[digest(identity) for identity in identities],
    ) as sinks:
        try:
            pipeline.generate_to(
                requests,
                sinks,
                keep_latents=False,
                progress=progress,
                on_step_end=on_step_end,
                previews=previews,
            )
        except Cancelled:
            if len(requests) > 1:  # one of them may be unwanted: the others go on from this step
                progress.save_now()
            raise


@contextmanager
def _settled(finishing: Finishing, clock: Clock) -> Iterator[None]:
    """Leave the block when its last batch is complete. An error of the block comes first."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            finishing.settle()
        raise
    with clock.stage("write"):
        finishing.settle()


@contextmanager
def _every_replica(whole: Session) -> Iterator[None]:
    """Run the block, this replica's list, and leave it when every replica has done its own.

    A mistake that ends one of the lists ends the run when the others have made theirs.
    """
    fault: SharedFault | None = None
    try:
        yield
    except SharedFault as error:
        fault = error

    def outcome() -> None:
        if fault is not None:
            raise fault

    whole.control.together(outcome)


def _without(
    work: Work, bad: Task, engine: Engine, sheet: RunSheet | None, fault: SharedPromptFault
) -> Work:
    """The batch without a task that cannot be made, which is said."""
    if engine.pipeline.session.leads:
        record_path(bad.output).unlink(missing_ok=True)  # or it would hold the name
        _log.warning("%s is not made: %s; the others are", bad.output, fault)
    if sheet is not None:
        sheet.forget(work.tasks)
    return replace(work, tasks=tuple(task for task in work.tasks if task is not bad))


def _finish(
    job: Job,
    work: Work,
    files: Sequence[StateFiles],
    sheet: RunSheet | None,
    seconds: float,
) -> None:
    """Remove what was saved on the way and say what is there; the leading rank alone."""
    if not job.settings.keep_state:
        for one in files:
            try:
                one.remove()
            except OSError as error:  # the output is there: what is left over takes nothing from it
                warn_once(_log, "left over", f"the saved state of {one.output} is left: {error}")
    if sheet is not None:
        sheet.took(work.tasks, seconds)
    if job.settings.verbose > 0:
        _log.info("done in %.1f s", seconds)
    for task in work.tasks:
        result(task.output)


def _write_stage(task: Task, identity: Identity, stage: Stage) -> None:
    faults.reach("record")
    try:
        write_record(task.output, identity, stage)
    except (UserError, OSError) as error:
        warn_once(_log, "record", f"the record of {task.output} is not written: {error}")
