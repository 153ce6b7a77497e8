"""Seconds and memory of one guided step: every variant of it, in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opensora_sp.benchmark.memory_meter import MemoryMeter
from scripts.gpu_day.day import Day
from scripts.gpu_day.rows import Row, failed, left_out
from scripts.gpu_day.sizes import Case
from scripts.gpu_day.timing import Budget, release, spread, timed
from scripts.gpu_day.variants import LeftOutError, Scene, Step, variants

PART = "step"


@dataclass
class _Ready:
    """A variant whose warm-up has ended."""

    step: Step
    figures: dict[str, Any]
    result: Tensor
    taken: list[float] = field(default_factory=list)

    @property
    def expected(self) -> float:
        """Seconds of its next call."""
        return self.taken[-1] if self.taken else float(self.figures["warm_up"])


def measure(day: Day, budget: Budget, case: Case) -> Iterator[Row]:
    """A warm-up of each variant, then rounds in which each computes one step."""
    with torch.no_grad(), day.arithmetic():
        scene = Scene.of(day, case)
        ready: dict[str, _Ready] = {}
        for name, make in variants(scene).items():
            slowest = max((each.expected for each in ready.values()), default=0.0)
            if not budget.allows(2 * slowest):
                yield left_out(PART, case.name, "no time was left for it", name)
                continue
            trouble: Row | None = None
            try:
                ready[name] = _warmed_up(make(), day.device)
            except LeftOutError as error:
                trouble = left_out(PART, case.name, str(error), name)
            except Exception as error:  # out of memory, most of all
                trouble = failed(PART, case.name, error, name)
            if trouble is not None:
                release(day.device)  # when the error, and all that it holds, is gone
                yield trouble
                continue
            yield Row(
                part=PART,
                case=case.name,
                variant=name,
                status="running",
                figures=ready[name].figures,
            )
        _rounds(ready, day, budget)
        yield from _rows(ready, case)


def _warmed_up(step: Step, device: torch.device) -> _Ready:
    release(device)
    meter = MemoryMeter(device)
    meter.reset()
    results: list[Tensor] = []
    first = timed(lambda: results.append(step()), device)
    figures: dict[str, Any] = {"warm_up": first, "peak_bytes": meter.peak_device_bytes()}
    result = results.pop()
    return _Ready(step, figures, result if result.is_meta else result.float().cpu())


def _rounds(ready: dict[str, _Ready], day: Day, budget: Budget) -> None:
    for _ in range(day.sizes.rounds):
        for each in ready.values():
            if budget.allows(each.expected):
                each.taken.append(timed(each.step, day.device))


def _rows(ready: dict[str, _Ready], case: Case) -> Iterator[Row]:
    plain = ready.get("plain")
    for name, each in ready.items():
        figures = dict(each.figures)
        if plain is not None and plain is not each and not each.result.is_meta:
            figures["difference"] = difference(each.result, plain.result)
        if not each.taken:
            yield Row(
                part=PART,
                case=case.name,
                variant=name,
                status="left out",
                reason="time was left for its warm-up only",
                figures=figures,
            )
            continue
        figures |= spread(each.taken)
        if plain is not None and plain.taken:
            figures["of_plain"] = figures["seconds"] / spread(plain.taken)["seconds"]
        yield Row(part=PART, case=case.name, variant=name, figures=figures)


def difference(value: Tensor, other: Tensor) -> float | None:
    """Relative RMS difference of two tensors; None where it is no number."""
    other = other.double()
    found = float((value.double() - other).norm() / other.norm())
    return found if found == found and found != float("inf") else None
