"""Numbers in sentences."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """Such as "1 frame" and "17 frames"; noun: one of them, with a plural in -s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
