"""The report of a benchmark while it runs. It is on disk from the start, and kept up to date."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from opensora_sp import __version__
from opensora_sp.base.errors import UserError
from opensora_sp.benchmark.options import BenchmarkOptions, measurement_digest
from opensora_sp.benchmark.report import build
from opensora_sp.benchmark.report.files import (
    SCHEMA_NAME,
    SCHEMA_VERSION,
    Report,
    read_finished,
    write_report,
)
from opensora_sp.planner.plan import Plan
from opensora_sp.request.computed_steps import heaviest_batch, most_computed
from opensora_sp.request.request import Job
from opensora_sp.request.step_choice import describe
from opensora_sp.request.step_schedule import StepSchedule

_log = logging.getLogger(__name__)

SCHEDULER = "rflow"


class LiveReport:
    """The report so far, on the leading rank. `write` puts its current state on disk."""

    def __init__(self, job: Job, options: BenchmarkOptions, *, ranks: int) -> None:
        self._job, self._options = job, options
        self.started = datetime.now(timezone.utc)
        self.runs: list[dict[str, Any]] = []
        self.check_seconds: float | None = None
        self.facts: dict[str, Any] = {"run": {"ranks": ranks}, "model": None, "machine": {}}
        self.plan: Plan | None = None
        self.work: Mapping[str, Any] | None = None
        self.peak: Mapping[str, Any] | None = None
        self.profile: list[str] | None = None
        self.doing = "loading"
        self.digest = measurement_digest(job, options, ranks)

    def settled(self, job: Job) -> None:
        """The job with its step schedules in place of their names and files."""
        self._job = job

    def write(self, status: str, error: Mapping[str, Any] | None = None) -> Report:
        """Write the report with the status running, ok or failed, and return it."""
        report = self._report(status, error)
        write_report(self._options.benchmark_save_path, report)
        return report

    def fail(self, error: BaseException, stage: str | None) -> None:
        """Write the report as failed. An error of writing is only a note."""
        self._fail(type(error).__name__, str(error), stage)

    def fail_for_all(self, said: str) -> None:
        """As `fail`, when the run ends because of a fault on another rank."""
        self._fail("JobEnded", said.removeprefix("error: "), None)

    def _fail(self, kind: str, message: str, stage: str | None) -> None:
        found = {
            "type": kind,
            "message": " ".join(message.split()) or kind,
            "doing": self.doing,
            "stage": stage,
        }
        try:
            self.write("failed", found)
        except UserError as trouble:
            _log.warning("the report of this failure: %s", trouble)

    def _report(self, status: str, error: Mapping[str, Any] | None) -> Report:
        machine = self.facts["machine"]
        parts = ("device", "driver_packages", "python_packages", "os", "cpu", "disk", "host")
        baseline = self._options.baseline
        return {
            "schema": {"name": SCHEMA_NAME, "version": SCHEMA_VERSION},
            "status": status,
            "error": None if error is None else dict(error),
            "created": self.started.isoformat(timespec="seconds"),
            "program": {"name": "opensora_sp", "version": __version__},
            "performance_info": build.performance_info(
                self.runs, load_seconds=self._load_seconds(), facts=self._vendor_facts()
            ),
            **{part: machine.get(part) for part in parts},
            "digest": self.digest,
            "request": self._request(),
            "run": self.facts["run"],
            "model": self.facts["model"],
            "summary": build.summary(self.runs),
            "plan": None if self.plan is None else build.planned_memory(self.plan, self.runs),
            "first_and_warm": build.first_and_warm(self.runs),
            "flops": build.flops_section(self.runs, self.work, self.peak),
            "efficiency": build.efficiency(
                self.runs,
                None if baseline is None else read_finished(baseline, "--baseline"),
                None if baseline is None else str(baseline),
            ),
            "profile": self.profile,
            "runs": self.runs,
        }

    def _load_seconds(self) -> float | None:
        """Seconds of checking the files and of all loading since, on the leading rank."""
        if self.check_seconds is None:
            return None
        return self.check_seconds + sum(run["load_seconds"] for run in self.runs)

    def _vendor_facts(self) -> dict[str, Any]:
        """The keys of `performance_info` that are settings, in the vendor's order."""
        settings, options, first = self._job.settings, self._options, self._job.tasks[0].request
        return {
            "resolution": options.resolution or f"{first.height}x{first.width}",
            "aspect_ratio": options.aspect_ratio or f"{first.height}:{first.width}",
            "batch_size": settings.batch_size,
            "dtype": self._job.engine.dtype,
            "scheduler": SCHEDULER,
            "fps": first.model_fps,
            "num_frames": first.num_frames,
            "num_sample": settings.num_sample,
            "denoising_steps": first.steps,
            "seed": first.seed,
            "device": self.facts["run"].get("device") or self._job.engine.device or "auto",
            "output_path": str(settings.save_dir),
            "warmup_count": options.warmup_count,
            "eval_count": options.eval_count,
        }

    def _request(self) -> dict[str, Any]:
        tasks = self._job.tasks
        return {
            "digests": [task.request.digest() for task in tasks],
            "first": tasks[0].request.public_dict(),
            "videos": len(tasks),
        }


def run_facts(pipeline: Any, job: Job) -> dict[str, Any]:
    """The report's section "run": device, backend, mesh, runtime, shapes."""
    from opensora_sp.base.cpu_threads import VARIABLE

    session, settings, request = pipeline.session, job.settings, job.tasks[0].request
    mesh = pipeline.models.mesh(request)
    schedule = request.step_cache if isinstance(request.step_cache, StepSchedule) else None
    batches = [[task.request for task in tasks] for tasks in job.batches()]
    return {
        "ranks": session.world_size,
        "device": session.device.type,
        "backend": session.backend.name if session.world_size > 1 else None,
        "dtype": job.engine.dtype,
        "mesh": {
            "replicas": mesh.replicas,
            "guidance": mesh.guidance,
            "sequence": mesh.sequence,
        },
        "overlap": pipeline.models.runtime.overlap,
        "serial_guidance": pipeline.models.runtime.serial_guidance,
        "chunks": pipeline.models.runtime.chunks,
        "batch_size": settings.batch_size,
        "threads": os.environ.get(VARIABLE),
        "latent_shape": list(request.latent_shape),
        "patches": request.patch_grid[0] * request.patch_grid[1],
        "step_cache": None if schedule is None else describe(schedule),
        "computed_steps": most_computed(heaviest_batch(batches, schedule), schedule),
    }


def frames_of(sinks: Sequence[Any]) -> int:
    """The number of frames that counting sinks got."""
    return sum(sink.frames for sink in sinks)
