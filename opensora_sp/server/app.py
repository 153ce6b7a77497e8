"""The gateway: HTTP in front of the queue. Holds no model and never blocks on the engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from opensora_sp import __version__
from opensora_sp.server.bodies import length_of, read_json_body
from opensora_sp.server.description import REFUSALS, Models, answers
from opensora_sp.server.gateway import Gateway
from opensora_sp.server.guard import Guard
from opensora_sp.server.images import Intake, add_images
from opensora_sp.server.live import Feed
from opensora_sp.server.operations import add_operations
from opensora_sp.server.page import add_page
from opensora_sp.server.page_routes import add_page_routes
from opensora_sp.server.polls import Polls
from opensora_sp.server.protocol import MODEL
from opensora_sp.server.refusals import add_refusals, refusal
from opensora_sp.server.videos import add_videos, queue_job, refuse_new, remove


def build_app(gateway: Gateway) -> FastAPI:
    """The application. It describes itself at /openapi.json."""
    # FastAPI's own pages load their scripts from elsewhere.
    app = FastAPI(
        title="Open-Sora 1.2 server",
        version=__version__,
        lifespan=_lifespan(gateway),
        docs_url=None,
        redoc_url=None,
        responses=REFUSALS,
    )
    app.add_middleware(Polls, gateway=gateway)
    app.add_middleware(Guard, gateway=gateway)  # outside of Polls
    if gateway.origins:
        _allow_origins(app, gateway.origins)
    add_refusals(app)
    _add_models(app)
    add_videos(app, gateway)
    add_images(app, _intake(gateway))
    feed = Feed(gateway.board, gateway.engine_state, lambda: gateway.draining)
    add_page_routes(app, gateway.store, gateway.board, gateway.tokens, feed)
    add_page(app, embedded=gateway.embedded, asks_token=bool(gateway.tokens))
    # Last: what counts requests stands outside of the guard.
    add_operations(app, gateway.health, lambda: gateway.draining, gateway.metrics)
    return app


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let scripts of other sites' pages send requests and read the answers (CORS).

    It stands outside of the guard: a browser asks first, without a token, whether it may send one,
    and a page has to read why it is refused. Cookies are not taken from there, only tokens.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("openai-poll-after-ms", "retry-after"),
        max_age=600,
    )


def _intake(gateway: Gateway) -> Intake:
    """What pictures need of the gateway: they go the way of every job."""

    async def read(request: Request) -> dict[str, Any]:
        with gateway.arriving.body(length_of(request), gateway.limits.bytes_at_once):
            return await asyncio.wait_for(read_json_body(request), gateway.limits.body_seconds)

    async def put(fields: dict[str, Any], owner: str) -> str:
        job_id = gateway.store.new_id()
        async with gateway.judging:
            await run_in_threadpool(queue_job, gateway, job_id, fields, [], owner)
        return job_id

    return Intake(
        board=gateway.board,
        store=gateway.store,
        seconds=gateway.limits.image_seconds,
        stopping=lambda: gateway.draining,
        finishing=lambda: gateway.finishing,
        read=read,
        full=lambda owner, count: refuse_new(gateway, owner, count),
        arriving=gateway.arriving.job,
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


def _add_models(app: FastAPI) -> None:
    @app.get("/v1/models", responses=answers(Models))
    async def models() -> Response:
        """The one model."""
        one = {"id": MODEL, "object": "model", "created": 0, "owned_by": "opensora_sp"}
        return JSONResponse({"object": "list", "data": [one]})
