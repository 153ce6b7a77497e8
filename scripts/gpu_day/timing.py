"""Seconds of a call on a device, and how much time is left."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opensora_sp.engine.timing import synchronize


@dataclass(frozen=True)
class Budget:
    """A point in time until which work may be begun. end: of `time.monotonic`."""

    end: float

    @classmethod
    def of(cls, seconds: float) -> Budget:
        """So many seconds from now on."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 when it has ended."""
        return self.end - time.monotonic()

    def within(self, seconds: float) -> Budget:
        """The same, and at most so many seconds from now on."""
        return Budget(min(self.end, time.monotonic() + seconds))

    def allows(self, seconds: float) -> bool:
        """Whether a call that took so long the last time will end in time."""
        return self.left > 1.1 * seconds


def settle(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type != "meta":
        synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: between two events of the device, or by the host's clock without them.

    The device is idle before and after.
    """
    settle(device)
    begin, end = _event(device), _event(device)
    started = time.perf_counter()
    if begin is not None:
        begin.record()
    call()
    if end is not None:
        end.record()
    settle(device)
    wall = time.perf_counter() - started
    if begin is None or end is None:
        return wall
    return float(begin.elapsed_time(end)) / 1000 or wall


def _event(device: torch.device) -> Any:
    """An event that measures time, or None where the device has none."""
    event = getattr(getattr(torch, device.type, None), "Event", None)
    if device.type in ("cpu", "meta") or event is None:
        return None
    try:
        return event(enable_timing=True)
    except (RuntimeError, TypeError):  # a vendor's build without it
        return None


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, fastest and slowest of some calls, and how many there were."""
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "runs": len(seconds),
    }


def repeat(
    call: Callable[[], Any], device: torch.device, budget: Budget, most: int
) -> dict[str, Any]:
    """A warm-up and up to `most` calls, as many as the budget allows: its figures.

    Where the budget allows no second call, the warm-up's seconds are all that is known.
    """
    first = timed(call, device)
    taken: list[float] = []
    while len(taken) < most and budget.allows(max([first, *taken][-1:])):
        taken.append(timed(call, device))
    return {"warm_up": first, **(spread(taken) if taken else {})}


def release(device: torch.device) -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    module: Any = getattr(torch, device.type, None)
    if device.type not in ("cpu", "meta") and hasattr(module, "empty_cache"):
        module.empty_cache()
