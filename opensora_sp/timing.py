"""Where the time of a run goes: named stages, with the device idle at both ends of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "synchronize"):
        module.synchronize()  # type: ignore[union-attr]


class Clock:
    """Seconds per stage, summed over the times it ran, in the order they first ran.

    around(name): a context that each stage also runs in.
    """

    def __init__(
        self,
        device: torch.device,
        around: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.device = device
        self._around = around or (lambda name: nullcontext())
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a `with` block as stage `name`."""
        with self._around(name):
            synchronize(self.device)
            started = time.perf_counter()
            try:
                yield
            finally:
                synchronize(self.device)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
