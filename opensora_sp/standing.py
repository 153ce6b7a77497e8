"""Where every task of a run stands before it begins: finished, begun, or not there yet.

Nothing that was made is made again, replaced or thrown away unless a person says so. One rank
looks, for the others may see another file system.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opensora_sp.errors import UserError
from opensora_sp.identity import Identity, difference, identity_of, latents_identity
from opensora_sp.manifest import read_record, write_record
from opensora_sp.request import Job, RunSettings, Task
from opensora_sp.saved_state import Position, StateFiles
from opensora_sp.screen import note, one_line

_OTHERWISE = "choose another --sample-name or --save-dir, or make it anew with --overwrite"


@dataclass(frozen=True)
class Standing:
    """Where a task stands: None is finished. refined: the prompt it was begun with, if refined."""

    position: Position | None
    refined: str | None = None


def look_at_all(job: Job, models: Mapping[str, str]) -> list[Standing]:
    """Where each of the job's tasks stands; says what is skipped and what goes on.

    What is to be made is put down as waiting; with --overwrite its saved state goes. models: as
    `identity.model_digests`. Raises UserError, before anything is changed, where an output or a
    saved state is of another request, was changed or is damaged.
    """
    settings = job.settings
    identities = [identity_of(task, settings, models) for task in job.tasks]
    pairs = list(zip(job.tasks, identities, strict=True))
    standings = [_look_at(task, identity, settings) for task, identity in pairs]
    for (task, identity), standing in zip(pairs, standings, strict=True):
        if standing.position is None:
            continue
        if settings.overwrite and not settings.decode_only:
            StateFiles(task.output, {}).remove()
        if standing.position == Position():
            write_record(task.output, identity, "waiting")
    if settings.resume and all(standing.position == Position() for standing in standings):
        note(
            "--resume: nothing of this run has been begun in its --save-dir, so all of it "
            "starts from the beginning"
        )
    return standings


def _look_at(task: Task, identity: Identity, settings: RunSettings) -> Standing:
    if not settings.overwrite and _is_finished(task, identity, settings):
        return Standing(None)
    files = StateFiles(task.output, latents_identity(identity))
    if settings.overwrite and not settings.decode_only:
        return Standing(Position())
    position = files.position()
    request = task.request
    said = f"clip {position.clip + 1} of {request.loop}, step {position.step} of {request.steps}"
    if settings.decode_only and position.clip < request.loop:
        raise UserError(
            f"--decode-only: {task.output} has not been denoised to its end (it stands at {said}): "
            "leave --decode-only out to finish it"
        )
    if position == Position():
        return Standing(position)
    if settings.verbose > 0:
        stands = "is only decoded" if position.clip >= request.loop else f"goes on after {said}"
        print(one_line(f"{task.output} {stands}"), file=sys.stderr, flush=True)
    return Standing(position, files.refined_prompt())


def _is_finished(task: Task, identity: Identity, settings: RunSettings) -> bool:
    """Whether an output is there that this run would make, or that it has to leave alone.

    A file of which nothing is known is replaced, as the reference replaces it, or skipped with
    `prompt_as_path`, as the reference does then.
    """
    output = task.output
    if not output.exists():
        return False
    record = read_record(output)
    found = None
    if record is not None and record.stage == "done":
        found = difference(record.identity, identity)
        if found is None and not record.fits(output):
            found = "it was changed since it was made"
    elif not settings.skip_existing:
        return False
    if found is not None and not settings.skip_existing:
        raise UserError(f"{output} is there already, but {found}: {_OTHERWISE}")
    although = "" if found is None else f", although {found}"
    print(one_line(f"{output} is there already, skipped{although}"), file=sys.stderr)
    return True


def captions_left(tasks: Sequence[Task], start: Position) -> list[str]:
    """The captions that tasks still need, from where they stand."""
    from opensora_sp.generate import caption

    return [
        caption(task.request, clip)
        for task in tasks
        for clip in range(start.clip, task.request.loop)
    ]
