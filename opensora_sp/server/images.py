"""POST /v1/images/generations, as the openai client sends it: jobs of one frame, waited for.

They go through the queue of all jobs. Whoever leaves before they are made cancels them.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from opensora_sp.base.value_types import shown
from opensora_sp.server.board import Board, Entry
from opensora_sp.server.description import Pictures, answers, picture_body
from opensora_sp.server.job_store import JobStore
from opensora_sp.server.protocol import BadRequest, read_fields

MOST_IMAGES = 4
LOOK_SECONDS = 0.1
DEFAULT_SEED = 42
# Fields of OpenAI's models, and the values of them that say what is done here anyway.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "output_format": ("png",),
    "stream": (False,),
}
# Fields that say how a picture moves.
VIDEO_FIELDS = (
    "seconds",
    "num_frames",
    "fps",
    "save_fps",
    "loop",
    "condition_frame_length",
    "loop_carry",
    "reference_fps",
)

Outcome = Literal["ended", "late", "left", "stopping"]


@dataclass(frozen=True, kw_only=True)
class Intake:
    """What pictures need of the gateway.

    seconds: how long one may wait. stopping: whether the server is; finishing: whether it finishes
    the job that is made before. read: a body of JSON. full: why so many jobs of an owner are not
    taken now. arriving: counts so many jobs of an owner until they are queued. put: queues a job of
    these fields and owner; its id. remove: stops a job and removes it. refuse: an error as the API
    shows it.
    """

    board: Board
    store: JobStore
    seconds: float
    stopping: Callable[[], bool]
    finishing: Callable[[], bool]
    read: Callable[[Request], Awaitable[dict[str, Any]]]
    full: Callable[[str, int], Response | None]
    arriving: Callable[[str, int], AbstractContextManager[None]]
    put: Callable[[dict[str, Any], str], Awaitable[str]]
    remove: Callable[[Entry], None]
    refuse: Callable[..., Response]


def read_image_fields(fields: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """A request for pictures: the fields of each picture's job, and the form of the answer.

    Pictures of one request have seeds that follow each other. Raises BadRequest.
    """
    rest = {name: value for name, value in fields.items() if value is not None}
    form = rest.pop("response_format", "b64_json")
    if form not in ("b64_json", "url"):
        raise BadRequest(f"response_format {shown(form)} is not b64_json or url", "response_format")
    count = rest.pop("n", 1)
    if isinstance(count, bool) or count not in range(1, MOST_IMAGES + 1):
        raise BadRequest(f"n {shown(count)} is not a whole number from 1 to {MOST_IMAGES}", "n")
    for name, values in ONLY.items():
        if name in rest and rest[name] not in values:
            allowed = " or ".join(map(str, values))
            raise BadRequest(f"{name} {shown(rest[name])} is not {allowed}", name)
        rest.pop(name, None)
    for name in VIDEO_FIELDS:
        if name in rest:
            raise BadRequest(f"{name} is for videos: send it to /v1/videos", name)
    if rest.get("size") == "auto":
        del rest["size"]
    seed = rest.pop("seed", DEFAULT_SEED)
    try:
        first = int(str(seed))
    except ValueError:
        raise BadRequest(f"seed {shown(seed)} is not a whole number from 0", "seed") from None
    jobs = [rest | {"num_frames": 1, "seed": first + place} for place in range(int(count))]
    read_fields(jobs[0])
    return jobs, form


def add_images(app: FastAPI, intake: Intake) -> None:
    """Answer POST /v1/images/generations."""

    @app.post(
        "/v1/images/generations",
        responses=answers(Pictures),
        openapi_extra=picture_body(MOST_IMAGES, VIDEO_FIELDS, ONLY),
    )
    async def generate(request: Request) -> Response:
        """Make 1 to 4 pictures and answer with them. `prompt` is needed."""
        kind = request.headers.get("content-type", "").split(";")[0]
        if kind != "application/json":
            raise HTTPException(415, f"content-type {kind[:60]!r}: send application/json")
        try:
            fields = await intake.read(request)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            return intake.refuse(400, "the body did not arrive in time")
        asked, form = read_image_fields(fields)
        owner = request.state.owner
        if (full := intake.full(owner, len(asked))) is not None:
            return full
        ids: list[str] = []
        outcome: Outcome = "left"
        try:
            with intake.arriving(owner, len(asked)):
                for each in asked:
                    ids.append(await intake.put(each, owner))
            outcome = await _wait(request, intake, ids)
        finally:
            # Other gateways have the jobs of a shared queue, too: what is queued is made.
            stays = outcome == "stopping" and intake.board.others
            if outcome != "ended" and not stays:
                await run_in_threadpool(_remove_all, intake, ids)
        if outcome != "ended":
            return _not_made(intake, outcome, ids)
        entries = [intake.board.get(job_id) for job_id in ids]
        for entry in entries:
            if entry is None or entry.result is None or entry.result.error is not None:
                await run_in_threadpool(_remove_all, intake, ids)
                return _failed(intake, entry)
        made = [entry for entry in entries if entry is not None]
        data = await run_in_threadpool(_data, intake, made, form, str(request.base_url))
        size = made[0].spec.shown.get("size")
        return JSONResponse(
            {"created": int(time.time()), "data": data, "output_format": "png", "size": size}
        )


async def _wait(request: Request, intake: Intake, ids: Sequence[str]) -> Outcome:
    """Until all jobs have ended, or there is nobody or no time left to wait."""
    end = time.monotonic() + intake.seconds
    gone = asyncio.ensure_future(_gone(request))
    try:
        return await _outcome(intake, ids, end, gone)
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    """Return when nobody listens any more; the body has been read."""
    # Request.is_disconnected sees nothing behind a middleware.
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _outcome(
    intake: Intake, ids: Sequence[str], end: float, gone: asyncio.Future[None]
) -> Outcome:
    while True:
        entries = [intake.board.get(job_id) for job_id in ids]
        if all(entry is None or not entry.live for entry in entries):
            return "ended"
        if time.monotonic() > end:
            return "late"
        waits = any(entry is not None and entry.status == "queued" for entry in entries)
        if intake.stopping() and (waits or not intake.finishing()):
            return "stopping"
        if gone.done():
            return "left"
        await asyncio.sleep(LOOK_SECONDS)


def _remove_all(intake: Intake, ids: Sequence[str]) -> None:
    for job_id in ids:
        entry = intake.board.get(job_id)
        if entry is not None:
            intake.remove(entry)


def _not_made(intake: Intake, outcome: Outcome, ids: Sequence[str]) -> Response:
    if outcome == "late":
        seconds = intake.seconds
        return intake.refuse(
            503,
            f"it was not made within {seconds:g} s and is cancelled: send num_frames 1 to "
            "/v1/videos, which answers at once",
            code="timeout",
        )
    if intake.board.others:
        names = " and ".join(ids)
        return intake.refuse(
            503,
            f"this gateway is being stopped; what was asked for is made all the same: ask another "
            f"gateway for /v1/videos/ID of {names}",
            code="stopping",
        )
    return intake.refuse(503, "the server is being stopped; the request is cancelled")


def _failed(intake: Intake, entry: Entry | None) -> Response:
    """Why a picture is not there: it was deleted meanwhile, refused, or the engine's fault."""
    if entry is None:
        return intake.refuse(409, "it was deleted while it was made")
    result = entry.result
    assert result is not None
    asked = result.error_code == "invalid_request"
    return intake.refuse(400 if asked else 500, result.error or "it failed", code=result.error_code)


def _data(intake: Intake, entries: Sequence[Entry], form: str, base: str) -> list[dict[str, Any]]:
    """The pictures as the answer holds them; id and seed are this server's own."""
    data = []
    for entry in entries:
        job_id = entry.spec.id
        one: dict[str, Any] = {"id": job_id, "seed": entry.spec.shown.get("seed")}
        if form == "url":
            one["url"] = f"{base}v1/videos/{job_id}/content"
        else:
            output = intake.store.output(job_id)
            if output is None:
                raise HTTPException(409, "it was deleted while it was sent")
            one["b64_json"] = base64.b64encode(output.read_bytes()).decode("ascii")
        data.append(one)
    return data
