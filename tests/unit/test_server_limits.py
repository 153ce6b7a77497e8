"""--limit of the server: what is given is taken, what is no limit is refused in a line."""

from __future__ import annotations

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.server.settings import Limits, read_limits


def test_limits_that_are_given_are_taken_and_the_others_stay() -> None:
    found = read_limits(["queued=3", "body_seconds=1.5"])
    assert (found.queued, found.body_seconds) == (3, 1.5)
    assert found.connections == Limits().connections


@pytest.mark.parametrize("word", ["nope=1", "queued", "queued=x", "queued=0", "body_seconds=nan"])
def test_what_is_no_limit_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=f"--limit {word}: "):
        read_limits([word])
