"""Seconds of the attention kernels at the model's head width, on the shapes of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.gpu_day.day import Day
from scripts.gpu_day.rows import Row, failed
from scripts.gpu_day.steps import difference
from scripts.gpu_day.timing import Budget, repeat
from scripts.gpu_day.variants import attention_lengths

PART = "attention"
_TABLE = "opensora_sp.models.kernels.attention"
_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
_WIDTHS = (80, 96, 128)  # that kernels are built for, above the model's 72
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CHECKED = 64  # queries that are compared with the formula
_CALLS = 10  # in one measurement

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(day: Day, budget: Budget) -> Iterator[Row]:
    """Every kernel on every shape: those of the program's table, or torch's own."""
    shapes = attention_lengths(day, day.sizes.largest)
    for place, (case, (count, queries, keys)) in enumerate(shapes.items()):
        share = budget.within(budget.left / (len(shapes) - place))
        q, k, v = _inputs(day, count, queries, keys)
        name = f"{case} {count}x{queries}x{keys}"
        for variant, call in _kernels(day, q.shape[-1]):
            try:
                yield _row(name, variant, call, (q, k, v), day, share)
            except Exception as error:  # a kernel that does not take this
                yield failed(PART, name, error, variant)


def _row(
    case: str,
    variant: str,
    call: Call,
    qkv: tuple[Tensor, Tensor, Tensor],
    day: Day,
    budget: Budget,
) -> Row:
    q, k, v = qkv
    found = call(q, k, v)[:1, :, :_CHECKED].float().cpu()
    exact = _formula(q[:1, :, :_CHECKED].float(), k[:1].float(), v[:1].float()).cpu()

    def calls() -> None:
        for _ in range(_CALLS):
            call(q, k, v)

    figures = {
        name: value if name == "runs" else value / _CALLS
        for name, value in repeat(calls, day.device, budget, day.sizes.rounds).items()
    }
    figures["difference"] = difference(found, exact)
    if "seconds" in figures:
        work = 4 * math.prod(q.shape) * k.shape[2]
        figures["flop_rate"] = work / figures["seconds"]
    return Row(part=PART, case=case, variant=variant, figures=figures)


def _inputs(day: Day, count: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [N,H,length,D] in memory as a product leaves them: [N,length,H,D]."""
    config = day.sizes.transformer
    row = (config.num_heads, config.hidden_size // config.num_heads)

    def drawn(length: int) -> Tensor:
        made = torch.empty(count, length, *row, dtype=day.dtype, device=day.device)
        return made.normal_().transpose(1, 2)

    return drawn(queries), drawn(keys), drawn(keys)


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


def _kernels(day: Day, width: int) -> Iterator[tuple[str, Call]]:
    if find_spec(_TABLE) is not None:
        table: Any = import_module(_TABLE)
        for kernel in table.usable(day.device.type, _NAMES[day.dtype]):
            for wide in kernel.widths(width) if kernel.probed else ():
                choice = table.Choice(kernel.name, wide)
                yield choice.described(width), partial(table.run, choice)
        return
    yield "sdpa", F.scaled_dot_product_attention
    if day.device.type == "cpu":
        return
    for backend in _BACKENDS:
        for wide in (width, *_WIDTHS):
            said = backend.removesuffix("_ATTENTION").lower()
            yield f"{said} at {wide}", partial(_by_backend, backend, wide)


def _by_backend(backend: str, wide: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One backend of torch's attention, on heads padded with zeros to `wide`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    width = q.shape[-1]
    q, k, v = (F.pad(x, (0, wide - width)) for x in (q, k, v))
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        out = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(width))
    return out[..., :width]
