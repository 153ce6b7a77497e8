"""Settles what the step cache of a request means: a schedule, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from opensora_sp.parallel.session import Session
from opensora_sp.request.request import Request
from opensora_sp.request.step_cache import OFF
from opensora_sp.request.step_choice import Choice, choose_schedule
from opensora_sp.request.step_schedule import StepSchedule


def settle(
    session: Session, requests: Sequence[Request], directory: Path, model: Callable[[], str]
) -> tuple[list[Request], list[str]]:
    """The requests with schedules in place of levels and files, and a line for each schedule.

    The leading rank reads the files, for only it need see them. directory, model: of the
    transformer's checkpoint, and its fingerprint. Collective. Raises UserError, on every rank, as
    `choose_schedule`.
    """
    if all(request.step_cache == OFF for request in requests):
        return list(requests), []

    def choices() -> list[Choice]:
        return [choose_schedule(request, directory, model) for request in requests]

    chosen = session.control.broadcast_object(session.control.together(choices, leading_only=True))
    assert chosen is not None
    settled = [
        replace(request, step_cache=one.schedule or OFF)
        for request, one in zip(requests, chosen, strict=True)
    ]
    return settled, list(dict.fromkeys(one.said for one in chosen if one.said))


def left_out(request: Request) -> int:
    """How many steps of a settled request's clip its schedule leaves out."""
    return request.step_cache.left_out if isinstance(request.step_cache, StepSchedule) else 0
