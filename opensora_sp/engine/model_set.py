"""The models of one process: loaded where they are needed, with the mesh that shares them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from opensora_sp.base import faults
from opensora_sp.base.errors import UserError
from opensora_sp.base.geometry import SPATIAL_FACTOR, TIME_FACTOR
from opensora_sp.engine.guidance import Denoiser
from opensora_sp.engine.loading import (
    WeightsFrom,
    load_transformer,
    open_transformer,
)
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.timing import Clock
from opensora_sp.models.compiler import Compiler
from opensora_sp.models.kernels.active import Kernels, using
from opensora_sp.models.kernels.cpu_half import arithmetic
from opensora_sp.models.kernels.probe import DTYPE_NAMES
from opensora_sp.models.offload import ModelOffload
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config
from opensora_sp.parallel.decode_plan import has_several_groups
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.parallel.session import MeshComms, Session
from opensora_sp.request.request import Checkpoints, Request
from opensora_sp.request.runtime import Runtime

if TYPE_CHECKING:
    from opensora_sp.models.video_vae import VideoVAE

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """What a person fixed of one video's mesh; None leaves it to `plan_mesh`."""

    guidance: int | None = None
    sequence: int | None = None


@dataclass
class ModelSet:
    """The transformer and the VAE of one process. Each loads at its first use.

    clock: times the loading and whatever is computed with the models. kernels: what the
    transformer calls; the attention kernels in it are chosen before a video's first step.
    compiler: has the transformer's compiled graphs; None computes without.
    """

    session: Session
    checkpoints: Checkpoints
    dtype: torch.dtype
    runtime: Runtime
    parallelism: Parallelism
    clock: Clock
    config: STDiT3Config
    weights_from: WeightsFrom = "disk"
    kernels: Kernels = field(default_factory=Kernels)
    compiler: Compiler | None = None
    _transformer: STDiT3 | None = None
    _vae: VideoVAE | None = None
    _offload: ModelOffload | None = None
    _comms: dict[Mesh, MeshComms] = field(default_factory=dict)

    def check(self, *, transformer_only: bool = False) -> None:
        """Compare every weight's name and shape with its model, reading none. Collective.

        Raises CheckpointError naming the weight and the file that does not fit.
        """
        files = open_transformer(self.session, self.checkpoints.dit, self.weights_from)
        self.session.control.together(lambda: load_transformer(files, self.config, check_only=True))
        if not transformer_only:
            self.session.control.together(self._check_leading_models, leading_only=True)

    def mesh(self, request: Request) -> Mesh:
        """How the ranks share this request."""
        fixed = self.parallelism
        return plan_mesh(
            self.session.world_size,
            guided=request.cfg_scale != 1,
            guidance=fixed.guidance,
            sequence=fixed.sequence,
        )

    def denoiser(self, request: Request) -> Denoiser:
        """This rank's share of the transformer for a request's shape. Collective at first use."""
        mesh = self.mesh(request)
        if mesh not in self._comms:
            self._comms[mesh] = self.session.build(mesh)
        frames, *size = request.latent_shape
        layout = Layout(frames=frames, size=(size[0], size[1]), ranks=mesh.sequence)
        self.to_device(self.transformer)
        return parallelize(self.transformer, self._comms[mesh], layout, self.runtime, self.compiler)

    @property
    def transformer(self) -> STDiT3:
        """STDiT3 on this rank's device. Collective at first use."""
        if self._transformer is None:
            with self.clock.stage("load"):
                faults.reach("load")
                files = open_transformer(self.session, self.checkpoints.dit, self.weights_from)
                self._transformer = self.session.control.together(
                    lambda: load_transformer(
                        files,
                        self.config,
                        self.dtype,
                        self.session.device,
                        offload=self.runtime.offload,
                    )
                )
        assert self._transformer is not None
        return self._transformer

    def shares_decode(self, request: Request) -> bool:
        """Whether all ranks decode a request's frames; the same answer on every rank."""
        ranks = self.session.world_size
        if ranks == 1 or self.runtime.vae_decode == "rank0" or self.weights_from == "rank0":
            return False
        # Where there is one group the others would load the VAE for nothing.
        return self.runtime.vae_decode == "shared" or has_several_groups(
            request.num_frames, request.micro_frame_size, request.micro_batch_size
        )

    def shared_vae(self, request: Request) -> VideoVAE:
        """The VAE on every rank, for a decode that they share. Collective at first use."""
        vae = self.session.control.together(
            lambda: self._load_vae(request, encoder=self.session.leads and request.loop > 1)
        )
        assert vae is not None
        return vae

    def vae(self, request: Request, *, encoder: bool = False) -> VideoVAE:
        """The video VAE, on the leading rank only; its encoder where references need it."""
        if not self.session.leads:
            raise RuntimeError(f"rank {self.session.rank} has no use for the VAE")
        return self._load_vae(request, encoder=encoder or request.loop > 1)

    def _load_vae(self, request: Request, *, encoder: bool) -> VideoVAE:
        if self._vae is None or (encoder and self._vae.temporal_vae.encoder is None):
            with self.clock.stage("load"):
                from opensora_sp.models.video_vae import VideoVAE

                self._vae = None
                self.to_device(None)
                self._vae = VideoVAE.load(
                    self.checkpoints.vae3d,
                    self.checkpoints.vae2d,
                    dtype=self.dtype,
                    device=self.session.device,
                    with_encoder=encoder,
                    in_host_memory=self.runtime.offload.models,
                )
        self.to_device(self._vae)
        return self._vae.with_micro_sizes(
            request.micro_frame_size, self.runtime.group(request.micro_batch_size)
        )

    def to_device(self, module: nn.Module | None) -> None:
        """Model offload: copy the model that runs next to the device, and free the one before.

        None only makes room. Without model offload every model stays where it is.
        """
        if not self.runtime.offload.models:
            return
        if isinstance(module, STDiT3) and self.runtime.offload.layers:
            module = None  # its layers are copied one by one as they are used
        if self._offload is None:
            self._offload = ModelOffload(self.session.device)
        self._offload.to_device(module)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The context that these models run in."""
        with arithmetic(self.session.device, self.dtype), using(self.kernels):
            yield

    def max_length(self, request: Request) -> int:
        """Text tokens a request is padded to: what it asks for, at most what the model knows."""
        longest = self.config.model_max_length
        return min(request.model_max_length or longest, longest)

    def _check_leading_models(self) -> None:
        from opensora_sp.models.text_encoder import TextEncoder
        from opensora_sp.models.video_vae import VideoVAE

        width = TextEncoder.check(self.checkpoints.t5)
        if width != self.config.caption_channels:
            raise UserError(
                f"{self.checkpoints.t5} encodes to width {width}, but the transformer in "
                f"{self.checkpoints.dit} takes {self.config.caption_channels}: they do not belong "
                "together"
            )
        factors = VideoVAE.check(self.checkpoints.vae3d, self.checkpoints.vae2d)
        if factors != (TIME_FACTOR, SPATIAL_FACTOR):
            raise UserError(
                f"{self.checkpoints.vae3d} shrinks time and space by {factors}, but Open-Sora 1.2 "
                f"and this program count on {(TIME_FACTOR, SPATIAL_FACTOR)}"
            )
