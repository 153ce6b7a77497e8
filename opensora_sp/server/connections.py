"""Connections of the gateway: how many there may be, and how long one may send nothing whole.

uvicorn limits neither the number of connections, short of its process's open files, nor the time in
which a request's headers arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from opensora_sp.server.settings import Limits

# Open files beside those of clients: the queue, uploads, answers that are files.
_OTHER_FILES = 1000


def protocol_of(limits: Limits) -> type[H11Protocol]:
    """The protocol for uvicorn: h11, whose headers are bounded, with limits on connections."""

    class Timed(H11Protocol):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._idle_since = self.loop.time()
            self._timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            _send_at_once(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._timer = self.loop.call_later(limits.header_seconds, self._check)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self._idle_since = self.loop.time()
            super().on_response_complete()

        def _check(self) -> None:
            """Close a connection that waits for the rest of a request's headers for too long."""
            left = limits.header_seconds
            if self.cycle is None or self.cycle.response_complete:
                left -= self.loop.time() - self._idle_since
            if left <= 0:
                self.transport.abort()
                return
            self._timer = self.loop.call_later(left, self._check)

    return Timed


def _send_at_once(transport: asyncio.Transport) -> None:
    """Do not hold an answer's body back until the client has acknowledged its head.

    uvicorn writes them one after the other. A client that delays its acknowledgements would get the
    body 40 ms later. asyncio does this itself, but not for a socket whose protocol is 0, which is
    what `socket.create_server` makes.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def allow_open_files(limits: Limits) -> None:
    """Raise this process's limit of open files to what the connections need, where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
