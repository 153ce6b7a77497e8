"""A whole run of the command line: open the session, encode all texts, generate every task."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora_sp.base import faults
from opensora_sp.base.errors import SharedFault, SharedPromptFault, UserError
from opensora_sp.base.screen import note, note_once, one_line, result
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.progress import Position
from opensora_sp.engine.weight_digests import model_digests
from opensora_sp.jobs.identity import Identity, identity_of, latents_identity
from opensora_sp.jobs.open import announce, load_pipeline, mesh_of, open_job_session
from opensora_sp.jobs.outputs import describe, open_outputs
from opensora_sp.jobs.records import FOLDER, Stage, record_path, write_record
from opensora_sp.jobs.refine import refine_batches
from opensora_sp.jobs.saved_latents import StateFiles
from opensora_sp.jobs.saved_progress import SavedProgress
from opensora_sp.jobs.schedule import Work, deal, regroup
from opensora_sp.jobs.sheet_sink import RunSheet
from opensora_sp.jobs.worklist import WorkState, captions_left, look_up_work, renamed
from opensora_sp.media.writer import probe_encoder
from opensora_sp.parallel.agreement import ensure_agreement
from opensora_sp.parallel.session import Session
from opensora_sp.request.caption_notes import MOST_NOTES, check_captions
from opensora_sp.request.naming import numbered
from opensora_sp.request.request import Job, RunSettings, Task


def run_job(job: Job) -> int:
    """Generate every task of the job on this rank and its peers; returns the exit code.

    0: all are there; 1: some could not be made, each is named with its reason. Raises UserError
    for what a person can mend; anything else is a bug.
    """
    settings, started = job.settings, time.perf_counter()
    failed: list[Failure] = []
    with open_job_session(settings) as whole:
        mesh = mesh_of(job, whole.world_size)
        session = whole.split(mesh) if mesh.replicas > 1 else whole
        pipeline = load_pipeline(job, session, mesh)
        models = whole.together(
            lambda: model_digests(pipeline.models.checkpoints), leading_only=True
        )
        models = whole.broadcast_object(models)
        _agree(job, whole)
        job, works = _unfinished(job, whole, models)
        if works:
            announce(pipeline, works[0].tasks[0].request, mesh)
            _advise(settings, whole, works)
            lists = deal(works, mesh.replicas)
            failed = _generate_all(pipeline, job, lists, models, started)
        return _report(whole, job, failed)


def _agree(job: Job, whole: Session) -> None:
    """All ranks have the same list before them, or the replicas would leave parts of it out."""
    if whole.world_size > 1:
        text = "".join(f"{task.request.digest()}{task.output.name}\n" for task in job.tasks)
        facts = {"list of requests": hashlib.sha256(text.encode()).hexdigest()[:16]}
        ensure_agreement(whole, facts)


def _unfinished(job: Job, whole: Session, models: dict[str, str]) -> tuple[Job, list[Work]]:
    """What is still to be made, as rank 0 sees it; prompts refined where that is asked for.

    The job comes back with the names that its outputs have.
    """
    planned = job
    looked = whole.together(lambda: look_up_work(planned, models), leading_only=True)
    found = whole.broadcast_object(looked)
    job = renamed(job, found)
    standings = dict(zip(job.tasks, found, strict=True))
    works = regroup(job.batches(), {task: one.position for task, one in standings.items()})
    if job.settings.llm_refine:
        works = _refine(works, standings, job.settings, whole)
    return job, works


def _refine(
    works: Sequence[Work], standings: dict[Task, WorkState], settings: RunSettings, whole: Session
) -> list[Work]:
    """The works with refined prompts; what has been begun goes on with the prompt it has."""
    fresh = [work.tasks for work in works if work.start == Position()]
    answers = iter(
        refine_batches(fresh, whole, settings.prompt_generator, verbose=settings.verbose > 0)
        if fresh
        else ()
    )
    return [
        replace(work, tasks=tuple(next(answers)))
        if work.start == Position()
        else replace(
            work, tasks=tuple(_with_prompt(task, standings[task].refined) for task in work.tasks)
        )
        for work in works
    ]


def _with_prompt(task: Task, refined: str | None) -> Task:
    if refined is None:
        return task
    request = replace(task.request, prompt=refined)
    return replace(task, request=request, original_prompt=task.request.prompt)


def _advise(settings: RunSettings, whole: Session, works: Sequence[Work]) -> None:
    """More replicas are a person's choice: whether a video fits fewer ranks is not known here."""
    ranks, asked = whole.world_size, settings.replicas is not None
    if whole.leads and settings.verbose > 0 and not asked and ranks > 1 and len(works) > 1:
        note(
            f"{len(works)} videos or batches, each on all {ranks} ranks; --replicas R makes "
            f"R at a time on {ranks}/R ranks each, faster if one fits their memory"
        )


