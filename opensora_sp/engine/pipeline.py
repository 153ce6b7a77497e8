"""The Python API: the models of one process, loaded where they are needed.

    with open_session() as session:                     # alone, or as torchrun started us
        pipeline = Pipeline.load(session=session)       # the embedded model, or checkpoints=...
        result = pipeline.generate(Request(prompt="a red ball rolls to the left"))

Every rank runs the same lines; the result's frames and latents are on the leading rank only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opensora_sp.base import faults
from opensora_sp.base.errors import UserError
from opensora_sp.base.finite import require_finite
from opensora_sp.base.geometry import SPATIAL_FACTOR, TIME_FACTOR
from opensora_sp.base.value_types import shown
from opensora_sp.engine.guidance import Denoiser
from opensora_sp.engine.loading import (
    WeightsFrom,
    load_transformer,
    open_transformer,
    transformer_config,
)
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.text_cache import TextCache
from opensora_sp.engine.timing import Clock
from opensora_sp.engine.weight_digests import text_encoder_digest
from opensora_sp.media.fetch import Remote
from opensora_sp.models.kernels.cpu_half import arithmetic
from opensora_sp.models.offload import Turns, release_cached
from opensora_sp.models.stdit3 import STDiT3, STDiT3Config
from opensora_sp.parallel.agreement import hand_out_checked
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.parallel.session import MeshComms, Session, alone
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.preflight import check_conditions
from opensora_sp.request.prompts import split_loops
from opensora_sp.request.request import SETTINGS_KINDS, CheckFinite, Checkpoints, Request, a_path
from opensora_sp.request.runtime import Runtime

if TYPE_CHECKING:
    from opensora_sp.engine.result import Result
    from opensora_sp.models.text_encoder import TextEncoder
    from opensora_sp.models.video_vae import VideoVAE

_CAPTIONS_AT_ONCE = 64  # of a long list, sent to another replica in one go
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


_CHECKPOINTS = "Checkpoints(dit=..., t5=..., vae2d=..., vae3d=...), the four directories"


def _require_kind(name: str, value: object, kind: type[Any], instead: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{name} {shown(value)} is not a {kind.__name__}: give {instead}")


def _require_open(session: Session) -> None:
    if session.whole.closed:
        raise UserError(
            "the session is closed: load and generate inside `with open_session() as session:`"
        )


@dataclass(frozen=True)
class Text:
    """Encoded captions: tokens, one [L_i, caption_channels] each, and masks [n, L] of 0/1."""

    tokens: list[Tensor]
    masks: Tensor


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """What a person fixed of one video's mesh; None leaves it to `plan_mesh`."""

    guidance: int | None = None
    sequence: int | None = None


