"""Settles what the step cache of a request means: a schedule, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.parallel.session import Session
from opensora_sp.request.request import Request
from opensora_sp.request.step_cache import OFF
from opensora_sp.request.step_choice import Choice, choose_schedule
from opensora_sp.request.step_schedule import StepSchedule, steps_text


def settle(
    session: Session, requests: Sequence[Request], directory: Path, model: Callable[[], str]
) -> tuple[list[Request], list[str]]:
    """The requests with schedules in place of levels and files, and a line for each schedule.

    The leading rank reads the files, for only it need see them. directory, model: of the
    transformer's checkpoint, and its fingerprint. Collective. Raises UserError, on every rank, as
    `choose_schedule`, and where ranks ask for different step caches.
    """
    control = session.control
    asked = [request.step_cache for request in requests]

    def choices() -> list[Choice]:
        return [choose_schedule(request, directory, model) for request in requests]

    chosen = control.together(choices, leading_only=True)
    leading, chosen = control.broadcast_object((asked, chosen))
    assert chosen is not None

    def require_same() -> None:
        if asked != leading:
            mine, theirs = (shown([_named(one) for one in values]) for values in (asked, leading))
            raise UserError(
                f"step_cache {mine} differs from rank 0's {theirs}: give every rank the same"
            )

    if session.world_size > 1:  # or they would wait for each other's exchanges
        control.together(require_same)
    settled = [
        request if request.step_cache == OFF else replace(request, step_cache=one.schedule or OFF)
        for request, one in zip(requests, chosen, strict=True)
    ]
    return settled, list(dict.fromkeys(one.said for one in chosen if one.said))


def _named(asked: str | StepSchedule) -> str:
    return (
        f"{asked.name} {steps_text(asked.computed)}" if isinstance(asked, StepSchedule) else asked
    )
