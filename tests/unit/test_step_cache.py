"""Steps that are not computed: what fills them, which they are, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from opensora_sp.base.errors import UserError
from opensora_sp.engine.clips import apply_strategy
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.progress import Progress
from opensora_sp.engine.sampling import sample
from opensora_sp.engine.step_cache.filled import FilledVelocity
from opensora_sp.jobs.outputs import describe
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.session import alone
from opensora_sp.request.computed_steps import computed_before, computed_steps
from opensora_sp.request.conditions import layout_of
from opensora_sp.request.mask_strategy import parse_mask_strategy, plan_clip
from opensora_sp.request.request import EngineSettings, Job, JobSettings, Request, Task
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.step_schedule import FILLS, StepSchedule
from opensora_sp.request.step_times import times_of, timesteps

REQUEST = Request(prompt="a red ball", height=32, width=48, num_frames=17, steps=6)
TIMES = timesteps(12, height=64, width=96, frames=17)


def schedule(*computed: int, steps: int = 12, fill: str = "hold") -> StepSchedule:
    return StepSchedule(name="own", steps=steps, computed=computed, fill=fill)


class Counting:
    """A velocity that is a function of z, t and the frames, and notes the times it is asked for."""

    def __init__(self, power: int | None = None) -> None:
        self.asked: list[float] = []
        self._power = power

    def __call__(self, z: Tensor, t: float, generate: Tensor | None) -> Tensor:
        self.asked.append(t)
        if self._power is not None:
            return torch.full_like(z, (t / 1000) ** self._power)
        return torch.tanh(z + t / 1000) + (0 if generate is None else generate[..., None])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(
    policy: StepSchedule | None, power: int | None = None, mask: Tensor | None = None
) -> tuple[Tensor, list[int], list[tuple[Tensor, Any]]]:
    """The last z, the steps that were computed, and z and what is held after each step."""
    model = Counting(power)
    filled = None if policy is None else FilledVelocity(model, policy, TIMES, mask)
    seen: list[tuple[Tensor, Any]] = []

    def on_step(step: int, z: Tensor) -> None:
        seen.append((z, () if filled is None else filled.held()))

    z = sample(normal(2, 5, 3), TIMES, filled or model, mask, noise_at, on_step)
    return z, [TIMES.index(t) for t in model.asked], seen


def noise_at(step: int) -> Tensor:
    return normal(2, 5, 3, seed=step + 1)


@pytest.mark.parametrize(("order", "fill"), list(enumerate(FILLS)))
def test_a_fill_is_exact_for_velocities_of_its_order_in_t(order: int, fill: str) -> None:
    policy = schedule(0, 1, 2, 5, 9, fill=fill)
    for power in range(3):
        exact, _, _ = run(None, power)
        filled, computed, _ = run(policy, power)
        assert computed == list(policy.computed)
        error = float((filled - exact).abs().max())
        assert (error < 1e-5) == (power <= order), (power, error)


# The second sample's last frames join at t = 1000·0.6 and 1000·0.3, the others begin at once.
MASK = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.6, 0.3]])


def test_a_step_at_which_frames_join_is_computed_and_what_was_before_it_forgotten() -> None:
    joins = [next(i for i, t in enumerate(TIMES) if t <= 1000 * part) for part in (0.6, 0.3)]
    _, computed, seen = run(schedule(0, 1, fill="quadratic"), mask=MASK)
    assert computed == [0, 1, *joins]
    assert [one.step for one in seen[joins[0] - 1][1]] == [0, 1]
    for join in joins:
        assert [one.step for one in seen[join][1]] == [join]


@pytest.mark.parametrize("transform", [True, False])
def test_plans_count_the_steps_at_which_frames_join_as_the_run_does(transform: bool) -> None:
    """Also for ratios that are equal to a time, of which rounding decides."""
    policy = schedule(0, 2, 4)
    plain = replace(REQUEST, num_frames=34, steps=12, timestep_transform=transform)
    found: set[int] = set()
    times = times_of(plain)
    ratios = [t / 1000 - less for t in times[1:] for less in (0, 1e-10)] + [0.001, 0.449, 0.95]
    for strategy in [f"0,0,0,0,4,{ratio}" for ratio in ratios] + [
        "0,0,0,0,5,0.3;0,0,0,5,5,0.7",
        "0,0,0,0,10,0.3;0,0,0,0,5,0;0,0,0,5,5,1",  # what a later group covers does not join
        "1,0,0,0,4,0.5",  # of a clip that is not made
        "0,0,0,-5,5,0.6",
    ]:
        edited = replace(plain, reference_path="a.mp4", mask_strategy=strategy)
        groups, layout = parse_mask_strategy(strategy), layout_of(edited)
        placed = plan_clip(groups, 0, [34], layout, edited.align)
        mask = apply_strategy(torch.zeros(4, 10, 1, 1), [torch.zeros(4, 10, 1, 1)], placed)
        masks = torch.stack([torch.ones(10), mask])  # the batch's other video has no reference
        run = FilledVelocity(Counting(), policy, times, masks)
        planned = computed_steps([plain, edited], policy, 0)
        assert set(planned) == run.computed, strategy
        assert list(planned) == sorted(planned)
        found |= run.computed
    assert found == set(range(12))  # every step is one at which some of them join


def test_steps_are_counted_clip_by_clip() -> None:
    looped = replace(REQUEST, num_frames=34, steps=12, loop=3, step_cache=schedule(0, 6))
    looped = replace(looped, reference_path="a.mp4")
    assert computed_before([looped]) == [0, *(n for n in range(1, 7) for _ in range(6))]
    edited = replace(looped, mask_strategy="1,0,0,5,1,0.5")
    times = times_of(edited)
    join = next(step for step, t in enumerate(times) if t <= 500)
    before = computed_before([looped, edited])
    assert before[12] == 2  # the first clip has no join
    assert [before[12 + join + 1] - before[12 + join], before[24], before[36]] == [1, 5, 7]
    assert computed_before([replace(edited, step_cache="off")]) == list(range(37))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_run_goes_on_from_any_step_to_the_same_bits(fill: str, mask: Tensor | None) -> None:
    policy = schedule(0, 1, 3, 4, 8, 11, fill=fill)
    whole, _, seen = run(policy, mask=mask)
    for first, (z, held) in enumerate(seen[:-1], start=1):
        velocity = FilledVelocity(Counting(), policy, TIMES, mask, first, held)
        assert torch.equal(sample(z, TIMES, velocity, mask, noise_at, None, first), whole), first


def loaded(**choices: Any) -> Pipeline:
    return Pipeline.load(session=alone("cpu"), dtype="fp32", runtime=Runtime(**choices))


@dataclass(frozen=True)
class EverySecond:
    """A policy of one's own: the odd steps are held."""

    name: str = "every second"
    fill: str = "hold"

    def computes(self, step: int, t: float) -> bool:
        """The even ones."""
        return step % 2 == 0


