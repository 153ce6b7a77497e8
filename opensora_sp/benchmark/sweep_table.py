"""Tables of a sweep: a table for each mesh, with resolutions as rows and durations as columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base.wording import plural
from opensora_sp.benchmark.report import units
from opensora_sp.benchmark.report.files import Report

if TYPE_CHECKING:
    from opensora_sp.benchmark.sweep_spec import Point, Sweep


def write_tables(folder: Path, sweep: Sweep, reports: Mapping[str, Report]) -> str:
    """Write table.md and table.json from the reports so far. Returns the Markdown."""
    from opensora_sp.base.atomic import atomic_output, reported

    points = list(sweep.points())
    alone = {
        (point.resolution, point.duration): seconds_of(reports[point.name])
        for point in points
        if point.ranks == 1 and point.name in reports
    }
    text = "\n\n".join(_table(sweep, mesh, reports, alone) for mesh in sweep.meshes)
    text += (
        "\n\nSeconds of a whole run (text, denoising, decoding, writing; median) and the peak of "
        "device memory on the fullest rank, or of host memory where the device counts none. "
        "(N×): how many times faster than one rank.\n"
    )
    rows = [_row(point, reports.get(point.name), alone) for point in points]
    for name, content in (("table.md", text), ("table.json", json.dumps(rows, indent=1) + "\n")):
        path = folder / name
        with atomic_output(path) as temporary, reported(path):
            temporary.write_text(content, encoding="utf-8")
    return text


def _table(
    sweep: Sweep,
    mesh: tuple[int, int],
    reports: Mapping[str, Report],
    alone: Mapping[tuple[str, str], float | None],
) -> str:
    ranks = mesh[0] * mesh[1]
    title = f"{plural(ranks, 'rank')} ({mesh[0]} guidance × {mesh[1]} sequence)"
    lines = [[title, *sweep.durations], ["---"] * (1 + len(sweep.durations))]
    points = [p for p in sweep.points() if (p.guidance, p.sequence) == mesh]
    for resolution in sweep.resolutions:
        row = [p for p in points if p.resolution == resolution]
        lines.append([resolution, *(_cell(reports.get(p.name), p, alone) for p in row)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(
    report: Report | None, point: Point, alone: Mapping[tuple[str, str], float | None]
) -> str:
    if report is None:
        return "…"
    seconds = seconds_of(report)
    if seconds is None:
        message = " ".join(str(report["error"]["message"]).split()).replace("|", "\\|")
        return f"failed: {message[:60]}" + ("…" if len(message) > 60 else "")
    gain = _speedup(point, seconds, alone)
    faster = "" if gain is None else f" ({units.ratio(gain)})"
    return f"{units.seconds(seconds)}, {units.gibibytes(memory_of(report))}{faster}"


def _row(
    point: Point, report: Report | None, alone: Mapping[tuple[str, str], float | None]
) -> dict[str, Any]:
    seconds = None if report is None else seconds_of(report)
    return {
        "resolution": point.resolution,
        "duration": point.duration,
        "guidance": point.guidance,
        "sequence": point.sequence,
        "ranks": point.ranks,
        "status": "missing" if report is None else report["status"],
        "error": None if report is None else report.get("error"),
        "seconds": seconds,
        "peak_memory_bytes": None if report is None else memory_of(report),
        "speedup": None if seconds is None else _speedup(point, seconds, alone),
        "report": f"{point.name}.json",
    }


def _speedup(
    point: Point, seconds: float, alone: Mapping[tuple[str, str], float | None]
) -> float | None:
    one = alone.get((point.resolution, point.duration))
    return None if point.ranks == 1 or one is None else one / seconds


def seconds_of(report: Report) -> float | None:
    """Median seconds of a whole measured run; None where it failed."""
    if report["status"] != "ok":
        return None
    return float(report["summary"]["seconds"]["median"])


def memory_of(report: Report) -> int | None:
    """The highest peak (bytes) of a rank: of its device, or of the host if that is not counted."""
    if report["status"] != "ok":
        return None
    return next(_peaks(report), None)


def _peaks(report: Report) -> Iterator[int]:
    for key in ("peak_device_bytes", "peak_host_bytes"):
        known = [row[key] for row in report["summary"]["memory"] if row[key] is not None]
        if known:
            yield max(known)
