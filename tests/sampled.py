"""How many cases of a property the suite tries; tests/properties.py tries as many as it is asked.

`@few(20)` stands for the 100 of Hypothesis where a case takes long. The whole run sets
OPENSORA_SP_EXAMPLES, and then every property has that many cases a round.
"""

from __future__ import annotations

import os
from functools import partial

import hypothesis
from hypothesis import strategies as st

ROUND = "OPENSORA_SP_EXAMPLES"


def few(cases: int) -> hypothesis.settings:
    """A decorator: so many cases in the suite."""
    return hypothesis.settings(max_examples=int(os.environ.get(ROUND, cases)))


# Libraries of the older stack make the processor flush subnormal numbers to zero, and Hypothesis
# refuses to draw them then.
floats = partial(st.floats, allow_subnormal=False)
