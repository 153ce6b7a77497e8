"""In front of every route: who may call at all, and the headers of every answer."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping

from fastapi import Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensora_sp.server.gateway import Gateway
from opensora_sp.server.page_routes import LOGIN
from opensora_sp.server.refusals import refusal

# Without a token: the page has no job in it, and asks for the token itself.
OPEN = ("/", "/health", "/ready", LOGIN)
# A host with or without a port; an address of IPv6 is in brackets.
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::[0-9]*)?")
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

        refused = _refused(self._gateway, scope)
        await (refused or self._app)(scope, receive, answer)


def _refused(gateway: Gateway, scope: Scope) -> Response | None:
    """Who may call at all: the right host, the right origin, a token where one is asked for.

    None lets the request in; its owner is then `request.state.owner`.
    """
    # Of a name that came twice, the first.
    headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
    given = headers.get(b"host", "")
    named = _HOST.fullmatch(given)
    host = given if named is None else named[1].strip("[]").lower()
    if gateway.hosts and host not in gateway.hosts:
        return refusal(421, f"this server does not answer for the host {host[:100]!r}")
    origin = headers.get(b"origin")
    own = origin is None or origin.split("://", 1)[-1] == given
    if not own and origin not in gateway.origins and scope["method"] not in ("GET", "HEAD"):
        return refusal(403, "requests from pages of other sites are refused")
    owner: str | None = ""
    path = scope["path"]
    if gateway.tokens and path not in OPEN and not path.startswith("/static/"):
        owner = _owner(gateway.tokens, Request(scope), cookies=own)
        if owner is None:
            answer = refusal(401, "a token is needed: Authorization: Bearer TOKEN")
            answer.headers["www-authenticate"] = "Bearer"
            return answer
    scope.setdefault("state", {})["owner"] = owner
    length = headers.get(b"content-length")
    if length is not None and (
        not length.isdecimal() or len(length) > 15 or int(length) > gateway.limits.body_bytes
    ):
        return refusal(
            413, f"the body is larger than {gateway.limits.body_bytes >> 20} MiB are taken"
        )
    return None


def _owner(tokens: Mapping[str, str], request: Request, *, cookies: bool) -> str | None:
    """Whose token came along; every token is compared in constant time.

    cookies: whether the cookie counts. A browser sends it for pages of other ports of this host
    too, because SameSite looks at no port; it is the token of the server's own page alone.
    """
    given = request.headers.get("authorization", "")
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer":
        token = request.cookies.get("token", "") if cookies else ""
    found = None
    for known, owner in tokens.items():
        if hmac.compare_digest(known.encode(), token.strip().encode()):
            found = owner
    return found
