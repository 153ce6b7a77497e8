"""The vocabulary of a text encoder's checkpoint: SentencePiece's pieces. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.errors import CheckpointError, UserError

PIECES_FILE = "spiece.model"
_MOST_BYTES = 64 << 20  # T5's has 0.8 MB


def load_pieces(directory: Path) -> Any:
    """The SentencePiece model itself, not transformers' tokenizer: one behaviour in every version.

    transformers converts this file anew in each major version, and needs protobuf or even a hub
    for it; the pieces, their scores and the normaliser are all in the file.

    Raises CheckpointError where there is none, or it is not T5's.
    """
    from sentencepiece import SentencePieceProcessor

    path = directory / PIECES_FILE
    if not access.is_file(path):
        raise CheckpointError(
            f"no {path.name} in {path.parent}: give the directory of T5 v1.1's encoder"
        )
    try:
        raw = access.read_bytes(path, limit=_MOST_BYTES)
    except UserError as error:
        raise CheckpointError(str(error)) from None
    try:
        pieces = SentencePieceProcessor(model_proto=raw)
    except (OSError, RuntimeError, ValueError) as error:  # of its own message, which is no UTF-8
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a SentencePiece model: download it again"
        ) from error
    if pieces.eos_id() < 0 or pieces.pad_id() < 0:
        raise CheckpointError(f"{path} has no end or padding piece: it is not T5's")
    return pieces
