"""Where the time of a run goes: named stages, with the device idle at both ends of each.

Every run has the sums. A benchmark also switches recording on, and then each stage, each part of
one and each denoising step is kept as an interval; without it parts and steps cost nothing, and no
step waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from opensora_sp.parallel.ledger import Ledger

STEP = "step"
# The collectives of a step, by what they are for; see `opensora_sp.parallel.exchange`.
EXCHANGE_KINDS = ("patches_to_frames", "frames_to_patches")
VELOCITY_KINDS = ("velocity",)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "synchronize"):
        module.synchronize()  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One stage, or a part of one, from `start` for `seconds`.

    start: seconds since the recording began. inside: the stage that this is a part of, None for a
    stage itself. nested: seconds of other stages within a stage. step: the index of a denoising
    step. exchange, velocity: seconds of a step in which the host stood still for the exchange
    around spatial attention, and for the velocity of the other CFG branch.
    """

    stage: str
    start: float
    seconds: float
    inside: str | None = None
    nested: float = 0.0
    step: int | None = None
    exchange: float = 0.0
    velocity: float = 0.0


@dataclass
class _Open:
    """A stage, or a part of one, that has begun and not ended."""

    name: str
    is_part: bool
    nested: float = 0.0


@dataclass
class Recording:
    """Intervals in the order they ended, since `origin` (on `time.perf_counter`)."""

    origin: float = field(default_factory=time.perf_counter)
    intervals: list[Interval] = field(default_factory=list)
    _open: list[_Open] = field(default_factory=list)

    def begin(self, name: str, *, is_part: bool = False) -> None:
        """A stage, or a part of the stage that is open, begins now."""
        self._open.append(_Open(name, is_part))

    def end(self, started: float, **more: Any) -> None:
        """What was begun last, at `started`, ends now."""
        seconds = time.perf_counter() - started
        ended = self._open.pop()
        outer = next((each for each in reversed(self._open) if not each.is_part), None)
        if outer is not None and not ended.is_part:
            outer.nested += seconds
        self.intervals.append(
            Interval(
                stage=ended.name,
                start=started - self.origin,
                seconds=seconds,
                inside=outer.name if outer is not None and ended.is_part else None,
                nested=ended.nested,
                **more,
            )
        )


class Clock:
    """Seconds per stage, summed over the times it ran, in the order they first ran.

    around(name): a context that each stage also runs in. failed_in: the innermost stage that an
    exception left first, None as long as all went well. beside: seconds of other threads, by what
    they did; the run did not stand still for them.
    """

    def __init__(
        self,
        device: torch.device,
        around: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.device = device
        self._around = around or (lambda name: nullcontext())
        self.seconds: dict[str, float] = {}
        self.beside: dict[str, float] = {}
        self.recording: Recording | None = None
        self._watch: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()
        self.failed_in: str | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a `with` block as stage `name`."""
        recording = self.recording
        with self._around(name), self._watch(name):
            synchronize(self.device)
            started = time.perf_counter()
            if recording is not None:
                recording.begin(name)
            try:
                with torch.profiler.record_function(name):
                    yield
            except BaseException:
                self.failed_in = self.failed_in or name
                raise
            finally:
                synchronize(self.device)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
                if recording is not None:
                    recording.end(started)

    def note_beside(self, name: str, seconds: float) -> None:
        """Add the seconds of another thread."""
        self.beside[name] = self.beside.get(name, 0.0) + seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of a stage, while recording only."""
        recording = self.recording
        if recording is None:
            yield
            return
        synchronize(self.device)
        started = time.perf_counter()
        recording.begin(name, is_part=True)
        try:
            yield
        finally:
            synchronize(self.device)
            recording.end(started)

    def steps(self, ledger: Ledger) -> Callable[[int], None]:
        """A function to call with its index when a step has ended; the first begins now."""
        recording = self.recording
        if recording is None:
            return lambda _: None
        synchronize(self.device)
        started, before = time.perf_counter(), ledger.snapshot()

        def ended(step: int) -> None:
            nonlocal started, before
            synchronize(self.device)
            spent = ledger.since(before)
            recording.begin(STEP, is_part=True)
            recording.end(
                started,
                step=step,
                exchange=sum(spent[kind].seconds for kind in EXCHANGE_KINDS if kind in spent),
                velocity=sum(spent[kind].seconds for kind in VELOCITY_KINDS if kind in spent),
            )
            started, before = time.perf_counter(), ledger.snapshot()

        return ended

    @contextmanager
    def record(
        self, watch: Callable[[str], AbstractContextManager[None]] | None = None
    ) -> Iterator[Recording]:
        """Keep intervals for the length of a `with` block, counted from its start.

        watch(name): a context that each stage also runs in until then.
        """
        outer, self.recording = self.recording, Recording()
        unwatched = self._watch
        self._watch = watch or unwatched
        try:
            yield self.recording
        finally:
            self.recording, self._watch = outer, unwatched
