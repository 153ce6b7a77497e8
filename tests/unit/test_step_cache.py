"""A step cache in the Python API: what is refused, and what a result says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from opensora_sp.engine.step_cache.first_block import FirstBlockCache

from opensora_sp.base.errors import UserError
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.progress import Progress
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime

REQUEST = Request(prompt="a red ball", height=32, width=48, num_frames=17, steps=4)


class Saving(Progress):
    """Like the one that saves latents, but it keeps none."""

    saves = True


def loaded(**choices: Any) -> Pipeline:
    return Pipeline.load(session=alone("cpu"), dtype="fp32", runtime=Runtime(**choices))


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf"), "0.1", True, None])
def test_a_threshold_that_is_no_number_from_0_on_is_refused(threshold: Any) -> None:
    with pytest.raises(UserError, match=r"threshold .* is not a number from 0 on: 0.1 reuses"):
        FirstBlockCache(threshold=threshold)


@pytest.mark.parametrize("cache", [0.1, "first-block", FirstBlockCache])
def test_what_is_no_policy_is_refused_when_models_are_loaded(cache: Any) -> None:
    with pytest.raises(UserError, match=r"step_cache .* is not a StepCache: give a policy"):
        loaded(step_cache=cache)


def test_a_result_names_its_step_cache_and_the_steps_that_were_reused() -> None:
    exact = loaded().generate(REQUEST)
    assert (exact.step_cache, list(exact.reused_steps)) == (None, [[]])
    cached = loaded(step_cache=FirstBlockCache(threshold=1e9)).generate(REQUEST)
    assert (cached.step_cache, list(cached.reused_steps)) == ("first-block 1e+09", [[1, 2, 3]])
    assert not np.array_equal(cached.videos[0], exact.videos[0])  # type: ignore[arg-type]


def test_latents_made_with_a_step_cache_are_not_saved() -> None:
    pipeline = loaded(step_cache=FirstBlockCache(threshold=0.1))
    with pytest.raises(UserError, match=r"step cache first-block 0.1 are not the exact ones"):
        pipeline.generate_to([REQUEST], [Collector()], progress=Saving())
