"""What the routes of the gateway share."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException

from opensora_sp.server.board import Board, Entry
from opensora_sp.server.checking import Judge
from opensora_sp.server.durable import Jobs
from opensora_sp.server.engine_process import Health
from opensora_sp.server.job_store import JobStore
from opensora_sp.server.metrics import Metrics
from opensora_sp.server.owners import sees
from opensora_sp.server.settings import Limits, ServiceLabel


@dataclass
class Arriving:
    """Requests whose body is being read or judged, which no queue counts yet."""

    jobs: Counter[str] = field(default_factory=Counter)
    total: int = 0
    bytes: int = 0

    @contextlib.contextmanager
    def job(self, owner: str, count: int = 1) -> Iterator[None]:
        """Count jobs of an owner while they arrive."""
        self.jobs[owner] += count
        self.total += count
        try:
            yield
        finally:
            self.jobs[owner] -= count
            self.total -= count
            if not self.jobs[owner]:
                del self.jobs[owner]

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

    tokens: token → its owner's name; empty lets everybody in. hosts: the names that the server
    answers for; empty for all. origins: of other sites' pages that may use the API. health: of the
    engine. log_prompts: whether prompts may be logged. label: of all that is made. draining: the
    server is being stopped; finishing: the job that is made is finished before. judging: held while
    a request is judged and queued.
    """

    store: JobStore
    jobs: Jobs
    board: Board
    judge: Judge
    health: Callable[[], Health]
    metrics: Metrics
    tokens: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    embedded: bool = True
    draining: bool = False
    finishing: bool = False
    # One request is judged at a time; those that wait are not to hold every thread of the pool,
    # which deletes and downloads need too.
    judging: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))
    arriving: Arriving = field(default_factory=Arriving)
    log_prompts: bool = False
    label: ServiceLabel = field(default_factory=ServiceLabel)

    def engine_state(self) -> str:
        """The engine's state, with the reason where it has failed."""
        return str(self.health())

    def sees(self, owner: str, entry: Entry) -> bool:
        """Whether a token's owner may know of a job: see `sees`."""
        return sees(self.tokens, owner)(entry)
