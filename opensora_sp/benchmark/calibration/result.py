"""What a calibration writes: schedules, and the curve as JSON, table and picture. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.benchmark.calibration.selection import LEVELS, Candidate, Curve
from opensora_sp.request.request import Request
from opensora_sp.request.step_choice import tokens_of
from opensora_sp.request.step_schedule import StepSchedule, read_schedules, write_schedules

# The guidance scales that a schedule is for, in calibrated ones. Less guidance costs less: at 0.43
# of it the embedded model is 4 to 8 dB better. At 1.43 of it no level holds any more.
LOWEST_SCALE, HIGHEST_SCALE = 0.4, 1.1
_CLASS = 4  # tokens of a size class: from a power of this to the next one


def size_class(tokens: int) -> tuple[int, int]:
    """The size class of so many tokens, from (inclusive) and to (exclusive): powers of four.

    A fixed grid, so that calibrations of several sizes never overlap in part.
    """
    low = 1
    while low * _CLASS <= tokens:
        low *= _CLASS
    return low, low * _CLASS


def schedule_of(
    name: str,
    one: Candidate,
    request: Request,
    model: str | None,
    measured: Sequence[float] = (),
) -> StepSchedule:
    """The schedule of a candidate for a request's size class and guidance."""
    scale = request.cfg_scale
    guided = (round(scale * LOWEST_SCALE, 2), round(scale * HIGHEST_SCALE, 2))
    return StepSchedule(
        name=name,
        steps=request.steps,
        computed=one.computed,
        fill=one.fill,
        tokens=size_class(tokens_of(request)),
        cfg_scale=(1.0, 1.0) if scale == 1 else guided,
        model=model,
        psnr=round(fmean(measured), 1) if measured else None,
        prompts=len(measured) or None,
        images=request.is_image,
    )


def _is_for(one: StepSchedule) -> tuple[Any, ...]:
    return (one.steps, one.images, one.tokens, one.cfg_scale, one.model)


def write_merged(path: Path, made: Sequence[StepSchedule], request_of: StepSchedule) -> None:
    """Write schedules into a file; what it has for other sizes, steps and models stays.

    request_of: any schedule of the calibrated size: what the file has for the same is replaced,
    also where nothing was made. Raises UserError.
    """
    known = read_schedules(path) if access.exists(path) else ()
    kept = [one for one in known if _is_for(one) != _is_for(request_of)]
    every = sorted([*kept, *made], key=lambda one: (one.images, one.tokens, one.steps))
    if every:
        write_schedules(path, every)
    else:
        path.unlink(missing_ok=True)


def rows_of(curve: Curve, steps: int) -> list[dict[str, Any]]:
    """A row for every number of computed steps, and for every other candidate that was measured."""
    rows = []
    for count in sorted(curve.candidates, reverse=True):
        for place, one in enumerate(curve.candidates[count]):
            measured = curve.measured.get(one)
            if place and measured is None:
                continue
            rows.append(
                {
                    "computed": count,
                    "ratio": round(steps / count, 3),
                    "fill": one.fill,
                    "steps": list(one.computed),
                    "estimate": _rounded(curve.estimate(one)),
                    "mean": None if measured is None else round(fmean(measured), 2),
                    "worst": None if measured is None else round(min(measured), 2),
                }
            )
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def table(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, StepSchedule]) -> str:
    """The curve as Markdown; rows that are only estimated hold one figure."""
    lines = [
        "| computed | fewer | fill | PSNR, mean | worst | schedule |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        mean, worst = row["mean"], row["worst"]
        said = f"about {row['estimate']:.0f} dB" if mean is None else f"{mean:.1f} dB"
        key = (row["fill"], tuple(row["steps"]))
        names = ", ".join(n for n, one in chosen.items() if (one.fill, one.computed) == key)
        lines.append(
            f"| {row['computed']} | {row['ratio']:.2f}× | {row['fill']} | {said} | "
            f"{'' if worst is None else f'{worst:.1f}'} | {names} |"
        )
    return "\n".join(lines)


def write_curve(path: Path, content: Mapping[str, Any]) -> None:
    """Write the curve as JSON."""
    with atomic_output(path) as temporary, reported(path):
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_picture(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the curve as SVG: the estimate as a line, measured means and worst prompts as points."""
    with atomic_output(path) as temporary, reported(path):
        temporary.write_text(picture(rows, title), encoding="utf-8")


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The SVG of `write_picture`."""
    width, height, left, top, bottom, right = 720, 400, 60, 40, 50, 20
    most = max(row["computed"] for row in rows)
    values = [row[key] for row in rows for key in ("estimate", "mean", "worst") if row[key]]
    levels = [level.mean for level in LEVELS.values()]
    high = min(100.0, max([*values, *levels])) + 2
    low = max(0.0, min([*values, *levels]) - 2)

    def x(count: float) -> str:
        return f"{left + (width - left - right) * count / most:.1f}"

    def y(value: float) -> str:
        inside = min(high, max(low, value))
        return f"{top + (height - top - bottom) * (high - inside) / (high - low):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="{width // 2}" y="{height - 10}">steps computed</text>',
        f'<text x="8" y="{top - 6}">PSNR, dB</text>',
    ]
    for value in range(int(low // 10 + 1) * 10, int(high) + 1, 10):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(value)}" y2="{y(value)}" '
            f'stroke="#dddddd"/><text x="{left - 26}" y="{y(value)}" dy="4">{value}</text>'
        )
    for count in range(0, most + 1, max(1, most // 10)):
        parts.append(f'<text x="{x(count)}" y="{height - bottom + 18}" dx="-6">{count}</text>')
    for name, level in LEVELS.items():
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(level.mean)}" y2="{y(level.mean)}" '
            f'stroke="#999999" stroke-dasharray="4 4"/><text x="{left + 6}" y="{y(level.mean)}" '
            f'dy="-4" fill="#666666">{name}: {level.mean:g} dB</text>'
        )
    best = {row["computed"]: row for row in reversed(rows)}
    line = " ".join(
        f"{x(count)},{y(row['estimate'])}"
        for count, row in sorted(best.items())
        if row["estimate"] is not None
    )
    parts.append(f'<polyline points="{line}" fill="none" stroke="#4477aa"/>')
    for row in rows:
        if row["mean"] is not None:
            at = x(row["computed"])
            parts.append(f'<circle cx="{at}" cy="{y(row["mean"])}" r="4" fill="#4477aa"/>')
            parts.append(f'<circle cx="{at}" cy="{y(row["worst"])}" r="3" fill="#cc3311"/>')
    keys = (("#4477aa", "measured, mean"), ("#cc3311", "measured, worst prompt"))
    for place, (colour, said) in enumerate(keys):
        across, down = width - 190, height - bottom - 40 + 18 * place
        parts.append(f'<circle cx="{across}" cy="{down}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{across + 10}" y="{down + 4}">{said}</text>')
    return "\n".join([*parts, "</svg>", ""])
