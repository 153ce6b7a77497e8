"""A request judged before it is queued, in a process of its own with bounded memory and time.

What came from a client is looked at there (pictures and videos are opened for their headers), so
that a file which ends the decoder or takes for ever costs that client alone.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import re
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.request.conditions import total_frames
from opensora_sp.request.request import reference_paths
from opensora_sp.server.protocol import UPLOADS, BadRequest, as_bad_request
from opensora_sp.server.served import cost_of, plan_request, prompt_notes, why_not
from opensora_sp.server.settings import GroupSettings

SECONDS = 20.0
MEMORY_BYTES = 4 << 30


def judge(
    engine: GroupSettings,
    arguments: Sequence[str],
    uploads: Sequence[str],
    outputs: Path,
    refuse: bool = True,
) -> dict[str, Any]:
    """What is told again of a request that is right: its size, length, seed and notes; its cost.

    Raises UserError for what the command line would refuse, in its words, and for what does not
    fit the engine. refuse False: that comes back as "reason", None where it fits.
    """
    job = engine.job(arguments, outputs)
    request = job.tasks[0].request
    for path in reference_paths(request):
        if path not in uploads:
            raise UserError("--prompt names a file or an address: send the file with the request")
    plan, warm = plan_request(engine, job)
    by_name = not any(word.startswith("--image-size") for word in arguments)
    reason = why_not(job, warm, by_name=by_name)
    if refuse and reason is not None:
        raise UserError(reason)
    height, width = request.decoded_size
    frames = total_frames(request)
    found: dict[str, Any] = {
        "size": f"{width}x{height}",
        "seconds": f"{frames / request.save_fps:g}",
        "num_frames": frames,
        "seed": request.seed,
        "notes": prompt_notes(engine, job),
        "cost": cost_of(engine, job, plan),
    }
    return found if refuse else found | {"reason": reason}


def _bounded() -> None:
    """In the child: no more memory than a judge needs, and the engine goes before it."""
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _judge_safely(*arguments: Any) -> dict[str, Any] | str:
    try:
        return judge(*arguments)
    except UserError as error:
        return str(error)
    except MemoryError:
        return "the file needs too much memory to be looked at"


def without_paths(text: str, outputs: Path) -> str:
    """What is told of a job, without where its files lie on the server."""
    folder = str(outputs.parent)
    text = text.replace(f"{folder}/uploads/", "upload ").replace(f"{folder}/outputs/", "")
    # A message may have shortened a path in its middle.
    text = re.sub(r"'[^']*/uploads/([^']*)'", r"'upload \1'", text)
    text = re.sub(r"'[^']*/outputs/([^']*)'", r"'\1'", text)
    # Its folder, and the save directory in which all jobs' folders lie.
    for place in (outputs, outputs.parent, *outputs.absolute().parents[1:3]):
        if len(place.parts) > 1:
            text = text.replace(str(place), "the server's folder")
    return re.sub(r"\S*/uploads/", "upload ", text)


class Judge:
    """Judges requests one after the other in a child process, which is replaced where it fails."""

    def __init__(self, engine: GroupSettings) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __call__(
        self,
        arguments: Sequence[str],
        uploads: Sequence[str],
        outputs: Path,
        *,
        refuse: bool = True,
    ) -> dict[str, Any]:
        """What `judge` finds. Raises BadRequest where it refuses, fails or takes too long."""
        with self._lock:
            if self._pool is None:
                self._pool = concurrent.futures.ProcessPoolExecutor(
                    1, mp_context=multiprocessing.get_context("spawn"), initializer=_bounded
                )
            try:
                found = self._pool.submit(
                    _judge_safely, self._engine, list(arguments), list(uploads), outputs, refuse
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
        if not isinstance(found, str):
            return found
        told = without_paths(found, outputs)
        refused = as_bad_request(UserError(told))
        if "upload " in told and uploads and refused.param not in UPLOADS:
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
