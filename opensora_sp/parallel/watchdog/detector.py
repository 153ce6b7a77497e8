"""Finds what has gone wrong with a rank or its peers. Ends nothing: the watchdog does that.

Each search returns a Fault or None. The clock, the store and the peers' processes are arguments.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from opensora_sp.base.launcher import launcher_keeps_store
from opensora_sp.base.processes import Process
from opensora_sp.parallel.watchdog.collective_mark import CollectiveMark
from opensora_sp.parallel.watchdog.own_clock import OwnClock
from opensora_sp.parallel.watchdog.stages import Limits, Stages
from opensora_sp.parallel.watchdog.store import PATIENCE_S, Beat, Fault, StatusStore

BEAT_S = 1.0
# A rank that waits for a late one leaves it this long to say so itself.
COURTESY_S = 5.0
# A sign of life takes this long to be written and read, beside the limit of silence.
DELIVERY_S = 1.0


class FailureDetector:
    """One rank's signs of life, and its view of the others'.

    store None: the process is alone, and only its own deadlines count. peers: every rank's
    process, in rank order. mark: whether the main thread is inside a collective. now: seconds on a
    clock that never goes back.
    """

    def __init__(
        self,
        rank: int,
        store: StatusStore | None,
        peers: Sequence[Process],
        limits: Limits,
        mark: CollectiveMark | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank, self.store, self.peers = rank, store, list(peers)
        self.stages = Stages(now)
        self.clock = OwnClock(self._stood_still, now)
        self._limits, self._mark, self._now = limits, mark or CollectiveMark(), now
        self._count = 0
        self._last_beat = 0.0
        # Of every peer: the number of its last sign of life, and when that was first seen.
        self._heard = {r: (-1, now()) for r in range(len(self.peers)) if r != rank}
        self._last_stage: dict[int, str] = {}
        self._answered = now()
        self._stopped_since: dict[int, float] = {}
        self._signalled: tuple[int, float] | None = None

    def find(self, search: Callable[[], Fault | None]) -> Fault | None:
        """What a search finds, unless this process stood still before it or in the middle of it."""
        halts = self.clock.halts()
        try:
            fault = search()
        except Exception:  # the store or a peer's entry is gone: another search tells why
            return None
        return fault if self.clock.halts() == halts else None

    def show(self) -> None:
        """Put up a sign of life: a number that grows, and the stage."""
        if self.store is None:
            return
        self._count += 1
        self._last_beat = self._now()
        with suppress(Exception):  # a store that is gone is found by `lost_store`
            self.store.beat(Beat(self._count, self.stages.where))

    def known_fault(self) -> Fault | None:
        """The fault that some rank has put up. Shows a sign of life where one is due."""
        assert self.store is not None
        if self._now() - self._last_beat > BEAT_S:
            self.show()
        fault = self.store.fault()
        self._answered = self._now()
        return fault

    def lost_store(self) -> Fault | None:
        """The store has not answered for longer than a peer may be silent.

        Where the launcher keeps it, no rank is at fault.
        """
        silent = self._now() - self._answered
        if self.store is None or silent < self._limits.heartbeat + PATIENCE_S:
            return None
        if launcher_keeps_store():
            return self.own_fault(
                "the launcher, which keeps the store of the run, has not answered for "
                f"{silent:.0f} s: was it stopped (SIGSTOP), or is its machine gone?"
            )
        what = f"the store of the run, kept there, has not answered for {silent:.0f} s"
        return Fault(rank=0, stage=self._stage_of(0), what=what)

    def deaths(self) -> Fault | None:
        """A peer's process on this machine is gone before it finished, or has been stopped."""
        now = self._now()
        for rank in self._heard:
            peer = self.peers[rank]
            state = peer.state() if peer.here else "running"
            if state == "gone" and not self._has_finished(rank):
                return Fault(rank=rank, stage=self._stage_of(rank), what=peer.fate())
            if state != "stopped":
                self._stopped_since.pop(rank, None)
            elif now - self._stopped_since.setdefault(rank, now) > self._limits.heartbeat:
                return self._silent(rank, "is stopped (SIGSTOP)")
        return None

    def silence(self) -> Fault | None:
        """A peer has given no sign of life for longer than the limit."""
        assert self.store is not None
        now = self._now()
        for rank, beat in self.store.beats(list(self._heard)).items():
            self._last_stage[rank] = beat.stage
            if beat.count != self._heard[rank][0]:
                self._heard[rank] = (beat.count, now)
        for rank, (_, since) in self._heard.items():
            silent = now - since > self._limits.heartbeat + DELIVERY_S
            if silent and not self._has_finished(rank):
                return self._silent(rank, "hangs")
        return None

    def late(self) -> Fault | None:
        """This rank's own stage has outrun its deadline.

        A rank that waits in a collective first leaves its peers `COURTESY_S` to say so themselves.
        """
        late = self.stages.late(self._limits.deadlines)
        if late is None:
            return None
        waits = self._mark.kind is not None
        if late.over < (COURTESY_S if waits else 0):
            return None
        done = "waited for its peers" if waits else "worked"
        limit = f"{late.limit:g}"
        return self.own_fault(f"{done} for more than {limit} s (--deadlines {late.kind}={limit})")

    def stage_now(self) -> tuple[str, float | None, float]:
        """The stage that this rank is in, since when on the detector's clock, and its limit in s.

        A stage without a deadline has that of loading: nothing that it waits for may take longer.
        """
        since, kind = self.stages.now()
        return self.stages.where, since, self._limits.deadlines[kind or "load"]

    def quietest(self) -> tuple[int | None, float]:
        """The peer that is silent the longest, and for how many seconds; None without peers."""
        heard = [(since, rank) for rank, (_, since) in list(self._heard.items())]
        if not heard:
            return None, 0.0
        since, rank = min(heard)
        return rank, max(0.0, self._now() - since)

    def signalled(self, number: int) -> None:
        """A person or the launcher has asked this process to stop; only the first time counts."""
        if self._signalled is None:
            self._signalled = (number, self._now())

    def unheeded(self, grace: float) -> Fault | None:
        """The main thread has not left within `grace` seconds of a signal."""
        if self._signalled is None or self._now() - self._signalled[1] < grace:
            return None
        return self.stop_fault(self._signalled[0])

    def own_fault(self, what: str) -> Fault:
        """This rank itself has failed, in the stage that it is in."""
        return Fault(rank=self.rank, stage=self.stages.where, what=what)

    def stop_fault(self, number: int) -> Fault:
        """A person or the launcher has stopped this rank, by a signal."""
        name = signal.Signals(number).name
        return Fault(
            rank=self.rank, stage=self.stages.where, what=name, code=128 + number, stopped=True
        )

    def claim(self, fault: Fault) -> bool:
        """Put the fault up; whether it is the one that stands, so that this rank speaks for all.

        Where the store is gone, the lowest rank of this machine that still runs speaks.
        """
        if self.store is None:
            return True
        mine = replace(fault, found_by=self.rank)  # two may have found the very same
        try:
            return self.store.claim(mine) == mine
        except Exception:
            below = self.peers[: self.rank]
            return not any(peer.here and peer.state() == "running" for peer in below)

    def _stood_still(self) -> None:
        """This process itself was stopped (Ctrl-Z, a suspended machine): so were its clocks."""
        now = self._now()
        self._heard = dict.fromkeys(self._heard, (-1, now))
        self._stopped_since.clear()
        self._answered = now
        if self._signalled is not None:
            self._signalled = (self._signalled[0], now)
        self.stages.restart()

    def _silent(self, rank: int, how: str) -> Fault:
        limit = f"{self._limits.heartbeat:g}"
        what = f"{how}: no sign of life for {limit} s (--heartbeat-timeout {limit})"
        return Fault(rank=rank, stage=self._stage_of(rank), what=what)

    def _stage_of(self, rank: int) -> str:
        with suppress(Exception):  # the store may have died with the rank that kept it
            assert self.store is not None
            return self.store.beats([rank])[rank].stage
        return self._last_stage.get(rank, "an unknown stage")

    def _has_finished(self, rank: int) -> bool:
        with suppress(Exception):
            return self.store is not None and self.store.finished(rank)
        return False  # whoever finishes leaves the store standing until all have
