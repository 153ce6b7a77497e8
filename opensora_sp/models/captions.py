"""Caption cleaning: how the captions of Open-Sora 1.2's training set were cleaned.

A prompt goes through the same rules before the text encoder sees it, or the model meets words
it never saw in training. The rules stand in one table, in order, each working on the result of
the one before. "Letter" is a-z (the text is lower-cased first); digits, word characters and
white space are Unicode's, and `\\b` is Python's word boundary.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_plus

from opensora_sp.errors import UserError

_PASSES = 2
_TOP_LEVEL_DOMAIN = "(?:com|co|ru|net|org|edu|gov|it)"
_FILE_TYPE = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_NUMBER = r"\d+\.?\d*"
_DASHES = (
    "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_CJK = (
    "\u31c0-\u31ef"  # strokes
    "\u31f0-\u31ff"  # Katakana phonetic extensions
    "\u3200-\u32ff"  # enclosed letters and months
    "\u3300-\u33ff"  # compatibility
    "\u3400-\u4dbf"  # unified ideographs, extension A
    "\u4dc0-\u4dff"  # hexagrams
    "\u4e00-\u9fff"  # unified ideographs
)


@dataclass(frozen=True)
class Rule:
    """One substitution of the table: every match of `pattern` becomes `replacement`."""

    name: str
    pattern: re.Pattern[str]
    replacement: str

    def __call__(self, text: str) -> str:
        return self.pattern.sub(self.replacement, text)


def _drop(name: str, pattern: str) -> Rule:
    return Rule(name, re.compile(pattern), "")


def _blank(name: str, pattern: str) -> Rule:
    return Rule(name, re.compile(pattern), " ")


def _swap(name: str, pattern: str, replacement: str) -> Rule:
    return Rule(name, re.compile(pattern, re.DOTALL), replacement)


def _addresses(name: str, scheme: str) -> Rule:
    """A scheme's beginning or a host. An `@` after a host makes the match shrink, if it can.

    So `a.com/b@x` loses `a.com/`, while in `foo.com@bar` nothing is left to shrink to.
    """
    beginning = rf"{scheme}:(?:/{{1,3}}|[a-z\d%])"
    host = rf"[a-z\d.\-]+\.{_TOP_LEVEL_DOMAIN}[\w/\-]*\b/?(?!@)"
    return _drop(name, rf"\b(?:{beginning}|{host})")


def _decode_url(text: str) -> str:
    return unquote_plus(text).strip().lower()


def _html_text(text: str) -> str:
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    with warnings.catch_warnings():
        # A caption may look like a file name or an address; that is no mistake here.
        warnings.simplefilter("ignore")
        try:
            return BeautifulSoup(text, features="html.parser").get_text()
        except ParserRejectedMarkup:
            raise UserError(
                f"prompt {text[:60]!r} holds an unknown marked section, which HTML does not allow: "
                "remove the '<!['"
            ) from None


def _split_joined_words(text: str) -> str:
    """`this-is-my-cute-cat` is words; `slow-motion` stays."""
    if text.count("-") + text.count("_") > 3:
        return text.replace("-", " ").replace("_", " ")
    return text


def _repair_characters(text: str) -> str:
    from ftfy import fix_text

    return html.unescape(html.unescape(fix_text(text))).strip()


_STEPS: tuple[Callable[[str], str], ...] = (
    _decode_url,
    _swap("person tag", "<person>", "person"),
    _addresses("http addresses and hosts", "https?"),
    _addresses("www: addresses and hosts", "www"),
    _html_text,
    _drop("mentions", r"@\w+\b"),
    _drop("Chinese, Japanese and Korean characters", f"[{_CJK}]"),
    _swap("dashes", f"[{_DASHES}]+", "-"),
    _swap("double quotes", "[`´«»“”¨]", '"'),
    _swap("single quotes", "[‘’]", "'"),
    _drop("left-over &quot", "&quot;?"),
    _drop("left-over &amp", "&amp"),
    _blank("IP addresses", r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"),
    _drop("clock time before white space at the end", r"\d:\d\d\s+\Z"),
    _blank("written-out line breaks", r"\\n"),
    _drop("short hash numbers", r"#\d{1,3}\b"),
    _drop("long hash numbers", r"#\d{5,}\b"),
    _drop("long numbers", r"\b\d{6,}\b"),
    _drop("file names", rf"\S+\.{_FILE_TYPE}"),
    _swap("repeated quotes", "[\"']{2,}", '"'),
    _blank("repeated dots", r"\.{2,}"),
    _blank("decoration", r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+"),
    _blank("lonely dots", r"\s+\.\s+"),
    _split_joined_words,
    _repair_characters,
    _drop("codes such as jc6640", r"\b[a-z]{1,3}\d{3,15}\b"),
    _drop("codes such as jc6640vc", r"\b[a-z]+\d+[a-z]+\b"),
    _drop("codes such as 6640vc231", r"\b\d+[a-z]+\d+\b"),
    _drop("shipping offers", r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    _drop("download offers", r"(?:free\s)?download(?:\sfree)?"),
    _drop("click baits", r"\bclick\b\s(?:for|on)\s\w+"),
    _drop("file types", rf"\b{_FILE_TYPE}(?:\simages?)?"),
    _drop("page numbers", r"\bpage\s+\d+\b"),
    _blank("codes such as j2d1a2a", r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b"),
    _drop("sizes such as 1920x1080", rf"\b{_NUMBER}[x\u0445×]{_NUMBER}\b"),
    _swap("spaced colons", r"\b\s+:\s+", ": "),
    _swap("punctuation that touches a word", r"(?<=\D)([,./])\b", r"\1 "),
    _blank("white space", r"\s+"),
    _swap("quotes around it all", "\\A[\"'](.+)[\"']\\Z", r"\1"),
    _drop("leading punctuation", r"\A['_,\-:;]"),
    _drop("trailing punctuation", r"['_,\-:+]\Z"),
    _drop("a dot and one word", r"\A\.\S+\Z"),
    str.strip,
)


def clean_caption(text: str) -> str:
    """The text as the encoder should read it: the whole table of rules, applied twice.

    Twice, because one pass uncovers what the next removes; that is how the training captions
    were made, so it is part of the model. Cleaning of Open-Sora 1.2 (after DeepFloyd IF).

    Raises:
        UserError: the text is not valid Unicode, or holds markup that no HTML parser accepts.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"prompt {text[:60]!r} holds bytes that are not text: a prompt is UTF-8; "
            "check the file's encoding or the terminal's locale"
        )
    for _ in range(_PASSES):
        for step in _STEPS:
            text = step(text)
    return text
