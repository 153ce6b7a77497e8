"""Whose jobs a caller sees: with tokens, each owner has his own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opensora_sp.server.board import Entry

# The owner of this name sees and deletes everybody's jobs.
ADMIN = "admin"


def sees(tokens: Mapping[str, str], owner: str) -> Callable[[Entry], bool]:
    """Whether the owner of a token sees a job: his own; everybody's without tokens, or as admin.

    tokens: token → its owner's name.
    """
    return lambda entry: not tokens or owner in (ADMIN, entry.spec.owner)
