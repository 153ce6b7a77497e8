"""The main path: read a request → every rank draws the same noise → rank 0 encodes the text and
hands it out → all ranks denoise, each on its shard → the latents are decoded → rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from opensora_sp.base import faults
from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.engine.clean_estimate import Previews
from opensora_sp.engine.clips import ConditioningFrames
from opensora_sp.engine.decode import Decoded, decode_alone, decode_shared
from opensora_sp.engine.denoising import denoise
from opensora_sp.engine.model_set import ModelSet
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.options import GenerateOptions, StepEnd
from opensora_sp.engine.progress import Progress, ResumePoint
from opensora_sp.engine.result import Result
from opensora_sp.engine.step_cache.policy import policy_of
from opensora_sp.engine.text import TextStage
from opensora_sp.engine.timing import Clock
from opensora_sp.engine.working_memory import kept_in_decoding
from opensora_sp.media.sinks import Sink
from opensora_sp.request.conditions import dropped_frames
from opensora_sp.request.prompts import caption
from opensora_sp.request.request import Request


def generate(
    models: ModelSet,
    text: TextStage,
    requests: Sequence[Request],
    sinks: Sequence[Sink],
    options: GenerateOptions,
    *,
    noise: Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step_end: StepEnd | None = None,
    keep_latents: bool = True,
    progress: Progress | None = None,
    previews: Previews | None = None,
) -> Result:
    """Generate requests of one shape together. Every rank calls this with the same arguments.

    noise, step_noise, on_step_end: as for `Pipeline.generate`. previews: with
    on_step_end, is shown the estimate of the clean latents when it asks for it. on_step_end is then
    given None for the latents, so that they are not gathered after every step.
    keep_latents: return the latents; without, memory does not grow with the number of clips.
    progress: saves the state on the way, and knows what is there already.
    """
    check_batch(requests)
    progress = progress or Progress()
    _check_call(models, requests, sinks, progress)
    first, clock = requests[0], models.clock
    step_cache = policy_of(first, models.runtime)
    before = dict(clock.seconds)
    every: list[Tensor | None] = []
    left_out: list[list[int]] = []
    with torch.no_grad(), models.arithmetic():
        needed = not progress.is_finished(first.loop - 1)
        kept = ConditioningFrames(
            models, requests, allow_remote=options.allow_remote, needed=needed
        )
        for clip in range(first.loop):
            if progress.is_finished(clip):
                latents = progress.latents(clip)
            else:
                start = progress.resume_point(clip)
                if start is None:
                    with clock.stage("draw noise"):
                        drawn = draw_noise(requests, clip) if noise is None else noise
                    start = ResumePoint(0, *kept.start(clip, drawn))
                captions = [caption(request, clip) for request in requests]
                embedded = text.broadcast(captions, models.max_length(first))
                latents = denoise(
                    models,
                    requests,
                    clip,
                    embedded,
                    start,
                    options,
                    progress,
                    step_noise,
                    on_step_end,
                    left_out,
                    previews,
                )
                progress.finish(clip, latents, last=clip + 1 == first.loop)
            repeated = dropped_frames(first) if clip else 0
            for decoded in decode(models, requests, latents, kept.watched_from(clip)):
                kept.watch(decoded.pixels)
                write(clock, decoded.frames[:, repeated:], sinks)
                repeated = max(0, repeated - decoded.frames.shape[1])
            kept.finish(clip, latents)
            every.append(latents if keep_latents else None)
    seconds = {name: spent - before.get(name, 0.0) for name, spent in clock.seconds.items()}
    return Result(
        requests=requests,
        latents=every,
        sinks=sinks,
        seconds=seconds,
        step_cache=None if step_cache is None else step_cache.name,
        left_out_steps=left_out,
    )


def _check_call(
    models: ModelSet, requests: Sequence[Request], sinks: Sequence[Sink], progress: Progress
) -> None:
    if len(sinks) != len(requests):
        raise UserError(f"{len(sinks)} sinks for {len(requests)} requests: one for each is needed")
    if models.runtime.step_cache is not None and progress.saves:
        raise UserError(
            f"the step cache {models.runtime.step_cache.name} of the runtime is not part of what "
            "is saved for a later run to go on from: give a schedule with the request instead"
        )


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


def decode(
    models: ModelSet,
    requests: Sequence[Request],
    latents: Tensor | None,
    keep_from: int | None = None,
) -> Iterator[Decoded]:
    """Decode the latents [B,4,T,H,W] of the leading rank, a few frames at a time, in order.

    Yields nothing on other ranks. Collective where the ranks share the work. keep_from: the chunk
    from which on pixels are wanted beside the frames.
    """
    request = requests[0]
    if models.shares_decode(request):
        vae = models.shared_vae(request)
        _, height, width = request.latent_shape
        shape = (len(requests), 4, height, width)
        frames = request.num_frames
        parts = decode_shared(models.session, vae, latents, shape, frames, keep_from)
    elif latents is None:
        return
    else:
        vae = models.vae(request)
        parts = decode_alone(vae, latents, request.num_frames, keep_from)
    parts = kept_in_decoding(models, request, vae, parts)
    while True:
        with models.clock.stage("decode"):
            faults.reach("decode")
            decoded = next(parts, None)
        if decoded is None:
            return
        yield decoded


def write(clock: Clock, frames: Tensor, sinks: Sequence[Sink]) -> None:
    """Hand decoded frames, uint8 [B,f,H,W,3], to the sinks."""
    if frames.shape[1] == 0:
        return
    for video, sink in zip(frames, sinks, strict=True):
        with clock.stage("write"):
            faults.reach("encode-to-file")
            sink.write(video.numpy())
