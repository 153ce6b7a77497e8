"""The charts of a report's page, as HTML that scales with the page, without scripts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from opensora_sp.benchmark.report import units

Run = Mapping[str, Any]

# Names of colours in page.css. Stages that are not listed share one colour.
STAGE_COLOURS = {
    "load": "c5",
    "encode text": "c3",
    "read references": "c5",
    "encode references": "c5",
    "hand out": "c7",
    "agree": "ink",
    "compile": "c6",
    "denoise": "c1",
    "decode": "c2",
    "convert": "c6",
    "write": "c4",
    "wait": "wait",
}
STEP_COLOURS = {"compute": "c1", "exchange": "c2", "velocity": "c4"}
_RANK_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")


def text(value: object) -> str:
    """A value as HTML text. Lone surrogates, which UTF-8 cannot encode, are replaced."""
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A legend from (name, colour) pairs."""
    items = "".join(
        f'<li><i style="background:var(--{colour})"></i>{text(name)}</li>'
        for name, colour in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}%" if whole > 0 else "0%"


def colour_of(stage: str) -> str:
    """The colour of a stage."""
    return STAGE_COLOURS.get(stage, "c8")


def timeline(run: Run) -> str:
    """A lane for each rank, with its stages and its denoising steps."""
    whole = max(rank["seconds"] for rank in run["ranks"])
    lanes = []
    for rank in run["ranks"]:
        marks = "".join(_mark(interval, whole) for interval in rank["intervals"])
        label = f"rank {rank['rank']}: " + ", ".join(
            f"{name} {units.seconds(value)}" for name, value in rank["stages"].items()
        )
        lanes.append(
            f"<span>rank {rank['rank']}</span>"
            f'<div class="lane stages" role="img" aria-label="{text(label)}">{marks}</div>'
        )
    axis = "".join(f"<span>{units.seconds(whole * q / 4) if q else '0'}</span>" for q in range(5))
    present = dict.fromkeys(
        i["stage"] for r in run["ranks"] for i in r["intervals"] if not i["inside"]
    )
    return (
        f'<div class="lanes">{"".join(lanes)}<span></span><div class="axis">{axis}</div></div>'
        + legend((name, colour_of(name)) for name in present)
    )


def _mark(interval: Mapping[str, Any], whole: float) -> str:
    stage, step = interval["stage"], interval.get("step")
    if interval["inside"] is not None and step is None:
        return ""
    said = f"{stage} {step}" if step is not None else stage
    return (
        f'<i{"" if step is None else " class=step"} title="{text(said)}: '
        f'{units.seconds(interval["seconds"])}" style="left:{_percent(interval["start"], whole)};'
        f"width:{_percent(interval['seconds'], whole)};"
        f'background:var(--{colour_of("denoise" if step is not None else stage)})"></i>'
    )


