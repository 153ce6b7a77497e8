"""Captions as the model reads them, and notes where they differ from the prompt.

Caption cleaning drops words that no training caption had. The text encoder reads a limited number
of tokens, and its vocabulary has no piece for some characters. None of these is an error, and each
is worth a note. Imports no torch.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from urllib.parse import unquote_plus

from opensora_sp.base.value_types import shown
from opensora_sp.request.prompts import (
    append_scores,
    caption,
    prompt_for_loop,
    split_loops,
)
from opensora_sp.request.request import Request

_MOST_WORDS = 8  # words that a note names
MOST_NOTES = 10  # notes of a run; a long list in Chinese would fill the screen
_UNREADABLE = "\ufffd"
_IDEOGRAPHS = "\u31c0-\u9fff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]+|(?:(?![{_IDEOGRAPHS}])[^\W_])+")
_SPACE = "\u2581"  # SentencePiece writes the space before a piece as this character


@dataclass(frozen=True)
class CaptionCheck:
    """What the model reads of one text of a prompt.

    clip: the first clip that uses the text. clips: how many texts the prompt has. caption: the
    cleaned text with scores. lost: words of the prompt that are not in the caption. unread: the end
    of the caption after the last token that is read. unknown: words that hold a character without a
    piece.
    """

    prompt: str
    clip: int
    clips: int
    caption: str
    lost: Sequence[str]
    unread: str = ""
    unknown: Sequence[str] = ()

    def notes(self, *, translates: bool = True) -> list[str]:
        """A line for each kind of difference. translates: whether --llm-refine is to be named."""
        where = f"prompt {shown(self.prompt)}"
        if self.clips > 1:
            where += f", the text from clip {self.clip} on"
        translated = " (--llm-refine true translates)" if translates else ""
        said = []
        if self.lost:
            hint = (
                f"write it in English{translated}"
                if any(not word.isascii() for word in self.lost)
                else "put it in plain words"
            )
            said.append(
                f"{where}: not read are {_some(self.lost)}, which caption cleaning drops; the "
                f"model is told {shown(self.caption)}: {hint}"
            )
        if self.unread:
            words = self.unread.split()
            last = "word is" if len(words) == 1 else f"{len(words)} words are"
            said.append(
                f"{where} is longer than the text encoder reads: the last {last} not read, from "
                f"{shown(' '.join(words[:_MOST_WORDS]))} on: shorten it"
            )
        if self.unknown:
            said.append(
                f"{where}: the text encoder has no letters for {_some(self.unknown)}, which all "
                f"read alike to it: write it in English{translated}"
            )
        return said


def captions(request: Request) -> list[str]:
    """The caption of every clip. Equal captions at the end are listed once."""
    every = [caption(request, clip) for clip in range(request.loop)]
    while len(every) > 1 and every[-1] == every[-2]:
        every.pop()
    return every


def check_captions(
    request: Request, tokenizer: Any = None, max_length: int = 0
) -> list[CaptionCheck]:
    """Check each text of a request that a clip uses.

    tokenizer: the text encoder's SentencePiece processor. None checks caption cleaning only.
    max_length: tokens that the encoder reads, including the end token.
    """
    found = []
    texts = [clip for clip in sorted(split_loops(request.prompt)) if clip < request.loop]
    scores = (request.aes, request.flow, request.camera_motion)
    for clip in texts:
        told = caption(request, clip)
        written = append_scores(prompt_for_loop(request.prompt, clip), *scores)
        unread, unknown = ("", []) if tokenizer is None else _read(tokenizer, told, max_length)
        found.append(
            CaptionCheck(
                prompt=request.prompt,
                clip=clip,
                clips=len(texts),
                caption=told,
                lost=lost_words(written, told),
                unread=unread,
                unknown=unknown,
            )
        )
    return found


def lost_words(written: str, caption: str) -> list[str]:
    """The words of a text that are not in its caption, in the text's order.

    A word is a run of letters and digits, or of ideographs. Case, punctuation, and HTML and URL
    escapes make no difference.
    """
    from ftfy import fix_text

    lost = _missing(written, caption)
    if lost:
        decoded = html.unescape(fix_text(unquote_plus(written)))
        if _UNREADABLE not in decoded:  # the % of "20%cats" is not meant as an escape
            lost = min(lost, _missing(decoded, caption), key=len)
    return lost


def _missing(written: str, caption: str) -> list[str]:
    there = Counter(_words(caption))
    missing = []
    for word in _words(written):
        if there[word] > 0:
            there[word] -= 1
        else:
            missing.append(word)
    return missing


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _read(tokenizer: Any, caption: str, max_length: int) -> tuple[str, list[str]]:
    """The end of a caption that is not read, and the words before it with an unknown piece."""
    ids, parts = tokenizer.encode(caption), tokenizer.encode(caption, out_type=str)
    starts = [i for i, part in enumerate(parts) if part.startswith(_SPACE)]
    most = max_length - 1  # the end token takes one
    unread = ""
    if len(parts) > most:
        cut = max((start for start in starts if start <= most), default=most)
        unread = "".join(parts[cut:]).replace(_SPACE, " ").strip()
    number = {start: n for n, start in enumerate(starts)}
    word, of = 0, []
    for i in range(min(len(parts), most)):
        word = number.get(i, word)
        of.append((word, i))
    unknown = []
    for _, group in groupby(of, key=lambda pair: pair[0]):
        places = [i for _, i in group]
        if any(ids[i] == tokenizer.unk_id() for i in places):
            unknown.append("".join(parts[i] for i in places).replace(_SPACE, ""))
    return unread, list(dict.fromkeys(unknown))


def _some(words: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(words))
    named = ", ".join(shown(word) for word in distinct[:_MOST_WORDS])
    more = len(distinct) - _MOST_WORDS
    return named + (f" and {more} more" if more > 0 else "")
