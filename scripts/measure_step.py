"""Measures how fast a step is on this CPU: scripts/measure_step.py OUT.json [--rounds 5]

A pair of blocks at the published width, both CFG branches, without what a step does once: folded,
plain, in Open-Sora 1.2's order of operations, the products and attention of the pair alone (the
floor), and the folded pair without them, in float32 and bf16, on 1 and 2 threads.
One size and number format after the other, all of them take turns: within a round each number of
threads is computed once by each way, so that a machine whose speed drifts slows all alike. Each way
has a process of its own, because a run has one way only: in a shared one, what another way freed
lies about and does not always fit. OUT.json has the seconds of each round, by the clock and of the
CPU, and what the machine is. The tables are printed too. What two ways took in one round is
compared, because a machine is slower in some rounds than in others. The folded step is also
computed without keeping what it frees in the process; see opensora_sp/base/heap.py. A round that
would not end within --budget seconds, shared by sizes and number formats, is left out.

--alone measures each optimisation of the folded step by itself instead, in one process: switched
on in a plain step, and off in a folded one. It counts kernels and bytes of a whole step too, at
720p 16 s and 144p 2 s, with the operations that CUDA has and with those that every device has. See
scripts/step_switches.py.

--quick is a trial of the command with a narrow model; its seconds mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.connection import Connection
from operator import truediv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from opensora_sp.base import heap  # noqa: E402
from opensora_sp.base.errors import UserError  # noqa: E402
from opensora_sp.base.waiting import let_waiting_threads_sleep  # noqa: E402

let_waiting_threads_sleep()  # as the program's commands do, before torch is loaded

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from opensora_sp.benchmark.count.forward import ForwardSize  # noqa: E402
from opensora_sp.benchmark.count.table import markdown  # noqa: E402
from opensora_sp.models.kernels.cpu_half import arithmetic  # noqa: E402
from opensora_sp.models.stdit3 import STDiT3Config  # noqa: E402
from scripts.gpu_day.facts import commit, machine  # noqa: E402
from scripts.step_pair import (  # noqa: E402
    FLOOR,
    FOLDED,
    PLAIN,
    REST,
    WAYS,
    Compute,
    Pair,
    forward_size,
    size_of,
)
from scripts.step_switches import (  # noqa: E402
    alone_table,
    counts,
    every_variant,
    switched_pair,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PUBLISHED = STDiT3Config(depth=1)
NARROW = STDiT3Config(depth=1, hidden_size=144, num_heads=2, model_max_length=20)
CPU = torch.device("cpu")
GIVEN_BACK = "folded, freed memory given back"


# What one computation gave: its result where it was asked for, seconds of the clock and of the CPU.
Timed = tuple[Tensor | None, float, float]


class Here:
    """A way that is computed in this process."""

    def __init__(self, compute: Compute, dtype: torch.dtype) -> None:
        self._compute, self._dtype = compute, dtype

    def timed(self, threads: int, *, keep: bool = False) -> Timed:
        """One computation; with its result if it is to be kept."""
        torch.set_num_threads(threads)
        with torch.no_grad(), arithmetic(CPU, self._dtype):
            wall, cpu = time.perf_counter(), time.process_time()
            result = self._compute()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return result if keep else None, wall, cpu

    def close(self) -> None:
        """Nothing to end."""


class Elsewhere:
    """A way that has a process of its own."""

    def __init__(self, way: str, size: str, dtype: torch.dtype, config: STDiT3Config) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would lack the threads of OpenMP
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, way, size, dtype, config), daemon=True
        )
        self._process.start()
        other.close()

    def timed(self, threads: int, *, keep: bool = False) -> Timed:
        """As `Here.timed`. Raises EOFError when the process has ended."""
        self._pipe.send((threads, keep))
        found: Timed = self._pipe.recv()
        return found

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, way: str, size: str, dtype: torch.dtype, config: STDiT3Config) -> None:
    """Compute what is asked for, until nobody asks."""
    with nullcontext() if way == GIVEN_BACK else heap.freed_memory_kept(CPU, 0):
        with torch.no_grad(), arithmetic(CPU, dtype):
            compute = WAYS[FOLDED if way == GIVEN_BACK else way](Pair.of(size, dtype, config))
        here = Here(compute, dtype)
        with suppress(EOFError):
            while True:
                threads, keep = pipe.recv()
                pipe.send(here.timed(threads, keep=keep))


@dataclass
class Case:
    """One size in one number format: its ways, and what they took on each number of threads."""

    size: str
    dtype: str
    ways: Mapping[str, Here | Elsewhere]
    tokens: int = 0  # of one branch; known when it is warm
    difference: dict[str, float] = field(default_factory=dict)
    wall: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    cpu: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    def compute(self, way: str, threads: int) -> None:
        """One computation by one way, timed."""
        _, wall, cpu = self.ways[way].timed(threads)
        self.wall.setdefault((threads, way), []).append(wall)
        self.cpu.setdefault((threads, way), []).append(cpu)

    def warm_up(self, threads: Sequence[int]) -> None:
        """Every way once, compared with the plain one."""

        def result(way: str) -> Tensor:
            found, _, _ = self.ways[way].timed(max(threads), keep=True)
            assert found is not None
            return found.double()

        plain = result(PLAIN)
        self.tokens = plain.shape[1] * plain.shape[2]
        for way in self.ways:
            found = result(way)
            if way not in (FLOOR, REST):
                self.difference[way] = float((found - plain).norm() / plain.norm())

    def figures(self, threads: Sequence[int]) -> Iterator[dict[str, Any]]:
        """A line for each number of threads and each way."""
        for number, way in product(threads, self.ways):
            wall, cpu = self.wall[number, way], self.cpu[number, way]
            floor = self.wall.get((number, FLOOR), [])
            yield {
                "size": self.size,
                "tokens": self.tokens,
                "dtype": self.dtype,
                "threads": number,
                "way": way,
                "least": min(wall),
                "median": statistics.median(wall),
                "least_cpu": min(cpu),
                "seconds": wall,
                "cpu_seconds": cpu,
                "of_the_floor": statistics.median(map(truediv, wall, floor)) if floor else None,
                "difference_from_plain": self.difference.get(way),
            }


def take_turns(
    case: Case, threads: Sequence[int], rounds: int, budget: float
) -> list[dict[str, Any]]:
    """Compute everything once to warm up, then in rounds, as many as the budget of seconds allows.

    Returns how long each round took, and the load that it began under.
    """
    began = time.monotonic()
    case.warm_up(threads)
    print(f"warmed up: {case.size} {case.dtype}", file=sys.stderr, flush=True)
    log: list[dict[str, Any]] = []
    for number in range(rounds):
        longest = max((each["seconds"] for each in log), default=0.0)
        if log and time.monotonic() - began + longest > budget:
            print(f"no time for round {number + 1} of {rounds}", file=sys.stderr)
            break
        load, at = os.getloadavg()[0], time.monotonic()
        for threads_now in threads:
            ways = list(case.ways)
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                case.compute(way, threads_now)
        found = {"size": case.size, "dtype": case.dtype, "load": load}
        log.append(found | {"seconds": time.monotonic() - at})
        print(f"round {number + 1}: {log[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    return log


def case_of(size: str, dtype: str, config: STDiT3Config, *, alone: bool, can_keep: bool) -> Case:
    """A case with all its ways, ready to be computed."""
    format = DTYPES[dtype]
    if not alone:
        names = [*WAYS, GIVEN_BACK] if can_keep else list(WAYS)
        return Case(size, dtype, {way: Elsewhere(way, size, format, config) for way in names})
    with torch.no_grad(), arithmetic(CPU, format):
        computed = switched(Pair.of(size, format, config))
    return Case(size, dtype, {way: Here(compute, format) for way, compute in computed.items()})


def table(lines: Sequence[Mapping[str, Any]], what: str) -> str:
    """A figure of each way as Markdown: a row for a size, number format and number of threads."""
    ways = list(dict.fromkeys(str(line["way"]) for line in lines))
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for line in lines:
        case = (str(line["size"]), str(line["dtype"]), str(line["threads"]))
        rows.setdefault(case, {})[str(line["way"])] = line[what]
    cells = [(*case, *(f"{found[way]:.3f}" for way in ways)) for case, found in rows.items()]
    return markdown([("size", "dtype", "threads", *ways), *cells])


def switched(pair: Pair) -> dict[str, Compute]:
    """Every variant that is another computation on a CPU, by its label."""
    return {
        variant.label: switched_pair(pair, variant.on)
        for variant in every_variant()
        if variant.timed
    }


def count_sizes(config: STDiT3Config) -> dict[str, tuple[ForwardSize, bool]]:
    """What --alone counts, and whether with CUDA's operations; of a narrow model a short video."""
    if config is NARROW:
        return {"144p 17": (forward_size("144p 17", config), True)}
    large, small = (forward_size(name, STDiT3Config()) for name in ("720p 16s", "144p 2s"))
    return {
        "720p 16s": (large, True),
        "144p 2s": (small, True),
        "720p 16s, every device": (large, False),
    }