def stage_bars(summary: Mapping[str, Any]) -> str:
    """A bar for each stage: the median over the runs, and a line from minimum to maximum."""
    spreads = {name: stage["over_runs"] for name, stage in summary["stages"].items()}
    most = max(spread["max"] for spread in spreads.values())
    rows = []
    for name, spread in spreads.items():
        line = ""
        if spread["max"] > spread["min"]:
            line = (
                f'<u style="left:{_percent(spread["min"], most)};'
                f'width:{_percent(spread["max"] - spread["min"], most)}"></u>'
            )
        rows.append(
            f'<span>{text(name)}</span><div class="bar"><i style="'
            f'width:{_percent(spread["median"], most)};background:var(--{colour_of(name)})"></i>'
            f"{line}</div><b>{units.seconds(spread['median'])}</b>"
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def step_columns(runs: Sequence[Run]) -> str:
    """A column for each step: compute, exchange and velocity of the slowest rank, as medians."""
    steps = _slowest_steps(runs)
    most = max(sum(parts.values()) for parts in steps)
    columns = []
    for number, parts in enumerate(steps):
        said = ", ".join(f"{name} {units.seconds(value)}" for name, value in parts.items())
        pieces = "".join(
            f'<i style="height:{_percent(value, most)};background:var(--{STEP_COLOURS[name]})"></i>'
            for name, value in parts.items()
        )
        columns.append(f'<span title="step {number}: {said}">{pieces}</span>')
    last = len(steps) - 1
    label = f"seconds of {len(steps)} denoising steps, at most {units.seconds(most)}"
    return (
        f'<div class="axis"><span>{units.seconds(most)}</span></div>'
        f'<div class="plot columns" role="img" aria-label="{label}">{"".join(columns)}</div>'
        f'<div class="axis"><span>step 0</span><span>step {last}</span></div>'
        + legend((name, STEP_COLOURS[name]) for name in steps[0] if _any(steps, name))
    )


def _any(steps: Sequence[Mapping[str, float]], name: str) -> bool:
    return name == "compute" or any(parts[name] > 0 for parts in steps)


def _slowest_steps(runs: Sequence[Run]) -> list[dict[str, float]]:
    """The parts of each step on the rank where it took longest; medians over the runs."""
    per_run = []
    for run in runs:
        ranks = [[i for i in rank["intervals"] if "step" in i] for rank in run["ranks"]]
        per_run.append(
            [max(same, key=lambda i: i["seconds"]) for same in zip(*ranks, strict=False)]
        )
    return [
        {
            "compute": statistics.median(
                max(0.0, i["seconds"] - i["exchange"] - i["velocity"]) for i in same
            ),
            "exchange": statistics.median(i["exchange"] for i in same),
            "velocity": statistics.median(i["velocity"] for i in same),
        }
        for same in zip(*per_run, strict=False)
    ]


def memory_lines(run: Run, column: int) -> str:
    """Memory of every rank during a run. column: 1 for the host, 2 for the device."""
    whole = max(rank["seconds"] for rank in run["ranks"])
    lines = {
        rank["rank"]: [
            (s[0], s[column]) for s in rank["memory"]["samples"] if s[column] is not None
        ]
        for rank in run["ranks"]
    }
    lines = {rank: points for rank, points in lines.items() if points}
    if not lines:
        return '<p class="dim">Not counted here.</p>'
    most = max(value for points in lines.values() for _, value in points)
    drawn = "".join(
        f'<polyline stroke="var(--{_RANK_COLOURS[rank % len(_RANK_COLOURS)]})" points="'
        + " ".join(f"{1000 * at / whole:.1f},{100 - 96 * value / most:.2f}" for at, value in points)
        + '"/>'
        for rank, points in lines.items()
    )
    label = f"memory of {len(lines)} ranks, at most {units.gibibytes(most)}"
    return (
        f'<div class="axis"><span>{units.gibibytes(most)}</span></div>'
        f'<div class="plot" role="img" aria-label="{label}">'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none">{drawn}</svg></div>'
        f'<div class="axis"><span>0</span><span>{units.seconds(whole)}</span></div>'
        + legend((f"rank {r}", _RANK_COLOURS[r % len(_RANK_COLOURS)]) for r in lines)
    )


def byte_bars(summary: Mapping[str, Any]) -> str:
    """Bytes that each kind of collective sent in one run, on the rank that sent most."""
    rows = summary["ledger"]
    if not rows:
        return '<p class="dim">One rank sends nothing.</p>'
    most = max(max(spent["bytes_sent"]) for spent in rows.values()) or 1
    bars = "".join(
        f'<span>{text(kind)}</span><div class="bar"><i style="'
        f'width:{_percent(max(spent["bytes_sent"]), most)};background:var(--c1)"></i></div>'
        f"<b>{units.size(max(spent['bytes_sent']))}, {max(spent['calls'])} calls</b>"
        for kind, spent in rows.items()
    )
    return f'<div class="bars">{bars}</div>'
