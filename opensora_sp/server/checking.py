"""A request judged before it is queued, in a process of its own with bounded memory and time.

What came from a client is looked at there (pictures and videos are opened for their headers), so
that a file which ends the decoder or takes for ever costs that client alone.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import resource
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.server.protocol import BadRequest, as_bad_request

SECONDS = 20.0
MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Engine:
    """What the gateway knows of the engine: its flags and its ranks."""

    arguments: tuple[str, ...] = ()
    ranks: int = 1


@dataclass(frozen=True)
class Judged:
    """A request that is right: what is told of it again, and notes worth reading."""

    shown: dict[str, Any]
    notes: tuple[str, ...]


def job_arguments(engine: Engine, arguments: Sequence[str], outputs: Path) -> list[str]:
    """The command line of a job: the engine's flags, the request's, and where its output goes."""
    return [
        *engine.arguments,
        *arguments,
        f"--save-dir={outputs}",
        "--sample-name=video",
        "--verbose=0",
    ]


def judge(
    engine: Engine, arguments: Sequence[str], uploads: Sequence[str], outputs: Path
) -> Judged:
    """Raises UserError for what the command line would refuse, in its words."""
    from opensora_sp.request.request import reference_paths
    from opensora_sp.request.settings import build_job, parse_command_line, resolve

    command = parse_command_line(job_arguments(engine, arguments, outputs))
    values = resolve(command)
    job = build_job(values, world_size=engine.ranks)
    if job.failed:
        raise UserError(job.failed[0])
    request = job.tasks[0].request
    for path in reference_paths(request):
        if path not in uploads:
            raise UserError("--prompt names a file or an address: send the file with the request")
    height, width = request.decoded_size
    frames = request.num_frames + (request.loop - 1) * (request.num_frames - _repeated(request))
    return Judged(
        shown={
            "size": f"{width}x{height}",
            "seconds": f"{frames / request.save_fps:g}",
            "num_frames": frames,
            "seed": request.seed,
        },
        notes=tuple(note for note in job.notes if "embedded model" not in note),
    )


def _repeated(request: Any) -> int:
    from opensora_sp.request.conditions import dropped_frames

    return dropped_frames(request) if request.loop > 1 else 0


def _bounded() -> None:
    """In the child: no more memory than a judge needs."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _judge_safely(*arguments: Any) -> Judged | str:
    try:
        return judge(*arguments)
    except UserError as error:
        return str(error)
    except MemoryError:
        return "the file needs too much memory to be looked at"


def without_paths(text: str, outputs: Path) -> str:
    """What is told of a job, without where its files lie on the server."""
    folder = str(outputs.parent)
    return text.replace(f"{folder}/uploads/", "upload ").replace(f"{folder}/outputs/", "")


class Judge:
    """Judges requests one after the other in a child process, which is replaced where it fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __call__(self, arguments: Sequence[str], uploads: Sequence[str], outputs: Path) -> Judged:
        """What `judge` finds. Raises BadRequest where it refuses, fails or takes too long."""
        with self._lock:
            if self._pool is None:
                self._pool = concurrent.futures.ProcessPoolExecutor(
                    1, mp_context=multiprocessing.get_context("spawn"), initializer=_bounded
                )
            try:
                found = self._pool.submit(
                    _judge_safely, self._engine, list(arguments), list(uploads), outputs
                ).result(timeout=SECONDS)
            except concurrent.futures.TimeoutError:
                self._replace()
                raise BadRequest(
                    f"the files could not be looked at within {SECONDS:.0f} s: send shorter or "
                    "smaller ones",
                    "input_reference",
                ) from None
            except concurrent.futures.process.BrokenProcessPool:
                self._replace()
                raise BadRequest(
                    "the files could not be looked at: they ended the decoder", "input_reference"
                ) from None
        if isinstance(found, Judged):
            return found
        refused = as_bad_request(UserError(without_paths(found, outputs)))
        if any(path in found for path in uploads):
            refused.param = "input_reference"
        raise refused

    def _replace(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the child."""
        self._replace()
