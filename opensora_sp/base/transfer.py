"""Copies between host and device that the host does not wait for.

An ordinary copy from or to a CUDA device waits until the device has done everything it was given,
and the device then has nothing to do until the host has launched more. Copies of pinned memory wait
for nothing. On other devices these functions are ordinary copies, for what their plugins promise
about memory that is freed during a copy is not known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PINS = frozenset({"cuda"})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on the device, in order with the device's work; itself if there."""
    if tensor.device.type == "cpu" and device.type in _PINS:
        # torch keeps the pinned memory until the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Arriving:
    """A tensor on its way to the host; what the device is given afterwards is not waited for."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._event = tensor, None
        if tensor.device.type in _PINS:
            self._tensor = tensor.to("cpu", non_blocking=True)  # into pinned memory
            self._event = _recorded_event(tensor.device)

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.cpu()


def _recorded_event(device: torch.device) -> Any:
    event = getattr(torch, device.type).Event()
    event.record(getattr(torch, device.type).current_stream(device))
    return event
