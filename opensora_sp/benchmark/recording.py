"""The record of one run on one rank: intervals, collectives and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opensora_sp.benchmark.memory_meter import MemoryMeter, MemorySampler, peak_host_bytes
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.timing import Interval, Recording
from opensora_sp.parallel.ledger import Entry

WAIT = "wait"


@dataclass
class Phase:
    """A part of a run on this rank. It is complete when its block has ended.

    samples: (seconds since the phase began, host bytes, device bytes). ledger: the collectives in
    the phase. host_peak_of: "run", or "process" where the host's peak could not be reset.
    """

    recording: Recording
    seconds: float = 0.0
    ledger: dict[str, Entry] = field(default_factory=dict)
    samples: list[tuple[float, int | None, int | None]] = field(default_factory=list)
    peak_device_bytes: int | None = None
    stage_bytes: dict[str, int] = field(default_factory=dict)
    peak_host_bytes: int | None = None
    host_peak_of: str = "process"


@contextmanager
def recorded(pipeline: Pipeline, meter: MemoryMeter) -> Iterator[Phase]:
    """Record a `with` block, between two barriers. Waiting at the last one is the stage "wait"."""
    session, clock = pipeline.session, pipeline.models.clock
    session.control.barrier()
    meter.reset()
    before = session.ledger.snapshot()
    with clock.record(meter.stage) as recording:
        phase = Phase(recording)
        sampler = MemorySampler(meter, recording.origin)
        with sampler:
            yield phase
            with clock.stage(WAIT):
                session.control.barrier()
        last = recording.intervals[-1]
        phase.seconds = last.start + last.seconds
    phase.ledger = {k: e for k, e in session.ledger.since(before).items() if e.calls}
    phase.samples = sampler.samples
    phase.peak_device_bytes = meter.peak_device_bytes()
    phase.stage_bytes = dict(meter.stages)
    phase.peak_host_bytes = peak_host_bytes()
    phase.host_peak_of = "run" if meter.host_of_run else "process"


def rank_record(rank: int, phases: Sequence[Phase]) -> dict[str, Any]:
    """The phases of a run on one rank, one after the other, as JSON can hold them."""
    intervals: list[dict[str, Any]] = []
    samples: list[list[float | int | None]] = []
    ledger: dict[str, Entry] = {}
    stages: dict[str, float] = {}
    peaks: dict[str, int] = {}
    offset = 0.0
    for phase in phases:
        for interval in sorted(phase.recording.intervals, key=lambda i: i.start):
            intervals.append(_interval(interval, offset))
            if interval.inside is None:
                own = interval.seconds - interval.nested
                stages[interval.stage] = stages.get(interval.stage, 0.0) + own
        for name, peak in phase.stage_bytes.items():
            peaks[name] = max(peak, peaks.get(name, 0))
        samples += [[round(at + offset, 4), host, device] for at, host, device in phase.samples]
        for kind, spent in phase.ledger.items():
            ledger[kind] = ledger.get(kind, Entry()) + spent
        offset += phase.seconds
    return {
        "rank": rank,
        "seconds": offset,
        "stages": stages,
        "intervals": intervals,
        "ledger": {kind: dataclasses.asdict(entry) for kind, entry in ledger.items()},
        "memory": {
            "peak_device_bytes": _most(phase.peak_device_bytes for phase in phases),
            "stage_device_bytes": peaks or None,
            "peak_host_bytes": _most(phase.peak_host_bytes for phase in phases),
            "host_peak_of": phases[-1].host_peak_of,
            "samples": samples,
        },
    }


def _interval(interval: Interval, offset: float) -> dict[str, Any]:
    fields = {
        "stage": interval.stage,
        "start": round(interval.start + offset, 6),
        "seconds": round(interval.seconds, 6),
        "inside": interval.inside,
    }
    if interval.nested > 0:
        fields["nested"] = round(interval.nested, 6)
    if interval.step is not None:
        fields |= {
            "step": interval.step,
            "exchange": round(interval.exchange, 6),
            "velocity": round(interval.velocity, 6),
        }
    return fields


def _most(values: Iterator[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
