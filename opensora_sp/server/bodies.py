"""Bodies of requests: fields and files, bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message

from opensora_sp.server.gateway import Gateway
from opensora_sp.server.protocol import UPLOADS, BadRequest, read_json
from opensora_sp.server.uploads import picture_or_video, save_upload

# The longest text: a body of JSON, a form without files, a field of a form with files.
MOST_TEXT_BYTES, _MOST_TEXT = 1 << 20, "1 MiB"


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


def length_of(request: Request) -> int:
    """Bytes of a body as its header says; 0 without one."""
    return int(request.headers.get("content-length", 0))


async def read_json_body(request: Request) -> dict[str, Any]:
    """The fields of a body of JSON. Raises BadRequest for what is none."""
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > MOST_TEXT_BYTES:
            raise HTTPException(
                413, f"a body of JSON is at most {_MOST_TEXT}; send files as a form"
            )
    return read_json(raw)


async def received(
    request: Request, gateway: Gateway, job_id: str
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """As `_read_body`. Raises HTTPException where the body does not arrive in time.

    Raises ClientDisconnect where the connection is closed before.
    """
    seconds = gateway.limits.body_seconds
    try:
        return await asyncio.wait_for(_read_body(request, gateway, job_id), seconds)
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise HTTPException(400, f"the body did not arrive within {seconds:.0f} s") from None


async def _read_body(
    request: Request, gateway: Gateway, job_id: str
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Fields, and (field, path, kind) of each file, stored under names of our own."""
    limits = gateway.limits
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        return await read_json_body(request), []
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise HTTPException(
            415, f"content-type {kind[:60]!r}: send multipart/form-data or application/json"
        )
    if "content-length" not in request.headers:
        raise HTTPException(411, "a form needs its content-length")
    if kind != "multipart/form-data" and length_of(request) > MOST_TEXT_BYTES:
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