@dataclass
class Pipeline:
    """Models and settings of one process. Models load at first use; make one with `load`."""

    session: Session
    checkpoints: Checkpoints
    dtype: torch.dtype
    runtime: Runtime
    parallelism: Parallelism
    clock: Clock
    config: STDiT3Config
    show_progress: bool = False
    allow_remote: Remote = False
    check_finite: CheckFinite = "steps"
    weights_from: WeightsFrom = "disk"
    text_cache: Path | None = None
    _transformer: STDiT3 | None = None
    _text_encoder: TextEncoder | None = None
    _vae: VideoVAE | None = None
    _turns: Turns | None = None
    _captions: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _comms: dict[Mesh, MeshComms] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        checkpoints: Checkpoints | None = None,
        *,
        session: Session | None = None,
        dtype: str = "bf16",
        runtime: Runtime | None = None,
        parallelism: Parallelism | None = None,
        show_progress: bool = False,
        allow_remote: Remote = False,
        check_finite: CheckFinite = "steps",
        text_cache: Path | None = None,
        transformer_only: bool = False,
        weights_from: WeightsFrom = "disk",
    ) -> Pipeline:
        """Check every weight's name and shape (no data is read yet) and be ready to generate.

        checkpoints None is the embedded model; session None is this process alone. dtype is fp32,
        fp16 or bf16. check_finite: where to look for NaN. text_cache: where embeddings of captions
        are kept; None keeps them in memory only. transformer_only leaves the text encoder and the
        VAE out of the check. weights_from "rank0": only the leading rank has the checkpoints; it
        hands the transformer out and decodes alone. Raises UserError for an argument that is not
        legal, and CheckpointError naming the weight and the file that does not fit.
        """
        for name, value in (
            ("dtype", dtype),
            ("check_finite", check_finite),
            ("weights_from", weights_from),
        ):
            SETTINGS_KINDS[name].check(name, value)
        _require_kind("checkpoints", checkpoints, Checkpoints, _CHECKPOINTS)
        _require_kind("session", session, Session, "with open_session() as session: ...")
        _require_kind("runtime", runtime, Runtime, "Runtime(...), or leave it out")
        _require_kind("parallelism", parallelism, Parallelism, "Parallelism(sequence=2)")
        text_cache = None if text_cache is None else a_path("text_cache", text_cache)
        session = alone() if session is None else session
        _require_open(session)
        checkpoints = checkpoints or embedded_checkpoints()
        pipeline = cls(
            session=session,
            checkpoints=checkpoints,
            dtype=DTYPES[dtype],
            runtime=runtime or Runtime(),
            parallelism=parallelism or Parallelism(),
            clock=Clock(session.device, session.stage),
            config=transformer_config(session, checkpoints.dit, weights_from),
            weights_from=weights_from,
            show_progress=show_progress,
            allow_remote=allow_remote,
            check_finite=check_finite,
            text_cache=text_cache,
        )
        files = open_transformer(session, checkpoints.dit, weights_from)
        session.together(lambda: load_transformer(files, pipeline.config, check_only=True))
        if not transformer_only:
            session.together(pipeline._check_leading_models, leading_only=True)
        return pipeline

    def generate(
        self,
        request: Request | Sequence[Request],
        *,
        noise: Tensor | None = None,
        step_noise: Callable[[int], Tensor] | None = None,
    ) -> Result:
        """Generate one video, or several of one size together; the frames come back in memory.

        noise [B,4,T,H,W] float32: start every clip from it instead of the requests' keyed draw.
        step_noise(step), same shape: what frames are noised with that join at a step of a masked
        run. Every rank must be given the same. Raises UserError for what cannot be generated,
        before a model is loaded.
        """
        from opensora_sp.engine.generate import check_batch, generate
        from opensora_sp.media.sinks import Collector

        requests = self._requests(request)
        check_batch(requests)
        _require_open(self.session)
        self._check_noise(requests, noise, step_noise)
        self.session.together(lambda: self._check_words(requests), leading_only=True)
        collectors = [Collector() for _ in requests]
        return generate(self, requests, collectors, noise=noise, step_noise=step_noise)

    @staticmethod
    def _requests(request: Request | Sequence[Request]) -> list[Request]:
        if isinstance(request, Request):
            return [request]
        if isinstance(request, str) or not isinstance(request, Iterable):
            raise UserError(
                f"{shown(request)} is not a Request: make one, such as "
                'Request(prompt="a red ball", num_frames=51)'
            )
        return list(request)

    def _check_words(self, requests: Sequence[Request]) -> None:
        """What a prompt, its references and its strategy say, as the command line checks it."""
        for request in requests:
            split_loops(request.prompt)
            check_conditions(request, allow_remote=self.allow_remote)

    @staticmethod
    def _check_noise(requests: Sequence[Request], noise: Any, step_noise: Any) -> None:
        shape = (len(requests), 4, *requests[0].latent_shape)
        if noise is not None:
            if not isinstance(noise, Tensor):
                raise UserError(f"noise {shown(noise)} is not a tensor {list(shape)} of float32")
            if tuple(noise.shape) != shape or noise.dtype != torch.float32:
                raise UserError(
                    f"noise {list(noise.shape)} of {noise.dtype} is not {list(shape)} of float32, "
                    "as these requests need it"
                )
        if step_noise is not None and not callable(step_noise):
            raise UserError(f"step_noise {shown(step_noise)} is not a function of a step's number")

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
        self._take_turn(self.transformer)
        return parallelize(self.transformer, self._comms[mesh], layout, self.runtime)

    @property
    def transformer(self) -> STDiT3:
        """STDiT3 on this rank's device. Collective at first use."""
        if self._transformer is None:
            with self.clock.stage("load"):
                faults.reach("load")
                files = open_transformer(self.session, self.checkpoints.dit, self.weights_from)
                self._transformer = self.session.together(
                    lambda: load_transformer(
                        files,
                        self.config,
                        self.dtype,
                        self.session.device,
                        residency=self.runtime.residency,
                    )
                )
        assert self._transformer is not None
        return self._transformer

    def shares_decode(self, request: Request) -> bool:
        """Whether all ranks decode a request's frames; the same answer on every rank."""
        ranks = self.session.world_size
        if ranks == 1 or self.runtime.vae_decode == "rank0" or self.weights_from == "rank0":
            return False
        # One group of frames cannot be shared: the others would only load the VAE for nothing.
        return self.runtime.vae_decode == "shared" or request.num_frames > request.micro_batch_size

    def shared_vae(self, request: Request) -> VideoVAE:
        """The VAE on every rank, for a decode that they share. Collective at first use."""
        vae = self.session.together(
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
                self._take_turn(None)
                self._vae = VideoVAE.load(
                    self.checkpoints.vae3d,
                    self.checkpoints.vae2d,
                    dtype=self.dtype,
                    device=self.session.device,
                    with_encoder=encoder,
                    at_home=self.runtime.residency != "resident",
                )
        self._take_turn(self._vae)
        self._vae.config = replace(
            self._vae.config,
            micro_frame_size=request.micro_frame_size,
            micro_batch_size=self.runtime.group(request.micro_batch_size),
        )
        return self._vae

    def _take_turn(self, module: nn.Module | None) -> None:
        """Make room for what runs next, and bring it to the device, where models take turns."""
        if self.runtime.residency == "resident":
            return
        if isinstance(module, STDiT3) and self.runtime.residency == "streamed":
            module = None  # it brings its layers itself
        if self._turns is None:
            self._turns = Turns(self.session.device)
        self._turns.take(module)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The context that this pipeline's models run in."""
        return arithmetic(self.session.device, self.dtype)

    def max_length(self, request: Request) -> int:
        """Text tokens a request is padded to: what it asks for, at most what the model knows."""
        longest = self.config.model_max_length
        return min(request.model_max_length or longest, longest)

    def encode_captions(self, captions: Sequence[str], max_length: int) -> None:
        """Encode cleaned captions ahead of their use, on rank 0 of all ranks. Collective of all.

        A replica's leader then needs those of its own videos: `deal_captions`.
        """
        self._encode_together(self.session.whole, captions, max_length)

    def _encode_together(self, session: Session, captions: Sequence[str], max_length: int) -> None:
        """Encode what is missing on the session's leading rank, while the others wait."""
        with self.clock.stage("wait"):
            session.together(lambda: self._encode(captions, max_length), leading_only=True)
        if self.runtime.residency != "resident":
            self.release_text_encoder()

    def deal_captions(self, wanted: Sequence[Sequence[str]], max_length: int) -> None:
        """Give the leader of each replica the embeddings of its captions. Collective of all."""
        session = self.session
        for replica, captions in enumerate(wanted):
            own = session.leads and session.replica == replica
            for start in range(0, len(captions) if replica else 0, _CAPTIONS_AT_ONCE):
                part = [(c, max_length) for c in captions[start : start + _CAPTIONS_AT_ONCE]]
                known = {k: self._captions[k] for k in part} if session.whole.leads else None
                shared = session.whole.share(known)
                if own:
                    self._captions.update(shared)

    def _encode(self, captions: Sequence[str], max_length: int) -> None:
        missing = [c for c in dict.fromkeys(captions) if (c, max_length) not in self._captions]
        if not missing:
            return
        cache = self._open_text_cache(max_length)
        known = {c: t for c in missing if cache and (t := cache.get(c)) is not None}
        self._captions |= {(caption, max_length): tokens for caption, tokens in known.items()}
        missing = [caption for caption in missing if caption not in known]
        if self.show_progress and known:
            print(f"text: {len(known)} captions from the cache", file=sys.stderr, flush=True)
        if not missing:
            return
        encoder = self._load_text_encoder(max_length)
        with arithmetic(encoder.device, self.dtype), self.clock.stage("encode text"):
            faults.reach("encode")
            for caption in missing:
                # One at a time: a caption's embedding must not depend on its neighbours.
                encoded = encoder.encode([caption])
                if self.check_finite != "off":
                    require_finite(encoded.y, f"the text embedding of {shown(caption)}")
                tokens = encoded.y[0, encoded.mask[0].bool()].to("cpu", self.dtype)
                self._captions[caption, max_length] = tokens
                if cache:
                    cache.put(caption, tokens)
        if cache:
            cache.prune()

    def _open_text_cache(self, max_length: int) -> TextCache | None:
        if self.text_cache is None:
            return None
        return TextCache(
            self.text_cache,
            encoder=text_encoder_digest(self.checkpoints.t5) + self.runtime.text_weights,
            max_length=max_length,
            dtype=self.dtype,
            width=self.config.caption_channels,
        )

    def forget_captions(self) -> None:
        """Drop the embeddings made so far, so that encoding can be measured again."""
        self._captions.clear()

    def token_counts(self, captions: Sequence[str], max_length: int) -> list[int]:
        """Real text tokens of captions that have been encoded; on the leading rank."""
        return [len(self._captions[caption, max_length]) for caption in captions]

    def release_text_encoder(self) -> None:
        """Give T5's memory back; embeddings already made are kept."""
        self._text_encoder = None
        release_cached(self.session.device)

    def text(self, captions: Sequence[str], max_length: int) -> Text:
        """Cleaned captions → their embeddings on every rank of the video, from the leading one."""
        session, flat = self.session, None
        self._encode_together(session, captions, max_length)
        lengths: list[int] = []
        if session.leads:
            rows = [self._captions[caption, max_length] for caption in captions]
            flat, lengths = torch.cat(rows), [len(row) for row in rows]
        with self.clock.stage("hand out"):
            lengths = session.share(lengths)
            shape = (sum(lengths), self.config.caption_channels)
            flat = hand_out_checked(session, flat, shape, self.dtype)
        masks = (torch.arange(max_length) < torch.tensor(lengths)[:, None]).to(torch.int64)
        return Text(list(flat.split(lengths)), masks)

    def _load_text_encoder(self, max_length: int) -> TextEncoder:
        if self._text_encoder is None or self._text_encoder.max_length != max_length:
            with self.clock.stage("load"):
                from opensora_sp.models.text_encoder import TextEncoder

                self._text_encoder = None
                self._take_turn(None)
                on_cpu = self.runtime.text_encoder == "cpu"
                self._text_encoder = TextEncoder.load(
                    self.checkpoints.t5,
                    dtype=self.dtype,
                    device=torch.device("cpu") if on_cpu else self.session.device,
                    max_length=max_length,
                    streamed=self.runtime.residency == "streamed" and not on_cpu,
                    eight_bits=self.runtime.text_weights == "int8",
                )
        return self._text_encoder

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
