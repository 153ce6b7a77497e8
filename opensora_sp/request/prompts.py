"""The syntax of a prompt: texts per clip, scores, and JSON with references and a strategy.

A raw prompt is read in this order. `parse_prompt_json` takes the JSON off its end.
`prompt_for_loop` finds the text of a clip. `caption_for_clip` adds scores to it and cleans it. The
syntax is Open-Sora 1.2's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.base.value_types import shown
from opensora_sp.request.request import Request

_LOOPS_MARK = "|0|"
_JSON_KEYS = ("reference_path", "mask_strategy")
# Characters of one text. T5 reads at most 300 tokens of 16 characters. Cleaning takes more than
# linear time for unfinished HTML tags, and every rank would wait for it.
LONGEST_TEXT = 10_000
_MOST_DIGITS = 9  # of a clip's number
_LOOPS_FORM = "write it as |0|text|2|text|..., without other | signs"


@dataclass(frozen=True)
class PromptJson:
    """A prompt's words, its references (paths joined by `;`) and its mask strategy."""

    prompt: str
    reference_path: str
    mask_strategy: str


def parse_prompt_json(raw: str, *, reference_path: str = "", mask_strategy: str = "") -> PromptJson:
    """Split `words{"reference_path": "a.png;b.png", "mask_strategy": "0;0,1,0,-1,1"}`.

    Values in the JSON override the arguments, which are the flags' values for this prompt.

    Raises:
        UserError: a second `{`, bad JSON, another key, or a value that is not a string.
    """
    words, brace, rest = raw.partition("{")
    given = {"reference_path": reference_path, "mask_strategy": mask_strategy}
    if brace:
        if "{" in rest:
            raise UserError(
                f"prompt {shown(raw)} has a second '{{': only one JSON object, at the end of the "
                "prompt, is allowed"
            )
        given.update(_read_json(raw, brace + rest))
    return PromptJson(words, **given)


def _read_json(raw: str, text: str) -> dict[str, str]:
    try:
        found: dict[str, Any] = parse_json(text)  # it begins with a brace
    except NotJson as error:
        if error.key is not None:
            raise UserError(
                f"prompt {shown(raw)} gives a key twice in its JSON: give each once"
            ) from None
        raise UserError(
            f"prompt {shown(raw)}: what follows '{{' {error}; "
            f'write {{"reference_path": "..."}} at its end, or leave the brace out'
        ) from None
    for key, value in found.items():
        if key not in _JSON_KEYS:
            raise UserError(
                f"prompt {shown(raw)}: unknown key {shown(key)} in its JSON; "
                f"known are {' and '.join(_JSON_KEYS)}"
            )
        if not isinstance(value, str):
            raise UserError(
                f"prompt {shown(raw)}: {key} must be a string (join several with ';'), "
                f"not {shown(value)}"
            )
    return found


def split_loops(prompt: str) -> dict[int, str]:
    """First clip → text, for each text of the prompt; {0: prompt} unless it begins with |0|.

    Raises:
        UserError: a clip number that is not a whole number or comes twice, a missing text, or one
            of more than `LONGEST_TEXT` characters.
    """
    if not prompt.startswith(_LOOPS_MARK):
        _check_length(prompt, prompt)
        return {0: prompt}
    fields = prompt.split("|")[1:]
    if len(fields) % 2:
        raise UserError(
            f"prompt {shown(prompt)}: clip {shown(fields[-1])} has no text; {_LOOPS_FORM}"
        )
    segments: dict[int, str] = {}
    for number, text in zip(fields[::2], fields[1::2], strict=True):
        if not re.fullmatch(rf"\s*[0-9]{{1,{_MOST_DIGITS}}}\s*", number):
            raise UserError(
                f"prompt {shown(prompt)}: {shown(number)} is not a clip number; {_LOOPS_FORM}"
            )
        clip = int(number.strip())  # int alone leaves some of what the pattern takes for space
        if clip in segments:
            raise UserError(f"prompt {shown(prompt)} gives clip {clip} two texts; {_LOOPS_FORM}")
        _check_length(prompt, text)
        segments[clip] = text
    return segments


def _check_length(prompt: str, text: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise UserError(
            f"prompt {shown(prompt)} has a text of {len(text)} characters, but {LONGEST_TEXT} are "
            "allowed (the model reads 300 tokens, about 1300 characters): shorten it"
        )


def prompt_for_loop(prompt: str, clip: int) -> str:
    """The text of clip number `clip`, from 0: the text with the largest number up to it."""
    segments = split_loops(prompt)
    return segments[max(first for first in segments if first <= clip)]


def append_scores(
    prompt: str,
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """The prompt with the suffixes for scores that the training captions had, in their order.

    `aes` is the aesthetic score and `flow` the motion score, both written with one decimal. A
    suffix is left out where its value is None or the prompt already holds its label.
    """
    suffixes = (
        ("aesthetic score:", None if aes is None else f"{aes:.1f}"),
        ("motion score:", None if flow is None else f"{flow:.1f}"),
        ("camera motion:", camera_motion),
    )
    new = [
        f" {label} {value}."
        for label, value in suffixes
        if value is not None and label not in prompt
    ]
    return prompt + "".join(new)


def caption_for_clip(
    prompt: str,
    clip: int,
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """The caption that the text encoder reads for one clip: its text with scores, cleaned.

    `prompt` has no JSON at its end. Raises UserError where the text cannot be split or cleaned.
    """
    from opensora_sp.request.captions import clean_caption

    return clean_caption(append_scores(prompt_for_loop(prompt, clip), aes, flow, camera_motion))


def caption(request: Request, clip: int) -> str:
    """The caption of one clip of a request."""
    return caption_for_clip(request.prompt, clip, request.aes, request.flow, request.camera_motion)
