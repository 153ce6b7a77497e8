"""One guided forward of the program's own code, counted on tensors without contents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opensora_sp.engine.guidance import Conditions
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config, build_stdit3, patchify
from opensora_sp.parallel.exchange import Comm
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.ledger import Ledger
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import MeshComms
from opensora_sp.request.runtime import Runtime

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class ForwardSize:
    """What decides the cost of one guided forward.

    frames, size: latent frames and (H, W) cells. pixels: (height, width) of the request.
    text: text tokens of each video.
    """

    frames: int
    size: tuple[int, int]
    pixels: tuple[int, int]
    config: STDiT3Config = field(default_factory=STDiT3Config)
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    text: int = 300
    cfg_scale: float = 7.0

    @property
    def residual_bytes(self) -> int:
        """X: bytes of the residual stream of both CFG branches, or of the one that there is."""
        patches = Layout(frames=self.frames, size=self.size, ranks=1).patch_count
        branches = 1 if self.cfg_scale == 1 else 2
        tokens = branches * self.batch * self.frames * patches
        return tokens * self.config.hidden_size * self.dtype.itemsize


def meta_model(config: STDiT3Config, dtype: torch.dtype) -> STDiT3:
    """The transformer without memory, but for the null embedding: it is indexed on the host."""
    model = build_stdit3(config).to(dtype).eval().requires_grad_(False)
    shape = model.y_embedder.y_embedding.shape
    model.y_embedder.y_embedding = torch.zeros(shape, dtype=dtype)
    return model


class _Arrived:
    def wait(self) -> None:
        """Return at once, because nothing is sent."""


def first_rank(mesh: Mesh) -> MeshComms:
    """The groups of a mesh's first rank without the others: exchanges are booked, not sent.

    The first rank has the longer parts of what does not divide. Its ledger is that of `sequence`.
    """
    ledger, place = Ledger(), mesh.place(0)

    def comm(rank: int, size: int) -> Comm:
        return Comm(None, rank, size, ledger, all_to_all=lambda *_, **__: _Arrived())

    return MeshComms(
        mesh=mesh,
        place=place,
        sequence=comm(place.sequence, mesh.sequence),
        guidance=comm(place.guidance, mesh.guidance),
    )


def guided_forward(
    size: ForwardSize, runtime: Runtime | None = None, comms: MeshComms | None = None
) -> Callable[[], Tensor]:
    """One denoising step's velocity, ready to be called; what is made once a video is made here.

    comms: of one rank of several, such as `first_rank` makes; None is one rank alone.
    """
    config = size.config
    model = meta_model(config, size.dtype)
    ranks = 1 if comms is None else comms.mesh.sequence
    layout = Layout(frames=size.frames, size=size.size, ranks=ranks)
    denoiser = parallelize(model, comms, layout, runtime)
    text = torch.empty(size.text, config.caption_channels, dtype=size.dtype, device=META)
    masks = torch.zeros(size.batch, config.model_max_length, dtype=torch.int64)
    masks[:, : size.text] = 1
    with torch.no_grad():
        velocity = denoiser.prepare(
            Conditions(
                tokens=[text] * size.batch,
                masks=masks,
                height=size.pixels[0],
                width=size.pixels[1],
                fps=24,
                cfg_scale=size.cfg_scale,
            )
        )
        latents = torch.empty(size.batch, config.in_channels, size.frames, *size.size, device=META)
        z = patchify(latents)[:, :, denoiser.sharding.patches].contiguous()

    def forward() -> Tensor:
        with torch.no_grad():
            return velocity(z, 500.0)

    return forward
