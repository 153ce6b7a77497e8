"""The process group of a device double: gloo on copies in host memory, after checks.

The real eccl sends the raw buffer of a non-contiguous tensor and cuts 64-bit numbers to 32; here
both are refused. Only the collectives that every backend has are there at all.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from device_doubles.rules import RuleBroken, journal
from opensora_sp.parallel.backend_table import Backend


class Copying(dist._Work):  # type: ignore[name-defined]
    """A gloo collective under way; its result reaches the device's tensor when waited for."""

    def __init__(self, work: Any, pairs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._work, self._pairs = work, pairs

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Block until the collective has ended, then copy what it brought."""
        self._work.wait()
        for device, host in self._pairs:
            device.copy_(host)
        self._pairs = []
        return True

    def is_completed(self) -> bool:
        """Whether waiting would return at once."""
        return bool(self._work.is_completed())


class Collectives(dist.ProcessGroup):
    """all_to_all_single, broadcast and barrier, as the program uses them."""

    row: Backend

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        if not journal["set_device"]:
            raise RuleBroken("a group was made before set_device")
        journal["groups"].append(size)

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        """As torch asks for it."""
        return self.row.name

    def alltoall_base(  # type: ignore[override]
        self, output: Tensor, input: Tensor, out_splits: Any, in_splits: Any, opts: Any
    ) -> Any:
        """all_to_all_single."""
        received, sent = self._take("all_to_all_single", output, input)
        work = self._gloo.alltoall_base(received, sent, out_splits, in_splits, opts)
        return Copying(work, [(output, received)])

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:  # type: ignore[override]
        """broadcast."""
        hosts = self._take("broadcast", *tensors)
        return Copying(self._gloo.broadcast(hosts, opts), list(zip(tensors, hosts, strict=True)))

    def barrier(self, opts: Any) -> Any:  # type: ignore[override]
        """barrier."""
        return self._gloo.barrier(opts)

    def _take(self, name: str, *tensors: Tensor) -> list[Tensor]:
        """Host copies of a collective's buffers, once they are found to be fit for it."""
        counts = journal["collectives"]
        counts[name] = counts.get(name, 0) + 1
        current = getattr(torch, self.row.device).current_device()
        for tensor in tensors:
            if tensor.device != torch.device(self.row.device, current):
                raise RuleBroken(f"{name}: a buffer is on {tensor.device}")
            if not tensor.is_contiguous():
                raise RuleBroken(f"{name}: a buffer is not contiguous")
            if tensor.dtype in (torch.int64, torch.float64):
                raise RuleBroken(f"{name}: {tensor.dtype} is narrowed on the way")
        return [tensor.cpu() for tensor in tensors]


def collectives_of(row: Backend) -> type[Collectives]:
    """The process group of a backend."""
    return type(row.name.upper(), (Collectives,), {"row": row})
