"""How a run is computed: its speed and its memory. Only a step cache also changes the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.request.memory_modes import NO_OFFLOAD, MemoryMode, Offload, memory_mode


class NamedPolicy(Protocol):
    """What is known here of a step cache: its name. See `opensora_sp.engine.step_cache.policy`."""

    @property
    def name(self) -> str:
        """What a person calls it, with its settings: two equal names give equal results."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Choices for the block loop and for where weights are kept.

    serial_guidance: compute one CFG branch after the other, instead of both block by block. That
        needs half the activations, and the two have nothing to share.
    overlap: exchange one chunk of work while another is computed.
    chunks: chunks of T that a lone stream is cut into, so that there is something to overlap with.
    share_first: compute the first spatial self-attention once for both CFG branches, whose inputs
        are still equal there.
    check_blocks: look for NaN and infinity after every block, and name the first one.
    vae_decode: the leading rank decodes alone, all ranks share it, or whichever pays.
    offload: which weights wait in host memory; by default none.
    tokens: tokens that a block computes at once, attention included (whole frames or whole
        positions, at least one). None is all of them.
    text_encoder: T5 runs on the session's device; there too, but with its layers in host memory,
        from which they are copied one by one; or on the CPU.
    text_weights: T5's matrices in the run's dtype, or in 8 bits. 8 bits change its embeddings.
    vae_frames: frames that the spatial VAE takes at once, where that is fewer than a request's
        micro batch.
    step_kernels: plain ones, folded ones, or by a video's size; see
        `opensora_sp.request.step_kernels`. They round differently.
    attention: the attention kernel's name, or "auto": the fastest that is right on the device.
    fused_kernels: "auto" uses fused kernels where the device has them, "off" plain torch.
    compile: the pieces of a block between its attentions run from compiled graphs, which round
        otherwise; see `opensora_sp.models.compiler`.
    step_cache: a policy of one's own that decides which steps are computed, for requests that ask
        for no step cache; None computes every step. What it makes is never saved for a later run
        to go on from, for which a request's own `step_cache` is the way.
    mode: the memory mode that made these choices; None where each was given by itself.

    Raises UserError for an offload that is no Offload, and for the field's former name.
    """

    serial_guidance: bool = False
    overlap: bool = True
    chunks: int = 1
    share_first: bool = True
    check_blocks: bool = False
    vae_decode: Literal["auto", "rank0", "shared"] = "auto"
    offload: Offload = NO_OFFLOAD
    tokens: int | None = None
    text_encoder: Literal["device", "host", "cpu"] = "device"
    text_weights: Literal["full", "int8"] = "full"
    vae_frames: int | None = None
    step_kernels: Literal["auto", "plain", "folded"] = "auto"
    attention: str = "auto"
    fused_kernels: Literal["auto", "off"] = "auto"
    compile: bool = False
    step_cache: NamedPolicy | None = None
    mode: MemoryMode | None = None

    def __new__(cls, **given: Any) -> Runtime:
        """Refuse the former name of `offload` before the generated __init__ sees it."""
        if "residency" in given:
            raise UserError(
                f"Runtime(residency={given['residency']!r}): the field is called offload now; "
                "resident is Offload(), turns is Offload(models=True), streamed is "
                "Offload(models=True, layers=True)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.offload, Offload):
            raise UserError(
                f"offload {shown(self.offload)} is not an Offload: give Offload(), "
                "Offload(models=True) or Offload(models=True, layers=True)"
            )

    @classmethod
    def of(cls, mode: MemoryMode | str, *, serial_guidance: bool = False, **more: Any) -> Runtime:
        """What a memory mode, or the mode of that name, chooses, and others beside it.

        serial_guidance: also where the mode would compute both CFG branches together. Raises
        UserError for a name that is no mode's.
        """
        chosen = mode if isinstance(mode, MemoryMode) else memory_mode(mode)
        return cls(
            mode=chosen,
            offload=chosen.offload,
            tokens=chosen.tokens,
            vae_frames=chosen.vae_frames,
            serial_guidance=serial_guidance or chosen.serial_guidance,
            **more,
        )

    def group(self, micro_batch: int) -> int:
        """Frames that the spatial VAE takes at once, of a request's micro batch."""
        return micro_batch if self.vae_frames is None else min(micro_batch, self.vae_frames)
