"""A report as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opensora_sp.base.wording import plural
from opensora_sp.benchmark.report import units


def headline(report: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    run, info = report["run"], report["performance_info"]
    mesh = run.get("mesh")
    how = "" if mesh is None else f" ({mesh['guidance']} guidance × {mesh['sequence']} sequence)"
    what = plural(info["num_frames"], "frame")
    return (
        f"{what} of {report['request']['first']['height']}x{report['request']['first']['width']}, "
        f"{_steps(report)}, {info['dtype']}, {run['ranks']} × {info['device']}{how}"
    )


def _steps(report: Mapping[str, Any]) -> str:
    steps = report["performance_info"]["denoising_steps"]
    computed = report["run"].get("computed_steps", steps)
    whole = plural(steps, "step")
    return whole if computed == steps else f"{computed} of {whole} computed"


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The table that a benchmark ends with."""
    yield headline(report)
    found = report["summary"]
    if found is None:
        error = report["error"] or {}
        yield f"{report['status']}: {error.get('message', 'no run has finished')}"
        return
    yield from columns(
        ("stage", "min", "median", "p90", "max", "imbalance"), list(_stage_rows(found))
    )
    yield ""
    yield from columns(("", ""), list(_figures(report)), head=False)


def _stage_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, stage in found["stages"].items():
        yield _row(name, stage["over_runs"], stage)
        if name == "denoise" and found["steps"] is not None:
            for part, piece in found["steps"].items():
                yield _row(f"  {part}", piece["over_runs"], piece)
    yield _row("whole run", found["seconds"], None)


def _row(
    name: str, spread: Mapping[str, float], stage: Mapping[str, Any] | None
) -> tuple[str, ...]:
    figures = (units.seconds(spread[key]) for key in ("min", "median", "p90", "max"))
    shared = stage is not None and len(stage["ranks"]) > 1
    return (name, *figures, f"{stage['imbalance']:.2f}" if shared and stage is not None else "")


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    info, found = report["performance_info"], report["summary"]
    yield "frames per second", f"{info['QPS']:.4g}"
    yield "model load", units.seconds(info["model_load_time"])
    peaks = found["memory"]
    yield "peak device memory", _most(peaks, "peak_device_bytes")
    for name, said in planned_rows(report):
        yield f"  in {name}", said
    yield "peak host memory", _most(peaks, "peak_host_bytes")
    for kind, spent in found["ledger"].items():
        calls, sent = max(spent["calls"]), max(spent["bytes_sent"])
        yield f"sent: {kind}", f"{units.size(sent)} a rank and run, {calls} calls"
    if (work := report["flops"]) is not None:
        achieved = work["achieved_per_second"]
        share = work["fraction_of_peak"]
        yield (
            "denoising",
            f"{units.flops(sum(work['denoise']))}, {units.flops(achieved['denoise'])}/s"
            + ("" if share is None else f", {units.percent(share['denoise'])} of peak"),
        )
    if (gain := report["efficiency"]) is not None:
        yield (
            "against one rank",
            f"{units.ratio(gain['speedup']['run'])} faster "
            f"({units.percent(gain['efficiency']['run'])} efficient), denoising "
            f"{units.ratio(gain['speedup']['denoise'])} "
            f"({units.percent(gain['efficiency']['denoise'])})",
        )


def planned_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Measured and planned peak of each stage that was measured."""
    for row in (report.get("plan") or {"stages": ()})["stages"]:
        if row["measured_bytes"] is not None:
            yield (
                row["stage"],
                f"{units.gibibytes(row['measured_bytes'])}, planned "
                f"{units.gibibytes(row['predicted_bytes'])} "
                f"({units.ratio(row['measured_over_predicted'])} of it)",
            )


def _most(peaks: Sequence[Mapping[str, Any]], name: str) -> str:
    known = [(row[name], row["rank"]) for row in peaks if row[name] is not None]
    if not known:
        return "– (this backend does not count it)"
    most, rank = max(known)
    return units.gibibytes(most) + (f" on rank {rank}" if len(peaks) > 1 else "")


def columns(
    heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, head: bool = True
) -> Iterator[str]:
    """Lines of aligned columns. With more than two, all but the first are right-aligned."""
    lines = [heads, *rows] if head else list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        first = f"{line[0]:<{widths[0]}}"
        if len(heads) == 2:
            yield f"{first}  {line[1]}".rstrip()
        else:
            cells = (f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))
            yield "  ".join([first, *cells]).rstrip()
