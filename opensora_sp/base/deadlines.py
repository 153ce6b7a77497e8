"""How long each kind of work may take before it counts as hung. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

# Generous: hours of slow disks and slow cores fit in. What they catch is what never ends.
DEADLINES: Mapping[str, float] = MappingProxyType(
    {"load": 3600.0, "encode": 3600.0, "step": 7200.0, "decode": 7200.0, "write": 3600.0}
)
HEARTBEAT_S = 60.0
# What limits may be, in seconds: below, the program's own messages take longer; above, no timer of
# the libraries underneath counts.
TIMEOUT_RANGE_S = (1.0, 30 * 86_400.0)
HEARTBEAT_RANGE_S = (2.0, 30 * 86_400.0)
DEADLINE_RANGE_S = (1.0, 30 * 86_400.0)
# The stages of a run that each of them limits; stages that are not here only wait for others.
_KIND_OF_STAGE = {
    "load": "load",
    "encode text": "encode",
    "encode references": "encode",
    "hand out": "step",
    "denoise": "step",
    "decode": "decode",
    "write": "write",
}


def parse_deadlines(text: str) -> dict[str, float]:
    """ "step=600,decode=off" → every kind's seconds, those that are not named by default.

    "off" is no limit. Raises ValueError for another form, an unknown kind or a number that is
    not within `DEADLINE_RANGE_S`.
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
    """Which deadline limits a stage; None where none does."""
    return _KIND_OF_STAGE.get(stage)
