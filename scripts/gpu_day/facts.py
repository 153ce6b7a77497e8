"""Facts of the device: name, memory, driver, clocks, and two rates. No setting is changed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opensora_sp.base.machine import cpu_info, device_info, os_info, run_tool
from opensora_sp.parallel.backend_table import for_device
from scripts.gpu_day.day import Day
from scripts.gpu_day.rows import Row
from scripts.gpu_day.timing import Budget, repeat

PART = "device"
# It only asks; nothing is set.
_CLOCKS = (
    "nvidia-smi",
    "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu",
    "--format=csv",
)
_SIDE = {"cpu": 512}
_SIDE_ACCELERATOR = 8192
_COPIED = {"cpu": 2**24}
_COPIED_ACCELERATOR = 2**31
ROOT = Path(__file__).resolve().parents[2]


def machine(device: torch.device) -> dict[str, Any]:
    """What a report says of the machine. None is what could not be found out."""
    backend = for_device("cpu" if device.type == "meta" else device.type)
    about = device_info(device, backend.tool, backend.driver_query)
    about["clocks"] = run_tool(_CLOCKS) if device.type == "cuda" else None
    return {"device": about, "os": os_info(), "cpu": cpu_info(), "torch": torch.__version__}


def commit() -> str | None:
    """The commit of this checkout; None without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def measure(day: Day, budget: Budget) -> Iterator[Row]:
    """FLOP/s of a large product of matrices, and bytes per second of a copy on the device."""
    yield _product(day, budget.within(budget.left / 2))
    yield _copy(day, budget)


def _product(day: Day, budget: Budget) -> Row:
    side = _SIDE.get(day.device.type, _SIDE_ACCELERATOR)
    a, b = (torch.randn(side, side).to(day.device, day.dtype) for _ in range(2))
    figures = repeat(lambda: torch.mm(a, b), day.device, budget, 20)
    if "fastest" in figures:
        figures["flop_rate"] = 2 * side**3 / figures["fastest"]
    return Row(part=PART, case=f"matrix product of {side}x{side}", figures=figures)


def _copy(day: Day, budget: Budget) -> Row:
    size = _COPIED.get(day.device.type, _COPIED_ACCELERATOR)
    source = torch.zeros(size, dtype=torch.uint8, device=day.device)
    target = torch.empty_like(source)
    figures = repeat(lambda: target.copy_(source), day.device, budget, 20)
    if "fastest" in figures:
        figures["byte_rate"] = 2 * size / figures["fastest"]
    return Row(part=PART, case=f"copy of {size} bytes, read and written", figures=figures)
