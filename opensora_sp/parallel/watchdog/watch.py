"""Watchdog: if any rank dies, hangs or fails, all exit within seconds.

Two threads of each rank search a few times a second for a peer that has died, fallen silent or put
up a fault, and for a deadline that this rank has outrun. The rank that finds something first says
so in one line. Then every rank removes what it has not finished and ends, whatever its main thread
is stuck in.
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
from pathlib import Path
from typing import NoReturn

from opensora_sp.base.atomic import remove_leftovers, remove_unfinished
from opensora_sp.base.errors import JobEnded, Stopped, UserError, printable
from opensora_sp.base.launcher import launcher_keeps_store, under_torchrun
from opensora_sp.base.processes import Process
from opensora_sp.base.screen import one_line
from opensora_sp.parallel.watchdog.collective_mark import CollectiveMark, raised_in_collective
from opensora_sp.parallel.watchdog.detector import FailureDetector
from opensora_sp.parallel.watchdog.orphans import launcher_process, watched_by_the_session
from opensora_sp.parallel.watchdog.own_clock import TICK_S
from opensora_sp.parallel.watchdog.signals import STOP_SIGNALS, leave
from opensora_sp.parallel.watchdog.stages import Limits
from opensora_sp.parallel.watchdog.store import (
    PATIENCE_S,
    Fault,
    StatusStore,
    record_for_launcher,
    records_for_launcher,
)

POLL_S = 0.25
# A peer's broken connection is a consequence: its cause is in the store within this time.
SETTLE_S = 4.0
# torchrun sends SIGTERM when a rank has died: before that counts as a person's wish, the watching
# thread has had time to find the death.
LOOK_AROUND_S = 3 * POLL_S
# Ranks that have been told end within a moment; after this they are killed.
GOODBYE_S = 2.0
# Time that the main thread has after Ctrl-C or SIGTERM to leave in order.
STOP_GRACE_S = 10.0


class Watchdog:
    """One rank's watching threads, and how they end its process.

    store, peers, limits, mark: as for `FailureDetector`. directories: where outputs are written,
    looked through for what a killed rank left. at_end: called with what happened before this
    process is ended over it, in the watching thread. stop_grace: seconds that the main thread has
    to leave in order after a signal.
    """

    def __init__(
        self,
        rank: int,
        store: StatusStore | None,
        peers: Sequence[Process],
        limits: Limits,
        mark: CollectiveMark | None = None,
    ) -> None:
        self.rank, self.directories = rank, list[Path]()
        self.at_end: list[Callable[[str], None]] = []
        self.stop_grace = STOP_GRACE_S
        self._store, self._peers = store, list(peers)
        self._detector = detector = FailureDetector(rank, store, peers, limits, mark)
        self._closing = threading.Event()
        # Held by the thread that decides how this process ends, for good if it speaks for the run.
        self._deciding = threading.Lock()
        self._main = threading.main_thread().ident
        self._parent = launcher_process()
        # Two threads, for a store whose keeper is stopped never answers.
        self._threads = [
            threading.Thread(target=self._watch, args=(searches,), name="watchdog", daemon=True)
            for searches in (
                (self._launcher, self._signals, detector.deaths, self._late, detector.lost_store),
                (detector.known_fault, detector.silence) if store is not None else (),
            )
            if searches
        ]
        self._threads.append(threading.Thread(target=self._tick, name="own clock", daemon=True))
        self._wakeup: socket.socket | None = None

    def start(self) -> None:
        """Begin to watch."""
        watched_by_the_session(True)
        self._detector.show()
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
        with self._detector.stages.enter(name):
            self._detector.show()
            yield
        self._detector.show()

    def progress(self, detail: str) -> None:
        """The stage has come this far: its deadline starts anew."""
        self._detector.stages.progress(detail)
        self._detector.show()

    def stage_now(self) -> tuple[str, float | None, float]:
        """The stage that this rank is in, when it began or last came further, and its limit.

        When: on the clock of `time.monotonic`, None between stages. The limit is in seconds. Any
        thread may ask.
        """
        return self._detector.stage_now()

    def quietest(self) -> tuple[int | None, float]:
        """The peer that is silent the longest, and for how many seconds; None without peers."""
        return self._detector.quietest()

    def failed(self, error: BaseException) -> JobEnded:
        """An exception leaves this rank's main thread: tell everybody, and what to end with.

        The one that failed first says what happened; those whose connections broke over it wait
        until its fault is known, and are ended by their watching thread.
        """
        for number in STOP_SIGNALS:  # the launcher may be ending us already
            with suppress(ValueError):
                signal.signal(number, signal.SIG_IGN)
        if raised_in_collective(error):
            time.sleep(SETTLE_S)
        elif isinstance(error, Stopped):
            time.sleep(LOOK_AROUND_S)
        fault = self._fault_of(error)
        self._deciding.acquire()
        if not self._detector.claim(fault):
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
        where = self._detector.stages.failed or self._detector.stages.where
        if isinstance(error, Stopped | KeyboardInterrupt):
            number = error.number if isinstance(error, Stopped) else signal.SIGINT
            return self._detector.stop_fault(number)
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

    # What follows runs in the watching threads.

    def _watch(self, searches: Sequence[Callable[[], Fault | None]]) -> None:
        while not self._closing.wait(POLL_S):
            for search in searches:
                fault = self._detector.find(search)
                if fault is not None and not self._closing.is_set():
                    self._end(fault)

    def _tick(self) -> None:
        # A thread of its own: the others may wait for seconds for a store that does not answer.
        while not self._closing.wait(TICK_S):
            self._detector.clock.tick()

    def _launcher(self) -> Fault | None:
        if os.getppid() != self._parent and under_torchrun():
            return self._detector.own_fault("the launcher that started it is gone")
        return None

    def _signals(self) -> Fault | None:
        if self._wakeup is not None:
            with suppress(BlockingIOError):
                number = self._wakeup.recv(1)[0]
                if number in STOP_SIGNALS:
                    self._detector.signalled(number)
        return self._detector.unheeded(self.stop_grace)

    def _late(self) -> Fault | None:
        fault = self._detector.late()
        if fault is not None:
            _say("".join(self._main_stack().format()), self.rank)
        return fault

    def _end(self, fault: Fault) -> NoReturn:
        """End this process, whatever its main thread does."""
        self._deciding.acquire()  # for good
        told = fault.found_by is not None  # only what stands in the store says who found it
        mine = not told and self._detector.claim(fault)
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

    def _main_stack(self) -> traceback.StackSummary:
        frame = None if self._main is None else sys._current_frames().get(self._main)
        return traceback.StackSummary() if frame is None else traceback.extract_stack(frame)


def _say(text: str, rank: int | None = None) -> None:
    head = "" if rank is None else f"rank {rank}: "
    text = "\n".join(f"{head}{printable(line)}" for line in text.rstrip().split("\n"))
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
