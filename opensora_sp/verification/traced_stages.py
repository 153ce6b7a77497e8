"""Memory of the stages of a run, counted by the allocation tracer at the published sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from opensora_sp.engine.guidance import Conditions, Denoiser
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.media.pixels import to_bytes
from opensora_sp.models.kernels.int8_linear import quantize_
from opensora_sp.models.offload import OffloadedModuleList
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config
from opensora_sp.models.temporal_vae import TemporalVAEConfig
from opensora_sp.models.video_vae import VideoVAE, VideoVAEConfig
from opensora_sp.parallel.exchange import Comm
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import MeshComms
from opensora_sp.request.runtime import Runtime
from opensora_sp.verification.published import SDXL_VAE, T5_XXL
from opensora_sp.verification.tracing import peak_bytes, without_memory


@dataclass(frozen=True)
class Traced:
    """Bytes on the device in one stage. weights: those that stay. peak: the rest at its most."""

    weights: int
    peak: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.peak


def traced_denoising(
    frames: int,
    size: tuple[int, int],
    mesh: Mesh,
    runtime: Runtime,
    *,
    rank: int = 0,
    batch: int = 1,
    config: STDiT3Config | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Traced:
    """One guided velocity of STDiT3 on one rank. frames: T; size: (H, W) in latent cells."""
    config = config or STDiT3Config()
    with without_memory():
        model = _made(lambda: STDiT3(config), dtype)
        layout = Layout(frames=frames, size=size, ranks=mesh.sequence)
        denoiser = _denoiser(model, mesh, rank, layout, runtime)
        blocks = _bytes(*model.spatial_blocks, *model.temporal_blocks)
        in_host_memory = blocks if runtime.offload.layers else 0
        z = denoiser.shard(torch.empty(batch, config.in_channels, frames, *size))

        def step() -> None:
            denoiser.prepare(_conditions(batch, config, dtype))(z, 500.0)

        return Traced(_bytes(model) - in_host_memory, peak_bytes(step))


def traced_decoding(
    size: tuple[int, int], group: int, *, frames: int = 17, dtype: torch.dtype = torch.bfloat16
) -> Traced:
    """Decoding of one micro-frame chunk, with `group` frames at a time in the spatial VAE."""
    with without_memory():
        spatial = VideoVAEConfig(spatial=SDXL_VAE, temporal=TemporalVAEConfig())
        vae = _made(lambda: VideoVAE(spatial), dtype)
        vae.drop_encoder()
        vae.config = VideoVAEConfig(
            spatial=SDXL_VAE, temporal=TemporalVAEConfig(), micro_batch_size=group
        )
        z = torch.empty(1, 4, -(-frames // 4), *size)

        def chunk() -> None:
            for pixels in vae.decode_groups(z, frames):
                to_bytes(pixels)

        return Traced(_bytes(vae), peak_bytes(chunk))


def traced_text(
    *,
    offload_layers: bool,
    tokens: int = 300,
    dtype: torch.dtype = torch.bfloat16,
    eight_bits: bool = False,
) -> Traced:
    """Encoding of one caption by T5-XXL."""
    from transformers import T5Config, T5EncoderModel

    with without_memory():
        config = T5Config(**T5_XXL)
        model: Any = _made(lambda: T5EncoderModel(config), dtype)
        in_host_memory = 0
        if eight_bits:
            for block in model.encoder.block:
                quantize_(block)
        if offload_layers:
            in_host_memory = _bytes(*model.encoder.block)
            model.encoder.block = OffloadedModuleList(
                list(model.encoder.block), torch.device("cpu")
            )
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        mask = torch.ones_like(ids)
        weights = _bytes(model) - in_host_memory
        return Traced(weights, peak_bytes(lambda: model(input_ids=ids, attention_mask=mask)))


Module = TypeVar("Module", bound=nn.Module)


def _made(make: Callable[[], Module], dtype: torch.dtype) -> Module:
    """A module with weights in `dtype`. Fake tensors cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _denoiser(model: STDiT3, mesh: Mesh, rank: int, layout: Layout, runtime: Runtime) -> Denoiser:
    if mesh.replica_size == 1:
        return parallelize(model, None, layout, runtime)
    place = mesh.place(rank)
    comms = MeshComms(
        mesh=mesh,
        place=place,
        sequence=Comm(None, place.sequence, mesh.sequence),
        guidance=Comm(None, place.guidance, mesh.guidance),
    )
    return parallelize(model, comms, layout, runtime)


def _conditions(batch: int, config: STDiT3Config, dtype: torch.dtype) -> Conditions:
    length = config.model_max_length
    return Conditions(
        tokens=[torch.empty(length, config.caption_channels, dtype=dtype) for _ in range(batch)],
        masks=torch.ones(batch, length, dtype=torch.int64),
        height=720,
        width=1280,
        fps=24,
        cfg_scale=7.0,
    )


def _bytes(*modules: nn.Module) -> int:
    weights = {id(w): w for module in modules for w in module.state_dict(keep_vars=True).values()}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())
