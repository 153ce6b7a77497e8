"""Names of output files."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from opensora_sp.base.value_types import LONGEST_STEM

_UNSAFE_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})  # controls, surrogates, line separators
# They turn the direction of text around, so that a name looks like another one.
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HASH_LENGTH = 8


def safe_stem(text: str) -> str:
    """A file name stem that shows `text` and stays inside its directory; may be empty.

    Separators, control characters and a leading `-`, which programs take for a flag, become `_`,
    leading dots go, and what is too long is cut and ends in a hash of the whole, so that two long
    prompts that begin alike have two names.
    """
    stem = "".join("_" if _is_unsafe(char) else char for char in text.strip())
    stem = re.sub(r"^[.\s]+", "", stem)
    if stem.startswith("-"):
        stem = f"_{stem[1:]}"
    encoded = stem.encode("utf-8")
    if len(encoded) <= LONGEST_STEM:
        return stem
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:_HASH_LENGTH]
    kept = encoded[: LONGEST_STEM - _HASH_LENGTH - 1].decode("utf-8", errors="ignore")
    return f"{kept.rstrip()}-{digest}"


def numbered(output: Path, number: int) -> Path:
    """The number-th name for an output: sample_0000.mp4, sample_0000_2.mp4, sample_0000_3.mp4."""
    return output if number == 1 else output.with_name(f"{output.stem}_{number}{output.suffix}")


def number_of(name: str, output: Path) -> int | None:
    """Which of an output's names this is, None for none of them: 1 for its own."""
    found = re.fullmatch(
        re.escape(output.stem) + r"(?:_([1-9]\d{0,8}))?" + re.escape(output.suffix), name
    )
    if found is None or found[1] == "1":
        return None
    return int(found[1] or 1)


def output_stems(
    prompts: Sequence[tuple[int, str]], *, sample_name: str | None, prompt_as_path: bool
) -> list[str]:
    """One stem per (index, prompt), all different.

    SAMPLE_NAME_0000 with the prompt's index, or the prompt itself; a prompt that would have the
    name of an earlier one also gets its index.
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
    """What two names share that some file system takes for the same.

    Upper and lower case may be one there, and so may ü as one character and as u with two dots.
    """
    folded = unicodedata.normalize("NFD", stem).casefold()
    return unicodedata.normalize("NFC", folded)


def _is_unsafe(char: str) -> bool:
    return char in "/\\" or char in _BIDI or unicodedata.category(char) in _UNSAFE_CATEGORIES
