"""Which queued jobs are made together: those of one shape that stand one behind the other.

A job that stands behind one of another shape waits for its turn, so the order of the queue holds.
The queue hands out the first job only. The others stay queued while they are made with it, and are
found made when their turn comes: whoever is killed in between loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.request.request import EngineSettings, Job
from opensora_sp.server.durable import QueuedJob, queue_place
from opensora_sp.server.job_store import JobStore
from opensora_sp.server.protocol import as_bad_request
from opensora_sp.server.served import read_facts, why_not
from opensora_sp.server.settings import GroupSettings

# A job whose engine has ended this often is made alone, so that it cannot end others with it.
MOST_ATTEMPTS_TOGETHER = 2
# What may differ between videos of one batch. Jobs with references are made alone.
_FREE: Mapping[str, Any] = {"prompt": "", "seed": 0}


def gather(
    settings: GroupSettings,
    store: JobStore,
    first: str,
    behind: Iterable[QueuedJob],
    attempts: int = 1,
) -> dict[str, Job | str]:
    """The jobs to make now, by id: the first, and those directly behind it that have its shape.

    Empty where the first is deleted or has ended. Its value is a line where it cannot be made.
    behind: the queue after it, in order. attempts: how often the first was handed out.
    """
    job = prepare(settings, store, first)
    if job is None:
        return {}
    found: dict[str, Job | str] = {first: job}
    if isinstance(job, str) or attempts > MOST_ATTEMPTS_TOGETHER or _shape(job) is None:
        return found
    for job_id in _one_by_one(store, behind):
        if len(found) >= settings.batch_jobs:
            break
        other = prepare(settings, store, job_id)
        if other is None:  # deleted, or made already: it holds no place
            continue
        if isinstance(other, str) or _shape(other) != _shape(job):
            break
        if why_not(other, read_facts(settings), batch=len(found) + 1) is not None:
            break
        found[job_id] = other
    return found


def _one_by_one(store: JobStore, jobs: Iterable[QueuedJob]) -> Iterator[str]:
    """The ids in order, those of one second too."""
    for _, same in groupby(jobs, key=queue_place):
        yield from sorted((job.id for job in same), key=lambda job_id: _created(store, job_id))


def _created(store: JobStore, job_id: str) -> float:
    try:
        return store.spec(job_id).created_at
    except KeyError:  # deleted
        return 0.0


def prepare(settings: GroupSettings, store: JobStore, job_id: str) -> Job | str | None:
    """The job to make; None where there is nothing to do, a line where it cannot be made."""
    try:
        if store.result(job_id) is not None or store.cancel_asked(job_id):
            return None
        spec = store.spec(job_id)
    except KeyError:
        return None
    try:
        job = settings.job(spec.arguments, store.outputs(job_id))
    except UserError as error:
        return str(error)
    # A job that was queued before anybody knew what the engine has is judged here.
    short = why_not(job, read_facts(settings))
    return job if short is None else str(as_bad_request(UserError(short)))


def _shape(job: Job) -> Any:
    """What jobs that are made together have in common; None for one that is made alone."""
    request = job.tasks[0].request
    if request.reference_path or request.mask_strategy:
        return None
    return replace(request, **_FREE), replace(job.settings, save_dir=Path())


def joined(jobs: Iterable[Job], engine: EngineSettings) -> Job:
    """One job of which every task keeps its own output. engine: the settings that are open."""
    every = list(jobs)
    tasks = tuple(task for job in every for task in job.tasks)
    settings = replace(every[0].settings, batch_size=len(tasks))
    return replace(every[0], engine=engine, settings=settings, tasks=tasks)
