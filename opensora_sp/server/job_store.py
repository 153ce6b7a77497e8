"""A job's folder in the save directory: what was asked, what was sent along, how far it is.

    SAVE/jobs/ID/job.json         what was asked for; written once, before the job is queued
    SAVE/jobs/ID/uploads/         files that came with it, under names of our own
    SAVE/jobs/ID/outputs/         output, its record and its saved states, as generate writes them
    SAVE/jobs/ID/progress.json    how far it is, while it is made
    SAVE/jobs/ID/preview.webp     what it will look like, while it is denoised
    SAVE/jobs/ID/result.json      how it ended: the output's name and timings, or the error
    SAVE/jobs/ID/cancel           somebody wants it to stop
    SAVE/jobs/together.json       the jobs that are made together now, where they are several

Every file appears whole or not at all. The gateway writes job.json and cancel; the engine's rank 0
writes the others.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import parse_json

_ID = re.compile(r"video_[0-9a-f]{24}")
_LARGEST_FILE = 4 << 20
_TOGETHER = "together.json"
DEFAULT_PRIORITY = 100  # 1 is first


@dataclass(frozen=True)
class JobSpec:
    """What was asked for.

    arguments: flags and values, as the command line takes them. shown: what a client is told
    again (model, prompt, size, seconds, ...). priority: 1 is first.
    """

    id: str
    created_at: float
    arguments: tuple[str, ...]
    shown: dict[str, Any] = field(default_factory=dict)
    priority: int = DEFAULT_PRIORITY
    owner: str = ""


@dataclass(frozen=True)
class JobProgress:
    """How far a job is. step counts over all clips; eta_s: None where it is not known yet.

    preview: the step that the preview shows, 0 where there is none. together: so many jobs are made
    in one batch, which shares the time.
    """

    stage: str
    step: int = 0
    steps: int = 0
    eta_s: float | None = None
    started_at: float = 0.0
    preview: int = 0
    together: int = 1

    @property
    def percent(self) -> int:
        """0 to 99: 100 is for a job that is completed."""
        return 0 if not self.steps else min(99, 100 * self.step // self.steps)


@dataclass(frozen=True)
class JobResult:
    """How a job ended. error: one line, or None; file: the output's name in outputs/.

    stages: seconds on rank 0. peak_bytes: of rank 0's device, None on a CPU. peaks: of every rank,
    of its device, or of its process where the device counts none. steps, steps_made: denoising
    steps of the job, and those made since the engine was started last. bytes_sent: by collective,
    over all ranks. together: how many jobs were made in one batch; seconds and stages are the
    batch's.
    """

    finished_at: float
    file: str | None = None
    error: str | None = None
    error_code: str | None = None
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    peaks: Sequence[int | None] = ()
    bytes_sent: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    steps_made: int = 0
    together: int = 1


_Kind = TypeVar("_Kind", JobSpec, JobProgress, JobResult)


def _made(kind: type[_Kind], found: dict[str, Any]) -> _Kind | None:
    """What a file holds; None where a value is missing or of another type.

    Keys that are not known are left out: a newer version may have written them.
    """
    from pydantic import ValidationError

    try:
        return cast(_Kind, _adapter(cast(Any, kind)).validate_python(found))
    except ValidationError:
        return None


@cache
def _adapter(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


class JobStore:
    """All jobs of a save directory."""

    def __init__(self, save_dir: Path) -> None:
        self.root = save_dir / "jobs"

    def new_id(self) -> str:
        """A name that nobody can guess."""
        return f"video_{secrets.token_hex(12)}"

    def folder(self, job_id: str) -> Path:
        """A job's folder. Raises KeyError for what is no id: nothing else becomes a path."""
        if not _ID.fullmatch(job_id):
            raise KeyError(job_id)
        return self.root / job_id

    def uploads(self, job_id: str) -> Path:
        """Where the files that came with it lie."""
        return self.folder(job_id) / "uploads"

    def outputs(self, job_id: str) -> Path:
        """Where its output is written."""
        return self.folder(job_id) / "outputs"

    def preview(self, job_id: str) -> Path:
        """Where its preview lies while it is denoised."""
        return self.folder(job_id) / "preview.webp"

    def ids(self) -> Iterator[str]:
        """Every job that was ever asked for and not deleted; in no order."""
        if self.root.is_dir():
            for path in self.root.iterdir():
                if _ID.fullmatch(path.name) and (path / "job.json").is_file():
                    yield path.name

    def put_spec(self, spec: JobSpec) -> None:
        """Write what was asked for; the folder may hold its uploads already."""
        self.folder(spec.id).mkdir(parents=True, exist_ok=True)
        self._put(spec.id, "job.json", asdict(spec))

    def spec(self, job_id: str) -> JobSpec:
        """What was asked for. Raises KeyError where there is no such job."""
        found = self._get(job_id, "job.json")
        if found is None:
            raise KeyError(job_id)
        spec = _made(JobSpec, found)
        if spec is None:
            raise KeyError(job_id)
        return spec

    def put_progress(self, job_id: str, progress: JobProgress) -> None:
        """Write how far it is."""
        self._put(job_id, "progress.json", asdict(progress))

    def progress(self, job_id: str) -> JobProgress | None:
        """How far it is; None before it is begun."""
        found = self._get(job_id, "progress.json")
        return None if found is None else _made(JobProgress, found)

    def put_result(self, job_id: str, result: JobResult) -> None:
        """Write how it ended; the preview goes."""
        self._put(job_id, "result.json", asdict(result))
        self.preview(job_id).unlink(missing_ok=True)

    def result(self, job_id: str) -> JobResult | None:
        """How it ended; None while it has not."""
        found = self._get(job_id, "result.json")
        return None if found is None else _made(JobResult, found)

    def put_together(self, job_ids: Iterable[str]) -> None:
        """The jobs that are made together now; none or one: nothing is made together."""
        path, names = self.root / _TOGETHER, list(job_ids)
        if len(names) < 2:
            path.unlink(missing_ok=True)
            return
        with atomic_output(path) as temporary:
            temporary.write_text(json.dumps(names), encoding="ascii")

    def together(self) -> list[str]:
        """What `put_together` wrote last."""
        try:
            found = parse_json((self.root / _TOGETHER).read_bytes(), most_bytes=_LARGEST_FILE)
        except (OSError, ValueError):
            return []
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            return []
        return found

    def ask_to_cancel(self, job_id: str) -> None:
        """The engine stops at the next step of this job."""
        with contextlib.suppress(FileNotFoundError):  # it is deleted already
            (self.folder(job_id) / "cancel").touch()

    def cancel_asked(self, job_id: str) -> bool:
        """Whether somebody wants it to stop; also where it was deleted meanwhile."""
        folder = self.folder(job_id)
        return (folder / "cancel").exists() or not (folder / "job.json").exists()

    def forget(self, job_id: str) -> None:
        """Make a job gone whose folder the engine writes to; the engine removes the folder."""
        (self.folder(job_id) / "job.json").unlink(missing_ok=True)

    def delete(self, job_id: str) -> None:
        """Remove everything of a job; job.json first, so that a half-deleted one is gone."""
        folder = self.folder(job_id)
        (folder / "job.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def size(self, job_id: str) -> int:
        """Bytes of everything in a job's folder."""
        total = 0
        for path in self.folder(job_id).rglob("*"):
            with contextlib.suppress(OSError):  # deleted meanwhile
                if path.is_file():
                    total += path.stat().st_size
        return total

    def orphans(self, older: float) -> Iterator[str]:
        """Folders without a job.json in which nothing was written since `older`, s since 1970."""
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if not _ID.fullmatch(path.name) or (path / "job.json").exists():
                continue
            with contextlib.suppress(OSError):
                if max(p.stat().st_mtime for p in (path, *path.rglob("*"))) < older:
                    yield path.name

    def output(self, job_id: str) -> Path | None:
        """The finished output; None where there is none."""
        result = self.result(job_id)
        if result is None or result.file is None:
            return None
        path = self.outputs(job_id) / Path(result.file).name
        return path if path.is_file() else None

    def _put(self, job_id: str, name: str, content: dict[str, Any]) -> None:
        folder = self.folder(job_id)
        if not folder.is_dir():
            return  # deleted meanwhile: nothing is to come back
        try:
            with atomic_output(folder / name) as temporary:
                temporary.write_text(json.dumps(content), encoding="utf-8")
        except (OSError, UserError):
            if (folder / "job.json").exists() or name == "job.json":
                raise  # else it was deleted while this was written

    def _get(self, job_id: str, name: str) -> dict[str, Any] | None:
        path = self.folder(job_id) / name
        try:
            if path.stat().st_size > _LARGEST_FILE:
                return None
            found = parse_json(path.read_bytes(), most_bytes=_LARGEST_FILE)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None
