"""The gateway: HTTP in front of the queue. Holds no model and never blocks on the engine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensora_sp import __version__
from opensora_sp.base.errors import UserError
from opensora_sp.base.screen import one_line
from opensora_sp.server.board import Board, Entry, rounded
from opensora_sp.server.checking import Judge
from opensora_sp.server.durable import JobQueue
from opensora_sp.server.earlier import files_of_earlier_jobs
from opensora_sp.server.engine_process import Health
from opensora_sp.server.images import Intake, add_images
from opensora_sp.server.job_store import JobSpec, JobStore
from opensora_sp.server.live import Feed
from opensora_sp.server.metrics import Metrics
from opensora_sp.server.operations import add_operations
from opensora_sp.server.owners import sees
from opensora_sp.server.page import add_page
from opensora_sp.server.page_routes import LOGIN, add_page_routes
from opensora_sp.server.protocol import (
    MODEL,
    UPLOADS,
    BadRequest,
    as_bad_request,
    error_json,
    read_fields,
    read_json,
)
from opensora_sp.server.settings import Limits
from opensora_sp.server.uploads import picture_or_video, save_upload

log = logging.getLogger(__name__)
POLL_AFTER_MS, MOST_POLL_AFTER_MS = 500, 5000
# The longest text: a body of JSON, a form without files, a field of a form with files.
MOST_TEXT_BYTES, _MOST_TEXT = 1 << 20, "1 MiB"
# Without a token: the page has no job in it, and asks for the token itself.
OPEN = ("/", "/health", "/ready", LOGIN)
RETRY_AFTER_SECONDS = 30
_MEDIA = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}


@dataclass
class Arriving:
    """Requests whose body is being read or judged, which no queue counts yet."""

    jobs: Counter[str] = field(default_factory=Counter)
    total: int = 0
    bytes: int = 0

    @contextlib.contextmanager
    def job(self, owner: str) -> Iterator[None]:
        """Count a job of an owner while it arrives."""
        self.jobs[owner] += 1
        self.total += 1
        try:
            yield
        finally:
            self.jobs[owner] -= 1
            self.total -= 1

    @contextlib.contextmanager
    def body(self, length: int, most: int) -> Iterator[None]:
        """Count a body while it arrives. Raises HTTPException where all are more than `most`."""
        if self.bytes + length > most:
            raise HTTPException(429, "too many files are being sent just now: try again later")
        self.bytes += length
        try:
            yield
        finally:
            self.bytes -= length


@dataclass(kw_only=True)
class Gateway:
    """What the routes share.

    tokens: token → its owner's name; empty lets everybody in. health: of the engine. log_prompts:
    whether prompts may be logged.
    """

    store: JobStore
    jobs: JobQueue
    board: Board
    judge: Judge
    health: Callable[[], Health]
    metrics: Metrics
    tokens: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    hosts: Sequence[str] = ()
    embedded: bool = True
    draining: bool = False
    arriving: Arriving = field(default_factory=Arriving)
    log_prompts: bool = False

    def engine_state(self) -> str:
        """The engine's state, with the reason where it has failed."""
        return str(self.health())

    def sees(self, owner: str, entry: Entry) -> bool:
        """Whether a token's owner may know of a job: see `sees`."""
        return sees(self.tokens, owner)(entry)


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
    app.add_middleware(Guard, gateway=gateway)
    app.add_exception_handler(BadRequest, _on_bad_request)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    _add_models(app)
    _add_videos(app, gateway)
    add_images(app, _intake(gateway))
    feed = Feed(gateway.board, gateway.engine_state, lambda: gateway.draining)
    add_page_routes(app, gateway.store, gateway.board, gateway.tokens, feed)
    add_page(app, embedded=gateway.embedded, asks_token=bool(gateway.tokens))
    # Last: what counts requests stands outside of the guard.
    add_operations(app, gateway.health, lambda: gateway.draining, gateway.metrics)
    return app


def _intake(gateway: Gateway) -> Intake:
    """What pictures need of the gateway: they go the way of every job."""

    def put(fields: dict[str, Any], owner: str) -> str:
        return queue_job(gateway, gateway.store.new_id(), fields, [], owner).spec.id

    return Intake(
        board=gateway.board,
        store=gateway.store,
        seconds=gateway.limits.image_seconds,
        stopping=lambda: gateway.draining,
        read=lambda request: asyncio.wait_for(_read_json(request), gateway.limits.body_seconds),
        full=lambda owner, count: refuse_new(gateway, owner, count),
        put=put,
        remove=lambda entry: remove(gateway, entry),
        refuse=refusal,
    )


