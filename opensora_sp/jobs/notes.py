"""What a job says on rank 0 beside its results: advice, what the model is told, what failed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.jobs.open import Engine, announce
from opensora_sp.jobs.schedule import Work
from opensora_sp.models.text_pieces import load_pieces
from opensora_sp.parallel.session import Session
from opensora_sp.request.caption_notes import MOST_NOTES, check_captions
from opensora_sp.request.request import Job

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """An output that could not be made, and why."""

    output: Path
    reason: str


def say_what_begins(engine: Engine, job: Job, works: Sequence[Work]) -> None:
    """What is about to be made, on what, and whether more replicas might make it faster.

    More replicas are a person's choice: whether a video fits fewer ranks is not known here.
    """
    first = works[0].tasks[0].request
    announce(engine.pipeline, first, engine.mesh(first))
    ranks, asked = engine.whole.world_size, engine.settings.replicas is not None
    if (
        engine.whole.leads
        and job.settings.verbose > 0
        and not asked
        and ranks > 1
        and len(works) > 1
    ):
        _log.warning(
            f"{len(works)} videos or batches, each on all {ranks} ranks; --replicas R makes "
            f"R at a time on {ranks}/R ranks each, faster if one fits their memory"
        )


def say_captions(pipeline: Pipeline, job: Job, works: Sequence[Work]) -> None:
    """Say where the model will be told something else than a prompt's words. Collective.

    Before T5's weights are loaded, and whether or not its embeddings are cached.
    """
    if job.settings.verbose > 0:
        pipeline.session.whole.control.together(
            lambda: _tell(pipeline, job, works), leading_only=True
        )


def _tell(pipeline: Pipeline, job: Job, works: Sequence[Work]) -> None:
    pieces = load_pieces(pipeline.models.checkpoints.t5)
    settings = job.settings
    tasks = {task.request.prompt: task for w in works if not w.denoised for task in w.tasks}
    notes = []
    for task in tasks.values():
        for one in check_captions(task.request, pieces, pipeline.models.max_length(task.request)):
            notes += one.notes(translates=not settings.llm_refine)
            if settings.verbose > 1:
                clip = f" from clip {one.clip} on" if one.clips > 1 else ""
                _log.info("%s%s is told: %r", task.output.name, clip, one.caption)
                if one.unread:
                    _log.info("%s%s is not told: %r", task.output.name, clip, one.unread)
    most = len(notes) if settings.verbose > 1 else MOST_NOTES
    for told_of in notes[:most]:
        _log.warning(told_of)
    if len(notes) > most:
        _log.warning(
            f"{len(notes) - most} more notes of this kind; --verbose 2 shows all of them and "
            "what the model is told of every prompt"
        )


def report(whole: Session, job: Job, failed: Sequence[Failure]) -> int:
    """Name every output of any replica that could not be made; the exit code. Collective."""
    every = {
        one.output: one for part in whole.control.all_gather_object(list(failed)) for one in part
    }
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
            _log.error(line)
    return 1 if every or job.failed else 0
