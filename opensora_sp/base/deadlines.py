"""Deadlines: how long each kind of work may take before it counts as hung. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

# The limits are generous, so that slow disks and slow cores do not exceed them.
DEADLINES: Mapping[str, float] = MappingProxyType(
    {"load": 3600.0, "encode": 3600.0, "step": 7200.0, "decode": 7200.0, "write": 3600.0}
)
HEARTBEAT_S = 60.0
# The range of each limit, in seconds. Below it the program's own messages take longer. Above it the
# timers of the libraries below overflow.
TIMEOUT_RANGE_S = (1.0, 30 * 86_400.0)
HEARTBEAT_RANGE_S = (2.0, 30 * 86_400.0)
DEADLINE_RANGE_S = (1.0, 30 * 86_400.0)
# Which limit applies to which stage. Stages that are not listed only wait for other ranks.
_KIND_OF_STAGE = {
    "load": "load",
    "compile": "load",
    "encode text": "encode",
    "encode references": "encode",
    "hand out": "step",
    "denoise": "step",
    "decode": "decode",
    "write": "write",
    "save": "write",
}


def parse_deadlines(text: str) -> dict[str, float]:
    """The seconds of every kind from a text such as "step=600,decode=off".

    A kind that is not named has its default, and "off" means no limit. Raises ValueError for
    another form, an unknown kind, or a number outside `DEADLINE_RANGE_S`.
    """
    limits = dict(DEADLINES)
    for part in text.replace(";", ",").split(","):
        if not part.strip():
            continue
        kind, equals, value = (piece.strip() for piece in part.partition("="))
        if kind not in limits or not equals:
            raise ValueError(text)
        limits[kind] = math.inf if value == "off" else float(value)
        low, high = DEADLINE_RANGE_S
        if value != "off" and not low <= limits[kind] <= high:
            raise ValueError(text)
    return limits


def kind_of_stage(stage: str) -> str | None:
    """The kind of deadline that limits a stage; None for a stage without one."""
    return _KIND_OF_STAGE.get(stage)