def _lifespan(gateway: Gateway) -> Callable[[FastAPI], Any]:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gateway.board.start()
        yield
        gateway.board.close()
        gateway.judge.close()

    return lifespan


def refusal(
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
    return refusal(400, str(error), param=error.param, code="invalid_value")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, str(error.detail))


async def _on_bad_parameter(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    message = f"{name} {str(first.get('input'))[:40]!r}: {first['msg']}"
    return refusal(400, message, param=name, code="invalid_value")


async def _on_fault(_: Request, error: Exception) -> Response:
    """A fault of the server's own; uvicorn logs it with its traceback."""
    return refusal(500, "the server could not answer this; its log says why")


# Sent with every answer that does not say otherwise itself.
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"media-src 'self' blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        b"frame-ancestors 'none'"
    ),
}


class Guard:
    """In front of every route: refuses callers, and adds headers to what is answered.

    Plain ASGI: a middleware of `app.middleware("http")` costs a task and two queues a request.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                there = {name.lower() for name, _ in headers}
                headers.extend(pair for pair in _HEADERS.items() if pair[0] not in there)
            await send(message)

        refused = _refused(self._gateway, Request(scope))
        await (refused or self._app)(scope, receive, answer)


def _refused(gateway: Gateway, request: Request) -> Response | None:
    """Who may call at all: the right host, the right origin, a token where one is asked for.

    None lets the request in; its owner is then `request.state.owner`.
    """
    host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]").lower()
    if gateway.hosts and host not in gateway.hosts:
        return refusal(421, f"this server does not answer for the host {host[:100]!r}")
    origin = request.headers.get("origin")
    own = origin is None or origin.split("://", 1)[-1] == request.headers.get("host", "")
    if not own and request.method not in ("GET", "HEAD"):
        return refusal(403, "requests from pages of other sites are refused")
    request.state.owner, path = "", request.url.path
    if gateway.tokens and path not in OPEN and not path.startswith("/static/"):
        owner = _owner(gateway.tokens, request)
        if owner is None:
            answer = refusal(401, "a token is needed: Authorization: Bearer TOKEN")
            answer.headers["www-authenticate"] = "Bearer"
            return answer
        request.state.owner = owner
    length = request.headers.get("content-length")
    if length is not None and (
        not length.isdecimal() or len(length) > 15 or int(length) > gateway.limits.body_bytes
    ):
        return refusal(
            413, f"the body is larger than {gateway.limits.body_bytes >> 20} MiB are taken"
        )
    return None


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


def refuse_draining() -> JSONResponse:
    """The answer to whoever brings a job while the server is being stopped."""
    answer = refusal(503, "the server is being stopped and takes no new jobs")
    answer.headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return answer


def _add_models(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """The one model."""
        one = {"id": MODEL, "object": "model", "created": 0, "owned_by": "opensora_sp"}
        return JSONResponse({"object": "list", "data": [one]})


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


def _add_videos(app: FastAPI, gateway: Gateway) -> None:
    board, limits = gateway.board, gateway.limits
    # One request is judged at a time; those that wait are not to hold every thread of the pool,
    # which deletes and downloads need too.
    judging = asyncio.Semaphore(4)

    def entry_of(video_id: str, request: Request) -> Entry:
        entry = board.get(video_id)
        # Somebody else's is not there: a client cannot find out which ids are taken.
        if entry is None or not gateway.sees(request.state.owner, entry):
            raise HTTPException(404, f"there is no video {video_id[:64]!r}")
        return entry

    def answer(entry: Entry) -> Response:
        headers = {"openai-poll-after-ms": str(poll_after_ms(entry))}
        return Response(board.body(entry), media_type="application/json", headers=headers)

    @app.post("/v1/videos")
    async def create(request: Request) -> Response:
        """Queue a video: multipart/form-data, or JSON. `prompt` is needed."""
        owner, arriving = request.state.owner, gateway.arriving
        if (full := refuse_new(gateway, owner)) is not None:
            return full
        job_id = gateway.store.new_id()
        with arriving.job(owner), arriving.body(_length(request), limits.bytes_at_once):
            try:
                fields, uploads = await _received(request, gateway, job_id)
            except BaseException:
                await run_in_threadpool(gateway.store.delete, job_id)
                raise
            async with judging:
                entry = await run_in_threadpool(queue_job, gateway, job_id, fields, uploads, owner)
            return answer(entry)

    @app.post("/v1/videos/estimate")
    async def estimate(request: Request) -> Response:
        """What a video of these fields needs and how long it takes; nothing is queued."""
        owner, job_id = request.state.owner, gateway.store.new_id()
        with gateway.arriving.body(_length(request), limits.bytes_at_once):
            try:
                fields, uploads = await _received(request, gateway, job_id)
                async with judging:
                    return JSONResponse(
                        await run_in_threadpool(_estimate, gateway, job_id, fields, uploads, owner)
                    )
            finally:
                await run_in_threadpool(gateway.store.delete, job_id)

    @app.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str, request: Request) -> Response:
        """One video."""
        return answer(entry_of(video_id, request))

    @app.get("/v1/videos")
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

    @app.delete("/v1/videos/{video_id}")
    async def delete(video_id: str, request: Request) -> Response:
        """Delete a video; one that is queued or being made is stopped first."""
        entry = entry_of(video_id, request)
        await run_in_threadpool(remove, gateway, entry)
        return JSONResponse({"id": video_id, "deleted": True, "object": "video.deleted"})

    @app.get("/v1/videos/{video_id}/content")
    async def content(video_id: str, request: Request, variant: str = "video") -> Response:
        """The file: variant video, thumbnail or spritesheet."""
        if variant not in ("video", "thumbnail", "spritesheet"):
            raise BadRequest(
                f"variant {variant[:40]!r} is not video, thumbnail or spritesheet", "variant"
            )
        entry = entry_of(video_id, request)
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
        entry_of(video_id, request)
        return StreamingResponse(_events(board, video_id), media_type="text/event-stream")


def poll_after_ms(entry: Entry) -> int:
    """When a client is told to ask again: a job that waits behind others changes less soon."""
    if entry.status != "queued" or not entry.place:
        return POLL_AFTER_MS
    return min(MOST_POLL_AFTER_MS, POLL_AFTER_MS * (1 + entry.place))


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


class _Tail:
    """Keeps the last bytes of a body: the form's parser takes one that is cut off for whole."""

    def __init__(self, request: Request) -> None:
        kind = request.headers.get("content-type", "")
        self._boundary = parse_options_header(kind)[1].get(b"boundary", b"")
        self._receive, self._tail = request.receive, b""

    async def receive(self) -> Message:
        """The next message of the body."""
        message = await self._receive()
        self._tail = (self._tail + message.get("body", b""))[-512:]
        return message

    def has_end(self) -> bool:
        """Whether the closing boundary came."""
        return b"--" + self._boundary + b"--" in self._tail


