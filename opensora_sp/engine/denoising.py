"""Denoising of one clip: the steps of the sampler, on the rank's shard, and what follows a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from opensora_sp.engine.step_cache.policy import StepCache, policy_of
from opensora_sp.engine.text import Text
from opensora_sp.engine.timing import Clock
from opensora_sp.engine.working_memory import kept_in_steps
from opensora_sp.parallel.agreement import checksum, ensure_agreement, fingerprint
from opensora_sp.parallel.session import Session
from opensora_sp.request.request import CheckFinite, Request
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
    on_step_end, previews: as for `opensora_sp.engine.generate.generate`.
    """
    options = options or GenerateOptions()
    request, clock = requests[0], models.clock
    denoiser = models.denoiser(request)
    _agree(models, requests, text, start.z)
    checked = _Checked(denoiser, options.check_finite, start.step)
    steps = _Steps(
        session=models.session,
        clock=clock,
        denoiser=denoiser,
        policy=policy_of(request, models.runtime),
        times=times_of(request),
        clip=clip,
        start=start,
        checked=checked,
        progress=progress or Progress(),
        on_step_end=on_step_end,
        previews=previews,
    )

    def noise_at(step: int) -> Tensor:
        drawn = draw_noise(requests, clip, step) if step_noise is None else step_noise(step)
        return denoiser.shard(drawn)

    show = options.show_progress and models.session.whole.leads
    texts = [len(t) for t in text.tokens]
    chosen = False
    if denoiser.compiler is not None:
        # In a stage of its own: the steps are as fast as they stay.
        with clock.stage("compile"):
            # Before the rehearsal: what attention returns depends on its kernel.
            chosen = choose_kernels(models, requests, texts)
            rehearse(models, denoiser, request, start, steps.times[start.step :], show=show)
    with clock.stage("denoise"), kept_in_steps(models, request, len(requests)):
        with clock.part("prepare"):
            chosen = choose_kernels(models, requests, texts) or chosen
            if chosen and show:
                say(models)
            velocity = steps.around(
                denoiser.prepare(_conditions(request, text), checked.on_velocity)
            )
            z = denoiser.shard(start.z)
        with steps.followed(show=show):
            z = sample(z, steps.times, velocity, start.mask, noise_at, steps.on_step, start.step)
        checked.check(z, "the denoised latents")
        if left_out is not None:
            left_out.append(steps.left_out)
        with clock.part("gather"):
            return checked.gather(z)


def _conditions(request: Request, text: Text) -> Conditions:
    return Conditions(
        tokens=text.tokens,
        masks=text.masks,
        height=request.height,
        width=request.width,
        fps=request.model_fps,
        cfg_scale=request.cfg_scale,
    )


class _Checked:
    """What one rank computes of a clip, checked for NaN and infinity, and gathered.

    check_finite: where to look. step: the one that is being computed. It knows nothing of the
    velocity, which holds much memory and calls it.
    """

    def __init__(self, denoiser: Denoiser, check_finite: CheckFinite, step: int) -> None:
        self._denoiser, self._looks = denoiser, check_finite != "off"
        self._finite = FiniteChecks(_HINTS.get(check_finite, ""))
        self.step = step

    def check(self, tensor: Tensor, what: str) -> None:
        """Refuse NaN and infinity, unless that is switched off."""
        if self._looks:
            self._finite.add(tensor, what)

    def on_velocity(self, velocity: Tensor, t: float) -> None:
        """See `Denoiser.prepare`."""
        self.check(velocity, f"the velocity of step {self.step + 1} (t = {t:.1f})")

    def gather(self, z: Tensor) -> Tensor | None:
        """Whole latents [B,4,T,H,W] on the leading rank."""
        self._finite.settle()  # what leaves the loop, to be saved or looked at, is sound
        return self._denoiser.gather(z)

    def gather_held(self, known: Sequence[Computed]) -> HeldVelocities | None:
        """What a step cache holds, whole, on the leading rank."""
        whole = [self._denoiser.gather(one.velocity) for one in known]
        found = [one.cpu() for one in whole if one is not None]
        steps = [one.step for one in known]
        return HeldVelocities(steps, torch.stack(found)) if found else None


@dataclass(kw_only=True)
class _Steps:
    """What follows each step of a clip: its time, saved states, the caller's function, previews.

    policy: which steps are computed; None: all. Every rank calls the same methods in one order.
    """

    session: Session
    clock: Clock
    denoiser: Denoiser
    policy: StepCache | None
    times: Sequence[float]
    clip: int
    start: ResumePoint
    checked: _Checked
    progress: Progress
    on_step_end: StepEnd | None
    previews: Previews | None

    def __post_init__(self) -> None:
        self._computed: Collection[int] = frozenset(range(len(self.times)))
        self._filled: FilledVelocity | None = None

    @property
    def left_out(self) -> list[int]:
        """The steps that are not computed."""
        steps = range(self.start.step, len(self.times))
        return [step for step in steps if step not in self._computed]

    def around(self, velocity: VelocityFunction) -> VelocityFunction:
        """The model's velocity as the sampler calls it: filled where steps are left out."""
        if self.policy is not None:
            known = _sharded(self.denoiser, self.start.held)
            velocity = self._filled = FilledVelocity(
                velocity, self.policy, self.times, self.start.mask, self.start.step, known
            )
            self._computed = self._filled.computed
        self._estimate = CleanEstimate(velocity)
        return velocity if self.previews is None else self._estimate

    @contextmanager
    def followed(self, *, show: bool) -> Iterator[None]:
        """Time the steps of a `with` block, and show them; the run may be stopped in it."""
        self._ended = self.clock.steps(self.session.ledger)
        self._announce()
        with _bar(self._computed, self.start.step, show=show) as bar, self.progress.stoppable():
            self._bar = bar
            yield

    def on_step(self, done: int, z: Tensor) -> None:
        """See `sample`."""
        checked = self.checked
        checked.step = done + 1
        if done in self._computed:  # steps left out are no steps to time: they take next to nothing
            self._bar.update()
            self._ended(done)
        if checked.step < len(self.times):
            self._announce()
            filled = self._filled
            known = None if filled is None else partial(checked.gather_held, filled.held())
            self.progress.watch(
                self.clip, checked.step, self.start.mask, lambda: checked.gather(z), known
            )
        if self.on_step_end is not None:
            self._call(self.on_step_end, done, z)

    def _announce(self) -> None:
        self.session.control.progress(f"step {self.checked.step + 1} of {len(self.times)}")

    def _call(self, on_step_end: StepEnd, done: int, z: Tensor) -> None:
        """The caller's function on every rank; all ranks end when one of them asks for it."""
        previews = self.previews
        latents = self.checked.gather(z) if previews is None else None
        ends = on_step_end(done, self.times[done], latents) is True
        due = previews is not None and previews.due()
        answers = self.session.control.all_gather_object((ends, due))
        if any(ended for ended, _ in answers):
            raise Cancelled(f"the callback ended the generation after step {done + 1}")
        if previews is not None and any(wanted for _, wanted in answers):
            following = self.times[done + 1] if done + 1 < len(self.times) else 0.0
            previews.show(self.checked.gather(self._estimate.clean(z, following)))


def _sharded(denoiser: Denoiser, held: HeldVelocities | None) -> list[Computed]:
    """What a step cache held when a run was left, as this rank's shards."""
    if held is None:
        return []
    pairs = zip(held.steps, held.velocities, strict=True)
    return [Computed(step, denoiser.shard(velocity)) for step, velocity in pairs]


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
