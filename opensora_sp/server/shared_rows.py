"""What a shared queue's database holds, as objects: jobs, groups, and who has which job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec

# Of a job, for `read_row`.
COLUMNS = (
    "id, state, priority, extract(epoch FROM created_at)::float8, shape, spec, attempt, group_name,"
    " epoch, result"
)


@dataclass(frozen=True)
class Row:
    """A job as the database has it. state: queued, taken, ended or gone (deleted).

    created_at: seconds since 1970 by the database's clock. attempt: how often it was taken;
    group, epoch: by whom last.
    """

    id: str
    state: str
    priority: int
    created_at: float
    shape: str
    spec: JobSpec
    attempt: int = 0
    group: str | None = None
    epoch: int | None = None
    result: JobResult | None = None


@dataclass(frozen=True)
class Group:
    """A group as the database has it.

    epoch: a number that is new with every start of its engine. state: starting, ready or draining.
    about: ranks, device, card, host, serves. progress: of the job that it makes. unfit: shapes that
    it cannot make, with the reason of each.
    """

    name: str
    epoch: int
    alive: bool
    state: str
    about: dict[str, Any] = field(default_factory=dict)
    job: str | None = None
    attempt: int | None = None
    progress: JobProgress | None = None
    unfit: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A job that a group has taken. attempt: its number; no other group ever gets the same."""

    id: str
    attempt: int
    spec: JobSpec


def read_spec(found: Mapping[str, Any]) -> JobSpec:
    """A job's specification from the database's JSON."""
    return JobSpec(**{**found, "arguments": tuple(found["arguments"])})


def read_row(found: Any) -> Row:
    """A row of COLUMNS."""
    job_id, state, priority, created_at, shape, spec, attempt, group, epoch, result = found
    return Row(
        id=job_id,
        state=state,
        priority=priority,
        created_at=created_at,
        shape=shape,
        spec=read_spec(spec),
        attempt=attempt,
        group=group,
        epoch=epoch,
        result=None if result is None else JobResult(**result),
    )
