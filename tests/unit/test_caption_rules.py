"""The rules of caption cleaning that are searched run by run, against the plain patterns.

The plain patterns are what the model's captions were cleaned with. They take seconds for a text of
dots; the rules of the program do not, and must find the same.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from typing import Any

import pytest
from plain_captions import PLAIN

from opensora_sp.request import captions

_NAMES = [*"aé1.-/@: x%", "http:", "https://", "www:", ".com", ".co", ".it", "com", "_"]
PIECES = {
    "http addresses and hosts": _NAMES,
    "www: addresses and hosts": _NAMES,
    "file names": [*"aé1./@ ", ".png", ".mp4", "mp4", "png", "\n"],
    "lonely dots": [*" .a\n\t", "\u2003", ".."],
    "codes such as j2d1a2a": [*"ab1٣_é .", "a1", "1a", "b2", " "],
    "sizes such as 1920x1080": [*"12٣.x×хé _"],
}


def rules() -> dict[str, Any]:
    return {step.name: step for step in captions._STEPS if hasattr(step, "name")}


@pytest.mark.parametrize("name", PLAIN)
def test_a_rule_finds_what_its_plain_pattern_finds(name: str) -> None:
    plain, rule, drawn = re.compile(PLAIN[name][0]), rules()[name], random.Random(name)
    pieces, changed = PIECES[name], 0
    for _ in range(20_000):
        text = "".join(drawn.choices(pieces, k=drawn.randint(1, 14)))
        expected = plain.sub(PLAIN[name][1], text)
        assert rule(text) == expected, ascii(text)
        changed += expected != text
    assert changed > 500  # or hardly anything was compared


def test_no_rule_goes_over_a_long_run_again_and_again() -> None:
    """Two minutes for what takes seconds; searched from every letter it takes hours."""
    units = ["1.", "a.", ".", " ", "a-", "aaa111", "a1", "1", "a.com@", "&#", "aGVsbG8", ". "]
    code = (
        "from opensora_sp.request.captions import clean_caption\n"
        f"for unit in {units}:\n"
        "    for tail in ('', 'é', '@'):\n"
        "        clean_caption((unit * 100_000)[:100_000] + tail)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
