"""Why a plan needs more memory than another that one would expect to need more."""

from __future__ import annotations

from dataclasses import replace

from opensora_sp.base.wording import plural
from opensora_sp.planner.devices import GB
from opensora_sp.planner.plan import Plan, decoding_ranks, make_plan
from opensora_sp.request.memory_modes import MEMORY_MODES


def unexpected_peaks(plan: Plan) -> list[str]:
    """A line for each way in which the plan needs more memory than one would expect.

    More ranks should need less each, and so should a mode that is further down the list. Where
    they need more, it is how the program works; the line names the cause.
    """
    return [line for line in (_fewer_ranks(plan), _faster_mode(plan)) if line is not None]


def _fewer_ranks(plan: Plan) -> str | None:
    ranks, options = plan.mesh.size, replace(plan.options, guidance=None, sequence=None)
    others = [
        make_plan(plan.shape, fewer, plan.mode, plan.models, options) for fewer in range(1, ranks)
    ]
    least = min(others, key=lambda other: other.peak, default=plan)
    if least.peak >= plan.peak:
        return None
    stage = _largest(plan)
    return (
        f"{plural(least.mesh.size, 'rank')} would need less ({_gb(least.peak)} instead of "
        f"{_gb(plan.peak)}): {_cause(stage, plan, least)}"
    )


def _cause(stage: str, plan: Plan, least: Plan) -> str:
    ranks = plan.mesh.size
    shares = decoding_ranks(plan.shape, plan.mesh, plan.options)
    if stage == "decode" and shares > 1:
        return (
            f"{plural(shares, 'rank')} share the decoding, and the first one holds the frames of "
            "all of them as bytes (--vae-decode rank0 avoids it)"
        )
    if stage == "denoise" and least.mesh.guidance > plan.mesh.guidance:
        return (
            f"{plural(ranks, 'rank')} {'are' if ranks > 1 else 'is'} grouped {plan.mesh}, so each "
            "computes both CFG branches"
        )
    if stage == "denoise" and least.mesh.sequence > plan.mesh.sequence:
        return (
            f"{plural(ranks, 'rank')} are grouped {plan.mesh}, so only {plan.mesh.sequence} share "
            "a video's patches (--guidance-parallel 1 shares them among all)"
        )
    return (
        "ranks that share a video also hold whole frames for spatial attention, and uneven "
        "shares leave the first one with the largest"
    )


def _faster_mode(plan: Plan) -> str | None:
    modes = list(MEMORY_MODES.values())
    ranks = plan.mesh.size
    faster = [
        make_plan(plan.shape, ranks, mode, plan.models, plan.options)
        for mode in modes[: modes.index(plan.mode)]
    ]
    least = min(faster, key=lambda other: other.peak, default=plan)
    if least.peak >= plan.peak:
        return None
    causes = {
        "text": "T5's layers pass through two at a time, which is more than this T5 holds",
        "denoise": "three block pairs are on the device at a time, more than this model has",
    }
    stays = "the transformer's weights outside its blocks stay on the device there"
    return (
        f"--memory {least.mode} needs less than {plan.mode} ({_gb(least.peak)} instead of "
        f"{_gb(plan.peak)}): {causes.get(_largest(plan), stays)}"
    )


def _largest(plan: Plan) -> str:
    return max(plan.stages, key=lambda stage: stage.total).name


def _gb(size: int) -> str:
    return f"{size / GB:.3g} GB"
