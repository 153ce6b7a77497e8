"""What comes before the first output of a job: what is left to make, its prompts, its texts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from opensora_sp.base.processes import Process
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.progress import Position
from opensora_sp.engine.step_cache.settle import settle
from opensora_sp.jobs.records import FOLDER
from opensora_sp.jobs.refine import refine_batches, with_prompt
from opensora_sp.jobs.schedule import Work, regroup
from opensora_sp.jobs.worklist import WorkState, captions_left, look_up_work, renamed
from opensora_sp.media.writer import probe_encoder
from opensora_sp.parallel.agreement import ensure_agreement
from opensora_sp.parallel.session import Session
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.request import Job, JobSettings, Task

_log = logging.getLogger(__name__)


def unfinished(job: Job, whole: Session, models: Mapping[str, str]) -> tuple[Job, list[Work]]:
    """What is still to be made, as rank 0 sees it; prompts refined where that is asked for.

    The job comes back with the names that its outputs have. models: digests of the weights.
    """
    _require_same_list(job, whole)
    planned = job = with_step_schedules(job, whole, lambda: models["dit"])
    own = whole.control.all_gather_object(Process.current())
    looked = whole.control.together(lambda: look_up_work(planned, models, own), leading_only=True)
    found = whole.control.broadcast_object(looked)
    job = renamed(job, found)
    states = dict(zip(job.tasks, found, strict=True))
    works = regroup(job.batches(), {task: one.position for task, one in states.items()})
    if job.settings.llm_refine:
        works = _refine(works, states, job.settings, whole)
    return job, works


def with_step_schedules(job: Job, whole: Session, transformer: Callable[[], str]) -> Job:
    """The job with the schedules that its requests' step caches mean, which is said. Collective.

    transformer: gives its digest. Raises SharedFault where no schedule fits.
    """
    directory = (job.engine.checkpoints or embedded_checkpoints()).dit
    requests, said = settle(whole, [task.request for task in job.tasks], directory, transformer)
    if whole.leads and job.settings.verbose > 0:
        for line in said:
            _log.info(line)
    pairs = zip(job.tasks, requests, strict=True)
    return replace(job, tasks=tuple(replace(task, request=request) for task, request in pairs))


def _require_same_list(job: Job, whole: Session) -> None:
    """All ranks have the same list before them, or the replicas would leave parts of it out."""
    if whole.world_size > 1:
        text = "".join(f"{task.request.digest()}{task.output.name}\n" for task in job.tasks)
        facts = {"list of requests": hashlib.sha256(text.encode()).hexdigest()[:16]}
        ensure_agreement(whole, facts)


def _refine(
    works: Sequence[Work], states: dict[Task, WorkState], settings: JobSettings, whole: Session
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
            work, tasks=tuple(with_prompt(task, states[task].refined) for task in work.tasks)
        )
        for work in works
    ]


def check_encoder(whole: Session, job: Job, works: Sequence[Work]) -> None:
    """Write a few frames where the outputs go: a broken encoder or a full disk is found now, not
    after hours of denoising. A full temporary folder is no reason to end. Collective.
    """
    first = works[0].tasks[0].request
    if not first.is_image:
        place = job.settings.save_dir / FOLDER
        whole.control.together(
            lambda: probe_encoder(first.save_fps, *first.decoded_size, place), leading_only=True
        )


def encode_all_text(pipeline: Pipeline, lists: Sequence[Sequence[Work]]) -> None:
    """Encode every caption of the job in one go, so that T5's memory is free before denoising.

    lists: of the replicas. T5 stays loaded where the pipeline's text stage keeps it. Collective of
    all ranks.
    """
    captions = [
        [caption for work in works for caption in captions_left(work.tasks, work.start)]
        for works in lists
    ]
    first = next(work.tasks[0] for works in lists for work in works)
    length = pipeline.models.max_length(first.request)
    pipeline.text.encode([caption for part in captions for caption in part], length)
    if not pipeline.text.stays:
        pipeline.text.release_encoder()
    pipeline.text.scatter([list(dict.fromkeys(part)) for part in captions], length)
