"""Caption cleaning by plain patterns alone: what the program's faster rules are compared with."""

from __future__ import annotations

import re

from opensora_sp.base.errors import UserError
from opensora_sp.request import captions

_HOST = r"[a-z\d.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)"
_TYPES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
# Rules that are searched run by run, as the patterns that the model's captions were cleaned with.
PLAIN = {
    "http addresses and hosts": (rf"\b(?:https?:(?:/{{1,3}}|[a-z\d%])|{_HOST})", ""),
    "www: addresses and hosts": (rf"\b(?:www:(?:/{{1,3}}|[a-z\d%])|{_HOST})", ""),
    "file names": (rf"\S+\.{_TYPES}", ""),
    "lonely dots": (r"\s+\.\s+", " "),
    "codes such as j2d1a2a": (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    "sizes such as 1920x1080": (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),
}


def clean_plainly(text: str) -> str:
    """The table of rules, twice, with the plain patterns. Takes long for long texts."""
    if re.search("[\ud800-\udfff]", text):
        raise UserError("half a character")
    for _ in range(2):
        for step in captions._STEPS:
            pattern, replacement = PLAIN.get(getattr(step, "name", ""), (None, ""))
            text = step(text) if pattern is None else re.sub(pattern, replacement, text)
    return text
