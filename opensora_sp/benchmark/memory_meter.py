"""Measurement of a process's memory, on its device and on the host: peaks and samples."""

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
_RESET_PEAK = "5"  # resets the peak of the resident set, when written to clear_refs (proc(5))
_MOST_SAMPLES = 400
_FIRST_PAUSE_S = 0.02


class MemoryMeter:
    """Peaks of memory since `reset`, of one device and this process.

    stages: the device's peak, in bytes, within each `stage` block since then. host_of_run: whether
    the host's peak could be reset, so that it belongs to the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = getattr(torch, device.type, None)
        self.host_of_run = False
        self.stages: dict[str, int] = {}
        self._open: list[str] = []
        self._highest: int | None = None

    def reset(self) -> None:
        """Reset the peaks."""
        self.stages, self._open, self._highest = {}, [], None
        self._call("reset_peak_memory_stats")
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
            self.host_of_run = True
        except OSError:  # not Linux, or not allowed: the peak stays that of the whole process
            self.host_of_run = False

    def peak_device_bytes(self) -> int | None:
        """The most bytes allocated on the device; None where the backend does not count them."""
        self._settle()
        return self._highest

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A block whose device peak is counted by itself, inner blocks included."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        """Add the peak since the last call to all open stages, and reset the device's counter."""
        peak = self._call("max_memory_allocated")
        if peak is None:
            return
        self._highest = max(peak, self._highest or 0)
        for name in self._open:
            self.stages[name] = max(peak, self.stages.get(name, 0))
        self._call("reset_peak_memory_stats")

    def device_bytes(self) -> int | None:
        """Bytes allocated on the device now; None where the backend does not count them."""
        return self._call("memory_allocated")

    def _call(self, name: str) -> int | None:
        if self._device.type == "cpu" or not hasattr(self._module, name):
            return None
        try:
            value = getattr(self._module, name)(self._device)
        except Exception:  # some vendor builds have the function and raise
            return None
        # A running model has allocated something, so 0 means that the backend does not count.
        return int(value) or None if value is not None else None


def peak_host_bytes() -> int | None:
    """The peak resident set in bytes of this process, since the last reset where that worked."""
    with contextlib.suppress(OSError, ValueError):
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit or None


def host_bytes() -> int | None:
    """The resident set of this process now, in bytes."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


class MemorySampler:
    """Samples of memory over time, taken by a thread while a `with` block runs.

    samples: (seconds since `origin`, host bytes, device bytes). There are at most a few hundred:
    when the list is full, every other sample is dropped and the pause doubles.
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
