"""A plan in words, the grid of a card, and the table of the docs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from opensora_sp.base.errors import UserError
from opensora_sp.base.wording import plural
from opensora_sp.planner.devices import GB, usable
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape
from opensora_sp.planner.plan import (
    DURATIONS,
    RESOLUTIONS,
    Options,
    Plan,
    best,
    nearest_request,
    plans,
    published_sizes,
    smallest_ranks,
)


def describe(plan: Plan, memory: float | None, flop_rate: float | None, link: float | None) -> str:
    """The plan's figures, a line each."""
    shape = plan.shape
    lines = [
        f"{plural(shape.num_frames, 'frame')} of "
        f"{shape.height}x{shape.width}, batch {shape.batch}, "
        f"{_steps(shape)}, {shape.dtype}, on {plural(plan.mesh.size, 'rank')}: {plan.mesh}",
        f"--memory {plan.mode}; peak of the busiest rank by stage, in GB:",
    ]
    for stage in plan.stages:
        lines.append(
            f"  {stage.name:<11} {stage.total / GB:6.2f}  = weights {stage.weights / GB:.2f} "
            f"+ {stage.peak / GB:.2f}"
        )
    if memory is not None:
        lines.append(f"  of {usable(memory) / GB:.2f} that tensors can have of {memory / GB:.0f}")
    lines.append(f"host memory of the leading rank: {plan.host / GB:.1f} GB")
    lines.append(
        f"busiest rank, one batch: {plan.flops / 1e15:.2f} PFLOP, {plan.sent / GB:.1f} GB sent"
    )
    if flop_rate is not None:
        seconds = plan.seconds(flop_rate, link)
        lines.append(f"at {flop_rate:.3g} FLOP/s: about {seconds:.0f} s, if nothing is hidden")
    else:
        lines.append("time: give --flop-rate (of one device, as it is measured) for a prediction")
    return "\n".join(lines)


def _steps(shape: Shape) -> str:
    if not shape.left_out:
        return plural(shape.steps, "step")
    return f"{shape.computed} of {plural(shape.steps, 'step')} computed"


def verdict(
    shape: Shape, ranks: int, models: ModelSizes, options: Options, memory: float
) -> tuple[Plan, str, bool]:
    """The plan to use, what there is to say of it, and whether it fits."""
    candidates = plans(shape, ranks, models, options)
    plan = best(candidates, memory)
    if plan is not None:
        return plan, "fits" if plan is candidates[0] else f"fits with --memory {plan.mode}", True
    least = min(candidates, key=lambda candidate: candidate.peak)
    return least, _advice(least, ranks, models, options, memory), False


def _advice(least: Plan, ranks: int, models: ModelSizes, options: Options, memory: float) -> str:
    stage = max(least.stages, key=lambda stage: stage.total)
    said = (
        f"does not fit: {stage.name} needs {stage.total / GB:.1f} GB with --memory {least.mode}, "
        f"of {usable(memory) / GB:.1f} GB that tensors can have"
    )
    ways = []
    if options.memory is not None:
        free = best(plans(least.shape, ranks, models, replace(options, memory=None)), memory)
        if free is not None:
            ways.append(f"--memory {free.mode} fits")
    if options.vae_decode != "rank0":
        rank0 = replace(options, vae_decode="rank0")
        alone = best(plans(least.shape, ranks, models, rank0), memory)
        if alone is not None:
            ways.append(f"--vae-decode rank0 fits (--memory {alone.mode})")
    found = smallest_ranks(least.shape, models, options, memory)
    if found is not None and found[0] != ranks:
        fit = "1 rank fits" if found[0] == 1 else f"{found[0]} ranks fit"
        ways.append(f"{fit} (--memory {found[1].mode})")
    near = nearest_request(least.shape, ranks, models, options, memory)
    if near is not None:
        ways.append(f"nearest size that fits: {near[0]} (--memory {near[1].mode})")
    return said + "".join(f"; {way}" for way in ways)


def check_fits(
    shape: Shape, ranks: int, models: ModelSizes, options: Options, memory: float
) -> Plan:
    """The plan to run. Raises UserError with the ways out where nothing fits."""
    plan, said, fits = verdict(shape, ranks, models, options, memory)
    if not fits:
        raise UserError(
            f"{plural(shape.num_frames, 'frame')} of {shape.height}x{shape.width} on "
            f"{plural(ranks, 'rank')} {said}; --no-plan tries it all the same"
        )
    return plan


def grid(ranks: int, models: ModelSizes, options: Options, memory: float, shape: Shape) -> str:
    """Every trained size on one card: the mode that fits and its peaks in GB."""
    cells = _cells(ranks, models, options, memory, shape)
    head = f"{'9:16':<6}" + "".join(f"{duration:>20}" for duration in DURATIONS)
    rows = [
        f"{resolution:<6}" + "".join(f"{cells[f'{resolution} {d}']:>20}" for d in DURATIONS)
        for resolution in RESOLUTIONS
    ]
    return "\n".join([head, *rows])


def _cells(
    ranks: int, models: ModelSizes, options: Options, memory: float, shape: Shape
) -> dict[str, str]:
    cells = {}
    for name, (height, width, frames) in published_sizes():
        one = replace(shape, height=height, width=width, num_frames=frames)
        plan = best(plans(one, ranks, models, options), memory)
        cells[name] = "-" if plan is None else _cell(plan)
    return cells


def _cell(plan: Plan) -> str:
    """The mode, and peaks of text / denoising / decoding."""
    peaks = "/".join(f"{stage.total / GB:.1f}" for stage in plan.stages)
    return f"{plan.mode} {peaks}"


def docs_table(memories: Sequence[int], ranks: Sequence[int]) -> str:
    """Markdown: every trained size × memory × ranks, the mode that fits and its peaks in GB."""
    models, options = ModelSizes(), Options()
    shape = Shape(height=240, width=426, num_frames=51)
    parts = []
    for memory in memories:
        columns = [_cells(n, models, options, memory * GB, shape) for n in ranks]
        head = "| size | " + " | ".join(f"N = {n}" for n in ranks) + " |"
        rule = "| --- |" + " --- |" * len(ranks)
        rows = [
            f"| {name} | " + " | ".join(column[name] for column in columns) + " |"
            for name, _ in published_sizes()
        ]
        parts.append("\n".join([f"### {memory} GB", "", head, rule, *rows]))
    return "\n\n".join(parts) + "\n"


def _page() -> str:
    return (
        "# What fits where\n\n"
        "Written by `python -m opensora_sp.planner.report > docs/memory_table.md`: the fastest "
        "memory mode that\nfits and its planned peaks in GB on the busiest rank for text / "
        "denoising / decoding; published models\nin bf16, batch 1, 9:16; `-` does not fit. "
        "What the peak counts and what it does not: [memory.md](memory.md).\n\n"
        + docs_table((24, 48, 80, 141), (1, 2, 4, 8))
    )


if __name__ == "__main__":
    sys.stdout.write(_page())
