"""Metrics of the server in Prometheus's text form, at GET /metrics.

Labels are bounded: a route's template, a code of ours, a stage, a collective, a rank. No label
holds what a client chose: no job, no prompt, no owner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensora_sp.server.board import Board, Entry
from opensora_sp.server.engine_process import Health

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Stages of the engine's clock, and codes of failed jobs; others are "other".
STAGES = (
    "load", "draw noise", "read references", "encode references", "encode text", "hand out",
    "wait", "agree", "compile", "denoise", "decode", "write",
)  # fmt: skip
CODES = ("invalid_request", "engine_error", "engine_ended")
STATES = ("ready", "starting", "stopped", "failed")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
_STEP_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_FPS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_HTTP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
access_log = logging.getLogger("opensora_sp.server.access")


class Metrics:
    """Everything that is counted. completed: jobs completed since the server was started."""

    def __init__(self, board: Board, health: Callable[[], Health]) -> None:
        self.completed = 0
        self.registry = CollectorRegistry()
        self.registry.register(_Now(board, health))  # type: ignore[arg-type]
        ProcessCollector(registry=self.registry)

        def made(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            return kind(f"opensora_sp_{name}", text, labels, registry=self.registry, **more)

        self._ended = made(
            Counter, "jobs_ended", "Jobs by how they ended; code: why a job failed.",
            ("outcome", "code"),
        )  # fmt: skip
        self._stages = made(
            Histogram, "stage_seconds", "Seconds of each stage of a completed job, on rank 0.",
            ("stage",), buckets=_SECONDS,
        )  # fmt: skip
        self._step = made(
            Histogram, "step_seconds", "Mean seconds of a denoising step of a completed job.",
            buckets=_STEP_SECONDS,
        )  # fmt: skip
        self._steps = made(Counter, "steps", "Denoising steps of completed jobs.")
        self._fps = made(
            Histogram, "frames_per_second",
            "Frames of a completed job by its seconds; jobs that went on from a saved step are "
            "left out.",
            buckets=_FPS,
        )  # fmt: skip
        self._frames = made(Counter, "frames", "Frames of completed jobs.")
        self._peaks = made(
            Gauge, "rank_peak_bytes",
            "Peak memory of a rank in the last completed job: of its device, or of its process "
            "where the device counts none.",
            ("rank",),
        )  # fmt: skip
        self._sent = made(
            Counter, "collective_bytes", "Bytes sent over all ranks in completed jobs.",
            ("collective",),
        )  # fmt: skip
        self._requests = made(
            Counter, "http_requests", "Requests by route and status.",
            ("route", "method", "status"),
        )  # fmt: skip
        self._request_seconds = made(
            Histogram, "http_request_seconds", "Seconds until a request's answer begins.",
            ("route", "method"), buckets=_HTTP_SECONDS,
        )  # fmt: skip

        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def job_ended(self, entry: Entry) -> None:
        """A job has completed or failed."""
        result = entry.result
        if result is None:
            return
        if entry.status != "completed":
            code = result.error_code if result.error_code in CODES else "other"
            self._ended.labels("failed", code).inc()
            return
        self.completed += 1
        self._ended.labels("completed", "").inc()
        for stage, seconds in result.stages.items():
            self._stages.labels(stage if stage in STAGES else "other").observe(seconds)
        if result.steps_made:
            self._step.observe(result.stages.get("denoise", 0.0) / result.steps_made)
            self._steps.inc(result.steps_made)
        frames = int(entry.spec.shown.get("num_frames") or 0)
        self._frames.inc(frames)
        if result.seconds > 0 and result.steps_made == result.steps:
            self._fps.observe(frames / result.seconds)
        for rank, peak in enumerate(result.peaks):
            if peak is not None:
                self._peaks.labels(str(rank)).set(peak)
        for collective, sent in result.bytes_sent.items():
            self._sent.labels(collective).inc(sent)

    def job_cancelled(self) -> None:
        """A job was deleted before it ended."""
        self._ended.labels("cancelled", "").inc()

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered. route: its template."""
        known = self._answered.get((route, method, status))
        if known is None:  # looking labels up takes longer than counting
            known = (
                self._requests.labels(route, method, str(status)),
                self._request_seconds.labels(route, method),
            )
            self._answered[route, method, status] = known
        known[0].inc()
        known[1].observe(seconds)


class _Now:
    """What is looked up when the metrics are read."""

    def __init__(self, board: Board, health: Callable[[], Health]) -> None:
        self._board, self._health = board, health

    def collect(self) -> Iterator[Metric]:
        """Gauges of the queue and of the engine."""
        entries, now = self._board.all(), time.time()
        queued = [now - entry.spec.created_at for entry in entries if entry.status == "queued"]
        live = [entry for entry in entries if entry.status in ("queued", "in_progress")]
        running = sum(entry.status == "in_progress" for entry in live)
        yield _gauge("queue_length", "Jobs that wait.", len(queued))
        yield _gauge(
            "queue_seconds",
            "Seconds of one engine that the jobs that wait or are made still need, as estimated.",
            self._board.estimator.outstanding(live),
        )  # fmt: skip
        yield _gauge("jobs_in_progress", "Jobs that are made.", running)
        yield _gauge(
            "oldest_queued_seconds", "How long the oldest of the jobs that wait has waited.",
            max(queued, default=0.0),
        )  # fmt: skip
        if counts := self._board.group_counts():
            groups = GaugeMetricFamily(
                "opensora_sp_groups", "Groups of the shared queue by state.", labels=["state"]
            )
            for name, count in counts.items():
                groups.add_metric([name], float(count))
            yield groups
        health = self._health()
        yield CounterMetricFamily(
            "opensora_sp_engine_restarts",
            "How often the engine was started again.",
            value=health.restarts,
        )
        state = GaugeMetricFamily(
            "opensora_sp_engine_state", "1 for the state that the engine is in.", labels=["state"]
        )
        for name in STATES:
            state.add_metric([name], float(name == health.state))
        yield state


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"opensora_sp_{name}", text, value=value)


class Counted:
    """ASGI: counts every request and, at debug, logs it. Stands outside of all that may refuse."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, method = time.perf_counter(), scope["method"]
        method = method if method in METHODS else "other"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                seconds, status = time.perf_counter() - started, int(message["status"])
                route = route_of(scope)
                self._metrics.answered(route, method, status, seconds)
                access_log.debug("%s %s %d in %.4f s", method, route, status, seconds)
            await send(message)

        await self._app(scope, receive, answer)


def route_of(scope: Scope) -> str:
    """The template of the route that took a request; "none" where none did."""
    if (path := getattr(scope.get("route"), "path", None)) is not None:
        return str(path)
    return "/static" if scope["path"].startswith("/static/") else "none"
