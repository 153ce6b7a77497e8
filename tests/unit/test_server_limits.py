"""Limits and connections of the server: --limit, and how an answer is sent."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.server.settings import Limits, read_limits, read_origins


def test_limits_that_are_given_are_taken_and_the_others_stay() -> None:
    found = read_limits(["queued=3", "body_seconds=1.5"])
    assert (found.queued, found.body_seconds) == (3, 1.5)
    assert found.connections == Limits().connections


@pytest.mark.parametrize("word", ["nope=1", "queued", "queued=x", "queued=0", "body_seconds=nan"])
def test_what_is_no_limit_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=f"--limit '{word}': "):
        read_limits([word])


def test_origins_are_told_as_browsers_send_them() -> None:
    given = ["http://LOCALHOST:8080", "https://a.example:443", "http://[::1]:80", "http://a:0081"]
    told = ("http://localhost:8080", "https://a.example", "http://[::1]", "http://a:81")
    assert read_origins([*given, given[0]]) == told


@pytest.mark.parametrize(
    "word",
    ["*", "null", "", "a.example", "ftp://a", "http://a/", "http://a:65536", "http://u@a", "//a"],
)
def test_what_is_no_origin_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"--allow-origin .*such as http://localhost:8080"):
        read_origins([word])


def test_an_answer_s_body_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    uvicorn = pytest.importorskip("uvicorn")
    from uvicorn.server import ServerState

    from opensora_sp.server.connections import protocol_of

    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nothing is asked")

    class Seen(protocol_of(Limits())):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            accepted = transport.get_extra_info("socket")
            seen.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.abort()

    async def connect() -> None:
        config = uvicorn.Config(app, http=Seen, log_config=None)
        config.load()
        # Made as the server makes it, whose protocol number asyncio does not recognise.
        listening = socket.create_server(("127.0.0.1", 0))
        server = await asyncio.get_running_loop().create_server(
            lambda: Seen(config=config, server_state=ServerState(), app_state={}), sock=listening
        )
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        assert await reader.read() == b""
        writer.close()
        server.close()

    asyncio.run(asyncio.wait_for(connect(), 30))
    assert seen == [1]
