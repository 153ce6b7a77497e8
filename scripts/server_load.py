"""Clients of a server, for measure_server.py: they send, poll, list and delete, and time each call.

    python scripts/server_load.py http://127.0.0.1:8000 --clients 100 --seconds 30 --pace 0.5

Plain asyncio over kept connections, so that the clients take little of the machine that they
measure. Prints JSON: milliseconds of every call by its kind, failures, CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

JOB = {"prompt": "a red ball", "size": "48x32", "num_frames": 17, "num_inference_steps": 2}
# So many polls of one job, and a list after every fifth of them; then it is deleted.
POLLS, LIST_EVERY = 40, 5


class Line:
    """One kept connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def call(
        self, method: str, path: str, body: Any = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON; once more on a new connection where the kept one was closed."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        for fresh in (False, True):
            try:
                if self._reader is None or self._writer is None or fresh:
                    self.close()
                    self._reader, self._writer = await asyncio.open_connection(
                        self._host, self._port
                    )
                self._writer.write(head.encode() + data)
                return await self._answer(self._reader)
            except (OSError, asyncio.IncompleteReadError):
                if fresh:
                    raise
        raise AssertionError

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines[1:] if line]
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        content = await reader.readexactly(int(headers["content-length"]))
        return int(lines[0].split(" ")[1]), headers, json.loads(content)

    def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


class Load:
    """What all clients share."""

    def __init__(self, url: str, pace: float, seconds: float) -> None:
        self.url, self.pace = url, pace
        self.end = time.monotonic() + seconds
        self.took: dict[str, list[float]] = {}
        self.wrong: Counter[str] = Counter()

    async def timed(self, kind: str, line: Line, *call: Any) -> tuple[dict[str, str], Any]:
        """A call whose milliseconds are kept; what is no 200 is counted as wrong."""
        start = time.perf_counter()
        try:
            status, headers, found = await line.call(*call)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.wrong[f"{kind}: {type(error).__name__}"] += 1
            return {}, {}
        self.took.setdefault(kind, []).append(1e3 * (time.perf_counter() - start))
        if status != 200:
            self.wrong[f"{kind}: {status}"] += 1
        return headers, found

    async def client(self, number: int) -> None:
        """One client: a job at a time, polled at its pace, until the time is over."""
        line = Line(self.url)
        await asyncio.sleep(random.Random(number).random() * max(self.pace, 0.5))
        while time.monotonic() < self.end:
            _, video = await self.timed("create", line, "POST", "/v1/videos", JOB)
            path = f"/v1/videos/{video.get('id', 'none')}"
            for poll in range(POLLS):
                if time.monotonic() >= self.end or "id" not in video:
                    break
                headers, _ = await self.timed("retrieve", line, "GET", path)
                if poll % LIST_EVERY == 0:
                    await self.timed("list", line, "GET", "/v1/videos?limit=20")
                told = float(headers.get("openai-poll-after-ms", 500)) / 1000
                await asyncio.sleep(self.pace or told)
            if "id" in video:
                await self.timed("delete", line, "DELETE", path)
            else:
                await asyncio.sleep(0.5)
        line.close()


async def flood(url: str, posts: int, clients: int = 32) -> Counter[int]:
    """So many requests for a video, one after the other on each connection; by status."""
    left = iter(range(posts))
    statuses: Counter[int] = Counter()

    async def one() -> None:
        line = Line(url)
        for _ in left:
            status, _, _ = await line.call("POST", "/v1/videos", JOB)
            statuses[status] += 1
        line.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return statuses


async def run(load: Load, clients: int) -> None:
    """All clients at once."""
    await asyncio.gather(*(load.client(number) for number in range(clients)))


def main() -> int:
    """Run the clients and print what they saw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--pace", type=float, default=0.5, help="0: as the server says")
    parser.add_argument("--flood", type=int, default=0, help="send so many requests instead")
    asked = parser.parse_args()
    start = time.monotonic()
    if asked.flood:
        statuses = asyncio.run(flood(asked.url, asked.flood))
        found: dict[str, Any] = {"statuses": dict(statuses)}
    else:
        load = Load(asked.url, asked.pace, asked.seconds)
        asyncio.run(run(load, asked.clients))
        found = {"ms": load.took, "wrong": dict(load.wrong)}
    found |= {"cpu_s": time.process_time(), "wall_s": time.monotonic() - start}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
