"""How much memory a process takes, of its device and of the host, at the most and over time."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what clear_refs is told to forget the highest resident set (proc(5))
_MOST_SAMPLES = 400
_FIRST_PAUSE_S = 0.02


class MemoryMeter:
    """Peaks since `reset`, of one device and this process.

    stages: the device's peak within each stage that ran in `stage` since then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = getattr(torch, device.type, None)
        self.host_of_run = False
        self.stages: dict[str, int] = {}
        self._open: list[str] = []
        self._highest: int | None = None

    def reset(self) -> None:
        """Begin anew: peaks from here on."""
        self.stages, self._open, self._highest = {}, [], None
        self._call("reset_peak_memory_stats")
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
            self.host_of_run = True
        except OSError:  # not Linux, or not allowed here: the peak stays the process's
            self.host_of_run = False

    def peak_device_bytes(self) -> int | None:
        """Most bytes allocated on the device, None where the backend cannot tell or has none."""
        self._settle()
        return self._highest

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the device's peak in a `with` block by itself; what runs inside it counts too."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        """Book the peak since the last time on whatever is open, and begin the next."""
        peak = self._call("max_memory_allocated")
        if peak is None:
            return
        self._highest = max(peak, self._highest or 0)
        for name in self._open:
            self.stages[name] = max(peak, self.stages.get(name, 0))
        self._call("reset_peak_memory_stats")

    def device_bytes(self) -> int | None:
        """Bytes allocated on the device now, or None."""
        return self._call("memory_allocated")

    def _call(self, name: str) -> int | None:
        if self._device.type == "cpu" or not hasattr(self._module, name):
            return None
        try:
            value = getattr(self._module, name)(self._device)
        except Exception:  # vendor builds have it and refuse: then nobody knows
            return None
        # A running model holds something: a zero is a backend that does not count.
        return int(value) or None if value is not None else None


def peak_host_bytes() -> int | None:
    """The highest resident set of this process, since the last reset where that worked."""
    with contextlib.suppress(OSError, ValueError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit or None


def host_bytes() -> int | None:
    """The resident set of this process now."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


class MemorySampler:
    """Memory over time, in a thread of its own for the length of a `with` block.

    samples: (seconds since `origin`, host bytes, device bytes). However long a run lasts there
    are at most a few hundred: when they are full every other one goes and the pause doubles.
    """

    def __init__(self, meter: MemoryMeter, origin: float) -> None:
        self._meter, self._origin = meter, origin
        self._pause = _FIRST_PAUSE_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self.samples: list[tuple[float, int | None, int | None]] = []

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()

    def _run(self) -> None:
        while True:
            self._take()
            if len(self.samples) >= _MOST_SAMPLES:
                del self.samples[1::2]
                self._pause *= 2
            if self._stop.wait(self._pause):
                return

    def _take(self) -> None:
        now = time.perf_counter() - self._origin
        self.samples.append((now, host_bytes(), self._meter.device_bytes()))
