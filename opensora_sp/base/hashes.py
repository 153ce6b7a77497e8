"""Hashes of files, and the list of them that stands beside downloaded weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUMS = "SHA256SUMS"  # as sha256sum writes and reads it
_BLOCK = 1 << 20


def write_sums(directory: Path, sums: dict[str, str]) -> None:
    """Record the hashes of files, named relative to the directory."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def sha256(file: Path) -> str:
    """Hex digest of a file's contents."""
    return _digest(file, hashlib.sha256())


def git_blob(file: Path) -> str:
    """The name that git gives a file's contents: what a hub says of files it keeps in git."""
    return _digest(file, hashlib.sha1(f"blob {file.stat().st_size}\0".encode()))


def _digest(file: Path, digest: hashlib._Hash) -> str:
    with file.open("rb") as source:
        while block := source.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
