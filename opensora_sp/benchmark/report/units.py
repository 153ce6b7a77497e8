"""Formatting of figures: seconds, bytes, FLOPs, percent, ratios."""

from __future__ import annotations

import math

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
_FLOPS = ("", "k", "M", "G", "T", "P", "E")


def seconds(value: float | None) -> str:
    """Seconds with 3 significant digits. Below 1 s in ms, from 10 minutes on in minutes."""
    if value is None:
        return "–"
    if value >= 600:
        minutes, rest = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    if value >= 1:
        return f"{_digits(value)} s"
    return f"{_digits(value * 1000)} ms"


def size(value: float | None) -> str:
    """Bytes in powers of 1000."""
    return "–" if value is None else _scaled(value, _BYTES)


def gibibytes(value: float | None) -> str:
    """Memory in GiB, the unit of device tools."""
    return "–" if value is None else f"{_digits(value / 2**30)} GiB"


def flops(value: float | None) -> str:
    """FLOPs with a prefix. A caller may append "/s"."""
    if value is None:
        return "–"
    return _scaled(value, tuple(f"{prefix}FLOP" for prefix in _FLOPS))


def percent(value: float | None) -> str:
    """A fraction of 1 in percent."""
    return "–" if value is None else f"{_digits(value * 100)} %"


def ratio(value: float | None) -> str:
    """A ratio, such as 1.90×."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}×"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power + 1 < len(units):
        value, power = value / 1000, power + 1
    return f"{_digits(value)} {units[power]}".strip()


def _digits(value: float) -> str:
    """Three significant digits, and no more than the whole number where that has more."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 3)}f}"
