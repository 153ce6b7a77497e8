"""What every measurement is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from opensora_sp.models.kernels.cpu_half import arithmetic
from scripts.gpu_day.rows import Row
from scripts.gpu_day.sizes import Sizes
from scripts.gpu_day.timing import Budget


@dataclass(frozen=True, kw_only=True)
class Day:
    """links: bytes per second of the links that steps on several ranks are projected for.

    call_seconds: latency of one collective there.
    """

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    links: Sequence[float]
    call_seconds: float

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The context that models run in."""
        return arithmetic(self.device, self.dtype)


Measure = Callable[[Day, Budget], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A group of rows. seconds: the most that it may take. least: what it is not begun below."""

    part: str
    case: str
    seconds: float
    measure: Measure
    least: float = 0.0
