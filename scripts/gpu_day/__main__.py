"""python -m scripts.gpu_day [--reduced] [--out DIR]: measures this device, in at most 9 minutes.

Random weights at the published sizes are drawn on the device; nothing is downloaded. After every
row DIR (or $OUT, or gpu_day/) has gpu_day.json, gpu_day.md and gpu_day.html. A row that fails says
why and the next one follows.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from opensora_sp.base.errors import UserError
from opensora_sp.engine.model_set import DTYPES
from opensora_sp.models.kernels.probe import DTYPE_NAMES
from opensora_sp.parallel.backend import load_plugin, pick_device
from opensora_sp.parallel.backend_table import DEVICES
from scripts.gpu_day import attention, facts, memory, shards, stages, steps
from scripts.gpu_day.day import Day, Task
from scripts.gpu_day.rows import Results, failed, left_out
from scripts.gpu_day.sizes import SIZES
from scripts.gpu_day.timing import Budget, release

REPORT_S = 5.0  # kept for the end


def tasks(day: Day) -> Iterator[Task]:
    """Everything to be measured; what matters most comes first."""
    small, largest, *others = day.sizes.steps
    name = day.sizes.largest.name

    def step(case: Any, seconds: float) -> Task:
        return Task(
            part=steps.PART,
            case=case.name,
            seconds=seconds,
            measure=partial(steps.measure, case=case),
            least=5,
        )

    yield Task(part=facts.PART, case="rates", seconds=15, measure=facts.measure)
    yield step(small, 40)
    yield step(largest, 150)
    yield Task(part=memory.PART, case=name, seconds=60, measure=memory.measure, least=10)
    yield Task(part=shards.PART, case=name, seconds=60, measure=shards.measure, least=10)
    yield Task(part=attention.PART, case=name, seconds=30, measure=attention.measure)
    yield Task(part=stages.DECODE, case=name, seconds=110, measure=stages.measure_decode, least=10)
    yield Task(part=stages.TEXT, case="T5", seconds=40, measure=stages.measure_text, least=10)
    for case in others:
        yield step(case, 40)


def run(day: Day, results: Results, seconds: float) -> None:
    """Measure task by task. The files are complete after every row."""
    budget = Budget.of(seconds - REPORT_S)
    for task in tasks(day):
        if budget.left <= task.least:
            results.put(left_out(task.part, task.case, f"{max(0.0, budget.left):.0f} s were left"))
            continue
        print(f"{task.part}: {task.case} …", file=sys.stderr, flush=True)
        trouble = None
        try:
            for row in task.measure(day, budget.within(task.seconds)):
                results.put(row)
        except Exception as error:  # one task must not end the day
            traceback.print_exc()
            trouble = _trouble(task, error)
        if trouble is not None:
            results.put(trouble)
        release(day.device)


def _trouble(task: Task, error: Exception) -> Any:
    if isinstance(error, ModuleNotFoundError):
        reason = f"the Python package {error.name} is not installed"
        return left_out(task.part, task.case, reason)
    return failed(task.part, task.case, error)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line. A mistake ends with exit code 2."""
    parser = argparse.ArgumentParser(prog="gpu_day", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu_day"))
    parser.add_argument("--budget", type=float, default=530.0, metavar="SECONDS")
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="bf16, or fp32 on a CPU")
    parser.add_argument("--size", choices=tuple(SIZES), help="full, or reduced on a CPU")
    parser.add_argument("--reduced", action="store_true", help="--size reduced")
    parser.add_argument(
        "--link-gbps",
        default="25,50,450",
        metavar="LIST",
        help="links to project steps on several ranks for, in 10^9 bytes a second and direction",
    )
    parser.add_argument(
        "--call-us", type=float, default=20.0, help="latency of a collective to project with"
    )
    asked = parser.parse_args(words)
    try:
        asked.links = [1e9 * float(word) for word in asked.link_gbps.split(",")]
    except ValueError:
        asked.links = []
    if not asked.links or min(asked.links) <= 0:
        parser.error(f"--link-gbps {asked.link_gbps}: give numbers above 0, such as 25,50,450")
    if asked.budget < 10:
        parser.error(f"--budget {asked.budget:g}: give at least 10 seconds")
    if asked.call_us < 0:
        parser.error(f"--call-us {asked.call_us:g}: give 0 or more")
    return asked


def day_of(asked: argparse.Namespace) -> Day:
    """The day that was asked for. Raises UserError for a device that is not here."""
    kind = pick_device(None if asked.device == "auto" else asked.device)
    load_plugin(kind)
    on_cpu = kind == "cpu"
    size = "reduced" if asked.reduced else asked.size or ("reduced" if on_cpu else "full")
    device = torch.device(kind, 0) if not on_cpu else torch.device(kind)
    dtype = asked.dtype or ("fp32" if on_cpu else "bf16")
    return Day(
        sizes=SIZES[size](),
        device=device,
        dtype=DTYPES[dtype],
        links=asked.links,
        call_seconds=asked.call_us * 1e-6,
    )


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and print the table. The exit code is 1 where rows failed."""
    words = sys.argv[1:] if words is None else words
    asked = parse(words)
    try:
        day = day_of(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    head = {
        "command": shlex.join(["scripts/gpu_day.sh", *words]),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": facts.commit(),
        "sizes": day.sizes.name,
        "dtype": DTYPE_NAMES[day.dtype],
        "budget": asked.budget,
        "call_seconds": day.call_seconds,
        "machine": facts.machine(day.device),
    }
    results = Results(asked.out, head)
    torch.manual_seed(0)
    try:
        results.write()
        run(day, results, asked.budget)
    except KeyboardInterrupt:
        results.finish("interrupted")
        print(f"error: interrupted; what was measured is in {asked.out}", file=sys.stderr)
        return 130
    results.finish("ok")
    print((asked.out / "gpu_day.md").read_text(encoding="utf-8"))
    print(asked.out / "gpu_day.html")
    return int(any(row.status == "failed" for row in results.rows))


if __name__ == "__main__":
    # Whoever ends this process, as a time limit does, gets what was measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
