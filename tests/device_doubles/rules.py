"""What a device double writes down, and what it raises where a rule of such devices is broken."""

from __future__ import annotations

from typing import Any

journal: dict[str, Any] = {"set_device": [], "wide": {}, "collectives": {}, "groups": []}


class RuleBroken(AssertionError):  # noqa: N818 (it reads as a finding of the test)
    """The program did what a real device answers with wrong numbers instead of an error."""
