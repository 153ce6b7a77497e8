"""The work list: which tasks of a run are finished, which can be resumed, which are new.

A finished output is never made again, replaced or deleted unless the user asks for it. Only rank 0
looks at the files, because other ranks may see another file system.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from opensora_sp.base.errors import UserError
from opensora_sp.base.processes import Process
from opensora_sp.base.screen import one_line
from opensora_sp.engine.progress import Position
from opensora_sp.jobs.identity import Identity, difference, identity_of, latents_identity
from opensora_sp.jobs.records import FOLDER, Record, Stage, read_record, write_record
from opensora_sp.jobs.saved_latents import StateFiles
from opensora_sp.request.naming import numbered, numbered_from
from opensora_sp.request.request import Job, JobSettings, Task

_log = logging.getLogger(__name__)

LOCK_SECONDS = 5.0
_OTHERWISE = "choose another --sample-name or --save-dir, or make it anew with --overwrite"


@dataclass(frozen=True)
class WorkState:
    """How far a task has come. position: None where it is finished.

    refined: the refined prompt of its saved state, if any. output: the file that it is written to.
    """

    position: Position | None
    refined: str | None = None
    output: Path | None = None


def look_up_work(
    job: Job, models: Mapping[str, str], own: Collection[Process] = ()
) -> list[WorkState]:
    """The state of each of the job's tasks. Prints what is skipped and what is resumed.

    An output without a name from the user gets a free name where another request's file has its
    name. A task that is to be made gets a record with the stage "waiting". With --overwrite its
    saved state is removed. models: as from `weight_digests.model_digests`. own: the processes of
    this run, beside this one. Raises UserError, before anything is changed, where an output or a
    saved state is of another request, changed or damaged, or where another run of this machine is
    making the output.
    """
    with _alone_in(job.settings.save_dir):
        return _look_up(job, models, {Process.current(), *own})


def _look_up(job: Job, models: Mapping[str, str], own: Collection[Process]) -> list[WorkState]:
    settings = job.settings
    identities = [identity_of(task, job.engine, settings, models) for task in job.tasks]
    names = _NamesInUse()
    pairs = [
        (_named(task, identity, settings, names), identity)
        for task, identity in zip(job.tasks, identities, strict=True)
    ]
    for task, _ in pairs:
        _require_nobody(task.output, own)
    states = [
        replace(_state_of(task, identity, settings), output=task.output) for task, identity in pairs
    ]
    for (task, identity), state in zip(pairs, states, strict=True):
        if state.position is None:
            continue
        if settings.overwrite and not settings.decode_only:
            StateFiles(task.output, {}).remove()
        write_record(task.output, identity, _stage_to_write(task, state.position))
    _say_names(job.tasks, states, settings)
    if settings.resume and all(state.position == Position() for state in states):
        _log.warning(
            "--resume: nothing of this run has been begun in its --save-dir, so all of it "
            "starts from the beginning"
        )
    return states


def _stage_to_write(task: Task, position: Position) -> Stage:
    """The stage of a task that this run is going to make: the record then names this process."""
    if position == Position():
        return "waiting"
    return "latents saved" if position.clip >= task.request.loop else "denoising"


def _require_nobody(output: Path, own: Collection[Process]) -> None:
    """Two runs that make one output would remove each other's saved state."""
    record = read_record(output)
    maker = None if record is None else record.made_by()
    if maker is not None and maker not in own:
        raise UserError(
            f"{output} is being made by process {maker.pid} of this machine: wait until that run "
            "has ended, end it, or choose another --sample-name or --save-dir"
        )


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, so that two runs do not choose the same names at one moment.

    Where that cannot be had, because the directory is not there yet and cannot be made, or its file
    system has no locks, or whoever holds it does so for long, the block runs without.
    """
    handle = None
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while handle is not None and time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
    finally:
        if handle is not None:
            os.close(handle)


def renamed(job: Job, states: Sequence[WorkState]) -> Job:
    """The job with the outputs that `look_up_work` found for its tasks."""
    tasks = tuple(
        task if state.output is None else replace(task, output=state.output)
        for task, state in zip(job.tasks, states, strict=True)
    )
    return replace(job, tasks=tasks)


def _named(task: Task, identity: Identity, settings: JobSettings, names: _NamesInUse) -> Task:
    """The task with the output it had before, or else with the first name that is free."""
    if not settings.default_names:
        return task
    taken = names.numbers(task.output)
    for number in sorted(taken):
        if _is_same(read_record(numbered(task.output, number)), identity, settings):
            return replace(task, output=numbered(task.output, number))
    if settings.overwrite:
        return task
    free = next(number for number in count(1) if number not in taken)
    return replace(task, output=numbered(task.output, free))


class _NamesInUse:
    """The numbers of outputs' names that a file, a record or a saved state has.

    A folder is read once, not for each output: a list may have thousands of them there.
    """

    def __init__(self) -> None:
        self._known: dict[Path, Mapping[str, set[int]]] = {}

    def numbers(self, output: Path) -> Collection[int]:
        """Those of one output. Raises UserError where its folder may not be looked into."""
        if output.parent not in self._known:
            self._known[output.parent] = _numbers_by_name(output.parent)
        return self._known[output.parent].get(output.name, ())


def _numbers_by_name(directory: Path) -> Mapping[str, set[int]]:
    """The numbers in use of every output of a directory, by its name without one."""
    found: dict[str, set[int]] = {}
    states = re.compile(r"(?P<name>.*)\.(?:json|step\.safetensors|clip\d{4,}\.safetensors)")
    for folder in (directory, directory / FOLDER):
        try:
            names = [entry.name for entry in os.scandir(folder)]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{folder} may not be looked into: {error.strerror}") from None
        for name in names:
            state = states.fullmatch(name) if folder != directory else None
            for output, number in numbered_from(state["name"] if state else name):
                found.setdefault(output, set()).add(number)
    return found


def _is_same(record: Record | None, identity: Identity, settings: JobSettings) -> bool:
    """Whether a record is of this request, as far as what is still to be made depends on it."""
    if record is None:
        return False
    if difference(record.identity, identity) is None:
        return True
    if record.stage == "done" and not settings.decode_only:
        return False
    try:
        before = latents_identity(record.identity)
        return difference(before, latents_identity(identity)) is None
    except (KeyError, TypeError, AttributeError):  # of a version with other fields
        return False


def _say_names(tasks: Sequence[Task], states: Sequence[WorkState], settings: JobSettings) -> None:
    others = [
        (task.output, state.output)
        for task, state in zip(tasks, states, strict=True)
        if state.position == Position() and state.output not in (None, task.output)
    ]
    if others and settings.verbose > 0:
        old, new = others[0]
        more = f" (and {len(others) - 1} more likewise)" if len(others) > 1 else ""
        _log.warning(
            f"{old.name} is there already and is another request's, so this one becomes {new}{more}"
        )


def _state_of(task: Task, identity: Identity, settings: JobSettings) -> WorkState:
    if not settings.overwrite and _is_finished(task, identity, settings):
        return WorkState(None)
    files = StateFiles(task.output, latents_identity(identity))
    if settings.overwrite and not settings.decode_only:
        return WorkState(Position())
    position = files.position()
    request = task.request
    said = f"clip {position.clip + 1} of {request.loop}, step {position.step} of {request.steps}"
    if settings.decode_only and position.clip < request.loop:
        raise UserError(
            f"--decode-only: {task.output} has not been denoised to its end (it stands at {said}): "
            "leave --decode-only out to finish it"
        )
    if position == Position():
        return WorkState(position)
    if settings.verbose > 0:
        stands = "is only decoded" if position.clip >= request.loop else f"goes on after {said}"
        _log.info(one_line(f"{task.output} {stands}"))
    return WorkState(position, files.refined_prompt())


def _is_finished(task: Task, identity: Identity, settings: JobSettings) -> bool:
    """Whether an output is there that this run would make, or that it has to leave alone.

    A file of which nothing is known is never replaced; with `prompt_as_path` it is skipped, as
    the reference does then.
    """
    output = task.output
    if not os.path.lexists(output):
        return False
    record = read_record(output)
    found = None
    if record is None:
        found = "nothing is known of how it was made"
    elif record.stage == "done":
        found = difference(record.identity, identity)
        if found is None and not record.fits(output):
            found = "it was changed since it was made"
    else:  # it is being made anew
        return False
    if found is not None and not settings.skip_existing:
        raise UserError(f"{output} is there already, but {found}: {_OTHERWISE}")
    although = "" if found is None else f", although {found}"
    _log.info(one_line(f"{output} is there already, skipped{although}"))
    return True


def captions_left(tasks: Sequence[Task], start: Position) -> list[str]:
    """The captions of the clips that tasks still have to make, from a position on."""
    from opensora_sp.request.prompts import caption

    return [
        caption(task.request, clip)
        for task in tasks
        for clip in range(start.clip, task.request.loop)
    ]