def _length(request: Request) -> int:
    return int(request.headers.get("content-length", 0))


async def _read_json(request: Request) -> dict[str, Any]:
    """The fields of a body of JSON. Raises BadRequest for what is none."""
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > MOST_TEXT_BYTES:
            raise HTTPException(
                413, f"a body of JSON is at most {_MOST_TEXT}; send files as a form"
            )
    return read_json(raw)


async def _received(
    request: Request, gateway: Gateway, job_id: str
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """As `_read_body`. Raises HTTPException where the body does not arrive, or not in time."""
    seconds = gateway.limits.body_seconds
    try:
        return await asyncio.wait_for(_read_body(request, gateway, job_id), seconds)
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise HTTPException(400, f"the body did not arrive within {seconds:.0f} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed before the body was whole") from None


async def _read_body(
    request: Request, gateway: Gateway, job_id: str
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Fields, and (field, path, kind) of each file, stored under names of our own."""
    limits = gateway.limits
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        return await _read_json(request), []
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise HTTPException(
            415, f"content-type {kind[:60]!r}: send multipart/form-data or application/json"
        )
    if "content-length" not in request.headers:
        raise HTTPException(411, "a form needs its content-length")
    if kind != "multipart/form-data" and _length(request) > MOST_TEXT_BYTES:
        raise HTTPException(413, f"a form of this kind is at most {_MOST_TEXT}")
    body = _Tail(request)
    try:
        form = await Request(request.scope, body.receive).form(
            max_files=limits.files, max_fields=limits.fields, max_part_size=MOST_TEXT_BYTES
        )
    except (MultiPartException, HTTPException) as error:
        raise BadRequest(f"the form cannot be read: {getattr(error, 'detail', error)}") from None
    fields = {}
    uploads: list[tuple[str, str, str]] = []
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        if kind == "multipart/form-data" and not body.has_end():
            raise BadRequest("the form is cut off: its last boundary is missing")
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
        asked = read_fields(fields, uploads)
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
        arguments=asked.arguments,
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
    }


def remove(gateway: Gateway, entry: Entry) -> None:
    """Stop a job where it has not ended, and remove everything of it."""
    job_id = entry.spec.id
    if entry.live:
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
    else:
        gateway.jobs.forget(job_id)
