"""Models with random weights, drawn on the device that computes them: nothing is read or written.

Scales are those of make_random_checkpoints, so that runs in bf16 stay finite.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from opensora_sp.benchmark.count.forward import meta_model
from opensora_sp.models.offload import pinned
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config, build_stdit3
from scripts.gpu_day.sizes import Sizes
from scripts.make_random_checkpoints import VAE3D_CONFIG, standard_deviation

Module = TypeVar("Module", bound=nn.Module)


def random_transformer(config: STDiT3Config, device: torch.device, dtype: torch.dtype) -> STDiT3:
    """STDiT3; without contents on the meta device."""
    if device.type == "meta":
        return meta_model(config, dtype)
    return _filled(build_stdit3(config), device, dtype)


def offload_blocks(model: STDiT3, device: torch.device) -> None:
    """Put the blocks' weights into host memory, where layer offload copies them from."""
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        for weight in block.parameters():
            weight.data = pinned(weight.data.cpu(), device)


def random_vae(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    """Both VAEs without their encoders. ImportError without diffusers."""
    from opensora_sp.models.video_vae import VideoVAE, VideoVAEConfig

    vae = VideoVAE.on_meta(VideoVAEConfig(spatial=sizes.spatial_vae, temporal=sizes.temporal_vae))
    vae.drop_encoder()
    _filled(vae, device, dtype)
    for name in ("shift", "scale"):
        setattr(vae, name, torch.tensor(VAE3D_CONFIG[name]).view(1, -1, 1, 1, 1).to(device))
    return vae


def random_t5(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    """T5's encoder. ImportError without transformers and accelerate."""
    from opensora_sp.models.text_encoder import build_t5

    return _filled(build_t5(sizes.t5), device, dtype)


@torch.no_grad()
def _filled(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """The module that was built on the meta device, with random weights; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for places in (part._parameters, part._buffers):
            for name, weight in list(places.items()):
                if weight is None:
                    continue
                if id(weight) not in made:
                    empty = torch.empty(weight.shape, dtype=dtype, device=device)
                    kept = isinstance(weight, nn.Parameter)
                    made[id(weight)] = nn.Parameter(empty, requires_grad=False) if kept else empty
                places[name] = made[id(weight)]  # type: ignore[assignment]
    module.eval()
    for name, weight in module.state_dict(keep_vars=True).items():
        _fill(name, weight.detach())
    return module


def _fill(name: str, weight: Tensor) -> None:
    if name == "rope.freqs":
        exponents = torch.arange(weight.numel(), dtype=torch.float32) / weight.numel()
        weight.copy_((10000.0**-exponents).to(weight.device))
    elif weight.ndim == 1 and name.endswith(".weight"):  # a norm's
        weight.fill_(1.0)
    else:
        weight.normal_().mul_(standard_deviation(name, tuple(weight.shape)))
