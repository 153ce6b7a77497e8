"""Every change of every job as one stream of server-sent events, for any number of listeners.

The board is compared with what it was four times a second, once for all listeners, and only while
there is one. Events are `video` (a job as the API shows it), `deleted` (its id) and `state` (the
engine's).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora_sp.server.board import LOOK_SECONDS, Board, Entry

# A listener that falls this many events behind is let go; its browser connects again.
MOST_BEHIND = 1000
# Proxies close a connection on which nothing is said.
SILENT_SECONDS = 15.0


@dataclass(eq=False)
class Listener:
    """One open stream. sees: whether a job may be shown to it."""

    sees: Callable[[Entry], bool]
    events: asyncio.Queue[str | None] = field(default_factory=lambda: asyncio.Queue(MOST_BEHIND))

    def tell(self, event: str | None) -> None:
        """Hand an event over; one that is too far behind is ended."""
        if self.events.full():
            while not self.events.empty():
                self.events.get_nowait()
            event = None
        self.events.put_nowait(event)


class Feed:
    """Tells listeners what changes. ending: whether the server is being stopped."""

    def __init__(
        self, board: Board, state: Callable[[], str], ending: Callable[[], bool] = lambda: False
    ) -> None:
        self._board, self._state, self._ending = board, state, ending
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None

    async def stream(self, sees: Callable[[Entry], bool]) -> AsyncIterator[str]:
        """Events for one listener: the jobs that have not ended first, then every change."""
        listener = Listener(sees)
        self._listeners.add(listener)
        # From here on every change is kept for it, also while it is slow to take what is there.
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            yield "retry: 1000\n\n" + event("state", self._state())
            for entry in reversed(self._board.all()):
                if entry.live and sees(entry):
                    yield event("video", self._board.video(entry))
            while True:
                try:
                    told = await asyncio.wait_for(listener.events.get(), SILENT_SECONDS)
                except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
                    told = ": still here\n\n"
                if told is None:
                    return
                yield told
        finally:
            self._listeners.discard(listener)

    async def _watch(self) -> None:
        before, state = self._entries(), self._state()
        while self._listeners and not self._ending():
            await asyncio.sleep(LOOK_SECONDS)
            now, said = self._entries(), self._state()
            self._compare(before, now)
            if said != state:
                self._tell(event("state", said))
            before, state = now, said
        if self._ending():
            self._tell(event("state", "draining"))
            self._tell(None)

    def _entries(self) -> dict[str, Entry]:
        return {entry.spec.id: entry for entry in self._board.all()}

    def _compare(self, before: Mapping[str, Entry], now: Mapping[str, Entry]) -> None:
        for job_id, entry in now.items():
            if before.get(job_id) is not entry:
                self._tell(event("video", self._board.video(entry)), entry)
        for job_id in before.keys() - now.keys():
            self._tell(event("deleted", {"id": job_id}), before[job_id])

    def _tell(self, told: str | None, about: Entry | None = None) -> None:
        for listener in list(self._listeners):
            if about is None or listener.sees(about):
                listener.tell(told)


def event(name: str, content: Any) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"
