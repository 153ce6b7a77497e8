"""How long a job takes, from the jobs that this server has made.

A stage's seconds are a + b · FLOPs: a is what a step or a decode costs however small it is, b the
pace of the busiest rank. Both are fitted to the median of each shape that was made, so that the
relative errors are small, with a, b ≥ 0; one shape alone gives b.

    seconds = steps · denoise(FLOPs of a step) + decode(FLOPs) + the median of everything else

Writing the file counts with decoding. A shape that was made already takes the median of its last
jobs. Before the first job has ended nothing is known. What the first job loads is not counted, nor
what the first of a shape compiles. Each job of a batch counts with its share of the batch's time,
so that the times of a queue add up.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec

_KEPT, _OF_A_SHAPE = 256, 5
_UNKNOWN_SECONDS = 60.0


class Job(Protocol):
    """What is looked at of a job on the board."""

    @property
    def spec(self) -> JobSpec:
        """What was asked for."""
        ...

    @property
    def status(self) -> str:
        """queued, in_progress, completed or failed."""
        ...

    @property
    def progress(self) -> JobProgress | None:
        """How far it is."""
        ...


@dataclass(frozen=True)
class Line:
    """Seconds = a + b · FLOPs."""

    a: float
    b: float

    def at(self, flops: float) -> float:
        """The seconds of so many FLOPs."""
        return self.a + self.b * flops


def fit(points: Iterable[tuple[float, float]]) -> Line:
    """The line through (FLOPs, seconds) with the least squared relative errors; a, b ≥ 0.

    At least one point, all positive.
    """
    pairs = list(points)
    # Divided by the seconds, each point asks for 1 = a·u + b·v.
    u = [1 / seconds for _, seconds in pairs]
    v = [flops / seconds for flops, seconds in pairs]
    uu, vv = math.fsum(x * x for x in u), math.fsum(x * x for x in v)
    uv = math.fsum(x * y for x, y in zip(u, v, strict=True))
    sum_u, sum_v = math.fsum(u), math.fsum(v)
    level, pace = Line(sum_u / uu, 0.0), Line(0.0, sum_v / vv)
    determinant = uu * vv - uv * uv
    if determinant <= 1e-9 * uu * vv:  # one shape
        return pace
    both = Line((sum_u * vv - sum_v * uv) / determinant, (sum_v * uu - sum_u * uv) / determinant)
    if both.a < 0:
        return pace
    return level if both.b < 0 else both


@dataclass
class _Shape:
    """Seconds of the last jobs of one shape, and its FLOPs."""

    steps: int
    denoise_flops: float
    decode_flops: float
    denoise: deque[float] = field(default_factory=lambda: deque(maxlen=_OF_A_SHAPE))
    decode: deque[float] = field(default_factory=lambda: deque(maxlen=_OF_A_SHAPE))
    total: deque[float] = field(default_factory=lambda: deque(maxlen=_OF_A_SHAPE))


class Estimator:
    """What was measured of the engine of one digest of settings, and what follows from it.

    Several threads may use it.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._shapes: dict[str, _Shape] = {}
        self._rest: deque[float] = deque(maxlen=_KEPT)
        self._loads: deque[float] = deque(maxlen=_KEPT)
        self._lines: tuple[Line, Line] | None = None
        self._lock = threading.RLock()

    def learn(self, spec: JobSpec, result: JobResult) -> None:
        """Take in a job that has ended; one that failed or went on from a state says nothing."""
        cost, stages = spec.shown.get("cost"), result.stages
        if not isinstance(cost, Mapping) or cost.get("engine") != self._engine:
            return
        denoise = stages.get("denoise", 0.0)
        decode = stages.get("decode", 0.0) + stages.get("write", 0.0)
        if (
            result.error is not None
            or result.steps_made != cost["steps"]
            or denoise <= 0
            or decode <= 0
        ):
            return
        # No later job of the shape compiles.
        seconds = result.seconds - stages.get("compile", 0.0)
        load, share = stages.get("load", 0.0), max(1, result.together)
        name = str(cost["shape"])
        with self._lock:
            shape = self._shapes.pop(name, None) or _Shape(
                cost["steps"], float(cost["denoise"]), float(cost["decode"])
            )
            self._shapes[name] = shape  # the latest is last
            if len(self._shapes) > _KEPT:
                del self._shapes[next(iter(self._shapes))]
            shape.denoise.append(denoise / share)
            shape.decode.append(decode / share)
            shape.total.append((seconds - load) / share)
            self._rest.append((seconds - load - denoise - decode) / share)
            self._loads.append(load / share)
            self._lines = None

    def seconds(self, cost: Mapping[str, Any] | None) -> float | None:
        """Seconds of a job of this cost; None where nothing was measured yet."""
        with self._lock:
            if cost is None or not self._measured(cost):
                return None
            known = self._shapes.get(str(cost["shape"]))
            if known is not None:
                return statistics.median(known.total) + self._load()
            denoise, decode = self._fitted()
            steps = int(cost["steps"])
            rest = max(0.0, statistics.median(self._rest)) + self._load()
            denoised = steps * denoise.at(float(cost["denoise"]) / steps)
            return denoised + decode.at(float(cost["decode"])) + rest

    def decode_seconds(self, cost: Mapping[str, Any] | None) -> float | None:
        """Of that, the seconds from the last step on."""
        with self._lock:
            if cost is None or not self._measured(cost):
                return None
            known = self._shapes.get(str(cost["shape"]))
            if known is not None:
                return statistics.median(known.decode)
            return self._fitted()[1].at(float(cost["decode"]))

    def left(self, job: Job) -> float | None:
        """Seconds until a job has ended, once nothing is before it; of a batch, until it has."""
        cost, progress = job.spec.shown.get("cost"), job.progress
        whole = self.seconds(cost)
        if progress is None:
            return whole
        together = max(1, progress.together)
        if progress.eta_s is not None and progress.stage != "decoding":
            return progress.eta_s + together * (self.decode_seconds(cost) or 0.0)
        passed = time.time() - progress.started_at
        return None if whole is None else max(0.0, together * whole - passed)

    def etas(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Seconds until each of the jobs has ended, by id, as far as they are known.

        jobs: in the order in which they are made.
        """
        found, until = {}, 0.0
        for job in jobs:
            left = self.left(job)
            if left is None:
                break
            # Those that are made now are made together: the batch is waited for once.
            until = until + left if job.progress is None else max(until, left)
            found[job.spec.id] = until
        return found

    def outstanding(self, jobs: Iterable[Job]) -> float:
        """Seconds of one engine that these jobs, waiting or being made, still need together.

        A job of which nothing is known counts as the mean of the others, and as a minute where
        nothing is known of any: a queue with jobs in it is never without work.
        """
        found = [
            # A batch is made once: each of its jobs has its share of what is left.
            None if left is None else left / max(1, job.progress.together if job.progress else 1)
            for job in jobs
            for left in (self.left(job),)
        ]
        known = [left for left in found if left is not None]
        usual = statistics.fmean(known) if known else _UNKNOWN_SECONDS
        return math.fsum(usual if left is None else left for left in found)

    def _measured(self, cost: Mapping[str, Any]) -> bool:
        """Whether anything is known of the engine that a job is for."""
        return cost.get("engine") == self._engine and bool(self._shapes)

    def _load(self) -> float:
        """What each job loads: not what the first one of an engine does."""
        later = list(self._loads)[1:]
        return statistics.median(later) if later else 0.0

    def _fitted(self) -> tuple[Line, Line]:
        if self._lines is None:
            shapes = self._shapes.values()
            self._lines = (
                fit(
                    (s.denoise_flops / s.steps, statistics.median(s.denoise) / s.steps)
                    for s in shapes
                ),
                fit((s.decode_flops, statistics.median(s.decode)) for s in shapes),
            )
        return self._lines
