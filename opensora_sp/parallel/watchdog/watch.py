"""One ends, all end: every rank shows signs of life and watches the others'.

A thread of each rank looks a few times a second whether a peer has died, fallen silent or put up
a fault, and whether this rank's own stage has outrun its deadline. Whoever finds something first
says so in one line; then every rank removes what it has not finished and ends, whatever its main
thread is stuck in.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from opensora_sp.base.atomic import remove_leftovers, remove_unfinished
from opensora_sp.base.errors import JobEnded, Stopped, UserError
from opensora_sp.base.launcher import launcher_keeps_store
from opensora_sp.base.processes import Process
from opensora_sp.base.screen import one_line, printable
from opensora_sp.parallel.watchdog.orphans import launcher_process, watched_by_the_session
from opensora_sp.parallel.watchdog.own_clock import TICK_S, OwnClock
from opensora_sp.parallel.watchdog.signals import STOP_SIGNALS, leave
from opensora_sp.parallel.watchdog.stages import Limits, Stages
from opensora_sp.parallel.watchdog.store import (
    PATIENCE_S,
    Beat,
    Fault,
    StatusStore,
    record_for_launcher,
    records_for_launcher,
)

POLL_S = 0.25
BEAT_S = 1.0
# A peer's broken connection is a consequence: its cause is in the store within this time.
SETTLE_S = 4.0
# torchrun sends SIGTERM when a rank has died: before that counts as a person's wish, the watching
# thread has had time to find the death.
LOOK_AROUND_S = 3 * POLL_S
# A rank that waits for a late one leaves it this long to say so itself.
COURTESY_S = 5.0
# Ranks that have been told end within a moment; after this they are killed.
GOODBYE_S = 2.0
# Time that the main thread has after Ctrl-C or SIGTERM to leave in order.
STOP_GRACE_S = 10.0
_COLLECTIVE_FILES = (os.path.join("torch", "distributed"), "exchange.py", "session.py")


class Watchdog:
    """One rank's signs of life and its eye on the others.

    store None: the process is alone; only its own deadlines are watched then.
    peers: every rank's process, in rank order. directories: where outputs are written, looked
    through for what a killed rank left. at_end: called with what happened before this process is
    ended over it, in the watching thread. stop_grace: seconds that the main thread has to leave in
    order after a signal.
    """

    def __init__(
        self, rank: int, store: StatusStore | None, peers: Sequence[Process], limits: Limits
    ) -> None:
        self.rank, self.directories = rank, list[Path]()
        self.at_end: list[Callable[[str], None]] = []
        self.stop_grace = STOP_GRACE_S
        self._store, self._peers, self._limits = store, list(peers), limits
        self._stages = Stages()
        self._count = 0
        self._heard = {r: (-1, time.monotonic()) for r in range(len(peers)) if r != rank}
        self._last_stage: dict[int, str] = {}
        self._last_beat = 0.0
        self._signalled: tuple[int, float] | None = None
        self._closing = threading.Event()
        # Held by the thread that decides how this process ends, for good if it speaks for the run.
        self._deciding = threading.Lock()
        self._main = threading.main_thread().ident
        self._parent = launcher_process()
        # Two threads, for a store whose keeper is stopped never answers.
        self._threads = [
            threading.Thread(target=self._watch, args=(looks,), name="watchdog", daemon=True)
            for looks in (
                (self._launcher, self._signals, self._deaths, self._late, self._lost_store),
                (self._told, self._silence) if store is not None else (),
            )
            if looks
        ]
        self._clock = OwnClock(self._stood_still)
        self._threads.append(threading.Thread(target=self._tick, name="own clock", daemon=True))
        self._answered = time.monotonic()
        self._stopped_since: dict[int, float] = {}
        self._wakeup: socket.socket | None = None

    def start(self) -> None:
        """Begin to watch."""
        watched_by_the_session(True)
        self._show()
        if threading.current_thread() is threading.main_thread():
            # A signal's handler cannot run while the main thread is stuck in a collective; the
            # number written here reaches the watching thread all the same.
            self._wakeup, inlet = socket.socketpair()
            self._wakeup.setblocking(False)
            inlet.setblocking(False)
            self._inlet = inlet
            signal.set_wakeup_fd(inlet.fileno(), warn_on_full_buffer=False)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop watching; this rank has finished and may go."""
        self._closing.set()
        watched_by_the_session(False)
        if self._store is not None:
            with suppress(Exception):  # whoever keeps the store may have gone before us
                self._store.finish()
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._inlet.close()
            self._wakeup.close()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Be in stage `name` for a `with` block; stages may lie in one another."""
        with self._stages.enter(name):
            self._show()
            yield
        self._show()

    def progress(self, detail: str) -> None:
        """The stage has come this far: its deadline starts anew."""
        self._stages.progress(detail)
        self._show()

    def failed(self, error: BaseException) -> JobEnded:
        """An exception leaves this rank's main thread: tell everybody, and what to end with.

        The one that failed first says what happened; those whose connections broke over it wait
        until its fault is known, and are ended by their watching thread.
        """
        for number in STOP_SIGNALS:  # the launcher may be ending us already
            with suppress(ValueError):
                signal.signal(number, signal.SIG_IGN)
        if isinstance(error, Exception) and _is_consequence(error):
            time.sleep(SETTLE_S)
        elif isinstance(error, Stopped):
            time.sleep(LOOK_AROUND_S)
        fault = self._fault_of(error)
        self._deciding.acquire()
        if not self._claim(fault):
            self._deciding.release()
            time.sleep(SETTLE_S)  # the watching thread ends this process before that
            return JobEnded(str(fault), fault.code)
        if not isinstance(error, UserError | Stopped | KeyboardInterrupt):
            _say("".join(traceback.format_exception(error)), self.rank)
        _say(str(fault))
        record_for_launcher(error)
        self._clear_node()
        return JobEnded(str(fault), fault.code)

    def _fault_of(self, error: BaseException) -> Fault:
        where = self._stages.failed or self._stages.where
        if isinstance(error, Stopped | KeyboardInterrupt):
            number = error.number if isinstance(error, Stopped) else signal.SIGINT
            return self._stop(number)
        if isinstance(error, SystemExit):
            what, code = f"left with exit code {error.code} before its work was done", 1
        elif isinstance(error, UserError):
            what, code = str(error), 2
        else:
            what, code = f"{type(error).__name__}: {error}", 1
        rank = getattr(error, "rank", self.rank)
        return Fault(
            rank=rank,
            stage=where,
            what=one_line(what),
            code=code,
            recorded=records_for_launcher(),
        )

    def _stop(self, number: int) -> Fault:
        name = signal.Signals(number).name
        return Fault(
            rank=self.rank, stage=self._stages.where, what=name, code=128 + number, stopped=True
        )

    def _claim(self, fault: Fault) -> bool:
        """Whether this rank's word is the one that stands."""
        if self._store is None:
            return True
        mine = replace(fault, found_by=self.rank)  # two may have found the very same
        try:
            return self._store.claim(mine) == mine
        except Exception:  # the store is gone: the lowest rank that is left speaks
            below = self._peers[: self.rank]
            return not any(peer.here and peer.state() == "running" for peer in below)

    # What follows runs in the watching threads.

    def _watch(self, looks: Sequence[Callable[[], Fault | None]]) -> None:
        while not self._closing.wait(POLL_S):
            for look in looks:
                fault = self._found_by(look)
                if fault is not None and not self._closing.is_set():
                    self._end(fault)

    def _found_by(self, look: Callable[[], Fault | None]) -> Fault | None:
        """What a look finds, unless this process stood still before it or in the middle of it."""
        halts = self._clock.halts()
        try:
            fault = look()
        except Exception:  # the store or a peer's entry is gone: another look tells why
            return None
        return fault if self._clock.halts() == halts else None

    def _tick(self) -> None:
        # A thread of its own: the others may wait for seconds for a store that does not answer.
        while not self._closing.wait(TICK_S):
            self._clock.tick()

    def _stood_still(self) -> None:
        """This process itself was stopped (Ctrl-Z, a suspended machine): so were its clocks."""
        now = time.monotonic()
        self._heard = dict.fromkeys(self._heard, (-1, now))
        self._stopped_since.clear()
        self._answered = now
        if self._signalled is not None:
            self._signalled = (self._signalled[0], now)
        self._stages.restart()

    def _launcher(self) -> Fault | None:
        if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
            return self._fault("the launcher that started it is gone")
        return None

    def _told(self) -> Fault | None:
        assert self._store is not None
        if time.monotonic() - self._last_beat > BEAT_S:
            self._show()
        fault = self._store.fault()
        self._answered = time.monotonic()
        return fault

    def _lost_store(self) -> Fault | None:
        silent = time.monotonic() - self._answered
        if self._store is None or silent < self._limits.heartbeat + PATIENCE_S:
            return None
        what = f"the store of the run, kept there, has not answered for {silent:.0f} s"
        return Fault(rank=0, stage=self._stage_of(0), what=what)

    def _signals(self) -> Fault | None:
        if self._wakeup is not None and self._signalled is None:
            with suppress(BlockingIOError):
                number = self._wakeup.recv(1)[0]
                if number in STOP_SIGNALS:
                    self._signalled = (number, time.monotonic())
        if self._signalled is None or time.monotonic() - self._signalled[1] < self.stop_grace:
            return None
        return self._stop(self._signalled[0])

    def _deaths(self) -> Fault | None:
        now = time.monotonic()
        for rank in self._heard:
            peer = self._peers[rank]
            state = peer.state() if peer.here else "running"
            if state == "gone" and not self._has_finished(rank):
                return Fault(rank=rank, stage=self._stage_of(rank), what=peer.fate())
            if state != "stopped":
                self._stopped_since.pop(rank, None)
            elif now - self._stopped_since.setdefault(rank, now) > self._limits.heartbeat:
                return self._silent(rank, "is stopped (SIGSTOP)")
        return None

    def _silence(self) -> Fault | None:
        assert self._store is not None
        now = time.monotonic()
        for rank, beat in self._store.beats(list(self._heard)).items():
            self._last_stage[rank] = beat.stage
            if beat.count != self._heard[rank][0]:
                self._heard[rank] = (beat.count, now)
        for rank, (_, since) in self._heard.items():
            if now - since > self._limits.heartbeat + 1 and not self._has_finished(rank):
                return self._silent(rank, "hangs")
        return None

    def _silent(self, rank: int, how: str) -> Fault:
        limit = f"{self._limits.heartbeat:g}"
        what = f"{how}: no sign of life for {limit} s (--heartbeat-timeout {limit})"
        return Fault(rank=rank, stage=self._stage_of(rank), what=what)

    def _late(self) -> Fault | None:
        late = self._stages.late(self._limits.deadlines)
        if late is None:
            return None
        stack = self._main_stack()
        waits = _in_collective(stack[-1].filename) if stack else False
        if late.over < (COURTESY_S if waits else 0):
            return None
        done = "waited for its peers" if waits else "worked"
        _say("".join(stack.format()), self.rank)
        limit = f"{late.limit:g}"
        return self._fault(f"{done} for more than {limit} s (--deadlines {late.kind}={limit})")

    def _end(self, fault: Fault) -> NoReturn:
        """End this process, whatever its main thread does."""
        self._deciding.acquire()  # for good
        told = fault.found_by is not None  # only what stands in the store says who found it
        mine = not told and self._claim(fault)
        if mine:
            _say(str(fault))
            culprit = self._peers[fault.rank] if self._peers else None
            if culprit is not None and fault.rank != self.rank:
                culprit.kill()  # a stopped one would keep its device until the launcher gives up
        if not fault.recorded:  # or torchrun would blame whoever wrote in the same second
            record_for_launcher(JobEnded(str(fault), fault.code))
        remove_unfinished()
        for tell in self.at_end:
            with suppress(Exception):
                tell(str(fault))
        if mine or (self.rank == 0 and not launcher_keeps_store()):
            self._clear_node()  # rank 0 goes last where the others learn of the fault from it
        leave(fault.code)

    def _clear_node(self) -> None:
        """Wait until the other ranks of this machine have gone, help those that do not go, and
        remove what any of them left half done."""
        others = [p for r, p in enumerate(self._peers) if r != self.rank and p.here]
        until = time.monotonic() + GOODBYE_S
        while time.monotonic() < until and any(p.state() != "gone" for p in others):
            time.sleep(POLL_S / 5)
        for peer in others:
            peer.kill()
        for directory in self.directories:
            remove_leftovers(directory)

    def _fault(self, what: str) -> Fault:
        return Fault(rank=self.rank, stage=self._stages.where, what=what)

    def _stage_of(self, rank: int) -> str:
        with suppress(Exception):  # the store may have died with the rank that kept it
            assert self._store is not None
            return self._store.beats([rank])[rank].stage
        return self._last_stage.get(rank, "an unknown stage")

    def _has_finished(self, rank: int) -> bool:
        with suppress(Exception):
            return self._store is not None and self._store.finished(rank)
        return False  # whoever finishes leaves the store standing until all have

    def _main_stack(self) -> traceback.StackSummary:
        frame = None if self._main is None else sys._current_frames().get(self._main)
        return traceback.StackSummary() if frame is None else traceback.extract_stack(frame)

    def _show(self) -> None:
        """Put up a sign of life."""
        if self._store is None:
            return
        self._count += 1
        self._last_beat = time.monotonic()
        with suppress(Exception):  # a store that is gone is found by whoever watches
            self._store.beat(Beat(self._count, self._stages.where))


def _in_collective(filename: str) -> bool:
    return any(name in filename for name in _COLLECTIVE_FILES)


def _is_consequence(error: Exception) -> bool:
    """Whether a collective raised it: then some peer has failed before."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and bool(frames) and _in_collective(frames[-1].filename)


def _say(text: str, rank: int | None = None) -> None:
    head = "" if rank is None else f"rank {rank}: "
    text = "\n".join(f"{head}{printable(line)}" for line in text.rstrip().split("\n"))
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
