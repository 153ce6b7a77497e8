"""Names that nobody asked for give way: an output with a default name never takes another's place.

An output is called `sample_0000.mp4` where a person gave neither --sample-name nor
--prompt-as-path. Where that name is another request's, or a file of which nothing is known, it
becomes `sample_0000_2.mp4`, then `_3` and so on, and the same request finds it there again. Names
that were asked for stay, and a clash is refused. One rank looks, for the others may see another
file system.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_sp import access
from opensora_sp.errors import UserError
from opensora_sp.identity import Identity, difference, identity_of, latents_identity
from opensora_sp.manifest import Record, read_record
from opensora_sp.request import Job, RunSettings, Task

if TYPE_CHECKING:
    from opensora_sp.saved_state import StateFiles

OTHERWISE = "choose another --sample-name or --save-dir, or make it anew with --overwrite"


def names_are_free(settings: RunSettings) -> bool:
    """Whether the outputs' names are nobody's choice, so that others will do as well."""
    return settings.sample_name is None and not settings.prompt_as_path


def candidates(output: Path) -> Iterator[Path]:
    """The output's name, then the others that it may get: NAME_2, NAME_3, ..."""
    yield output
    for number in count(2):
        yield output.with_name(f"{output.stem}_{number}{output.suffix}")


def free_of_files(output: Path) -> Path:
    """The first name at which nothing stands."""
    return next(path for path in candidates(output) if not os.path.lexists(path))


def place_outputs(job: Job, models: Mapping[str, str]) -> Job:
    """The job with a name for each output: that of its own file or state, or a free one.

    models: as `identity.model_digests`. Says where another name had to be taken. Raises UserError
    where the folder may not be looked into.
    """
    settings = job.settings
    if not names_are_free(settings):
        return job
    tasks, moved = [], []
    for task in job.tasks:
        output = _name_of(task, identity_of(task, settings, models), settings)
        tasks.append(replace(task, output=output))
        if output != task.output:
            moved.append((task.output, output))
    if moved and settings.verbose > 0:
        more = f" (and {len(moved) - 1} more outputs likewise)" if len(moved) > 1 else ""
        print(
            f"note: {moved[0][0]} belongs to another request: this one's is {moved[0][1]}{more}",
            file=sys.stderr,
            flush=True,
        )
    return replace(job, tasks=tuple(tasks))


def _name_of(task: Task, identity: Identity, settings: RunSettings) -> Path:
    latents = latents_identity(identity)

    def is_made(output: Path, record: Record | None) -> bool:
        """The output is here, or this is where it was to be made."""
        if record is None or difference(record.identity, identity) is not None:
            return False
        return record.stage != "done" or not os.path.lexists(output) or record.fits(output)

    def is_begun(output: Path, record: Record | None) -> bool:
        """Its latents are here, whatever file was to be made of them; the place is not taken."""
        taken = os.path.lexists(output) and not settings.decode_only
        return not taken and _has_state_of(output, latents, record)

    wanted: list[Callable[[Path, Record | None], bool]]
    wanted = [is_begun, is_made] if settings.decode_only else [is_made, is_begun]
    known = [(path, read_record(path)) for path in _until_free(task.output)]
    for is_wanted in wanted:
        for path, record in known:
            if is_wanted(path, record):
                return path
    # Nothing here is this request's. To make it anew is to replace what has the usual name.
    return task.output if settings.overwrite or settings.decode_only else known[-1][0]


def _until_free(output: Path) -> Iterator[Path]:
    """The names up to the first that nobody has, which is the last one."""
    for path in candidates(output):
        yield path
        record = read_record(path)
        # A record of a finished output whose file has gone keeps nothing from being lost.
        begun = record is not None and record.stage != "done"
        if not (begun or os.path.lexists(path) or _state_of(path, {}).exists()):
            return


def _has_state_of(output: Path, latents: Identity, record: Record | None) -> bool:
    if record is not None and difference(latents_identity(record.identity), latents) is not None:
        return False
    state = _state_of(output, latents)
    if not state.exists():
        return False
    if record is not None:
        return True  # a state of it that is damaged is for a person to see
    try:
        state.position()
    except UserError:
        return False
    return True


def _state_of(output: Path, latents: Identity) -> StateFiles:
    from opensora_sp.saved_state import StateFiles  # imports torch

    return StateFiles(output, latents)


def refuse_known_clashes(job: Job) -> None:
    """Raises UserError where a name that was asked for is another request's, as records say.

    Before torch and the weights: which models made a file is asked later, everything else now.
    """
    settings = job.settings
    if names_are_free(settings) or settings.skip_existing or settings.overwrite:
        return
    for task in job.tasks:
        if not access.exists(task.output):
            continue
        record = read_record(task.output)
        if record is None or record.stage != "done":
            continue
        identity = identity_of(task, settings, record.identity.get("models", {}))
        found = difference(record.identity, identity)
        if found is not None:
            raise UserError(f"{task.output} is there already, but {found}: {OTHERWISE}")
