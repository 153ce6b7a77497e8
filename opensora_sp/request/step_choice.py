"""The schedule that a request's --step-cache means. Imports no torch.

Of a file of schedules FILE takes the first that fits, FILE:NAME the first of that name. The
schedules of near-lossless and fast are those of step_cache.yaml beside the transformer's weights,
or else a general pattern.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.request.general_pattern import FEWEST_STEPS, FILL, general_steps
from opensora_sp.request.request import Request
from opensora_sp.request.step_cache import LEVELS, OFF
from opensora_sp.request.step_schedule import (
    MOST_TOKENS,
    StepSchedule,
    choose,
    read_schedules,
    steps_text,
)
from opensora_sp.request.step_times import times_of

OWN_FILE = "step_cache.yaml"  # beside a transformer's weights
_FLAG = "--step-cache"


def check_step_cache(requests: Sequence[Request], directory: Path | None) -> None:
    """Read the files that the requests' values name, and look for schedules that fit.

    directory: as for `choose_schedule`. Raises UserError as it does, whichever model is there.
    """
    # What a choice depends on; a list may have very many prompts.
    different = {
        (one.step_cache, one.steps, one.cfg_scale, one.timestep_transform, tokens_of(one)): one
        for one in requests
        if one.step_cache != OFF
    }
    for request in different.values():
        planned_schedule(request, directory)


@dataclass(frozen=True)
class Choice:
    """The schedule that is meant, None for all steps, and a line that says what it is."""

    schedule: StepSchedule | None
    said: str


def choose_schedule(
    request: Request, directory: Path | None, model: Callable[[], str] | None = None
) -> Choice:
    """What a request's `step_cache` means for it.

    directory: of the transformer's checkpoint; None where there is none. model: gives its
    fingerprint, which is asked for where a schedule depends on it; None takes every model for the
    one that was measured, for a plan. Raises UserError where a file is wrong, or where nothing in
    it fits.
    """
    value = request.step_cache
    if value == OFF:
        return Choice(None, "")
    if isinstance(value, StepSchedule):
        return Choice(value, describe(value))
    if value not in LEVELS:
        file, name = _file_and_name(value)
        candidates = _named(file, name)
        found = _first(request, candidates, None, model)
        if found is None:
            raise UserError(_nothing_fits(request, value, candidates, model))
        return Choice(found, describe(found))
    own = None if directory is None else directory / OWN_FILE
    candidates = list(read_schedules(own)) if own is not None and access.is_file(own) else []
    found = _first(request, candidates, value, model)
    if found is not None:
        return Choice(found, describe(found))
    pattern = general_pattern(value, times_of(request), images=request.is_image)
    why = "no measured schedule" if candidates else f"no {OWN_FILE}"
    return Choice(
        pattern,
        f"{describe(pattern)}; this is a general pattern, for the model has {why} for this request"
        ": what it costs here was not measured (opensora-sp calibrate measures it)",
    )


def planned_schedule(request: Request, directory: Path | None) -> StepSchedule | None:
    """The schedule to plan with, whichever model it was measured on; None for all steps.

    Raises UserError as `choose_schedule`.
    """
    return choose_schedule(request, directory).schedule


def tokens_of(request: Request) -> int:
    """T·S tokens of one sample: what the size classes of schedules count."""
    rows, columns = request.patch_grid
    return request.latent_shape[0] * rows * columns


def describe(schedule: StepSchedule) -> str:
    """A schedule in a line."""
    said = (
        f"step cache {schedule.name}: {len(schedule.computed)} of {schedule.steps} steps are "
        f"computed ({steps_text(schedule.computed)}), the others filled ({schedule.fill})"
    )
    if schedule.psnr is not None:
        over = "" if schedule.prompts is None else f" over {schedule.prompts} prompts"
        said += f"; measured{over}: {schedule.psnr:.1f} dB against all steps"
    return said


def general_pattern(level: str, times: Sequence[float], *, images: bool = False) -> StepSchedule:
    """A schedule that follows from the times of the steps; the fill is linear.

    times: of all steps, falling from 1000. near-lossless computes two thirds of them, fast half:
    see `general_steps`. Raises UserError for fewer than 10 steps.
    """
    steps = len(times)
    if steps < FEWEST_STEPS:
        raise UserError(
            f"{_FLAG} {level}: of {steps} steps none is left out without a schedule that was "
            f"measured for it: give --num-sampling-steps of at least {FEWEST_STEPS}, a file that "
            f"opensora-sp calibrate writes, or {_FLAG} {OFF}"
        )
    return StepSchedule(
        name=level,
        steps=steps,
        computed=general_steps(level, tuple(times)),
        fill=FILL,
        tokens=(1, MOST_TOKENS),
        images=images,
    )


def _first(
    request: Request,
    candidates: Sequence[StepSchedule],
    name: str | None,
    model: Callable[[], str] | None,
) -> StepSchedule | None:
    if not request.timestep_transform:  # the steps lie at other times than those measured
        return None
    if model is None:
        candidates = [replace(one, model=None) for one in candidates]
    asks = model is not None and any(one.model is not None for one in candidates)
    return choose(
        candidates,
        name=name,
        steps=request.steps,
        tokens=tokens_of(request),
        cfg_scale=request.cfg_scale,
        model=model() if asks and model is not None else None,
        images=request.is_image,
    )


def _file_and_name(value: str) -> tuple[str, str | None]:
    """(FILE, NAME or None) of a value that is no level; a file that is there is meant whole."""
    if access.is_file(value):
        return value, None
    file, colon, name = value.rpartition(":")
    if colon and file and access.is_file(file):
        return file, name
    if os.sep not in value and not value.endswith((".yaml", ".yml")):
        near = difflib.get_close_matches(value, (OFF, *LEVELS), n=1)
        nearest = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{_FLAG} {shown(value)} is neither {OFF}, {' nor '.join(LEVELS)} nor a file of "
            f"schedules{nearest}"
        )
    raise UserError(
        f"{_FLAG} {shown(value)}: {access.no_file(value)}; give one of schedules, as FILE or "
        f"FILE:NAME, or {OFF}, {' or '.join(LEVELS)}"
    )


def _named(file: str, name: str | None) -> list[StepSchedule]:
    """A file's schedules of that name, at least one."""
    every = read_schedules(file, f"{_FLAG} {shown(file)}")
    found = [one for one in every if name is None or one.name == name]
    if not found:
        names = ", ".join(dict.fromkeys(one.name for one in every))
        raise UserError(f"{_FLAG} {shown(file)} has no schedule {shown(name)}; it has {names}")
    return found


def _nothing_fits(
    request: Request,
    value: str,
    candidates: Sequence[StepSchedule],
    model: Callable[[], str] | None,
) -> str:
    """The line that says why none of a file's schedules is for a request."""
    tokens = tokens_of(request)
    of = "an image" if request.is_image else "a video"
    asked = f"{of} of {request.steps} steps, {tokens} tokens and --cfg-scale {request.cfg_scale:g}"
    if not request.timestep_transform:
        why = "its steps lie at other times, for timestep_transform is off"
    elif _first(request, [replace(one, model=None) for one in candidates], None, model):
        why = "what is for such a request was measured on another transformer"
    else:
        one = candidates[0]
        is_for = "images" if one.images else "videos"
        why = (
            f"the first is for {is_for} of {one.steps} steps, {one.tokens[0]} to "
            f"{one.tokens[1] - 1} tokens and a scale from {one.cfg_scale[0]:g} to "
            f"{one.cfg_scale[1]:g}"
        )
    return (
        f"{_FLAG} {shown(value)} has no schedule for {asked}: {why}; opensora-sp calibrate makes "
        f"one, or use {_FLAG} {OFF}"
    )
