"""Prompt embeddings kept on disk, so that a prompt seen before never loads T5 (19 GB) again.

One safetensors file per caption, named after a hash of everything that decides its embedding:
the encoder's weights and tokenizer, the cleaned caption, the padded length, the number format.
A file is written whole or not at all, so runs may share the directory; one that cannot be read is
ignored, said once and replaced. Beyond `MOST_BYTES` the files unused for longest go.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from opensora_sp.base import access
from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import UserError
from opensora_sp.parallel.agreement import checksum

_log = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
_FORMAT = "opensora-sp text 1"


def default_directory() -> Path | None:
    """`opensora-sp/text` in the user's cache directory; None for a user who has none."""
    return access.user_cache("text")


class TextCache:
    """Embeddings [n,C] of captions of one encoder; n real tokens, without padding.

    encoder: which one, see `opensora_sp.engine.weight_digests`. max_length: L, which decides where
    a caption is cut. Nothing here raises for what the disk does: a cache may fail, a run goes on.
    """

    def __init__(
        self, directory: Path, *, encoder: str, max_length: int, dtype: torch.dtype, width: int
    ) -> None:
        self.directory = directory
        self._encoder, self._max_length, self._width = encoder, max_length, width
        self._dtype = dtype
        self._said = False

    def path(self, caption: str) -> Path:
        """The file of a caption, there or not."""
        key = json.dumps([_FORMAT, self._encoder, caption, self._max_length, str(self._dtype)])
        return self.directory / f"{hashlib.sha256(key.encode('ascii')).hexdigest()}.safetensors"

    def get(self, caption: str) -> Tensor | None:
        """The embedding [n,C] of a caption, None where it is not known."""
        from safetensors import SafetensorError, safe_open

        path = self.path(caption)
        try:
            if not access.is_file(path):
                return None
        except UserError as error:
            self._say(f"embeddings are not looked up: {error}")
            return None
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                about = file.metadata() or {}
                tokens: Tensor = file.get_tensor("tokens")
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            self._say(f"{path} is damaged ({type(error).__name__})")
            return None
        fits = (
            about.get("caption") == caption
            and about.get("checksum") == checksum([tokens])
            and tokens.ndim == 2
            and 0 < tokens.shape[0] <= self._max_length
            and tokens.shape[1] == self._width
            and tokens.dtype == self._dtype
        )
        if not fits:
            self._say(f"{path} does not hold what its name says")
            return None
        with suppress(OSError):
            os.utime(path)  # it is in use: `prune` starts with what is not
        return tokens

    def put(self, caption: str, tokens: Tensor) -> None:
        """Keep the embedding [n,C] of a caption."""
        from safetensors.torch import save_file

        tokens = tokens.detach().cpu().contiguous()
        about = {"format": _FORMAT, "caption": caption, "checksum": checksum([tokens])}
        try:
            with atomic_output(self.path(caption)) as temporary:
                save_file({"tokens": tokens}, str(temporary), metadata=about)
        except (UserError, OSError) as error:
            self._say(f"embeddings are not kept: {error}")
        except Exception as error:  # safetensors' own, for a full disk
            if type(error).__module__.partition(".")[0] != "safetensors":
                raise
            self._say(f"embeddings are not kept: {error}")

    def prune(self, most_bytes: int = MOST_BYTES) -> None:
        """Remove the files unused for longest until the rest fits; call it after writing."""
        with suppress(OSError):
            files = []
            for path in self.directory.glob("*.safetensors"):
                with suppress(OSError):  # another run may remove it at the same time
                    found = path.stat()
                    files.append((found.st_mtime_ns, found.st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= most_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size

    def _say(self, problem: str) -> None:
        if not self._said:
            _log.warning("text cache: %s", problem)
        self._said = True