def _generate_all(
    pipeline: Pipeline,
    job: Job,
    lists: Sequence[Sequence[Work]],
    models: dict[str, str],
    started: float,
) -> list[Failure]:
    """Every replica its list, after rank 0 has encoded the texts of all of them.

    Returns what this replica could not make.
    """
    settings, session, whole = job.settings, pipeline.session, pipeline.session.whole
    mine = lists[session.replica]
    first = next(works for works in lists if works)[0].tasks[0].request
    if not first.is_image:
        # A broken encoder or a full disk is found now, not after hours of denoising; where the
        # outputs go, for a full temporary folder is no reason to end.
        place = settings.save_dir / FOLDER
        whole.together(
            lambda: probe_encoder(first.save_fps, *first.decoded_size, place), leading_only=True
        )
    if settings.verbose > 0:
        whole.together(lambda: _tell(pipeline, settings, lists), leading_only=True)
    _encode_all_text(pipeline, lists)
    sheet = RunSheet() if settings.sheet and session.leads else None
    failed: list[Failure] = []

    def run_list() -> None:
        for work in mine:
            if session is not whole:
                with session.stage("replica work"):
                    faults.reach("replica-work")
            failed.extend(_run_what_can_be(pipeline, settings, work, models, sheet))
            with session.stage("between outputs"):
                faults.reach("between-outputs")

    _wait_for_replicas(whole, run_list)
    if settings.sheet:
        sheets = whole.all_gather_object(sheet)
        if whole.leads:
            timings = {"whole run": time.perf_counter() - started, **pipeline.models.clock.seconds}
            order = [task.output for task in job.tasks]
            joined = RunSheet.joined([one for one in sheets if one is not None], order)
            if not joined.is_empty:
                path = _sheet_path(job)
                joined.write(path, describe(pipeline, settings, first), timings)
                result(path)
    return failed


def _sheet_path(job: Job) -> Path:
    """Where the sheet goes: numbered as the first output is, so that it replaces no other run's."""
    first = job.tasks[0].output
    found = re.fullmatch(r"sample_\d{4,}(?:-\d+)?_(\d+)", first.stem)
    number = int(found[1]) if found and job.settings.default_names else 1
    return numbered(job.settings.sheet_path, number)


@dataclass(frozen=True)
class Failure:
    """An output that could not be made, and why."""

    output: Path
    reason: str


def _run_what_can_be(
    pipeline: Pipeline,
    settings: RunSettings,
    work: Work,
    models: dict[str, str],
    sheet: RunSheet | None,
) -> list[Failure]:
    """Make a batch; what one of its prompts is at fault for is left out, and the rest is made."""
    failed = []
    while work.tasks:
        try:
            _run(pipeline, settings, work, models, sheet)
            break
        except SharedPromptFault as fault:
            bad = work.tasks[fault.place]
            failed.append(Failure(bad.output, str(fault)))
            if pipeline.session.leads:
                record_path(bad.output).unlink(missing_ok=True)  # or it would hold the name
                note(f"{bad.output} is not made: {fault}; the others are")
            if sheet is not None:
                sheet.forget(work.tasks)
            work = replace(work, tasks=tuple(task for task in work.tasks if task is not bad))
    return failed


def _report(whole: Session, job: Job, failed: Sequence[Failure]) -> int:
    """Name every output of any replica that could not be made; the exit code. Collective."""
    every = {one.output: one for part in whole.all_gather_object(list(failed)) for one in part}
    if whole.leads:
        lines = [f"{line}; not made" for line in job.failed]
        lines += [
            f"{task.output} was not made: {every[task.output].reason}"
            for task in job.tasks
            if task.output in every
        ]
        if lines:
            lines.append("all others are made; the same command makes these once they are mended")
        for line in lines:
            print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
    return 1 if every or job.failed else 0


def _wait_for_replicas(whole: Session, run_list: Callable[[], None]) -> None:
    """Run this replica's list and return when every replica has done its own.

    A mistake that ends one of the lists ends the run when the others have made theirs.
    """
    fault: SharedFault | None = None
    try:
        run_list()
    except SharedFault as error:
        fault = error

    def outcome() -> None:
        if fault is not None:
            raise fault

    whole.together(outcome)


