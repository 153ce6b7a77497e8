"""A check for NaN and infinity, which ends a run where they first appear.

A NaN on one rank reaches all ranks at the next spatial attention. Without the check the run would
go on and produce a black video, and nobody could tell where the NaN began.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_sp.base.errors import UserError
from opensora_sp.base.transfer import Arriving
from opensora_sp.base.wording import plural


def require_finite(tensor: Tensor, what: str, *, hint: str = "") -> None:
    """Raise UserError, with `what` and the number of bad values, where any is NaN or infinite.

    The check costs one pass over the tensor and, on an accelerator, one synchronization.
    """
    if not bool(torch.isfinite(tensor).all()):
        _refuse(_counts(tensor).tolist(), tensor.numel(), what, hint)


class FiniteChecks:
    """`require_finite` for tensors of a device, without waiting for the device.

    The values that are not finite are counted on the device. A count is read when the next tensor
    has been added, so the device still has that one's work while the host reads. On a CPU there is
    nothing to wait for, and a tensor is checked at once. hint: as for `require_finite`.
    """

    def __init__(self, hint: str = "") -> None:
        self._hint = hint
        self._sent: deque[_Sent] = deque()

    def add(self, tensor: Tensor, what: str) -> None:
        """Check a tensor. Raises UserError as `require_finite` does, for this one or the last."""
        if tensor.device.type == "cpu":
            require_finite(tensor, what, hint=self._hint)
            return
        self._sent.append(_Sent(Arriving(_counts(tensor)), tensor.numel(), what))
        self._read(leave=1)

    def settle(self) -> None:
        """Wait for every tensor added so far. Raises UserError for the first that is not finite."""
        self._read(leave=0)

    def _read(self, leave: int) -> None:
        while len(self._sent) > leave:
            sent = self._sent.popleft()
            counts = sent.counts.wait().tolist()
            if counts[0]:
                _refuse(counts, sent.total, sent.what, self._hint)


@dataclass(frozen=True)
class _Sent:
    """The counts of one tensor on their way; total: of its values."""

    counts: Arriving
    total: int
    what: str


def _counts(tensor: Tensor) -> Tensor:
    """[NaN or infinite, NaN], int32 [2] on the tensor's device."""
    # Not int64, which some accelerators lack.
    broken = (~torch.isfinite(tensor)).sum(dtype=torch.int32)
    return torch.stack([broken, torch.isnan(tensor).sum(dtype=torch.int32)])


def _refuse(counts: list[int], total: int, what: str, hint: str) -> None:
    are = "is" if counts[0] == 1 else "are"
    raise UserError(
        f"{what} holds {plural(counts[0], 'value')} of {total} that {are} NaN or infinite "
        f"({counts[1]} NaN): {hint or 'check the weights, or run with --dtype bf16 or fp32'}"
    )
