"""Caption cleaning: how the captions of Open-Sora 1.2's training set were cleaned.

A prompt passes the same rules before the text encoder reads it. Otherwise the model would read
words that no training caption had. The rules are one table. Each rule works on the result of the
rule before. A letter is a-z, because the text is lower-cased first. Digits, word characters and
white space are Unicode's, and `\\b` is Python's word boundary.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_plus

from opensora_sp.base.errors import UserError

_PASSES = 2
_TOP_LEVEL_DOMAIN = "(?:com|co|ru|net|org|edu|gov|it)"
_FILE_TYPE = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_NUMBER = r"\d+(?:\.\d*)?"
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


@dataclass(frozen=True)
class _Addresses:
    """Drops the beginning of an address (`http://`) or a host.

    The match of a host ends before an `@`, so `a.com/b@x` loses `a.com/`. In `foo.com@bar` no
    shorter match exists, and nothing is dropped.

    The rule is the pattern `\\b(?:beginning|host)`, and its leftmost matches are dropped. It is
    searched run by run, where a run is a-z, digits, dots and hyphens. If no host begins at the
    first word boundary of a run, none begins later in it, because it would have to end at the same
    dot. Trying every boundary, as the pattern alone does, takes seconds for 10,000 characters.
    """

    name: str
    start: re.Pattern[str]
    beginning: re.Pattern[str]
    host: re.Pattern[str]

    @classmethod
    def of(cls, name: str, scheme: str) -> _Addresses:
        """The rule for a scheme, given as a pattern."""
        beginning = rf"{scheme}:(?:/{{1,3}}|[a-z\d%])"
        run = r"[a-z\d.\-]+"
        host = rf"{run}\.{_TOP_LEVEL_DOMAIN}[\w/\-]*\b/?(?!@)"
        return cls(
            name,
            re.compile(rf"\b(?:(?P<beginning>{beginning})|{run})"),
            re.compile(rf"\b{beginning}"),
            re.compile(host),
        )

    def __call__(self, text: str) -> str:
        parts, done, at = [], 0, 0
        while found := self.start.search(text, at):
            match: re.Match[str] | None = found
            if found["beginning"] is None:
                match = self.host.match(text, found.start()) or self._late_beginning(text, found)
            if match is None:
                at = found.end()
            else:
                parts.append(text[done : match.start()])
                done = at = match.end()
        return "".join(parts) + text[done:]

    def _late_beginning(self, text: str, run: re.Match[str]) -> re.Match[str] | None:
        """The scheme at the end of a run, as in `a-http://`. No scheme holds a `.` or a `-`."""
        for length in (len("https"), len("http"), len("www")):
            start = run.end() - length
            if start > run.start() and (match := self.beginning.match(text, start)):
                return match
        return None


def _decode_url(text: str) -> str:
    return unquote_plus(text).strip().lower()


def _html_text(text: str) -> str:
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    with warnings.catch_warnings():
        # BeautifulSoup warns where a text looks like a file name or an address. Captions may.
        warnings.simplefilter("ignore")
        try:
            return BeautifulSoup(text, features="html.parser").get_text()
        except ParserRejectedMarkup:
            raise UserError(
                f"prompt {text[:60]!r} holds an unknown marked section, which HTML does not allow: "
                "remove the '<!['"
            ) from None


def _split_joined_words(text: str) -> str:
    """Split `this-is-my-cute-cat`. A text with up to three joins stays unchanged."""
    if text.count("-") + text.count("_") > 3:
        return text.replace("-", " ").replace("_", " ")
    return text


def _repair_characters(text: str) -> str:
    from ftfy import fix_text

    return html.unescape(html.unescape(fix_text(text))).strip()


_STEPS: tuple[Callable[[str], str], ...] = (
    _decode_url,
    _swap("person tag", "<person>", "person"),
    _Addresses.of("http addresses and hosts", "https?"),
    _Addresses.of("www: addresses and hosts", "www"),
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
    # Tried at a word's start only: if it does not match there, it matches at no later letter.
    _drop("file names", rf"(?<!\S)\S+\.{_FILE_TYPE}"),
    _swap("repeated quotes", "[\"']{2,}", '"'),
    _blank("repeated dots", r"\.{2,}"),
    _blank("decoration", r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+"),
    _blank("lonely dots", r"(?<!\s)\s+\.\s+"),
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
    _blank("codes such as j2d1a2a", r"\b\d*[a-z]+\d+[a-z]+\d[a-z\d]*\b"),
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


@lru_cache(maxsize=1024)
def clean_caption(text: str) -> str:
    """The text that the encoder reads: the whole table of rules, applied twice.

    The training captions were cleaned twice, and the second pass removes what the first uncovers.
    Source: the caption cleaning of Open-Sora 1.2, which follows DeepFloyd IF.

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
