"""Jobs' folders that many groups write to: each attempt at a job has a folder of its own.

    SAVE/queue-token                 what all processes of one queue must find there
    SAVE/jobs/ID/attempts/0003/      what attempt 3 writes: outputs, record, saved states, preview

No two attempts write the same file, so a group that was thought dead harms nobody. An attempt takes
over what an earlier one has saved. The database says which attempt's output is the job's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import UserError
from opensora_sp.server.job_store import JobResult, JobSpec, JobStore
from opensora_sp.server.queue_url import shown_url
from opensora_sp.server.shared_link import QueueLost
from opensora_sp.server.shared_queue import SharedQueue

if TYPE_CHECKING:
    from opensora_sp.request.request import Job

TOKEN_FILE = "queue-token"
# A file that another machine has just written may take this long to be seen on a network folder.
SEEN_SECONDS = 5.0
_STEP = re.compile(r".*\.step\.safetensors")
_CLIP = re.compile(r".*\.clip\d{4,}\.safetensors")
log = logging.getLogger(__name__)


class SharedStore(JobStore):
    """All jobs of a shared folder.

    attempt_of: the attempt that has a job, 0 where nobody had it. result_of: how a job ended, as
    the database says.
    """

    def __init__(
        self,
        save_dir: Path,
        attempt_of: Callable[[str], int],
        result_of: Callable[[str], JobResult | None],
    ) -> None:
        super().__init__(save_dir)
        self._attempt_of, self._result_of = attempt_of, result_of

    def attempt(self, job_id: str, number: int) -> Path:
        """What an attempt writes."""
        return self.folder(job_id) / "attempts" / f"{number:04d}"

    def attempts(self, job_id: str) -> Iterator[int]:
        """Numbers of the attempts that have written something, the latest first."""
        with contextlib.suppress(FileNotFoundError):
            names = [path.name for path in (self.folder(job_id) / "attempts").iterdir()]
            yield from sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def outputs(self, job_id: str) -> Path:
        """Where its output is written, by the attempt that has it."""
        number = self._attempt_of(job_id)
        return self.attempt(job_id, number) if number else super().outputs(job_id)

    def portable(self, spec: JobSpec) -> JobSpec:
        """A spec for the database: its uploads without the place of the folder here."""
        return self._moved(spec, f"{self.uploads(spec.id)}/", _uploads_word(spec.id))

    def local(self, spec: JobSpec) -> JobSpec:
        """A spec of the database with the uploads where this machine has them."""
        return self._moved(spec, _uploads_word(spec.id), f"{self.uploads(spec.id)}/")

    def preview(self, job_id: str) -> Path:
        """Where its preview lies while it is denoised."""
        return self.outputs(job_id) / "preview.webp"

    def result(self, job_id: str) -> JobResult | None:
        """How it ended; None while it has not."""
        return self._result_of(job_id)

    @staticmethod
    def _moved(spec: JobSpec, old: str, new: str) -> JobSpec:
        return replace(spec, arguments=tuple(one.replace(old, new) for one in spec.arguments))


def _uploads_word(job_id: str) -> str:
    """What stands for the folder of a job's uploads. No client knows the id beforehand."""
    return f"@{job_id}/uploads/"


def require_same_folder(save_dir: Path, queue: SharedQueue, url: str) -> None:
    """Raise UserError where a folder is not the one that the other processes of the queue have.

    The first process writes a token into its folder and into the database. Every other one must
    find the same in its own.
    """
    path = save_dir / TOKEN_FILE
    refusal = f"--save-dir {save_dir} is not the folder of the queue {shown_url(url)}"
    found = _read_token(path)
    proposed = found or secrets.token_hex(16)
    try:
        wanted = queue.folder_token(proposed)
    except QueueLost as error:
        raise UserError(
            f"--queue {shown_url(url)}: the database does not answer: {error}; try again"
        ) from None
    if wanted == proposed and found is None:
        with atomic_output(path) as temporary:
            temporary.write_text(wanted + "\n", encoding="ascii")
    end = time.monotonic() + SEEN_SECONDS
    while (found := _read_token(path)) is None and time.monotonic() < end:
        time.sleep(0.1)
    if found != wanted:
        what = "has no file" if found is None else "has another token in its file"
        raise UserError(
            f"{refusal}: it {what} {TOKEN_FILE}; give the folder that all other machines of this "
            "queue share, or another database"
        )
    # That it can be written to is found out now, and not with the first job.
    for folder in (save_dir / "jobs", save_dir):
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{secrets.token_hex(8)}"
        with atomic_output(trial) as temporary:
            temporary.touch()
        trial.unlink(missing_ok=True)