def by_dtype(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The least CPU seconds, by number format and way."""
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        found.setdefault(line["dtype"], {})[line["way"]] = line["least_cpu"]
    return found


def known_size(text: str) -> str:
    """A size such as "144p 2s", for argparse."""
    try:
        size_of(text)
    except (ValueError, UserError) as error:
        raise argparse.ArgumentTypeError(
            f'"{text}" is no size such as "144p 2s": {error}'
        ) from error
    return text


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", nargs="+", type=known_size, default=["144p 2s", "240p 2s"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=840, help="seconds for all rounds")
    parser.add_argument("--alone", action="store_true", help="each optimisation by itself")
    parser.add_argument("--quick", action="store_true", help="one round of a narrow model")
    asked = parser.parse_args(words)
    if asked.alone:
        asked.sizes, asked.threads = asked.sizes[:1], asked.threads[:1]
    config, rounds = (NARROW, 1) if asked.quick else (PUBLISHED, asked.rounds)
    every = list(product(asked.sizes, asked.dtypes))
    lines: list[dict[str, Any]] = []
    log: list[dict[str, Any]] = []
    # As a run does around its steps; where the user has decided how memory is allocated, not.
    with heap.freed_memory_kept(CPU, 0) as kept:
        for size, dtype in every:
            case = case_of(size, dtype, config, alone=asked.alone, can_keep=kept)
            try:
                log += take_turns(case, asked.threads, rounds, asked.budget / len(every))
            finally:
                for way in case.ways.values():
                    way.close()
            lines += case.figures(asked.threads)
    done = min(len(line["seconds"]) for line in lines)
    result: dict[str, Any] = {
        "what": f"seconds of a pair of blocks of width {config.hidden_size}, both CFG branches",
        "command": " ".join(["python", *sys.argv]) if words is None else " ".join(words),
        "commit": commit(),
        "machine": machine(CPU),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": log,
        "lines": lines,
    }
    if asked.alone:
        result["counts"] = moved = counts(count_sizes(config))
        print(f"least CPU seconds of {done} rounds\n\n{alone_table(moved, by_dtype(lines))}\n")
    else:
        for what in ("least", "median"):
            print(f"{what} seconds of {done} rounds\n\n{table(lines, what)}\n")
        print(f"of the floor, the median of the rounds\n\n{table(lines, 'of_the_floor')}\n")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
