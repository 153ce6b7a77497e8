"""Hashes of files, and the file SHA256SUMS beside downloaded weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

SUMS = "SHA256SUMS"  # the format of the command sha256sum
_BLOCK = 1 << 20


def write_sums(directory: Path, sums: dict[str, str]) -> None:
    """Write SHA256SUMS. Names are relative to the directory."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def sha256(file: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    return _digest(file, hashlib.sha256())


def git_blob(file: Path) -> str:
    """The SHA-1 (hex) of a file as a git blob, which a hub publishes for files it keeps in git."""
    return _digest(file, hashlib.sha1(f"blob {file.stat().st_size}\0".encode()))


def _digest(file: Path, digest: hashlib._Hash) -> str:
    with file.open("rb") as source:
        while block := source.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# Only samples of a large file are hashed, because reading 20 GB before every run takes too long.
# The samples suffice: a fine-tuned model differs everywhere, another model in its size or header.
_WHOLE_BYTES = 4 << 20
_HEAD_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 12
_WINDOWS = 64


def sampled_digest(files: Iterable[Path]) -> str:
    """SHA-256 (hex) of files: of their names, sizes and content, or samples of a large content."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(_HEAD_BYTES))
            for i in range(_WINDOWS):
                file.seek((size - _WINDOW_BYTES) * i // (_WINDOWS - 1))
                digest.update(file.read(_WINDOW_BYTES))
    return digest.hexdigest()