def holds_token(save_dir: Path, wanted: str) -> bool:
    """Whether the folder is still there and still the queue's."""
    return _read_token(save_dir / TOKEN_FILE) == wanted


def read_token(save_dir: Path) -> str:
    """The token of a folder that `require_same_folder` has seen; "" where it has gone."""
    return _read_token(save_dir / TOKEN_FILE) or ""


def _read_token(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()[:64] or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return "unreadable"


def take_over(store: SharedStore, job_id: str, number: int, job: Job, engine: Any) -> None:
    """Bring what an earlier attempt at a job has saved into the folder of attempt `number`.

    Files are linked where the folder can, else copied: the earlier attempt replaces files whole and
    never changes one. What this engine cannot go on from, such as the state of another dtype, is
    left out, and the job begins anew. job: with its output in the attempt's folder.
    """
    from opensora_sp.jobs.identity import difference, identity_of, latents_identity
    from opensora_sp.jobs.records import FOLDER, read_record, record_path
    from opensora_sp.jobs.saved_latents import StateFiles
    from opensora_sp.request.embedded import embedded_checkpoints
    from opensora_sp.request.step_cache import OFF
    from opensora_sp.request.step_choice import choose_schedule

    task = job.tasks[0]
    own = store.attempt(job_id, number)
    try:
        # Records and states are those of the schedule that a level means, not of its name.
        weights = (engine.settings.checkpoints or embedded_checkpoints()).dit
        chosen = choose_schedule(task.request, weights, lambda: engine.digests["dit"])
    except UserError:
        return  # the job itself fails with it
    task = replace(task, request=replace(task.request, step_cache=chosen.schedule or OFF))
    identity = identity_of(task, engine.settings, job.settings, engine.digests)
    for earlier in store.attempts(job_id):
        before = store.attempt(job_id, earlier)
        if earlier >= number or not (before / FOLDER).is_dir():
            continue
        output = before / task.output.name
        try:
            record = read_record(output)
            done = record is not None and record.stage == "done" and record.fits(output)
            same = record is not None and difference(record.identity, identity) is None
            if done and same and _link(output, own):
                _link(record_path(output), own / FOLDER)
                return
            # First the step: the clip that it is of may be finished meanwhile, and is then there.
            for kind in (_STEP, _CLIP):
                for path in sorted((before / FOLDER).iterdir()):
                    if kind.fullmatch(path.name):
                        _link(path, own / FOLDER)
            files = StateFiles(task.output, latents_identity(identity))
            if files.exists():
                stands = files.position()
                log.info(
                    "%s goes on after clip %d, step %d of attempt %d",
                    job_id, stands.clip, stands.step, earlier,
                )  # fmt: skip
                return
        except (UserError, OSError) as error:
            log.warning("what attempt %d of %s saved is not used: %s", earlier, job_id, error)
            shutil.rmtree(own / FOLDER, ignore_errors=True)


def _link(file: Path, folder: Path) -> bool:
    """The file in another folder too; False where it has gone."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.name
    try:
        try:
            os.link(file, target)
        except FileExistsError:
            return True
        except FileNotFoundError:
            return False
        except OSError:  # a file system without links
            with atomic_output(target) as temporary:
                shutil.copy2(file, temporary)
    except FileNotFoundError:
        return False
    return True


def remove_other_attempts(store: SharedStore, job_id: str, number: int) -> None:
    """Remove what attempts at a job left but the one that is its output."""
    for other in list(store.attempts(job_id)):
        if other != number:
            shutil.rmtree(store.attempt(job_id, other), ignore_errors=True)
