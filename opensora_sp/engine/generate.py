"""The main path: read a request → every rank draws the same noise → rank 0 encodes the text and
hands it out → all ranks denoise, each on its shard → the latents are decoded → rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora_sp.base import faults
from opensora_sp.base.errors import UserError
from opensora_sp.base.finite import require_finite
from opensora_sp.base.value_types import shown
from opensora_sp.engine.clips import KeptFrames
from opensora_sp.engine.decode import Decoded, decode_alone, decode_shared
from opensora_sp.engine.guidance import Conditions, Denoiser
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.progress import Progress, ResumePoint
from opensora_sp.engine.result import Result
from opensora_sp.engine.sampling import VelocityFunction, sample, timesteps
from opensora_sp.media.sinks import Sink
from opensora_sp.parallel.agreement import checksum, ensure_agreement, fingerprint
from opensora_sp.request.conditions import dropped_frames
from opensora_sp.request.prompts import caption
from opensora_sp.request.request import Request

if TYPE_CHECKING:
    from opensora_sp.engine.pipeline import Pipeline, Text


_HINTS = {
    "steps": "run again with --check-finite blocks to find the block, or with --dtype bf16 or fp32",
    "blocks": "run with --dtype bf16 or fp32, or check the weights",
}


def generate(
    pipeline: Pipeline,
    requests: Sequence[Request],
    sinks: Sequence[Sink],
    *,
    noise: Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    keep_latents: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Generate requests of one shape together. Every rank calls this with the same arguments.

    noise, step_noise: as for `Pipeline.generate`.
    keep_latents: return the latents; without, memory does not grow with the number of clips.
    progress: saves the state on the way, and knows what is there already.
    """
    check_batch(requests)
    if len(sinks) != len(requests):
        raise UserError(f"{len(sinks)} sinks for {len(requests)} requests: one for each is needed")
    with torch.no_grad(), pipeline.arithmetic():
        latents = _generate(pipeline, requests, sinks, noise, step_noise, keep_latents, progress)
    return Result(
        requests=requests, latents=latents, sinks=sinks, seconds=dict(pipeline.clock.seconds)
    )


def _generate(
    pipeline: Pipeline,
    requests: Sequence[Request],
    sinks: Sequence[Sink],
    noise: Tensor | None,
    step_noise: Callable[[int], Tensor] | None,
    keep_latents: bool,
    progress: Progress | None,
) -> list[Tensor | None]:
    """Clip by clip: text, start, denoise, decode, write; the latents of each clip."""
    first = requests[0]
    progress = progress or Progress()
    kept = KeptFrames(pipeline, requests, needed=not progress.is_finished(first.loop - 1))
    latents: list[Tensor | None] = []
    for clip in range(first.loop):
        if progress.is_finished(clip):
            latents.append(progress.latents(clip))
        else:
            start = progress.resume_point(clip)
            if start is None:
                with pipeline.clock.stage("draw noise"):
                    drawn = draw_noise(requests, clip) if noise is None else noise
                start = ResumePoint(0, *kept.start(clip, drawn))
            captions = [caption(request, clip) for request in requests]
            text = pipeline.text(captions, pipeline.max_length(first))
            latents.append(
                denoise(
                    pipeline,
                    requests,
                    clip,
                    text,
                    start.z,
                    start.mask,
                    step_noise,
                    first_step=start.step,
                    progress=progress,
                )
            )
            progress.finish(clip, latents[-1], last=clip + 1 == first.loop)
        repeated = dropped_frames(first) if clip else 0
        for decoded in decode(pipeline, requests, latents[-1], kept.watched_from(clip)):
            kept.watch(decoded.pixels)
            write(pipeline, decoded.frames[:, repeated:], sinks)
            repeated = max(0, repeated - decoded.frames.shape[1])
        kept.finish(clip, latents[-1])
        if not keep_latents:
            latents[-1] = None
    return latents


def check_batch(requests: Sequence[Request]) -> None:
    """Requests of one batch may differ in prompt, place in the list and seed only.

    Raises UserError for others, for none at all and for what is no request.
    """
    if not requests:
        raise UserError("no request is given: one Request or more is needed")
    for request in requests:
        if not isinstance(request, Request):
            raise UserError(
                f"{shown(request)} is not a Request: make one, such as "
                'Request(prompt="a red ball", num_frames=51)'
            )
    free = ("prompt", "prompt_index", "sample_index", "seed", "reference_path", "mask_strategy")
    shared = [{k: v for k, v in r.to_dict().items() if k not in free} for r in requests]
    for other in shared[1:]:
        different = [name for name, value in other.items() if value != shared[0][name]]
        if different:
            raise UserError(
                f"requests of one batch differ in {', '.join(different)}: generate them one by one"
            )


