"""The choices of a run that change its speed and memory, never its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Residency = Literal["resident", "turns", "streamed"]
MemoryMode = Literal["speed", "balanced", "small"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Choices for the block loop and for where weights live.

    serial_guidance: one guidance half after the other (half the activations, nothing to share)
        instead of both block by block.
    overlap: exchange one piece of work while another computes.
    chunks: parts of T that a lone stream is cut into, so that there is something to overlap with.
    share_first: compute the first spatial self-attention once for both guidance halves, whose
        inputs are still equal there.
    check_blocks: look for NaN and infinity after every block, and name the first one.
    vae_decode: the leading rank decodes alone, all ranks share it, or whichever pays.
    residency: every model stays on the device; or they take turns there, the others in host
        memory; or the transformer's and T5's layers pass through it one after the other.
    tokens: tokens that a block computes at once, attention included (whole frames or whole
        positions, at least one); None all of them.
    text_encoder: T5 runs on the session's device, or on the CPU.
    text_weights: T5's matrices in the run's dtype, or in 8 bits.
    vae_frames: frames that the spatial VAE takes at once, where that is fewer than a request's
        micro batch.
    """

    serial_guidance: bool = False
    overlap: bool = True
    chunks: int = 1
    share_first: bool = True
    check_blocks: bool = False
    vae_decode: Literal["auto", "rank0", "shared"] = "auto"
    residency: Residency = "resident"
    tokens: int | None = None
    text_encoder: Literal["device", "cpu"] = "device"
    text_weights: Literal["full", "int8"] = "full"
    vae_frames: int | None = None

    @classmethod
    def of(cls, mode: MemoryMode, *, serial_guidance: bool = False, **more: Any) -> Runtime:
        """A memory mode's choices, and others beside them; serial halves stay serial."""
        chosen = {"serial_guidance": serial_guidance, **MEMORY_MODES[mode]}
        return cls(**chosen, **more)

    @property
    def mode(self) -> MemoryMode:
        """The memory mode whose choices these are."""
        found = [m for m, chosen in MEMORY_MODES.items() if chosen["residency"] == self.residency]
        return found[0]

    def group(self, micro_batch: int) -> int:
        """Frames that the spatial VAE takes at once, of a request's micro batch."""
        return micro_batch if self.vae_frames is None else min(micro_batch, self.vae_frames)


# From the fastest to the one that needs least. Tokens at once: enough to keep matrix units busy
# in each, while what a block makes on its way (about 13 values a channel and token) stays small.
MEMORY_MODES: Mapping[MemoryMode, Mapping[str, Any]] = MappingProxyType(
    {
        "speed": {"residency": "resident", "tokens": 65536},
        "balanced": {"residency": "turns", "serial_guidance": True, "tokens": 32768},
        "small": {
            "residency": "streamed",
            "serial_guidance": True,
            "tokens": 16384,
            "vae_frames": 1,
        },
    }
)
