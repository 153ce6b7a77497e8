"""Names of output files."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from opensora_sp.base.value_types import LONGEST_STEM, NOT_IN_NAMES

_HASH_LENGTH = 8


def safe_stem(text: str) -> str:
    """A safe file name stem for `text`; it may be empty.

    Path separators, control characters and a leading `-` become `_`. Leading dots are dropped. A
    text that is too long is cut and ends in a hash of the whole text, so that two long prompts with
    the same beginning get two names.
    """
    stem = NOT_IN_NAMES.sub("_", text.strip())
    stem = re.sub(r"^[.\s]+", "", stem)
    if stem.startswith("-"):
        stem = f"_{stem[1:]}"
    encoded = stem.encode("utf-8")
    if len(encoded) <= LONGEST_STEM:
        return stem
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:_HASH_LENGTH]
    shortened = encoded[: LONGEST_STEM - _HASH_LENGTH - 1].decode("utf-8", errors="ignore")
    return f"{shortened.rstrip()}-{digest}"


def numbered(output: Path, number: int) -> Path:
    """An output's name with a number from 2 on: sample_0000_2.mp4. Number 1 is the name itself."""
    return output if number == 1 else output.with_name(f"{output.stem}_{number}{output.suffix}")


def numbered_from(name: str) -> list[tuple[str, int]]:
    """The output names and numbers of which `numbered` makes this name: itself is number 1."""
    found = re.fullmatch(r"(.+)_([1-9][0-9]{0,8})(\.[^.]*)", name, re.DOTALL)
    if found is None or found[2] == "1":
        return [(name, 1)]
    return [(name, 1), (found[1] + found[3], int(found[2]))]


def output_stems(
    prompts: Sequence[tuple[int, str]], *, sample_name: str | None, prompt_as_path: bool
) -> list[str]:
    """One stem per (index, prompt), all different.

    A stem is SAMPLE_NAME_0000 with the prompt's index, or the prompt itself. A prompt whose stem is
    taken gets its index as well.
    """
    if not prompt_as_path:
        name = sample_name or "sample"
        return [f"{name}_{index:04d}" for index, _ in prompts]
    stems: list[str] = []
    taken: set[str] = set()
    for index, prompt in prompts:
        stem = safe_stem((sample_name or "") + prompt) or f"prompt_{index:04d}"
        while _key(stem) in taken:
            stem = f"{stem}_{index:04d}"
        taken.add(_key(stem))
        stems.append(stem)
    return stems


def _key(stem: str) -> str:
    """A key that is equal for names that some file systems treat as the same.

    They may ignore case, and may treat ü as one character and as u with a diaeresis alike.
    """
    folded = unicodedata.normalize("NFD", stem).casefold()
    return unicodedata.normalize("NFC", folded)