@pytest.mark.parametrize("cache", [0.1, "fast", EverySecond, replace(EverySecond(), fill="cubic")])
def test_what_is_no_policy_is_refused_when_models_are_loaded(cache: Any) -> None:
    with pytest.raises(UserError, match=r"step_cache .*(is not a StepCache|is not one of hold)"):
        loaded(step_cache=cache)


def test_a_result_says_which_steps_were_left_out_and_one_that_leaves_none_out_is_exact() -> None:
    pipeline = loaded()
    exact = pipeline.generate(REQUEST)
    assert (exact.step_cache, list(exact.left_out_steps)) == (None, [[]])
    every = pipeline.generate(replace(REQUEST, step_cache=schedule(*range(6), steps=6)))
    assert np.array_equal(every.videos[0], exact.videos[0])  # type: ignore[arg-type]
    held = replace(REQUEST, step_cache=schedule(0, 2, 4, steps=6))
    filled = pipeline.generate([held, replace(held, prompt="a blue square", seed=1)])
    assert (filled.step_cache, list(filled.left_out_steps)) == ("own", [[1, 3, 5]])
    assert not np.array_equal(filled.videos[0], exact.videos[0])  # type: ignore[arg-type]
    own = loaded(step_cache=EverySecond())
    same = own.generate([REQUEST, replace(REQUEST, prompt="a blue square", seed=1)])
    assert list(same.left_out_steps) == [[1, 3, 5]]
    for one, other in zip(same.videos, filled.videos, strict=True):
        assert np.array_equal(one, other)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="step_cache 'own' of the request meets step_cache 'every"):
        own.generate(held)


def test_a_finished_file_says_which_steps_were_computed(tmp_path: Path) -> None:
    pipeline = cast(Pipeline, SimpleNamespace(session=alone("cpu")))
    request = replace(REQUEST, step_cache=schedule(0, 2, 4, steps=6, fill="linear"))
    task = Task(request=request, output=tmp_path / "a.mp4")
    job = Job(engine=EngineSettings(), settings=JobSettings(), tasks=(task,))
    said = json.loads(json.dumps(describe(pipeline, job, request)))["request"]
    assert said["step_cache"]["computed"] == [0, 2, 4]
    assert (said["step_cache"]["fill"], said["steps"]) == ("linear", 6)


class Saving(Progress):
    """Like the one that saves latents, but it keeps none."""

    saves = True


def test_what_cannot_be_saved_and_what_is_not_settled_is_refused() -> None:
    with pytest.raises(
        UserError, match="step_cache 'fast' of a request is not a schedule yet: call Pipeline"
    ):
        loaded().generate_to([replace(REQUEST, step_cache="fast")], [Collector()])
    with pytest.raises(UserError, match="step cache every second of the runtime is not part of"):
        loaded(step_cache=EverySecond()).generate_to([REQUEST], [Collector()], progress=Saving())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 7}, "step_cache own is for 6 steps, but steps is 7"),
        ({"num_frames": 1}, "step_cache own is for videos, but an image is asked for"),
    ],
)
def test_a_schedule_for_something_else_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(REQUEST, step_cache=schedule(0, 3, steps=6), **fields)


def test_levels_in_the_python_api_are_the_checkpoints_own_or_a_general_pattern(
    tmp_path: Path,
) -> None:
    result = loaded().generate(replace(REQUEST, steps=10, step_cache="near-lossless"))
    assert result.step_cache == "near-lossless"
    assert 0 < len(result.left_out_steps[0]) <= 5
    with pytest.raises(UserError, match=r"nope.yaml'?: there is no such file"):
        loaded().generate(replace(REQUEST, step_cache=str(tmp_path / "nope.yaml")))


def test_the_more_steps_are_computed_the_nearer_is_the_video() -> None:
    """On the embedded model: no figure of a size that matters, but the order has to be right."""
    pipeline = loaded()
    exact = pipeline.generate(REQUEST).latents[0]
    assert exact is not None

    def moved(*computed: int) -> float:
        request = replace(REQUEST, step_cache=schedule(*computed, steps=6, fill="linear"))
        latents = pipeline.generate(request).latents[0]
        assert latents is not None
        return float((latents - exact).norm() / exact.norm())

    little, much = moved(0, 1, 2, 4, 5), moved(0, 1, 4)
    assert 0 < little < much < math.inf
