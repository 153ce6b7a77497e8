"""The watchdog on a store, processes and a clock of the tests: what it finds, and whom it names."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opensora_sp.parallel.exchange import Comm, Transfer
from opensora_sp.parallel.watchdog.collective_mark import CollectiveMark, raised_in_collective
from opensora_sp.parallel.watchdog.detector import COURTESY_S, DELIVERY_S, FailureDetector
from opensora_sp.parallel.watchdog.own_clock import STOOD_STILL_S, OwnClock
from opensora_sp.parallel.watchdog.signals import STOP_SIGNALS
from opensora_sp.parallel.watchdog.stages import Limits
from opensora_sp.parallel.watchdog.store import PATIENCE_S, Fault, StatusStore
from opensora_sp.parallel.watchdog.watch import SETTLE_S, Watchdog

HEARTBEAT, STEP = 5.0, 10.0
TICK = 0.5  # of the test's clock: well below what counts as standing still
LIMITS = Limits(heartbeat=HEARTBEAT, deadlines=dict.fromkeys(("load", "decode"), math.inf))
LIMITS.deadlines["step"] = STEP  # type: ignore[index]


class KeyValues:
    """What torch's TCPStore does for the watchdog, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False

    def _answer(self) -> dict[str, bytes]:
        if self.gone:
            raise dist.DistNetworkError("connection closed")
        return self.values

    def set(self, key: str, value: str) -> None:
        self._answer()[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._answer()[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._answer() for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self._answer().get(key, b"") == expected.encode():
            self.values[key] = desired.encode()
        return self.values[key]


@dataclass
class Peer:
    """A process of this machine."""

    status: str = "running"
    here: bool = True

    def state(self) -> str:
        return self.status

    def fate(self) -> str:
        return "was killed by SIGKILL"

    def kill(self) -> None:
        self.status = "gone"


@dataclass
class Run:
    """Ranks that share a store and a clock. Those in `alive` tick and show signs of life."""

    world: int = 3
    keys: KeyValues = field(default_factory=KeyValues)
    seconds: float = 1000.0

    def __post_init__(self) -> None:
        self.peers: list[Any] = [Peer() for _ in range(self.world)]
        self.marks = [CollectiveMark() for _ in self.peers]
        self.ranks = [
            FailureDetector(rank, self.store(rank), self.peers, LIMITS, mark, self.now)
            for rank, mark in enumerate(self.marks)
        ]
        self.alive = set(range(self.world))

    def now(self) -> float:
        return self.seconds

    def store(self, rank: int) -> StatusStore:
        return StatusStore(self.keys, rank)

    def watch(self, seconds: float) -> list[Fault]:
        """What rank 0 finds in so many seconds, in which it searches as its threads do."""
        found = []
        for _ in range(round(seconds / TICK)):
            self.seconds += TICK
            for rank in sorted(self.alive):
                self.ranks[rank].clock.tick()
                self.ranks[rank].find(self.ranks[rank].known_fault)
            me = self.ranks[0]
            for search in (me.deaths, me.late, me.lost_store, me.silence):
                found.append(me.find(search))
        return [fault for fault in found if fault is not None]


def test_a_peer_that_falls_silent_is_named_with_its_stage() -> None:
    run = Run()
    with run.ranks[1].stages.enter("denoise"):
        run.ranks[1].stages.progress("step 3 of 9")
        assert run.watch(3 * HEARTBEAT) == []  # everybody gives signs of life
        run.alive.remove(1)
        assert run.watch(HEARTBEAT) == []
        found = run.watch(DELIVERY_S + 2)
    assert {fault.rank for fault in found} == {1}
    assert found[0].stage == "denoise, step 3 of 9"
    assert "no sign of life for 5 s (--heartbeat-timeout 5)" in found[0].what


def test_a_stage_beyond_its_deadline_is_the_ranks_own_fault() -> None:
    run = Run()
    with run.ranks[0].stages.enter("denoise"):
        assert run.watch(STEP - TICK) == []
        run.ranks[0].stages.progress("step 2 of 9")  # its time starts anew
        assert run.watch(STEP) == []
        found = run.watch(TICK)
    assert (found[0].rank, found[0].stage) == (0, "denoise, step 2 of 9")
    assert found[0].what == "worked for more than 10 s (--deadlines step=10)"


def test_a_rank_that_waits_in_a_collective_lets_the_late_one_speak_first() -> None:
    run = Run()
    with run.ranks[0].stages.enter("denoise"):
        run.watch(STEP - 1)
        with run.marks[0].inside("velocity"):
            assert run.watch(COURTESY_S + 1 - TICK) == []
            found = run.watch(TICK)
    assert found[0].what.startswith("waited for its peers for more than 10 s")


def test_the_first_fault_that_is_put_up_is_everybodys() -> None:
    run = Run()
    first = Fault(rank=1, stage="denoise", what="hangs")
    assert run.ranks[2].claim(first)
    assert not run.ranks[0].claim(Fault(rank=2, stage="decode", what="ValueError: x"))
    assert not run.ranks[1].claim(first)  # found by two: one of them says it
    for rank in run.ranks:
        told = rank.known_fault()
        assert told is not None
        assert (told.rank, told.what, told.found_by) == (1, "hangs", 2)


def test_a_peer_that_goes_before_it_has_finished_is_named_at_once() -> None:
    run = Run()
    run.watch(1)
    watchdog = Watchdog(1, run.store(1), run.peers, LIMITS)
    watchdog.start()
    watchdog.close()  # rank 1 has finished; whoever goes after that may
    run.peers[1].status = "gone"
    run.alive.remove(1)
    assert run.watch(3 * HEARTBEAT) == []
    run.peers[2].status = "gone"
    found = run.watch(TICK)
    assert [(fault.rank, fault.what) for fault in found] == [(2, "was killed by SIGKILL")]


def test_a_peer_that_is_stopped_is_named_after_the_limit_and_not_if_it_goes_on() -> None:
    run = Run()
    run.peers[2].status = "stopped"
    assert run.watch(HEARTBEAT - TICK) == []
    run.peers[2].status = "running"
    assert run.watch(TICK) == []
    run.peers[2].status = "stopped"
    assert run.watch(HEARTBEAT) == []
    found = run.watch(2 * TICK)
    assert found[0].rank == 2
    assert "is stopped (SIGSTOP)" in found[0].what


def test_a_store_that_is_lost_is_rank_0s_fault_and_the_lowest_that_runs_says_so() -> None:
    run = Run()
    run.watch(1)
    run.keys.gone = True
    assert run.watch(HEARTBEAT + PATIENCE_S - TICK) == []
    found = run.watch(TICK)
    assert (found[0].rank, len(found)) == (0, 1)
    assert "has not answered for 7 s" in found[0].what
    run.peers[0].status = "stopped"
    assert [rank.claim(found[0]) for rank in run.ranks[1:]] == [True, False]


def test_a_launcher_that_keeps_the_store_and_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    run = Run()
    run.keys.gone = True
    found = run.watch(HEARTBEAT + PATIENCE_S + TICK)
    assert "the launcher, which keeps the store of the run, has not answered" in found[0].what


def test_a_rank_that_stood_still_itself_accuses_nobody() -> None:
    run = Run()
    with run.ranks[0].stages.enter("denoise"):
        run.watch(3)
        run.alive = {0}
        run.peers[2].status = "stopped"
        run.watch(TICK)
        run.seconds += 1000  # rank 0 is stopped: it neither ticks nor listens
        run.ranks[0].clock.tick()
        assert run.ranks[0].find(run.ranks[0].lost_store) is None
        assert run.watch(HEARTBEAT) == []
        assert {fault.rank for fault in run.watch(DELIVERY_S + 1)} == {1, 2}  # still silent


def test_what_is_found_after_a_halt_does_not_count() -> None:
    """The halt may be in the middle of a search or before it."""
    run = Run()
    me, fault = run.ranks[0], Fault(rank=1, stage="denoise", what="hangs")

    def stopped_in_the_middle() -> Fault:
        run.seconds += STOOD_STILL_S + 1
        return fault

    assert me.find(stopped_in_the_middle) is None
    assert me.find(lambda: fault) == fault


def test_a_clock_that_stood_still_is_noticed_by_whoever_asks_first() -> None:
    time_is = [0.0]
    restarts: list[float] = []
    clock = OwnClock(lambda: restarts.append(time_is[0]), lambda: time_is[0])
    for _ in range(20):  # ticks in time: nothing stood still
        time_is[0] += STOOD_STILL_S / 2
        clock.tick()
    assert (clock.halts(), restarts) == (0, [])
    time_is[0] += 12
    assert clock.halts() == 1  # a watching thread that wakes before the ticking one
    clock.tick()
    assert (clock.halts(), restarts) == (1, [time_is[0]])
    time_is[0] += 12
    clock.tick()  # and one that wakes after it sees the same
    assert (clock.halts(), len(restarts)) == (2, 2)


def test_a_signal_that_the_main_thread_does_not_heed_ends_the_run() -> None:
    run = Run()
    run.ranks[0].signalled(signal.SIGTERM)
    run.watch(8)
    run.ranks[0].signalled(signal.SIGTERM)  # the launcher repeats itself: the first one counts
    assert run.ranks[0].unheeded(10) is None
    run.watch(2)
    fault = run.ranks[0].unheeded(10)
    assert fault is not None
    assert (fault.code, fault.stopped, fault.what) == (128 + 15, True, "SIGTERM")


def test_only_errors_that_a_collective_raises_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that is refused here is this rank's own fault; a broken connection is a peer's."""
    comm = Comm(None, 0, 2)
    marked: list[str | None] = []

    class Broken:
        def wait(self) -> None:
            marked.append(comm.ledger.mark.kind)
            raise RuntimeError("Connection closed by peer")

    def start(*arguments: Any, **more: Any) -> Broken:
        marked.append(comm.ledger.mark.kind)
        return Broken()

    monkeypatch.setattr(dist, "all_to_all_single", start)
    with pytest.raises(RuntimeError, match="contiguous") as refused:
        Transfer(comm, "velocity", torch.zeros(8)[::2], [2, 2], [2, 2], lambda got: got)
    assert not raised_in_collective(refused.value)
    under_way = Transfer(comm, "velocity", torch.zeros(4), [2, 2], [2, 2], lambda got: got)
    assert comm.ledger.mark.kind is None  # between the call and the wait this rank computes
    with pytest.raises(RuntimeError, match="closed by peer") as broken:
        under_way.wait()
    assert raised_in_collective(broken.value)
    assert marked == ["velocity", "velocity"]
    assert comm.ledger.mark.kind is None


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals are handled as before afterwards."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_an_error_of_a_collective_waits_for_its_cause(
    sleeps: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(2)
    run.peers[1].status = "gone"
    error = RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError), run.marks[0].inside("barrier"):
        raise error
    assert run.ranks[1].claim(Fault(rank=1, stage="decode", what="was killed"))
    watchdog = Watchdog(0, run.store(0), run.peers, LIMITS)
    assert watchdog.failed(error).code == 1
    assert sleeps == [SETTLE_S, SETTLE_S]  # for the cause, then for the thread that ends this rank
    assert capsys.readouterr().err == ""  # rank 1's death is what there is to say


@pytest.mark.usefixtures("handlers")
def test_an_error_of_the_rank_itself_is_said_at_once(
    sleeps: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(2)
    run.peers[1].status = "gone"
    watchdog = Watchdog(0, run.store(0), run.peers, LIMITS)
    with pytest.raises(RuntimeError) as raised, watchdog.stage("decode"):
        raise RuntimeError("the buffer is not contiguous")
    watchdog.failed(raised.value)
    assert sleeps == []
    told = run.ranks[1].known_fault()
    assert told is not None
    assert str(told) == "error: rank 0, decode: RuntimeError: the buffer is not contiguous"
    assert capsys.readouterr().err.endswith(f"{told}\n")