def _tell(pipeline: Pipeline, settings: RunSettings, lists: Sequence[Sequence[Work]]) -> None:
    """Say where the model will be told something else than a prompt's words; rank 0 alone.

    Before T5's weights are loaded, and whether or not its embeddings are cached.
    """
    from opensora_sp.models.text_encoder import TextEncoder

    pieces = TextEncoder.tokenizer(pipeline.models.checkpoints.t5)
    tasks = {
        t.request.prompt: t for works in lists for w in works if not w.denoised for t in w.tasks
    }
    notes = []
    for task in tasks.values():
        for one in check_captions(task.request, pieces, pipeline.models.max_length(task.request)):
            notes += one.notes(refined=settings.llm_refine)
            if settings.verbose > 1:
                clip = f" from clip {one.clip} on" if one.clips > 1 else ""
                print(f"{task.output.name}{clip} is told: {one.caption!r}", file=sys.stderr)
                if one.unread:
                    print(f"{task.output.name}{clip} is not told: {one.unread!r}", file=sys.stderr)
    most = len(notes) if settings.verbose > 1 else MOST_NOTES
    for told_of in notes[:most]:
        note(told_of)
    if len(notes) > most:
        note(
            f"{len(notes) - most} more notes of this kind; --verbose 2 shows all of them and "
            "what the model is told of every prompt"
        )
    sys.stderr.flush()


def _encode_all_text(pipeline: Pipeline, lists: Sequence[Sequence[Work]]) -> None:
    """Every caption of the run in one go, so that T5 can give its memory back before denoising."""
    captions = [
        [caption for work in works for caption in captions_left(work.tasks, work.start)]
        for works in lists
    ]
    length = next(
        pipeline.models.max_length(task.request)
        for works in lists
        for w in works
        for task in w.tasks
    )
    pipeline.text.encode([caption for part in captions for caption in part], length)
    pipeline.text.release_encoder()
    pipeline.text.scatter([list(dict.fromkeys(part)) for part in captions], length)


def _run(
    pipeline: Pipeline,
    settings: RunSettings,
    work: Work,
    models: dict[str, str],
    sheet: RunSheet | None,
) -> None:
    """Make the outputs of one batch, from where they stand."""
    started = time.perf_counter()
    requests = [task.request for task in work.tasks]
    leads = pipeline.session.leads
    identities = [identity_of(t, settings, models) if leads else {} for t in work.tasks]
    files = [
        StateFiles(
            task.output,
            latents_identity(identity) if leads else {},
            refined=None if task.original_prompt is None else task.request.prompt,
            about=f"{pipeline.session.device.type}, {pipeline.models.mesh(task.request)}",
        )
        for task, identity in zip(work.tasks, identities, strict=True)
    ]

    def stands(stage: Stage) -> None:
        if leads:
            for task, identity in zip(work.tasks, identities, strict=True):
                _put_down(task, identity, stage)

    progress = SavedProgress(
        pipeline.session,
        files,
        work.start,
        every=settings.save_every,
        stops=True,
        on_latents=lambda: stands("latents saved"),
    )
    if not work.denoised:
        stands("denoising")
    with open_outputs(pipeline, settings, work.tasks, sheet) as sinks:
        pipeline.generate_to(requests, sinks, keep_latents=False, progress=progress)
    stands("done")
    if leads:
        _finish(pipeline, settings, work, files, sheet, time.perf_counter() - started)


def _finish(
    pipeline: Pipeline,
    settings: RunSettings,
    work: Work,
    files: Sequence[StateFiles],
    sheet: RunSheet | None,
    seconds: float,
) -> None:
    if not settings.keep_state:
        for one in files:
            try:
                one.remove()
            except OSError as error:  # the output is there: what is left over takes nothing from it
                note_once("left over", f"the saved state of {one.output} is left: {error}")
    if sheet is not None:
        sheet.took(work.tasks, seconds)
    if pipeline.options.show_progress:
        print(f"done in {seconds:.1f} s", file=sys.stderr, flush=True)
    for task in work.tasks:
        result(task.output)


def _put_down(task: Task, identity: Identity, stage: Stage) -> None:
    try:
        write_record(task.output, identity, stage)
    except (UserError, OSError) as error:
        note_once("record", f"the record of {task.output} is not written: {error}")
