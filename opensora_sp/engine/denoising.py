"""Denoising of one clip: the steps of the sampler, on the rank's shard, and what follows a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opensora_sp.base.errors import Cancelled
from opensora_sp.base.finite import FiniteChecks
from opensora_sp.engine.clean_estimate import CleanEstimate, Previews
from opensora_sp.engine.compiling import rehearse
from opensora_sp.engine.guidance import Conditions, Denoiser
from opensora_sp.engine.kernel_choice import choose_kernels, say
from opensora_sp.engine.model_set import ModelSet
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.options import GenerateOptions, StepEnd
from opensora_sp.engine.progress import HeldVelocities, Progress, ResumePoint
from opensora_sp.engine.sampling import VelocityFunction, sample
from opensora_sp.engine.step_cache.filled import Computed, FilledVelocity
from opensora_sp.engine.step_cache.policy import policy_of
from opensora_sp.engine.text import Text
from opensora_sp.engine.working_memory import kept_in_steps
from opensora_sp.parallel.agreement import checksum, ensure_agreement, fingerprint
from opensora_sp.parallel.session import Session
from opensora_sp.request.request import Request
from opensora_sp.request.step_times import times_of

_HINTS = {
    "steps": "run again with --check-finite blocks to find the block, or with --dtype bf16 or fp32",
    "blocks": "run with --dtype bf16 or fp32, or check the weights",
}


def denoise(
    models: ModelSet,
    requests: Sequence[Request],
    clip: int,
    text: Text,
    start: ResumePoint,
    options: GenerateOptions | None = None,
    progress: Progress | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step_end: StepEnd | None = None,
    left_out: list[list[int]] | None = None,
    previews: Previews | None = None,
) -> Tensor | None:
    """Denoise a clip from `start` on: latents [B,4,T,H,W] on the leading rank.

    Sharded in between. start.mask [B,T]: which frames of start.z are kept, see `sample`.
    progress: told of every step. left_out: the steps that were not computed are added to it.
    on_step_end, previews: as for `generate`.
    """
    options, progress = options or GenerateOptions(), progress or Progress()
    request = requests[0]
    denoiser = models.denoiser(request)
    _agree(models, requests, text, start.z)
    times = times_of(request)
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

    clock, session = models.clock, models.session
    step = start.step

    finite = FiniteChecks(_HINTS.get(options.check_finite, ""))

    def check(tensor: Tensor, what: str) -> None:
        if options.check_finite != "off":
            finite.add(tensor, what)

    def gather(z: Tensor) -> Tensor | None:
        finite.settle()  # what leaves the loop, to be saved or looked at, is known to be sound
        return denoiser.gather(z)

    def gather_held(known: Sequence[Computed]) -> HeldVelocities | None:
        whole = [denoiser.gather(one.velocity) for one in known]
        found = [one.cpu() for one in whole if one is not None]
        steps = [one.step for one in known]
        return HeldVelocities(steps, torch.stack(found)) if found else None

    def on_velocity(velocity: Tensor, t: float) -> None:
        check(velocity, f"the velocity of step {step + 1} (t = {t:.1f})")

    def on_step(done: int, z: Tensor) -> None:
        nonlocal step
        step = done + 1
        if done in computed:  # steps left out are no steps to time: they take next to nothing
            bar.update()
            step_ended(done)
        if step < len(times):
            session.control.progress(f"step {step + 1} of {len(times)}")
            known = None if filled is None else partial(gather_held, filled.held())
            progress.watch(clip, step, start.mask, lambda: gather(z), known)
        if on_step_end is not None:
            latents = gather(z) if previews is None else None
            due = _call(session, on_step_end, done, times[done], latents, previews)
            if previews is not None and due:
                following = times[step] if step < len(times) else 0.0
                previews.show(gather(estimate.clean(z, following)))

    policy = policy_of(request, models.runtime)
    filled: FilledVelocity | None = None
    computed = frozenset(range(len(times)))
    show = options.show_progress and session.whole.leads
    texts = [len(t) for t in text.tokens]
    chosen = False
    if denoiser.compiler is not None:
        # In a stage of its own: the steps are as fast as they stay.
        with clock.stage("compile"):
            # Before the rehearsal: what attention returns depends on its kernel.
            chosen = choose_kernels(models, requests, texts)
            rehearse(models, denoiser, request, start, times[start.step :], show=show)
    with clock.stage("denoise"), kept_in_steps(models, request, len(requests)):
        with clock.part("prepare"):
            chosen = choose_kernels(models, requests, texts) or chosen
            if chosen and show:
                say(models)
            velocity: VelocityFunction = denoiser.prepare(conditions, on_velocity)
            if policy is not None:
                known = _sharded(denoiser, start.held)
                filled = FilledVelocity(velocity, policy, times, start.mask, start.step, known)
                velocity, computed = filled, filled.computed
            estimate = CleanEstimate(velocity)
            z = denoiser.shard(start.z)
        step_ended = clock.steps(session.ledger)
        session.control.progress(f"step {step + 1} of {len(times)}")
        with _bar(computed, start.step, show=show) as bar, progress.stoppable():
            asked = velocity if previews is None else estimate
            z = sample(z, times, asked, start.mask, noise_at, on_step, start.step)
        check(z, "the denoised latents")
        if left_out is not None:
            left_out.append([i for i in range(start.step, len(times)) if i not in computed])
        with clock.part("gather"):
            return gather(z)


def _sharded(denoiser: Denoiser, held: HeldVelocities | None) -> list[Computed]:
    """What a step cache held when a run was left, as this rank's shards."""
    if held is None:
        return []
    pairs = zip(held.steps, held.velocities, strict=True)
    return [Computed(step, denoiser.shard(velocity)) for step, velocity in pairs]


def _call(
    session: Session,
    on_step_end: StepEnd,
    step: int,
    t: float,
    latents: Tensor | None,
    previews: Previews | None,
) -> bool:
    """The caller's function on every rank; all ranks end when one of them asks for it.

    Returns whether a preview is due, the same on every rank.
    """
    ends = on_step_end(step, t, latents) is True
    due = previews is not None and previews.due()
    answers = session.control.all_gather_object((ends, due))
    if any(ended for ended, _ in answers):
        raise Cancelled(f"the callback ended the generation after step {step + 1}")
    return any(wanted for _, wanted in answers)


def _agree(models: ModelSet, requests: Sequence[Request], text: Text, start: Tensor) -> None:
    """Every rank is about to compute the same video, or the run ends here."""
    session = models.session
    if session.world_size > 1:
        with models.clock.stage("agree"):
            facts = {
                "request": " ".join(request.digest()[:16] for request in requests),
                "noise": checksum([start]),
                "text embedding": checksum([*text.tokens, text.masks]),
                "transformer weights": fingerprint(models.transformer),
                "step cache": _policy_name(requests[0], models),
            }
            ensure_agreement(session, facts)


def _policy_name(request: Request, models: ModelSet) -> str:
    policy = policy_of(request, models.runtime)
    return "none" if policy is None else policy.name


def _bar(computed: Collection[int], first_step: int, *, show: bool) -> Any:
    """A bar with the steps that are computed, pace and ETA on rank 0's standard error."""
    from tqdm import tqdm

    done = sum(step < first_step for step in computed)
    return tqdm(total=len(computed), initial=done, desc="denoise", unit="step", disable=not show)
