"""A trace of one rank that opens in Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.parallel.backend_table import for_device

# A merged view tells processes apart by number, and ranks on different nodes may have the same.
_PID_STRIDE = 1 << 22


def trace_path(directory: Path, rank: int) -> Path:
    """The file of a rank's trace."""
    return directory / f"trace-rank{rank}.json"


@contextmanager
def profiled(path: Path, rank: int, device: torch.device) -> Iterator[None]:
    """Trace a `with` block of one rank and write it to `path`, whole or not at all."""
    activities = [ProfilerActivity.CPU]
    own = for_device(device.type).profiler
    if own is not None and hasattr(ProfilerActivity, own):
        activities.append(getattr(ProfilerActivity, own))
    with profile(activities=activities) as profiler:
        yield
    with atomic_output(path) as temporary, reported(path):
        # The exporter chooses its format by the suffix, which the temporary name lacks.
        raw = temporary.with_suffix(".json")
        try:
            profiler.export_chrome_trace(str(raw))
            trace = json.loads(raw.read_text(encoding="utf-8", errors="replace"))
        finally:
            raw.unlink(missing_ok=True)
        name_processes(trace, rank, device.type)
        temporary.write_text(json.dumps(trace), encoding="utf-8")


def name_processes(trace: dict[str, Any], rank: int, device: str) -> None:
    """Name the trace's processes after their rank, and make their numbers unique."""
    events: list[dict[str, Any]] = trace["traceEvents"]
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            inner = event.get("args", {}).get("name", "")
            event["args"] = {"name": f"rank {rank} ({device}) {inner}".strip()}
        if event.get("ph") == "M" and event.get("name") == "process_sort_index":
            event["args"] = {"sort_index": rank}
        if isinstance(event.get("pid"), int):
            event["pid"] = rank * _PID_STRIDE + event["pid"]
    trace["rank"] = rank
