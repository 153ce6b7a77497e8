"""The gateway: HTTP in front of the queue. Holds no model and never blocks on the engine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import StreamingResponse

from opensora_sp import __version__
from opensora_sp.server.board import Board, Entry
from opensora_sp.server.checking import Judge
from opensora_sp.server.durable import JobQueue
from opensora_sp.server.earlier import files_of_earlier_jobs
from opensora_sp.server.job_store import JobSpec, JobStore
from opensora_sp.server.live import Feed
from opensora_sp.server.page import add_page
from opensora_sp.server.page_routes import LOGIN, add_page_routes, sees
from opensora_sp.server.protocol import MODEL, UPLOADS, BadRequest, error_json, read_fields
from opensora_sp.server.uploads import picture_or_video, save_upload

log = logging.getLogger(__name__)
POLL_AFTER_MS = 500
# Without a token: the page has no job in it, and asks for the token itself.
OPEN = ("/", "/health", "/ready", LOGIN)
_MEDIA = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all of them, may ask of the gateway."""

    queued: int = 1000
    queued_each: int = 200
    body_bytes: int = 512 << 20
    body_seconds: float = 120.0
    files: int = 8
    fields: int = 64


@dataclass(kw_only=True)
class Gateway:
    """What the routes share.

    tokens: token → its owner's name; empty lets everybody in. engine_state: "ready", "starting",
    "stopped" or what is wrong with it.
    """

    store: JobStore
    jobs: JobQueue
    board: Board
    judge: Judge
    engine_state: Callable[[], str]
    tokens: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    hosts: Sequence[str] = ()
    embedded: bool = True
    draining: bool = False


def build_app(gateway: Gateway) -> FastAPI:
    """The application. It describes itself at /openapi.json."""
    # FastAPI's own pages load their scripts from elsewhere.
    app = FastAPI(
        title="Open-Sora 1.2 server",
        version=__version__,
        lifespan=_lifespan(gateway),
        docs_url=None,
        redoc_url=None,
    )
    app.middleware("http")(_guard(gateway))
    app.add_exception_handler(BadRequest, _on_bad_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_operations(app, gateway)
    _add_videos(app, gateway)
    feed = Feed(gateway.board, gateway.engine_state, lambda: gateway.draining)
    add_page_routes(app, gateway.store, gateway.board, gateway.tokens, feed)
    add_page(app, embedded=gateway.embedded, asks_token=bool(gateway.tokens))
    return app


def _lifespan(gateway: Gateway) -> Callable[[FastAPI], Any]:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gateway.board.start()
        yield
        gateway.board.close()
        gateway.judge.close()

    return lifespan


def _refusal(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error as the API shows it; clients are told not to try again by themselves."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(
        error_json(message, kind=kind, param=param, code=code),
        status_code=status,
        headers={"x-should-retry": "false"},
    )


async def _on_bad_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return _refusal(400, str(error), param=error.param, code="invalid_value")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refusal(error.status_code, str(error.detail))


def _guard(gateway: Gateway) -> Callable[..., Any]:
    """Who may call at all: the right host, the right origin, a token where one is asked for."""

    async def guard(request: Request, call_next: Callable[..., Any]) -> Response:
        host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]").lower()
        if gateway.hosts and host not in gateway.hosts:
            return _refusal(421, f"this server does not answer for the host {host[:100]!r}")
        origin = request.headers.get("origin")
        own = origin is None or origin.split("://", 1)[-1] == request.headers.get("host", "")
        if not own and request.method not in ("GET", "HEAD"):
            return _refusal(403, "requests from pages of other sites are refused")
        request.state.owner, path = "", request.url.path
        if gateway.tokens and path not in OPEN and not path.startswith("/static/"):
            owner = _owner(gateway.tokens, request)
            if owner is None:
                answer = _refusal(401, "a token is needed: Authorization: Bearer TOKEN")
                answer.headers["www-authenticate"] = "Bearer"
                return answer
            request.state.owner = owner
        length = request.headers.get("content-length")
        if length is not None and (
            not length.isdecimal() or int(length) > gateway.limits.body_bytes
        ):
            return _refusal(
                413, f"the body is larger than {gateway.limits.body_bytes >> 20} MiB are taken"
            )
        response: Response = await call_next(request)
        response.headers.setdefault("x-content-type-options", "nosniff")
        response.headers.setdefault("referrer-policy", "no-referrer")
        response.headers.setdefault("cross-origin-resource-policy", "same-origin")
        response.headers.setdefault(
            "content-security-policy",
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
            "media-src 'self' blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
            "frame-ancestors 'none'",
        )
        return response

    return guard


