"""Ledger: counts the calls, bytes and seconds of every collective where it is called."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opensora_sp.parallel.watchdog.collective_mark import CollectiveMark


@dataclass
class Entry:
    """What one kind of collective has cost this rank."""

    calls: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0
    bytes_between: int = 0

    def __add__(self, other: Entry) -> Entry:
        return Entry(
            self.calls + other.calls,
            self.bytes_sent + other.bytes_sent,
            self.seconds + other.seconds,
            self.bytes_between + other.bytes_between,
        )

    def __sub__(self, other: Entry) -> Entry:
        return Entry(
            self.calls - other.calls,
            self.bytes_sent - other.bytes_sent,
            self.seconds - other.seconds,
            self.bytes_between - other.bytes_between,
        )


@dataclass
class Ledger:
    """Calls, bytes and seconds per kind of collective.

    bytes_sent counts what leaves this rank for another one; what it sends to itself is free.
    bytes_between is the part of it that leaves the node.
    seconds is how long the host stood still for the collective: on a CPU the exposed part of the
    exchange, on an accelerator only what was waited for on the host.
    mark: says that a collective is being waited for, while it is.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    mark: CollectiveMark = field(default_factory=CollectiveMark, compare=False)

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        """Call or wait for a collective in this block: it is marked, and its seconds are booked."""
        started = time.perf_counter()
        with self.mark.inside(kind):
            yield
        self.add(kind, seconds=time.perf_counter() - started)

    def add(
        self,
        kind: str,
        *,
        calls: int = 0,
        bytes_sent: int = 0,
        seconds: float = 0.0,
        bytes_between: int = 0,
    ) -> None:
        """Add to the entry of one kind of collective."""
        entry = self.entries.setdefault(kind, Entry())
        entry.calls += calls
        entry.bytes_sent += bytes_sent
        entry.seconds += seconds
        entry.bytes_between += bytes_between

    def snapshot(self) -> dict[str, Entry]:
        """A copy of the entries, to subtract from a later one."""
        return {kind: e - Entry() for kind, e in self.entries.items()}

    def since(self, earlier: dict[str, Entry]) -> dict[str, Entry]:
        """What was booked after `earlier` was taken."""
        return {kind: e - earlier.get(kind, Entry()) for kind, e in self.entries.items()}

    @property
    def bytes_sent(self) -> int:
        """Over all kinds."""
        return sum(e.bytes_sent for e in self.entries.values())

    @property
    def seconds(self) -> float:
        """Over all kinds."""
        return sum(e.seconds for e in self.entries.values())
