"""/v1/videos: jobs are judged, queued, shown, handed out and deleted."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import one_line
from opensora_sp.server.board import Board, Entry, rounded
from opensora_sp.server.bodies import length_of, received
from opensora_sp.server.description import (
    Estimate,
    Video,
    VideoDeleted,
    VideoList,
    answers,
    files,
    video_body,
)
from opensora_sp.server.earlier import files_of_earlier_jobs
from opensora_sp.server.gateway import Gateway
from opensora_sp.server.job_store import JobSpec
from opensora_sp.server.owners import sees
from opensora_sp.server.polls import PATH, answer
from opensora_sp.server.protocol import UPLOADS, BadRequest, as_bad_request, read_fields
from opensora_sp.server.refusals import refusal, refuse_draining

log = logging.getLogger(__name__)
_MEDIA = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}


def refuse_new(gateway: Gateway, owner: str, count: int = 1) -> JSONResponse | None:
    """Why so many new jobs are not taken now; None where they are."""
    limits = gateway.limits
    if gateway.draining:
        return refuse_draining()
    arriving = gateway.arriving
    if gateway.board.counts()["queued"] + arriving.total + count > limits.queued:
        return refusal(429, f"{limits.queued} jobs are queued already: try again later")
    mine = gateway.board.queued_of(owner) + arriving.jobs[owner]
    if gateway.tokens and mine + count > limits.queued_each:
        return refusal(429, f"{mine} of your jobs are queued already: try again later")
    return None


def add_videos(app: FastAPI, gateway: Gateway) -> None:
    """Serve what makes, shows and deletes videos."""
    _add_making(app, gateway)
    _add_showing(app, gateway)


async def _entry_of(gateway: Gateway, video_id: str, request: Request) -> Entry:
    """The job, where the caller may see it. Raises HTTPException 404 for all others."""
    board = gateway.board
    entry = board.get(video_id)
    if entry is None and board.others:  # another gateway may have taken it just now
        entry = await run_in_threadpool(board.seek, video_id)
    # Somebody else's is not there: a client cannot find out which ids are taken.
    if entry is None or not gateway.sees(request.state.owner, entry):
        raise HTTPException(404, f"there is no video {video_id[:64]!r}")
    return entry


def _add_making(app: FastAPI, gateway: Gateway) -> None:
    limits = gateway.limits

    @app.post("/v1/videos", responses=answers(Video), openapi_extra=video_body())
    async def create(request: Request) -> Response:
        """Queue a video: multipart/form-data, or JSON. `prompt` is needed."""
        owner, arriving = request.state.owner, gateway.arriving
        if (full := refuse_new(gateway, owner)) is not None:
            return full
        job_id = gateway.store.new_id()
        with arriving.job(owner), arriving.body(length_of(request), limits.bytes_at_once):
            try:
                fields, uploads = await received(request, gateway, job_id)
            except BaseException:
                await run_in_threadpool(gateway.store.delete, job_id)
                raise
            async with gateway.judging:
                entry = await run_in_threadpool(queue_job, gateway, job_id, fields, uploads, owner)
            return answer(gateway, entry)

    @app.post("/v1/videos/estimate", responses=answers(Estimate), openapi_extra=video_body())
    async def estimate(request: Request) -> Response:
        """What a video of these fields needs and how long it takes; nothing is queued."""
        owner, job_id = request.state.owner, gateway.store.new_id()
        with gateway.arriving.body(length_of(request), limits.bytes_at_once):
            try:
                fields, uploads = await received(request, gateway, job_id)
                async with gateway.judging:
                    return JSONResponse(
                        await run_in_threadpool(_estimate, gateway, job_id, fields, uploads, owner)
                    )
            finally:
                await run_in_threadpool(gateway.store.delete, job_id)


def _add_showing(app: FastAPI, gateway: Gateway) -> None:
    board = gateway.board

    # As Polls answers it; here it is described, and refused where it is not there.
    @app.get(PATH, responses=answers(Video))
    async def retrieve(video_id: str, request: Request) -> Response:
        """One video."""
        return answer(gateway, await _entry_of(gateway, video_id, request))

    @app.get("/v1/videos", responses=answers(VideoList))
    async def listed(
        request: Request, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> Response:
        """Videos, newest first or oldest first, a page at a time."""
        if not 1 <= limit <= 100:
            raise BadRequest(f"limit {limit} is not a whole number from 1 to 100", "limit")
        if order not in ("asc", "desc"):
            raise BadRequest(f"order {order[:20]!r} is not asc or desc", "order")
        owner = request.state.owner
        last = None if after is None else board.get(after)
        if after is not None and last is None and board.others:
            last = await run_in_threadpool(board.seek, after)
        if after is not None and (last is None or not gateway.sees(owner, last)):
            raise BadRequest(f"after {after[:64]!r} is not one of the videos", "after")
        page, more = board.page(
            last,
            limit,
            newest_first=order == "desc",
            shows=lambda entry: gateway.sees(owner, entry),
        )
        ends = {
            "first_id": page[0].spec.id if page else None,
            "last_id": page[-1].spec.id if page else None,
            "has_more": more,
        }
        head = b'{"object":"list","data":[' + b",".join(board.body(entry) for entry in page)
        return Response(head + b"]," + json.dumps(ends).encode()[1:], media_type="application/json")

    @app.delete("/v1/videos/{video_id}", responses=answers(VideoDeleted))
    async def delete(video_id: str, request: Request) -> Response:
        """Delete a video; one that is queued or being made is stopped first."""
        entry = await _entry_of(gateway, video_id, request)
        await run_in_threadpool(remove, gateway, entry)
        return JSONResponse({"id": video_id, "deleted": True, "object": "video.deleted"})

    @app.get(
        "/v1/videos/{video_id}/content",
        responses=files(*_MEDIA.values()),
        response_class=FileResponse,
    )
    async def content(video_id: str, request: Request, variant: str = "video") -> Response:
        """The file: variant video, thumbnail or spritesheet."""
        if variant not in ("video", "thumbnail", "spritesheet"):
            raise BadRequest(
                f"variant {variant[:40]!r} is not video, thumbnail or spritesheet", "variant"
            )
        entry = await _entry_of(gateway, video_id, request)
        if entry.status != "completed" and board.others:  # another gateway may know of it already
            found = await run_in_threadpool(board.seek, video_id)
            entry = entry if found is None else found
        output = gateway.store.output(video_id)
        if entry.status != "completed" or output is None:
            raise HTTPException(404, f"{video_id} is {entry.status}: it has no {variant} yet")
        if variant != "video":
            from opensora_sp.server.previews import preview

            output = await run_in_threadpool(preview, output, variant)
        return FileResponse(
            output,
            media_type=_MEDIA[output.suffix],
            filename=f"{video_id}{output.suffix}",
            content_disposition_type="inline",
        )

    @app.get("/v1/videos/{video_id}/events", include_in_schema=False)
    async def events(video_id: str, request: Request) -> Response:
        """Every change of a job as server-sent events, until it has ended."""
        await _entry_of(gateway, video_id, request)
        return StreamingResponse(_events(board, video_id), media_type="text/event-stream")


async def _events(board: Board, video_id: str) -> AsyncIterator[str]:
    last = ""
    while (entry := board.get(video_id)) is not None:
        video = json.dumps(board.video(entry))
        if video != last:
            last = video
            yield f"data: {video}\n\n"
        if not entry.live:
            return
        await asyncio.sleep(0.25)
    yield 'event: deleted\ndata: {"deleted": true}\n\n'


def queue_job(
    gateway: Gateway,
    job_id: str,
    fields: dict[str, Any],
    uploads: list[tuple[str, str, str]],
    owner: str,
) -> Entry:
    """Judge the request, write the job down, queue it: in this order, so that none is lost."""
    try:
        uploads = files_of_earlier_jobs(
            gateway.store, gateway.board, sees(gateway.tokens, owner), job_id, fields, uploads
        )
        asked = read_fields(gateway.label.put_into(fields), uploads)
        outputs = gateway.store.outputs(job_id)
        shown = gateway.judge(asked.arguments, [path for _, path, _ in uploads], outputs)
    except BaseException as error:
        gateway.store.delete(job_id)
        sent = [name for name, _, _ in uploads]
        if isinstance(error, BadRequest) and error.param in UPLOADS and sent:
            # The field that the client sent, where a flag of another name is made of it.
            error.param = error.param if error.param in sent else sent[0]
        raise
    spec = JobSpec(
        id=job_id,
        created_at=time.time(),
        arguments=(*gateway.label.arguments, *asked.arguments),
        shown=asked.shown | shown,
        priority=asked.priority,
        owner=owner,
    )
    gateway.store.put_spec(spec)
    entry = gateway.board.add(spec)
    try:
        gateway.jobs.put(job_id, asked.priority)
    except BaseException:  # the client is told that it failed: nothing of it stays
        gateway.board.remove(job_id)
        gateway.store.delete(job_id)
        raise
    prompt = f": {one_line(asked.shown['prompt'])}" if gateway.log_prompts else ""
    log.info("%s is queued%s", job_id, prompt, extra={"job": job_id})
    return entry


def _estimate(
    gateway: Gateway,
    job_id: str,
    fields: dict[str, Any],
    uploads: list[tuple[str, str, str]],
    owner: str,
) -> dict[str, Any]:
    """What a request needs, and how long it and those before it take as far as is known."""
    may_see = sees(gateway.tokens, owner)
    uploads = files_of_earlier_jobs(gateway.store, gateway.board, may_see, job_id, fields, uploads)
    asked = read_fields(fields, uploads)
    outputs, paths = gateway.store.outputs(job_id), [path for _, path, _ in uploads]
    found = gateway.judge(asked.arguments, paths, outputs, refuse=False)
    reason, cost = found["reason"], found["cost"]
    board = gateway.board
    return {
        "fits": reason is None,
        "reason": reason and str(as_bad_request(UserError(reason))),
        "size": found["size"],
        "seconds": found["seconds"],
        "num_frames": found["num_frames"],
        "peak_memory_mb": cost["peak_memory_mb"],
        "estimated_s": rounded(board.estimator.seconds(cost)) if reason is None else None,
        "queue_s": rounded(board.queue_seconds(asked.priority)),
        "tflop": cost["tflop"],
        "notes": found["notes"],
    }


def remove(gateway: Gateway, entry: Entry) -> None:
    """Stop a job where it has not ended, and remove everything of it."""
    job_id = entry.spec.id
    if gateway.board.others:
        # The database alone stops it. Where the answer is lost, `withdraw_unsure` finds out later.
        gateway.jobs.cancel(job_id)
    elif entry.live:
        gateway.store.ask_to_cancel(job_id)
        gateway.jobs.cancel(job_id)
    now = gateway.board.get(job_id) or entry
    if not gateway.board.remove(job_id):
        return  # somebody else deletes it just now
    if now.status == "in_progress":
        gateway.store.forget(job_id)  # the engine writes there: it removes what is left
    else:
        gateway.store.delete(job_id)
    if entry.live:
        gateway.metrics.job_cancelled()
        log.info("%s is deleted before it ended", job_id, extra={"job": job_id})
    elif not gateway.board.others:
        gateway.jobs.forget(job_id)
