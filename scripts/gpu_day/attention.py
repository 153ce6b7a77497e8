"""Seconds of the attention kernels at the model's head width, on the shapes of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from opensora_sp.models.kernels.attention import run
from opensora_sp.models.kernels.probe import DTYPE_NAMES, candidates
from scripts.gpu_day.day import Day
from scripts.gpu_day.rows import Row, failed
from scripts.gpu_day.steps import difference
from scripts.gpu_day.timing import Budget, repeat
from scripts.gpu_day.variants import attention_lengths

PART = "attention"
_CHECKED = 64  # queries that are compared with the formula
_CALLS = 10  # in one measurement

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(day: Day, budget: Budget) -> Iterator[Row]:
    """Every kernel of the program's table that may be chosen here, on every shape."""
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
    for choice in candidates(day.device.type, DTYPE_NAMES[day.dtype], width):
        yield choice.described(width), partial(run, choice)
