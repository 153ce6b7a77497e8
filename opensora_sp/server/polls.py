"""GET /v1/videos/{id} before any route: what clients ask again and again, answered at little cost.

Finding the route and solving its parameters takes FastAPI almost half of the gateway's time for a
poll, which on a CPU is taken from the engine. What is no poll of a job that is there goes on to the
routes.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from opensora_sp.server.board import Entry
from opensora_sp.server.gateway import Gateway

PATH = "/v1/videos/{video_id}"
POLL_AFTER_MS, MOST_POLL_AFTER_MS = 500, 5000
_POLL = re.compile(r"/v1/videos/(video_[0-9a-f]{24})")
# As the metrics name the route.
_ROUTE = SimpleNamespace(path=PATH)


class Polls:
    """ASGI: answers polls. Stands inside of the guard, which says whose they are."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["method"] == "GET":
            found = _POLL.fullmatch(scope["path"])
            entry = found and self._gateway.board.get(found[1])
            if entry and self._gateway.sees(scope["state"]["owner"], entry):
                scope["route"] = _ROUTE
                await answer(self._gateway, entry)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def answer(gateway: Gateway, entry: Entry) -> Response:
    """A job as the API shows it, and when to ask again."""
    headers = {"openai-poll-after-ms": str(poll_after_ms(entry))}
    return Response(gateway.board.body(entry), media_type="application/json", headers=headers)


def poll_after_ms(entry: Entry) -> int:
    """When a client is told to ask again: a job that waits behind others changes less soon."""
    if entry.status != "queued" or not entry.place:
        return POLL_AFTER_MS
    return min(MOST_POLL_AFTER_MS, POLL_AFTER_MS * (1 + entry.place))
