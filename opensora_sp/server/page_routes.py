"""What the page needs beside the API: one stream of events, previews, and the token as a cookie."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.server.board import Board
from opensora_sp.server.description import files
from opensora_sp.server.job_store import JobStore
from opensora_sp.server.live import Feed
from opensora_sp.server.owners import sees

LOGIN = "/login"
_LONGEST_LOGIN, _LOGIN_SECONDS = 4096, 20.0
_COOKIE_SECONDS = 30 * 24 * 3600


def add_page_routes(
    app: FastAPI, store: JobStore, board: Board, tokens: Mapping[str, str], feed: Feed
) -> None:
    """Add them to the gateway. tokens: token → its owner's name."""

    @app.get("/v1/events", include_in_schema=False)
    async def events(request: Request) -> Response:
        """Every change of every job that the caller may see, as server-sent events."""
        return StreamingResponse(
            feed.stream(sees(tokens, request.state.owner)),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    @app.get(
        "/v1/videos/{video_id}/preview", responses=files("image/webp"), response_class=Response
    )
    async def preview(video_id: str, request: Request) -> Response:
        """What it will look like, while it is denoised: up to eight frames side by side, WebP."""
        entry = board.get(video_id)
        if entry is None or not sees(tokens, request.state.owner)(entry):
            raise HTTPException(404, f"there is no video {video_id[:64]!r}")
        strip = await run_in_threadpool(_read, store, video_id)
        if strip is None:
            raise HTTPException(404, f"{video_id} is {entry.status}: it has no preview")
        return Response(strip, media_type="image/webp", headers={"cache-control": "no-store"})

    @app.post(LOGIN, include_in_schema=False)
    async def login(request: Request) -> Response:
        """Keep a token in a cookie: scripts cannot read it, and it counts for this origin alone."""
        try:
            token = await asyncio.wait_for(_token_of(request), _LOGIN_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            raise HTTPException(400, "the token did not arrive in time") from None
        given = token.encode("utf-8", "replace")
        if not any(hmac.compare_digest(known.encode(), given) for known in tokens):
            return JSONResponse({"error": {"message": "this token is not known"}}, 401)
        answer = JSONResponse({"ok": True})
        answer.set_cookie(
            "token",
            token,
            max_age=_COOKIE_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    @app.delete(LOGIN, include_in_schema=False)
    async def logout() -> Response:
        """Forget the cookie."""
        answer = JSONResponse({"ok": True})
        answer.delete_cookie("token", httponly=True, samesite="strict")
        return answer


def _read(store: JobStore, video_id: str) -> bytes | None:
    try:
        return store.preview(video_id).read_bytes()
    except OSError:
        return None


async def _token_of(request: Request) -> str:
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > _LONGEST_LOGIN:
            raise HTTPException(413, "a token is shorter than this")
    try:
        token = parse_json(raw)["token"]
    except (NotJson, KeyError, TypeError):
        raise HTTPException(400, 'send {"token": "..."}') from None
    return str(token).strip()
