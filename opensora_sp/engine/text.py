"""The text stage: T5 encodes captions on rank 0, and their embeddings are broadcast.

T5 is freed before denoising, in `TextStage.release_encoder`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora_sp.base import faults
from opensora_sp.base.finite import require_finite
from opensora_sp.base.value_types import shown
from opensora_sp.engine.model_set import ModelSet
from opensora_sp.engine.text_cache import TextCache
from opensora_sp.engine.weight_digests import text_encoder_digest
from opensora_sp.models.kernels.cpu_half import arithmetic
from opensora_sp.models.offload import release_cached
from opensora_sp.parallel.agreement import broadcast_checked
from opensora_sp.parallel.session import Session
from opensora_sp.request.request import CheckFinite

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from opensora_sp.models.text_encoder import TextEncoder

_CAPTIONS_AT_ONCE = 64  # of a long list, sent to another replica in one go
_KEPT = 64  # embeddings kept for later calls, besides those that were encoded ahead


@dataclass(frozen=True)
class Text:
    """Encoded captions: tokens, one [L_i, caption_channels] each, and masks [n, L] of 0/1."""

    tokens: list[Tensor]
    masks: Tensor


@dataclass
class TextStage:
    """T5 of one process, and the embeddings it has made.

    models: whose session, settings and device it shares. cache: a directory in which embeddings
    are kept between runs; None keeps them in memory only. stays: T5 stays loaded from one call to
    the next, whatever the memory mode does with it.
    """

    models: ModelSet
    cache: Path | None = None
    check_finite: CheckFinite = "steps"
    show_progress: bool = False
    stays: bool = False
    _encoder: TextEncoder | None = None
    _captions: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _ahead: set[tuple[str, int]] = field(default_factory=set)

    def encode(self, captions: Sequence[str], max_length: int) -> None:
        """Encode cleaned captions ahead of their use, on rank 0 of all ranks. Collective of all.

        A replica's leader then needs those of its own videos: `scatter`. Those that an earlier call
        encoded ahead are kept no longer than others, so that memory stays flat over many calls.
        """
        self._ahead = {(caption, max_length) for caption in captions}
        self._encode_together(self.models.session.whole, captions, max_length)

    def _encode_together(self, session: Session, captions: Sequence[str], max_length: int) -> None:
        """Encode what is missing on the session's leading rank, while the others wait."""
        with self.models.clock.stage("wait"):
            session.control.together(
                lambda: self._encode_missing(captions, max_length), leading_only=True
            )
        if not (self.stays or self.models.runtime.offload.text_encoder_stays):
            self.release_encoder()

    def scatter(self, wanted: Sequence[Sequence[str]], max_length: int) -> None:
        """Give the leader of each replica the embeddings of its captions. Collective of all."""
        session = self.models.session
        for replica, captions in enumerate(wanted):
            own = session.leads and session.replica == replica
            for start in range(0, len(captions) if replica else 0, _CAPTIONS_AT_ONCE):
                part = [(c, max_length) for c in captions[start : start + _CAPTIONS_AT_ONCE]]
                known = {k: self._captions[k] for k in part} if session.whole.leads else None
                shared = session.whole.control.broadcast_object(known)
                if own:
                    self._captions.update(shared)
                    self._ahead |= set(shared)

    def _forget_oldest(self) -> None:
        """Keep what was encoded ahead and the last few others, so that memory stays flat."""
        others = [key for key in self._captions if key not in self._ahead]
        for key in others[:-_KEPT]:
            del self._captions[key]

    def _encode_missing(self, captions: Sequence[str], max_length: int) -> None:
        missing = [c for c in dict.fromkeys(captions) if (c, max_length) not in self._captions]
        if not missing:
            return
        cache = self._open_cache(max_length)
        known = {c: t for c in missing if cache and (t := cache.get(c)) is not None}
        self._captions |= {(caption, max_length): tokens for caption, tokens in known.items()}
        missing = [caption for caption in missing if caption not in known]
        if self.show_progress and known:
            _log.info("text: %d captions from the cache", len(known))
        if not missing:
            return
        encoder = self._load_encoder(max_length)
        with arithmetic(encoder.device, self.models.dtype), self.models.clock.stage("encode text"):
            faults.reach("encode")
            for caption in missing:
                # One at a time: a caption's embedding must not depend on its neighbours.
                encoded = encoder.encode([caption])
                if self.check_finite != "off":
                    require_finite(encoded.y, f"the text embedding of {shown(caption)}")
                # Moved first: some accelerators have no sound indexing by a mask.
                padded = encoded.y[0].to("cpu", self.models.dtype)
                tokens = padded[encoded.mask[0].bool()]
                self._captions[caption, max_length] = tokens
                if cache:
                    cache.put(caption, tokens)
        if cache:
            cache.prune()

    def _open_cache(self, max_length: int) -> TextCache | None:
        if self.cache is None:
            return None
        return TextCache(
            self.cache,
            encoder=text_encoder_digest(self.models.checkpoints.t5)
            + self.models.runtime.text_weights,
            max_length=max_length,
            dtype=self.models.dtype,
            width=self.models.config.caption_channels,
        )

    def forget(self) -> None:
        """Drop the embeddings made so far, so that encoding can be measured again."""
        self._captions.clear()
        self._ahead.clear()

    def token_counts(self, captions: Sequence[str], max_length: int) -> list[int]:
        """Real text tokens of captions that have been encoded; on the leading rank."""
        return [len(self._captions[caption, max_length]) for caption in captions]

    def release_encoder(self) -> None:
        """Give T5's memory back; embeddings already made are kept."""
        self._encoder = None
        release_cached(self.models.session.device)

    def broadcast(self, captions: Sequence[str], max_length: int) -> Text:
        """Cleaned captions → their embeddings on every rank of the video, from the leading one."""
        session, flat = self.models.session, None
        self._encode_together(session, captions, max_length)
        lengths: list[int] = []
        if session.leads:
            rows = [self._captions[caption, max_length] for caption in captions]
            self._forget_oldest()
            flat, lengths = torch.cat(rows), [len(row) for row in rows]
        with self.models.clock.stage("hand out"):
            lengths = session.control.broadcast_object(lengths)
            shape = (sum(lengths), self.models.config.caption_channels)
            flat = broadcast_checked(session, flat, shape, self.models.dtype)
        masks = (torch.arange(max_length) < torch.tensor(lengths)[:, None]).to(torch.int64)
        return Text(list(flat.split(lengths)), masks)

    def _load_encoder(self, max_length: int) -> TextEncoder:
        self.models.to_device(None)  # with model offload: the model of the job before makes room
        if self._encoder is None or self._encoder.max_length != max_length:
            with self.models.clock.stage("load"):
                from opensora_sp.models.text_encoder import TextEncoder

                self._encoder = None
                runtime = self.models.runtime
                on_cpu = runtime.text_encoder == "cpu"
                layers = runtime.offload.layers or runtime.text_encoder == "host"
                self._encoder = TextEncoder.load(
                    self.models.checkpoints.t5,
                    dtype=self.models.dtype,
                    device=torch.device("cpu") if on_cpu else self.models.session.device,
                    max_length=max_length,
                    offload_layers=layers and not on_cpu,
                    eight_bits=runtime.text_weights == "int8",
                )
        return self._encoder
