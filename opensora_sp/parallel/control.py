"""The control plane: objects, barriers, stages and signals, beside the tensors' collectives.

Everything here travels over a gloo side group, which has a long time limit of its own. So ranks
may wait here for the leading rank while it loads, encodes or writes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

from opensora_sp.base.deadlines import DEADLINES
from opensora_sp.base.errors import PromptFault, SharedFault, SharedPromptFault, UserError
from opensora_sp.parallel.watchdog.collective_mark import CollectiveMark
from opensora_sp.parallel.watchdog.signals import handled_signals
from opensora_sp.parallel.watchdog.watch import STOP_GRACE_S, Watchdog

T = TypeVar("T")
# torchrun kills a rank 30 s after it was told to stop: a step and its saving have to fit in.
SAVE_GRACE_S = 25.0


@dataclass(frozen=True)
class Standing:
    """How the ranks stand, as one of them knows: for whoever watches the run from outside.

    stage: what this rank does. still: seconds since all ranks last met, or since this rank began
    its stage or came further in it, whichever was later. limit: how long that may be. quiet:
    seconds since the last sign of life of `quiet_rank`, the longest of all peers; None without
    peers.
    """

    stage: str
    still: float
    limit: float
    quiet_rank: int | None = None
    quiet: float = 0.0


@dataclass
class ControlPlane:
    """How the ranks of one session agree with each other.

    rank, world_size: this rank and the ranks of the session. first: what the whole world calls the
    session's rank 0; ranks of a session are consecutive in the world. side: the gloo group of the
    session, None for a rank without peers. watchdog: None before the session is open. mark: set
    while this rank waits for the others here. met: when all ranks of the session last met, on
    `time.monotonic`.
    """

    rank: int = 0
    world_size: int = 1
    first: int = 0
    side: Any = None
    watchdog: Watchdog | None = None
    mark: CollectiveMark = field(default_factory=CollectiveMark)
    met: float = field(default_factory=time.monotonic)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Be in a stage of the run: the peers are told, and the stage's deadline holds."""
        if self.watchdog is None:
            yield
            return
        with self.watchdog.stage(name):
            yield

    def progress(self, detail: str) -> None:
        """The stage has come this far; its deadline starts anew."""
        if self.watchdog is not None:
            self.watchdog.progress(detail)

    @contextmanager
    def signals_noted(self, into: list[int]) -> Iterator[None]:
        """Collect Ctrl-C and SIGTERM as numbers while the block runs, instead of being stopped.

        For work that all ranks have to leave at the same point. A second signal ends this process
        at once, as everywhere, and so does the watching thread when the point does not come.
        """

        def note(number: int, _frame: FrameType | None) -> None:
            into.append(number)
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)

        with handled_signals(note):
            if self.watchdog is not None:
                self.watchdog.stop_grace = SAVE_GRACE_S
            yield
            if self.watchdog is not None and not into:
                self.watchdog.stop_grace = STOP_GRACE_S

    def broadcast_object(self, value: T | None, source: int = 0) -> T:
        """One rank's picklable value on every rank. Collective."""
        if self.side is None:
            return value  # type: ignore[return-value]
        box = [value]
        first = dist.get_global_rank(self.side, source)
        with self.mark.inside("broadcast_object"):
            dist.broadcast_object_list(box, src=first, group=self.side)
        return box[0]  # type: ignore[return-value]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's picklable value on every rank, in rank order. Collective."""
        if self.side is None:
            self.met = time.monotonic()
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.mark.inside("all_gather_object"):
            dist.all_gather_object(values, value, group=self.side)
        self.met = time.monotonic()
        return values

    def meet(self, value: T | None) -> T | None:
        """Rank 0's picklable value on every rank; it returns when all ranks have come. Collective.

        A broadcast may return on its source before anybody has taken it, so it proves nothing.
        """
        return self.all_gather_object(value)[0]

    def standing(self) -> Standing:
        """How the ranks stand now. Any thread may ask.

        A stage without a deadline of its own may take as long as loading may.
        """
        watchdog, since = self.watchdog, self.met
        if watchdog is None:
            return Standing("between stages", time.monotonic() - since, DEADLINES["load"])
        stage, began, limit = watchdog.stage_now()
        still = time.monotonic() - max(since, began or since)
        rank, quiet = watchdog.quietest()
        return Standing(stage, max(0.0, still), limit, rank, quiet)

    def together(self, work: Callable[[], T], *, leading_only: bool = False) -> T | None:
        """Run work on every rank, or on the leading one while the others wait; its result.

        A UserError on any rank becomes a SharedFault on all of them, so that they end together
        and in order instead of finding out from broken connections; one of a single prompt
        becomes a SharedPromptFault. Collective.
        """
        result: T | None = None
        error: UserError | None = None
        if self.rank == 0 or not leading_only:
            try:
                result = work()
            except UserError as caught:
                error = caught
        place = error.place if isinstance(error, PromptFault) else None
        for rank, (fault, of) in enumerate(
            self.all_gather_object((None if error is None else str(error), place))
        ):
            if fault is not None and of is not None:
                raise SharedPromptFault(fault, of) from error
            if fault is not None:
                rank += self.first
                raise SharedFault(f"rank {rank}: {fault}" if rank else fault) from error
        return result

    def barrier(self) -> None:
        """Return when every rank has come here. Collective."""
        if self.side is not None:
            with self.mark.inside("barrier"):
                dist.barrier(group=self.side)
        self.met = time.monotonic()
