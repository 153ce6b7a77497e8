"""A counter of kernels and memory traffic, around anything that computes with torch.

    with Counter() as counter:
        compute()
    counter.rows

It counts on any device. On the meta device tensors have no memory, so a video of any size is
counted in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_sp.benchmark.count.parts import PARTS, part_of_call
from opensora_sp.benchmark.count.traffic import (
    launches,
    operands,
    operation_name,
    tensors_in,
    total_bytes,
)

# What devices compute in one kernel, and torch elsewhere as several operations.
ATTENTION, RMS_NORM = "attention", "rms_norm"
FUSED = frozenset({ATTENTION, RMS_NORM})


@dataclass(frozen=True, kw_only=True)
class Row:
    """All calls of one operation in one part: how many, and the bytes that they move."""

    part: str
    operation: str
    kernels: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class Counter:
    """Counts every operation of aten that launches a kernel, while it is entered.

    fused: the functions that count as one operation: `ATTENTION` reads q, k, v (and its mask) and
        writes its result, `RMS_NORM` likewise. Without one of them, its parts are counted.
    device: only what this device does counts; without it, everything.
    parts: the name of a function → the part of the model that its operations are counted under.
    """

    def __init__(
        self,
        *,
        fused: Iterable[str] = FUSED,
        device: torch.device | None = None,
        parts: Mapping[str, str] = PARTS,
    ) -> None:
        self._fused, self._device, self._parts = frozenset(fused), device, parts
        self._counted: dict[tuple[str, str], list[int]] = {}
        self._paused = False
        self._modes = ExitStack()

    def __enter__(self) -> Counter:
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()

    @property
    def rows(self) -> list[Row]:
        """What was counted, by part and operation; what moves most comes first."""
        rows = [
            Row(part=part, operation=operation, kernels=kernels, read=read, written=written)
            for (part, operation), (kernels, read, written) in self._counted.items()
        ]
        return sorted(rows, key=lambda row: -row.bytes)

    def _operation(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = op(*args, **kwargs)
        if not self._paused and launches(op):
            self.add(operation_name(op).lstrip("_"), *operands(op, args, kwargs, result))
        return result

    def _function(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        name = _FUSED_NAMES.get(function)
        if name is None or name not in self._fused or self._paused:
            return function(*args, **kwargs)
        first = args[0] if args else kwargs.get("query", kwargs.get("input"))
        assert isinstance(first, Tensor)
        if first.device.type == "meta":
            result = _ON_META[name](first)
        else:
            self._paused = True
            try:
                result = function(*args, **kwargs)
            finally:
                self._paused = False
        self.add(name, list(tensors_in([*args, *kwargs.values()])), [result])
        return result

    def add(self, operation: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Count one kernel that torch does not see; a part of the model by who calls this."""
        sizes = total_bytes(read, self._device), total_bytes(written, self._device)
        if not any(sizes):  # an empty tensor, or another device
            return
        total = self._counted.setdefault((part_of_call(self._parts), operation), [0, 0, 0])
        for place, more in enumerate((1, *sizes)):
            total[place] += more


def _attention_result(query: Tensor) -> Tensor:
    """[N,H,length,D] in memory as flash attention leaves it: in the order of its query, dense.

    What comes after it may have to copy it, or not.
    """
    return torch.empty_like(query.transpose(1, 2)).transpose(1, 2)


def _norm_result(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_ON_META = {ATTENTION: _attention_result, RMS_NORM: _norm_result}
_FUSED_NAMES: dict[Any, str] = {F.scaled_dot_product_attention: ATTENTION}
for _owner in (F, torch):  # rms_norm came after torch 2.3
    if hasattr(_owner, "rms_norm"):
        _FUSED_NAMES[_owner.rms_norm] = RMS_NORM


class _Functions(TorchFunctionMode):
    """Sees the functions of torch before they come apart into operations of aten."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of torch."""
        return self._counter._function(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Sees the operations of aten."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation of aten."""
        return self._counter._operation(func, args, kwargs or {})