def _owner(tokens: Mapping[str, str], request: Request) -> str | None:
    """Whose token came along; every token is compared in constant time."""
    given = request.headers.get("authorization", "")
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer":
        token = request.cookies.get("token", "")
    found = None
    for known, owner in tokens.items():
        if hmac.compare_digest(known.encode(), token.strip().encode()):
            found = owner
    return found


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", include_in_schema=False)
    async def health() -> Response:
        """Live: the gateway answers and its engine is not given up."""
        state = gateway.engine_state()
        return JSONResponse(
            {"status": state, "version": __version__}, 503 if state.startswith("failed") else 200
        )

    @app.get("/ready", include_in_schema=False)
    async def ready() -> Response:
        """Ready: jobs are taken and made now."""
        state = "draining" if gateway.draining else gateway.engine_state()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model."""
        one = {"id": MODEL, "object": "model", "created": 0, "owned_by": "opensora_sp"}
        return JSONResponse({"object": "list", "data": [one]})


def _add_videos(app: FastAPI, gateway: Gateway) -> None:
    board, limits = gateway.board, gateway.limits

    def entry_of(video_id: str) -> Entry:
        entry = board.get(video_id)
        if entry is None:
            raise HTTPException(404, f"there is no video {video_id[:64]!r}")
        return entry

    def answer(entry: Entry) -> JSONResponse:
        headers = {"openai-poll-after-ms": str(POLL_AFTER_MS)}
        return JSONResponse(board.video(entry), headers=headers)

    @app.post("/v1/videos")
    async def create(request: Request) -> Response:
        """Queue a video: multipart/form-data, or JSON. `prompt` is needed."""
        if gateway.draining:
            return _refusal(503, "the server is being stopped and takes no new jobs")
        counts = board.counts()
        if counts["queued"] >= limits.queued:
            return _refusal(429, f"{limits.queued} jobs are queued already: try again later")
        owner = request.state.owner
        if gateway.tokens:
            mine = sum(e.status == "queued" and e.spec.owner == owner for e in board.all())
            if mine >= limits.queued_each:
                return _refusal(429, f"{mine} of your jobs are queued already: try again later")
        job_id = gateway.store.new_id()
        try:
            fields, uploads = await asyncio.wait_for(
                _read_body(request, gateway, job_id), limits.body_seconds
            )
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            await run_in_threadpool(gateway.store.delete, job_id)
            return _refusal(400, f"the body did not arrive within {limits.body_seconds:.0f} s")
        except BaseException:
            await run_in_threadpool(gateway.store.delete, job_id)
            raise
        return answer(await run_in_threadpool(_queue, gateway, job_id, fields, uploads, owner))

    @app.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str) -> Response:
        """One video."""
        return answer(entry_of(video_id))

    @app.get("/v1/videos")
    async def listed(after: str | None = None, limit: int = 20, order: str = "desc") -> Response:
        """Videos, newest first or oldest first, a page at a time."""
        if not 1 <= limit <= 100:
            raise BadRequest(f"limit {limit} is not a whole number from 1 to 100", "limit")
        if order not in ("asc", "desc"):
            raise BadRequest(f"order {order[:20]!r} is not asc or desc", "order")
        entries = board.all()
        if order == "asc":
            entries.reverse()
        if after is not None:
            places = [n for n, entry in enumerate(entries) if entry.spec.id == after]
            if not places:
                raise BadRequest(f"after {after[:64]!r} is not one of the videos", "after")
            entries = entries[places[0] + 1 :]
        page = entries[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": [board.video(entry) for entry in page],
                "first_id": page[0].spec.id if page else None,
                "last_id": page[-1].spec.id if page else None,
                "has_more": len(entries) > len(page),
            }
        )

    @app.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> Response:
        """Delete a video; one that is queued or being made is stopped first."""
        entry = entry_of(video_id)
        await run_in_threadpool(remove, gateway, entry)
        return JSONResponse({"id": video_id, "deleted": True, "object": "video.deleted"})

    @app.get("/v1/videos/{video_id}/content")
    async def content(video_id: str, variant: str = "video") -> Response:
        """The file: variant video, thumbnail or spritesheet."""
        if variant not in ("video", "thumbnail", "spritesheet"):
            raise BadRequest(
                f"variant {variant[:40]!r} is not video, thumbnail or spritesheet", "variant"
            )
        entry = entry_of(video_id)
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
    async def events(video_id: str) -> Response:
        """Every change of a job as server-sent events, until it has ended."""
        entry_of(video_id)
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


async def _read_body(
    request: Request, gateway: Gateway, job_id: str
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Fields, and (field, path, kind) of each file, stored under names of our own."""
    limits, kind = gateway.limits, request.headers.get("content-type", "").split(";")[0]
    if kind == "application/json":
        raw = b""
        async for part in request.stream():
            raw += part
            if len(raw) > 1 << 20:
                raise HTTPException(413, "a body of JSON is at most 1 MiB; send files as a form")
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError):
            raise BadRequest("the body is not JSON") from None
        if not isinstance(fields, dict):
            raise BadRequest("the body is not a JSON object")
        return fields, []
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise HTTPException(
            415, f"content-type {kind[:60]!r}: send multipart/form-data or application/json"
        )
    if "content-length" not in request.headers:
        raise HTTPException(411, "a form needs its content-length")
    try:
        form = await request.form(
            max_files=limits.files, max_fields=limits.fields, max_part_size=1 << 20
        )
    except (MultiPartException, HTTPException) as error:
        raise BadRequest(f"the form cannot be read: {getattr(error, 'detail', error)}") from None
    fields = {}
    uploads: list[tuple[str, str, str]] = []
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                if name in fields:
                    raise BadRequest(f"{name[:60]} came twice: one value is taken", name[:60])
                fields[name] = value
                continue
            if name not in UPLOADS:
                raise BadRequest(
                    f"{name[:60]!r} takes no file; files come as {', '.join(UPLOADS)}", name[:60]
                )
            folder = gateway.store.uploads(job_id)
            path = await run_in_threadpool(save_upload, value.file, folder, len(uploads))
            uploads.append((name, str(path), picture_or_video(path)))
    return fields, uploads


def _queue(
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
        asked = read_fields(fields, uploads)
        outputs = gateway.store.outputs(job_id)
        shown = gateway.judge(asked.arguments, [path for _, path, _ in uploads], outputs)
    except BaseException:
        gateway.store.delete(job_id)
        raise
    spec = JobSpec(
        id=job_id,
        created_at=time.time(),
        arguments=asked.arguments,
        shown=asked.shown | shown,
        priority=asked.priority,
        owner=owner,
    )
    gateway.store.put_spec(spec)
    entry = gateway.board.add(spec)
    gateway.jobs.put(job_id, asked.priority)
    return entry


def remove(gateway: Gateway, entry: Entry) -> None:
    """Stop a job where it has not ended, and remove everything of it."""
    job_id = entry.spec.id
    if entry.live:
        gateway.store.ask_to_cancel(job_id)
        gateway.jobs.cancel(job_id)
    gateway.board.remove(job_id)
    gateway.store.delete(job_id)
    if not entry.live:
        gateway.jobs.forget(job_id)
