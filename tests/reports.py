"""Reports without a measurement: made-up records of ranks, through the code that builds them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from opensora_sp.benchmark.live_report import LiveReport
from opensora_sp.benchmark.options import BenchmarkOptions
from opensora_sp.benchmark.report.build import run_record
from opensora_sp.benchmark.report.files import SCHEMA_FILE
from opensora_sp.request.settings import build_job, parse_command_line, resolve

STEPS = 4


@cache
def validator() -> Any:
    """Of the schema beside the code."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def validate(report: Any) -> None:
    """Raises jsonschema.ValidationError for a report that its schema does not allow."""
    validator().validate(report)


def rank_record(
    rank: int, ranks: int, scale: float = 1.0, device: dict[str, int] | None = None
) -> dict[str, Any]:
    """A rank that denoises for 4 steps of `scale` seconds; rank 0 also encodes and decodes.

    device: bytes that its device held at the most, by stage.
    """
    step = scale * (1 + 0.1 * rank)
    spans = [("encode text", 0.5)] if rank == 0 else []
    spans.append(("denoise", STEPS * step))
    spans += [("decode", 2.0), ("convert", 0.25), ("write", 0.25)] if rank == 0 else []
    intervals: list[dict[str, Any]] = []
    at = 0.0
    for stage, seconds in spans:
        intervals.append({"stage": stage, "start": at, "seconds": seconds, "inside": None})
        if stage == "denoise":
            for i in range(STEPS):
                inner = {"stage": "step", "start": at + i * step, "seconds": step}
                waits = {"exchange": 0.1 * (ranks > 1), "velocity": 0.05 * (ranks > 1)}
                intervals.append({**inner, "inside": "denoise", "step": i, **waits})
        at += seconds
    whole = 3.1 + STEPS * scale * (1 + 0.1 * (ranks - 1))
    intervals.append({"stage": "wait", "start": at, "seconds": whole - at, "inside": None})
    stages = {i["stage"]: i["seconds"] for i in intervals if i["inside"] is None}
    ledger = {"velocity": {"calls": STEPS, "bytes_sent": 1000 + rank, "seconds": 0.2}}
    return {
        "rank": rank,
        "seconds": whole,
        "stages": stages,
        "intervals": intervals,
        "ledger": ledger if ranks > 1 else {},
        "memory": {
            "peak_device_bytes": device and max(device.values()),
            "stage_device_bytes": device,
            "peak_host_bytes": (3 + rank) * 2**30,
            "host_peak_of": "run",
            "samples": [[0.0, 2**30, None], [whole, 2 * 2**30, None]],
        },
    }


def draft_of(
    folder: Path, *flags: str, ranks: int = 2, scales: tuple[float, ...] = (1.0, 1.2)
) -> LiveReport:
    """A draft with one warm-up and a measured run per scale; its report goes to report.json."""
    argv = [] if "--prompt" in flags else ["--prompt", "a <b> & c"]
    argv += [] if "--num-frames" in flags else ["--image-size", "64", "96", "--num-frames", "17"]
    argv += [
        "--benchmark-save-path",
        str(folder / "report.json"),
        "--save-dir",
        str(folder),
        *flags,
    ]
    values = resolve(parse_command_line(argv), program="benchmark")
    job = build_job(values, world_size=ranks)
    draft = LiveReport(job, BenchmarkOptions.from_values(values), ranks=ranks)
    draft.check_seconds = 3.0
    guidance = job.engine.guidance_parallel or 1
    mesh = {"replicas": 1, "guidance": guidance, "sequence": ranks // guidance}
    draft.facts["run"] = {
        "ranks": ranks,
        "device": "cpu",
        "backend": "gloo",
        "dtype": "fp32",
        "mesh": mesh,
        "overlap": True,
        "serial_guidance": False,
        "chunks": 1,
        "batch_size": 1,
        "threads": "1",
        "latent_shape": [5, 8, 12],
        "patches": 24,
    }
    weights = [{"file": "dit/model.safetensors", "bytes": 10, "sha256": None}]
    draft.facts["model"] = {
        "checkpoints": "embedded",
        "transformer_parameters": 7,
        "weights": weights,
    }
    draft.work = {"denoise": [4e9] * ranks, "decode": 1e9, "text": None}
    kinds = ["warmup", *["measured"] * len(scales)]
    for number, (kind, scale) in enumerate(zip(kinds, (3.0, *scales), strict=True)):
        records = [rank_record(rank, ranks, scale) for rank in range(ranks)]
        run = run_record(kind, max(0, number - 1), records, frames=17, videos=1)
        draft.runs.append(run)
    return draft