def denoise(
    pipeline: Pipeline,
    requests: Sequence[Request],
    clip: int,
    text: Text,
    start: Tensor,
    frame_mask: Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    *,
    first_step: int = 0,
    progress: Progress | None = None,
) -> Tensor | None:
    """Starting latents [B,4,T,H,W] → latents [B,4,T,H,W] on the leading rank.

    Sharded in between. frame_mask [B,T]: which frames of `start` are kept, see `sample`.
    first_step: `start` is what the steps before it have made. progress: told of every step.
    """
    request = requests[0]
    denoiser: Denoiser = pipeline.denoiser(request)
    _agree(pipeline, requests, text, start)
    times = timesteps(
        request.steps,
        height=request.height,
        width=request.width,
        frames=request.num_frames,
        transform=request.timestep_transform,
    )
    conditions = Conditions(
        tokens=text.tokens,
        masks=text.masks,
        height=request.height,
        width=request.width,
        fps=request.model_fps,
        cfg_scale=request.cfg_scale,
    )

    def noise_at(step: int) -> Tensor:
        drawn = draw_noise(requests, clip, step) if step_noise is None else step_noise(step)
        return denoiser.shard(drawn)

    progress = progress or Progress()
    clock = pipeline.clock
    with clock.stage("denoise"), _bar(pipeline, times, first_step) as bar:
        with clock.part("prepare"):
            velocity = _Watched(pipeline, denoiser.prepare(conditions), len(times), first_step)
            z = denoiser.shard(start)
        step_ended = clock.steps(pipeline.session.ledger)

        def on_step(step: int, z: Tensor) -> None:
            bar.update()
            step_ended(step)
            if step + 1 < len(times):
                progress.watch(clip, step + 1, frame_mask, lambda: denoiser.gather(z))

        with progress.stoppable():
            z = sample(z, times, velocity, frame_mask, noise_at, on_step, first_step)
        velocity.check(z, "the denoised latents")
        with clock.part("gather"):
            return denoiser.gather(z)


class _Watched:
    """The velocity, with the run's progress told to the peers and its numbers looked at."""

    def __init__(
        self, pipeline: Pipeline, velocity: VelocityFunction, steps: int, done: int
    ) -> None:
        self._pipeline, self._velocity, self._steps, self._step = pipeline, velocity, steps, done

    def __call__(self, z: Tensor, t: float, generate: Tensor | None) -> Tensor:
        self._step += 1
        self._pipeline.session.progress(f"step {self._step} of {self._steps}")
        velocity = self._velocity(z, t, generate)
        self.check(velocity, f"the velocity of step {self._step} (t = {t:.1f})")
        return velocity

    def check(self, tensor: Tensor, what: str) -> None:
        if self._pipeline.check_finite != "off":
            require_finite(tensor, what, hint=_HINTS[self._pipeline.check_finite])


def _agree(pipeline: Pipeline, requests: Sequence[Request], text: Text, start: Tensor) -> None:
    """Every rank is about to compute the same video, or the run ends here."""
    session = pipeline.session
    if session.world_size > 1:
        with pipeline.clock.stage("agree"):
            facts = {
                "request": " ".join(request.digest()[:16] for request in requests),
                "noise": checksum([start]),
                "text embedding": checksum([*text.tokens, text.masks]),
                "transformer weights": fingerprint(pipeline.transformer),
            }
            ensure_agreement(session, facts)


def decode(
    pipeline: Pipeline,
    requests: Sequence[Request],
    latents: Tensor | None,
    keep_from: int | None = None,
) -> Iterator[Decoded]:
    """Decode the latents [B,4,T,H,W] of the leading rank, a few frames at a time, in order.

    Yields nothing on other ranks. Collective where the ranks share the work. keep_from: the chunk
    from which on pixels are wanted beside the frames.
    """
    request = requests[0]
    if pipeline.shares_decode(request):
        vae = pipeline.shared_vae(request)
        _, height, width = request.latent_shape
        shape = (len(requests), 4, height, width)
        frames = request.num_frames
        parts = decode_shared(pipeline.session, vae, latents, shape, frames, keep_from)
    elif latents is None:
        return
    else:
        parts = decode_alone(pipeline.vae(request), latents, request.num_frames, keep_from)
    while True:
        with pipeline.clock.stage("decode"):
            faults.reach("decode")
            decoded = next(parts, None)
        if decoded is None:
            return
        yield decoded


def write(pipeline: Pipeline, frames: Tensor, sinks: Sequence[Sink]) -> None:
    """Hand decoded frames, uint8 [B,f,H,W,3], to the sinks."""
    if frames.shape[1] == 0:
        return
    for video, sink in zip(frames, sinks, strict=True):
        with pipeline.clock.stage("write"):
            faults.reach("encode-to-file")
            sink.write(video.numpy())


def _bar(pipeline: Pipeline, times: Sequence[float], first_step: int) -> Any:
    """A bar with steps, pace and ETA on rank 0's standard error."""
    from tqdm import tqdm

    show = pipeline.show_progress and pipeline.session.whole.leads
    steps = len(times)
    return tqdm(total=steps, initial=first_step, desc="denoise", unit="step", disable=not show)
