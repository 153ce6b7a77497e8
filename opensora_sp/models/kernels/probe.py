"""The probe: which attention kernel is the fastest that is right, for one kind of attention.

Every kernel that is there is first compared with the formula in float32. Those that agree are timed
on the run's own lengths, head width and number format. A probe takes some milliseconds, after what
a kernel compiles at its first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_sp.models.kernels.attention import (
    DEFAULT,
    KERNELS,
    Choice,
    Kernel,
    Table,
    run,
    usable,
)

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Relative RMS errors of rounding, with a margin: a wrong scale or layout exceeds them by far.
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Elements of q and of k: enough to fill a device, and little beside what a run needs.
MOST_ELEMENTS = 1 << 24
# The default stays unless another is faster by this factor: differences below it are noise, and
# two runs of one request should not differ in their kernels.
MARGIN = 1.05
REPEATS = 3
_CHECKED = 64  # queries of each head that are compared with the formula

# Runs something and returns its seconds.
Measure = Callable[[Callable[[], Tensor], torch.device], float]


@dataclass(frozen=True)
class Shape:
    """One attention: `count` sequences, heads, queries, keys, head width."""

    count: int
    heads: int
    queries: int
    keys: int
    width: int

    def bounded(self, elements: int = MOST_ELEMENTS) -> Shape:
        """Fewer sequences, then fewer queries, so that q and k have at most so many elements."""
        row = self.heads * self.width
        count = max(1, min(self.count, elements // (row * max(self.queries, self.keys))))
        queries = self.queries
        if self.queries != self.keys:
            queries = max(1, min(self.queries, elements // (row * count)))
        return Shape(count, self.heads, queries, self.keys, self.width)


@dataclass(frozen=True)
class Trial:
    """What the probe found: seconds of each choice that is right, and why others are out."""

    seconds: Mapping[Choice, float]
    out: Mapping[Choice, str]


def fastest(seconds: Mapping[Choice, float], width: int, margin: float = MARGIN) -> Choice:
    """The choice of the fewest seconds; the default unless that is faster by the margin."""
    default = Choice(DEFAULT, width)
    if not seconds:
        return default
    best = min(seconds, key=lambda choice: (seconds[choice], choice))
    if default in seconds and seconds[default] < seconds[best] * margin:
        return default
    return best


def candidates(device: str, dtype: str, width: int, table: Table = KERNELS) -> list[Choice]:
    """What may be chosen for heads of this width, the default first."""
    rows: list[Kernel] = [row for row in usable(device, dtype, table) if row.probed]
    return [Choice(row.name, wide) for row in rows for wide in row.widths(width)]


def probe(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    table: Table = KERNELS,
    measure: Measure | None = None,
) -> Trial:
    """Check and time every candidate on one shape. A candidate that fails or errs is out."""
    q, k, v = _inputs(shape.bounded(), dtype, device)
    timed = measure or seconds_of
    seconds: dict[Choice, float] = {}
    out: dict[Choice, str] = {}
    for choice in candidates(device.type, DTYPE_NAMES[dtype], shape.width, table):
        try:
            trouble = _trouble(choice, q, k, v, table)
            if trouble is None:
                seconds[choice] = timed(lambda c=choice: run(c, q, k, v, table), device)  # type: ignore[misc]
        except Exception as error:  # whatever it is, the others may still work
            trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if trouble is not None:
            out[choice] = trouble
    return Trial(seconds, out)


def works(choice: Choice, dtype: torch.dtype, device: torch.device, width: int) -> str | None:
    """Why a kernel that was asked for does not work on this device, or None."""
    q, k, v = _inputs(Shape(2, 4, 80, 80, width), dtype, device)
    try:
        return _trouble(choice, q, k, v, KERNELS)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    # Laid out as a projection leaves them, [N,length,H,D] seen as [N,H,length,D].
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for length in (shape.queries, shape.keys, shape.keys):
        # A block that is repeated: drawing everything on the CPU would take longer than the probe.
        block = torch.randn(min(length, 256), shape.heads, shape.width, generator=generator)
        # Neighbouring sequences differ, or one that is taken for the other would not be noticed.
        two = torch.stack([block, block.flip(0)]).to(device, dtype)
        whole = two.repeat(-(-shape.count // 2), -(-length // len(block)), 1, 1)
        tensors.append(whole[: shape.count, :length].contiguous().transpose(1, 2))
    return tuple(tensors)


def _trouble(choice: Choice, q: Tensor, k: Tensor, v: Tensor, table: Table) -> str | None:
    """How far a kernel is from the formula in float32, where that is too far."""
    q, k, v = (x[:2] for x in (q, k, v))
    found = run(choice, q, k, v, table)
    if found.shape != q.shape or found.dtype != q.dtype:
        return f"{list(found.shape)} {found.dtype} came out"
    rows = slice(None, None, max(1, q.shape[2] // _CHECKED))
    wide_q, wide_k, wide_v = (x.float() for x in (q[:, :, rows], k, v))
    scores = wide_q @ wide_k.transpose(-2, -1) / q.shape[-1] ** 0.5
    expected = scores.softmax(-1) @ wide_v
    error = float((found[:, :, rows].float() - expected).norm() / expected.norm())
    limit = LIMITS[q.dtype]
    # NaN is never below the limit.
    return None if error <= limit else f"differs from the formula by {error:.1e}, limit {limit:.0e}"


def seconds_of(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of a call on a device: the fewest of some, after one that may compile."""
    wait = getattr(getattr(torch, device.type), "synchronize", lambda: None)
    call()
    wait()
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - began)
    return min(found)
