"""What a call of generate returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from opensora_sp.media.sinks import Collector, Sink
from opensora_sp.request.request import Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a batch of requests became; tensors on the leading rank only, None elsewhere.

    latents: per clip [B,4,T,H,W] float32. sinks: as given, one per request, now full.
    seconds: per stage, on this rank. step_cache: the name of the policy, None without one: then
    every step was computed. left_out_steps: per clip that was denoised here, the steps that were
    not computed.
    """

    requests: Sequence[Request]
    latents: list[Tensor | None]
    sinks: Sequence[Sink]
    seconds: dict[str, float]
    step_cache: str | None = None
    left_out_steps: Sequence[Sequence[int]] = ()

    @property
    def videos(self) -> list[NDArray[np.uint8] | None]:
        """The frames of each request, where they were collected: uint8 [F,H,W,3]."""
        return [sink.frames if isinstance(sink, Collector) else None for sink in self.sinks]
