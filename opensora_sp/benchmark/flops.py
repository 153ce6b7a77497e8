"""FLOPs of a run, and the peak FLOP/s of a device. "Fraction of peak" is computed from them.

A multiplication and an addition count as two FLOPs. Denoising follows the planner's formula
(`opensora_sp.planner.cost`). Decoding is counted operation by operation on the meta device. The
text encoder is counted from its config.json. Only products of matrices and convolutions count,
because peaks are quoted for them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from opensora_sp.base.geometry import split_chunks
from opensora_sp.engine.timing import synchronize
from opensora_sp.models.checkpoint import read_config
from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.models.video_vae import VideoVAE, VideoVAEConfig
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.planner.cost import Workload, step_flops
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime

_PUBLISHED_MLP_RATIO = 4.0  # the planner's formula assumes it
_GEMM_SIDE = {"cpu": 1024}
_GEMM_SIDE_ACCELERATOR = 8192
_PEAK_SECONDS = 1.0


def denoise_flops(
    requests: Sequence[Request],
    tokens: Sequence[int],
    config: STDiT3Config,
    mesh: Mesh,
    rank: int,
    runtime: Runtime,
    steps: int,
) -> float:
    """FLOPs of `rank` over the computed steps of one clip of a batch.

    steps: how many are computed. tokens: text tokens of each request, without padding. The first
    spatial attention counts once where the CFG branches share it.
    """
    first, depth = requests[0], config.depth
    frames, *size = first.latent_shape
    work = Workload(
        frames=frames,
        size=(size[0], size[1]),
        channels=config.hidden_size,
        depth=depth,
        batch=len(requests),
        text=0,
        guided=first.cfg_scale != 1,
        latent_channels=config.in_channels,
    )
    place, layout = mesh.place(rank), work.layout(mesh)
    branches = 2 if work.guided and mesh.guidance == 1 else 1
    own = frames * layout.patch_split[place.sequence]  # patches of one sample on this rank
    c, s = config.hidden_size, layout.patch_count
    total = step_flops(work, mesh, rank)
    # Cross-attention, sample by sample: 4·L·C a token and block, in both blocks of a pair.
    total += depth * branches * own * sum(8 * length * c for length in tokens)
    total += (
        depth
        * branches
        * own
        * len(requests)
        * 8
        * (config.mlp_ratio - _PUBLISHED_MLP_RATIO)
        * (c * c)
    )
    if branches == 2 and runtime.share_first and not runtime.serial_guidance:
        count = len(requests) * frames
        shared = layout.frame_split(count, count)[place.sequence]
        total -= shared * s * (4 * s * c + 6 * c * c)
    return total * steps


def decode_flops(request: Request, vae3d: Path, vae2d: Path) -> float | None:
    """FLOPs of decoding one clip of one request; None where this torch cannot count them."""
    try:
        from torch.utils.flop_counter import FlopCounterMode
    except ImportError:
        return None
    vae = VideoVAE.on_meta(VideoVAEConfig.read(vae3d, vae2d)).eval()
    _, height, width = request.latent_shape
    chunks = Counter(
        (chunk.frames, chunk.latents)
        for chunk in split_chunks(request.num_frames, request.micro_frame_size)
    )
    total = 0.0
    with torch.no_grad():
        for (frames, latents), times in chunks.items():
            z = torch.empty(1, vae.config.temporal.embed_dim, latents, height, width, device="meta")
            with FlopCounterMode(display=False) as counter:
                spatial = vae.decode_chunk_temporal(z, frames)
            total += times * counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:  # every frame costs the same
                vae.spatial_vae.decode(spatial[0, :, :1].transpose(0, 1))
            total += times * frames * counter.get_total_flops()
    return total


def text_flops(t5: Path, length: int) -> float:
    """FLOPs of encoding one caption padded to `length` tokens."""
    config = read_config(t5)
    width, feed_forward = int(config["d_model"]), int(config["d_ff"])
    inner = int(config["num_heads"]) * int(config["d_kv"])
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    weights = 4 * width * inner + (3 if gated else 2) * width * feed_forward
    layer = 2 * length * weights + 4 * length * length * inner
    return float(int(config["num_layers"]) * layer)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the best of those that fit into a second.

    Call it in the context that the models run in: `opensora_sp.models.kernels.cpu_half.arithmetic`.
    """
    side = _GEMM_SIDE.get(device.type, _GEMM_SIDE_ACCELERATOR)
    a = torch.randn(side, side).to(dtype).to(device)
    b = torch.randn(side, side).to(dtype).to(device)
    # Not torch.mm, which `arithmetic` leaves alone: the models' products would beat this "peak".
    torch.matmul(a, b)
    synchronize(device)
    best, end = math.inf, time.perf_counter() + _PEAK_SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.matmul(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best
