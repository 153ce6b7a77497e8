"""Memory of the devices that people have, and how sizes of memory are written."""

from __future__ import annotations

import re

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.parallel.backend_table import BACKENDS

GB = 10**9
# Marketed sizes, in units of 10^9 bytes: the real ones are a little larger, which is margin.
CARDS = {card: size for backend in BACKENDS.values() for card, size in backend.cards}
# Taken before the first tensor: the driver's context, libraries' workspaces, an allocator's
# rounding.
_CONTEXT = 1.0 * GB
_ROUNDING = 0.04


def usable(memory: float) -> float:
    """Bytes that tensors can have of a device with so many."""
    return max(0.0, memory * (1 - _ROUNDING) - _CONTEXT)


def parse_memory(text: str) -> float:
    """Bytes of "48GB", "44.5 GiB" or a card's name, whatever its case. Raises UserError."""
    for name, size in CARDS.items():
        if _letters(text) == _letters(name):
            return float(size * GB)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GIB|G|TB|TIB|MB|MIB)", text.strip().upper())
    if found is None or float(found[1]) <= 0:
        raise UserError(
            f"--device-memory {shown(text)} is neither a size such as 48GB nor one of the cards "
            f"{', '.join(CARDS)}"
        )
    units = {"G": GB, "GB": GB, "GIB": 2**30, "TB": 1000 * GB, "TIB": 2**40}
    units |= {"MB": 10**6, "MIB": 2**20}
    return float(found[1]) * units[found[2]]


def _letters(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).upper()
