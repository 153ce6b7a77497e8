"""The benchmark's own flags: how to measure, as opposed to what is generated.

Imports no torch, so that a mistake is refused before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.benchmark.report.files import check_baseline
from opensora_sp.request.flags.benchmark_settings import BenchmarkSettings
from opensora_sp.request.preflight import check_output, check_save_dir
from opensora_sp.request.request import Job
from opensora_sp.request.setting import from_flags


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(BenchmarkSettings):
    """The benchmark's settings, and what the report says of the size that was asked for.

    resolution, aspect_ratio: as they were asked for, None beside an image size.
    """

    resolution: str | None = None
    aspect_ratio: str | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> BenchmarkOptions:
        """From resolved flags, with the files and folders they name looked at.

        Raises UserError.
        """
        if values["measure_peak"] and values["peak_tflops"] is not None:
            raise UserError("--measure-peak and --peak-tflops both give the peak: choose one")
        given = from_flags(cls, values)
        for name in ("benchmark_save_path", "baseline", "profile"):
            given[name] = None if given[name] is None else Path(given[name])
        named = ("resolution", "aspect_ratio")
        given |= {name: None if values["image_size"] else values[name] for name in named}
        options = cls(**given)
        report = options.benchmark_save_path
        if report.suffix != ".json":
            raise UserError(f"--benchmark-save-path {report}: a name that ends in .json is needed")
        check_save_dir(os.path.dirname(report) or ".", "--benchmark-save-path")
        check_output(report)
        check_output(options.page)
        if options.profile is not None:
            check_save_dir(str(options.profile), "--profile")
        if options.baseline is not None:
            check_baseline(options.baseline)
        return options

    @property
    def page(self) -> Path:
        """The HTML page beside the report."""
        return self.benchmark_save_path.with_suffix(".html")


def check_baseline_request(job: Job, options: BenchmarkOptions) -> None:
    """UserError where the baseline's report is of another request or dtype than the job's."""
    if options.baseline is None:
        return
    report = check_baseline(options.baseline)
    mine, theirs = job.tasks[0].request.public_dict(), report["request"]["first"]
    different = [name for name, value in mine.items() if theirs.get(name) != value]
    if report["performance_info"]["dtype"] != job.engine.dtype:
        different.append("dtype")
    if report["request"]["videos"] != len(job.tasks):
        different.append("number of videos")
    if different:
        raise UserError(
            f"--baseline {shown(str(options.baseline))} is of another request (it differs in "
            f"{', '.join(different)}): measure one rank with the same flags first"
        )


def measurement_digest(job: Job, options: BenchmarkOptions, world_size: int) -> str:
    """SHA-256 (hex) of what decides a measurement: requests, settings, counts, ranks.

    Two reports with one digest measured the same thing; where the results went does not count.
    """
    settings = dataclasses.asdict(job.engine) | dataclasses.asdict(job.settings)
    for name in ("save_dir", "sample_name", "verbose", "sheet", "log_dir"):
        settings.pop(name, None)
    facts = {
        "requests": [task.request.digest() for task in job.tasks],
        "settings": settings,
        "counts": [options.warmup_count, options.eval_count],
        "ranks": world_size,
    }
    canonical = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()
