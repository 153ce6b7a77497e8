"""The Python API: models of one process, loaded once, generating as often as wanted.

    with open_session() as session:                     # alone, or as torchrun started us
        pipeline = Pipeline.load(session=session)       # the embedded model, or checkpoints=...
        result = pipeline.generate(Request(prompt="a red ball rolls to the left"))

Every rank runs the same lines; the result's frames and latents are on the leading rank only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.engine.clean_estimate import Previews
from opensora_sp.engine.compiling import new_compiler
from opensora_sp.engine.generate import check_batch, generate
from opensora_sp.engine.kernel_choice import kernels_asked_for
from opensora_sp.engine.loading import WeightsFrom, transformer_config
from opensora_sp.engine.model_set import DTYPES, ModelSet, Parallelism
from opensora_sp.engine.options import GenerateOptions, StepEnd
from opensora_sp.engine.progress import Progress
from opensora_sp.engine.result import Result
from opensora_sp.engine.step_cache.policy import check_policy
from opensora_sp.engine.step_cache.settle import settle
from opensora_sp.engine.text import TextStage
from opensora_sp.engine.timing import Clock
from opensora_sp.engine.weight_digests import transformer_digest
from opensora_sp.media.fetch import Remote
from opensora_sp.media.sinks import Collector, Sink
from opensora_sp.parallel.session import Session, alone
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.preflight import check_conditions, find_checkpoints
from opensora_sp.request.prompts import split_loops
from opensora_sp.request.request import CheckFinite, Checkpoints, EngineSettings, Request
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.setting import a_path, settings_of

_log = logging.getLogger(__name__)
_CHECKPOINTS = "Checkpoints(dit=..., t5=..., vae2d=..., vae3d=...), the four directories"


def _require_kind(name: str, value: object, kind: type[Any], instead: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{name} {shown(value)} is not a {kind.__name__}: give {instead}")


def _require_open(session: Session) -> None:
    if session.whole.closed:
        raise UserError(
            "the session is closed: load and generate inside `with open_session() as session:`"
        )


@dataclass
class Pipeline:
    """Models and settings of one process. Models load at first use; make one with `load`.

    models: the transformer and the VAE. text: T5 and its embeddings. options: for every call.
    """

    models: ModelSet
    text: TextStage
    options: GenerateOptions

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
        clock: Clock | None = None,
    ) -> Pipeline:
        """Check every weight's name and shape (no data is read yet) and be ready to generate.

        checkpoints None is the embedded model; session None is this process alone. dtype is fp32,
        fp16 or bf16. check_finite: where to look for NaN. text_cache: where embeddings of captions
        are kept; None keeps them in memory only. transformer_only leaves the text encoder and the
        VAE out of the check. weights_from "rank0": only the leading rank has the checkpoints; it
        hands the transformer out and decodes alone. clock: times the stages; None is a new one.
        Raises UserError for an argument that is not legal, and CheckpointError naming the weight
        and the file that does not fit.
        """
        for name, value in (
            ("dtype", dtype),
            ("check_finite", check_finite),
            ("weights_from", weights_from),
        ):
            settings_of(EngineSettings)[name].check(value)
        _require_kind("checkpoints", checkpoints, Checkpoints, _CHECKPOINTS)
        _require_kind("session", session, Session, "with open_session() as session: ...")
        _require_kind("runtime", runtime, Runtime, "Runtime(...), or leave it out")
        _require_kind("parallelism", parallelism, Parallelism, "Parallelism(sequence=2)")
        text_cache = None if text_cache is None else a_path("text_cache", text_cache)
        runtime = runtime or Runtime()
        for name in ("attention", "fused_kernels"):
            settings_of(EngineSettings)[name].check(getattr(runtime, name))
        if runtime.step_cache is not None:
            check_policy(runtime.step_cache)
        session = alone() if session is None else session
        _require_open(session)
        checkpoints = checkpoints or embedded_checkpoints()
        config = transformer_config(session, checkpoints.dit, weights_from)
        kernels = session.control.together(
            lambda: kernels_asked_for(runtime.attention, config, DTYPES[dtype], session.device)
        )
        assert kernels is not None
        models = ModelSet(
            session=session,
            checkpoints=checkpoints,
            dtype=DTYPES[dtype],
            runtime=runtime,
            parallelism=parallelism or Parallelism(),
            clock=clock or Clock(session.device, session.control.stage),
            config=config,
            weights_from=weights_from,
            kernels=kernels,
            compiler=new_compiler(session.device) if runtime.compile else None,
        )
        models.check(transformer_only=transformer_only)
        text = TextStage(
            models, cache=text_cache, check_finite=check_finite, show_progress=show_progress
        )
        options = GenerateOptions(
            check_finite=check_finite, allow_remote=allow_remote, show_progress=show_progress
        )
        return cls(models, text, options)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path | None = None,
        *,
        dit: str | Path | None = None,
        t5: str | Path | None = None,
        vae2d: str | Path | None = None,
        vae3d: str | Path | None = None,
        **settings: Any,
    ) -> Pipeline:
        """`load` from directories on this machine; nothing is downloaded.

        directory: holds dit, t5, vae2d and vae3d, as opensora-sp download leaves them. Or
        the four by name, which win over what `directory` holds. settings: as for `load`. Raises
        UserError naming the directory that is missing or the file that it lacks.
        """
        given = {"dit": dit, "t5": t5, "vae2d": vae2d, "vae3d": vae3d}
        return cls.load(find_checkpoints(directory, given), **settings)

    @property
    def session(self) -> Session:
        """The ranks that this pipeline's videos are shared among."""
        return self.models.session

    def generate(
        self,
        request: Request | Sequence[Request],
        *,
        noise: Tensor | None = None,
        step_noise: Callable[[int], Tensor] | None = None,
        callback_on_step_end: StepEnd | None = None,
    ) -> Result:
        """Generate one video, or several of one size together; the frames come back in memory.

        noise [B,4,T,H,W] float32: start every clip from it instead of the requests' keyed draw.
        step_noise(step), same shape: what frames are noised with that join at a step of a masked
        run. callback_on_step_end(step, t, latents): called after every step, counted from 0, with
        the step's time t (1000 is noise, 0 the video) and the latents [B,4,T,H,W], which are None
        on ranks that do not lead; where it returns True on any rank, all ranks raise Cancelled.
        Every rank must be given the same. Raises UserError for what cannot be generated, before a
        model is loaded.
        """
        requests = self._requests(request)
        check_batch(requests)
        _require_open(self.session)
        self._check_noise(requests, noise, step_noise)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise UserError(
                f"callback_on_step_end {shown(callback_on_step_end)} is not a function of a "
                "step's number, its time and the latents"
            )
        self.session.control.together(lambda: self._check_words(requests), leading_only=True)
        requests = self._settled(requests)
        return self.generate_to(
            requests,
            [Collector() for _ in requests],
            noise=noise,
            step_noise=step_noise,
            on_step_end=callback_on_step_end,
        )

    def generate_to(
        self,
        requests: Sequence[Request],
        sinks: Sequence[Sink],
        *,
        noise: Tensor | None = None,
        step_noise: Callable[[int], Tensor] | None = None,
        on_step_end: StepEnd | None = None,
        keep_latents: bool = True,
        progress: Progress | None = None,
        previews: Previews | None = None,
    ) -> Result:
        """Generate requests of one size into one sink each; what they say was checked before.

        keep_latents: return the latents; without, memory does not grow with the number of clips.
        progress: saves the state on the way, and knows what is there already. previews: sees the
        video while it is denoised; on_step_end is then given no latents. The others as for
        `generate`.
        """
        return generate(
            self.models,
            self.text,
            requests,
            sinks,
            self.options,
            noise=noise,
            step_noise=step_noise,
            on_step_end=on_step_end,
            keep_latents=keep_latents,
            progress=progress,
            previews=previews,
        )

    def _settled(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with the schedules that their step caches mean. Collective."""
        checkpoints = self.models.checkpoints
        settled, said = settle(
            self.session, requests, checkpoints.dit, lambda: transformer_digest(checkpoints.dit)
        )
        if self.options.show_progress and self.session.whole.leads:
            for line in said:
                _log.info(line)
        return settled

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
            check_conditions(request, allow_remote=self.options.allow_remote)

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
