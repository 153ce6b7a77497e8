"""The value of --step-cache: off, a level, a file of schedules, or in Python a schedule."""

from __future__ import annotations

from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import ValueType, path
from opensora_sp.request.step_schedule import StepSchedule

OFF = "off"
LEVELS = ("near-lossless", "fast")


def step_cache_value(*, schedules: bool = False) -> ValueType:
    """off, a level or a file, as text. schedules: or a StepSchedule, which only Python has."""
    as_path = path("FILE")

    def legal(value: Any) -> bool:
        return (schedules and isinstance(value, StepSchedule)) or as_path.legal(value)

    return ValueType(
        "off|near-lossless|fast|FILE",
        f"{OFF}, {', '.join(LEVELS)}, or a file of schedules as FILE or FILE:NAME"
        + ", or a StepSchedule" * schedules,
        lambda text: as_path.read(text.strip()),
        legal,
    )


def check_schedule(value: str | StepSchedule, *, steps: int, images: bool) -> None:
    """Raise UserError for a schedule of another number of steps, or of images for a video."""
    if not isinstance(value, StepSchedule):
        return
    if value.steps != steps:
        raise UserError(
            f"step_cache {value.name} is for {value.steps} steps, but steps is {steps}: give the "
            "same number, or another schedule"
        )
    if value.images != images:
        of, asked = ("images", "a video") if value.images else ("videos", "an image")
        raise UserError(
            f"step_cache {value.name} is for {of}, but {asked} is asked for: give another schedule"
        )
