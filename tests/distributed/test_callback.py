"""callback_on_step_end on two ranks: the same steps as on one, and one end for all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from opensora_sp import Cancelled, Pipeline, Request, Session, open_session
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.session import alone

# Odd sides, so that the two ranks hold parts of different length.
REQUEST = Request(prompt="a red ball", height=72, width=56, num_frames=17, steps=4)
SHARED = Request(prompt="a red ball", height=72, width=56, num_frames=17, steps=4, cfg_scale=1.0)


def watched(session: Session, request: Request) -> tuple[list[Any], Tensor | None]:
    pipeline = Pipeline.load(session=session, dtype="fp32")
    seen: list[Any] = []

    def watch(step: int, t: float, latents: Tensor | None) -> None:
        seen.append((step, t, None if latents is None else latents.clone()))

    result = pipeline.generate(request, callback_on_step_end=watch)
    plain, seen_to = pipeline.generate(request).latents[0], result.latents[0]
    if plain is None or seen_to is None:
        assert plain is seen_to
    else:
        assert torch.equal(plain, seen_to)
    return seen, plain


def watched_on_ranks(rank: int, world: int, init_file: str) -> Any:
    with open_session("cpu") as session:
        return [watched(session, request)[0] for request in (REQUEST, SHARED)]


class Estimates:
    """Wants the estimate after every second step, by rank 0's count alone."""

    def __init__(self, leads: bool) -> None:
        self.leads, self.asked = leads, 0
        self.shown: list[Tensor | None] = []

    def due(self) -> bool:
        self.asked += 1
        return self.leads and self.asked % 2 == 0

    def show(self, latents: Tensor | None) -> None:
        self.shown.append(latents)


def estimated(session: Session) -> list[list[Tensor | None]]:
    pipeline = Pipeline.load(session=session, dtype="fp32")
    found = []
    for request in (REQUEST, SHARED):
        estimates = Estimates(session.leads)
        pipeline.generate_to(
            [request], [Collector()], on_step_end=lambda *_: None, previews=estimates
        )
        found.append(estimates.shown)
    return found


def estimated_on_ranks(rank: int, world: int, init_file: str) -> Any:
    with open_session("cpu") as session:
        return estimated(session)


def cancelled_on_ranks(rank: int, world: int, init_file: str, who: int) -> Any:
    """Rank `who` asks for the end after the second step; then everybody generates once more."""
    with open_session("cpu") as session:
        pipeline = Pipeline.load(session=session, dtype="fp32")
        steps: list[int] = []

        def stop(step: int, *_: Any) -> bool:
            steps.append(step)
            return rank == who and step == 1

        try:
            pipeline.generate(REQUEST, callback_on_step_end=stop)
            said = ""
        except Cancelled as cancelled:
            said = str(cancelled)
        latents = pipeline.generate(REQUEST).latents[0]
        return said, steps, latents


def test_two_ranks_show_the_steps_of_one() -> None:
    leading, other = run_ranks(watched_on_ranks, 2)
    for number, request in enumerate((REQUEST, SHARED)):
        alone_seen, final = watched(alone("cpu"), request)
        assert final is not None
        assert [s[:2] for s in leading[number]] == [s[:2] for s in alone_seen]
        assert [s[:2] for s in other[number]] == [s[:2] for s in alone_seen]
        assert all(latents is None for _, _, latents in other[number])
        for (_, _, mine), (_, _, theirs) in zip(leading[number], alone_seen, strict=True):
            assert float((mine - theirs).abs().max() / theirs.abs().max()) < 1e-4


def test_two_ranks_estimate_what_one_estimates() -> None:
    leading, other = run_ranks(estimated_on_ranks, 2)
    expected = estimated(alone("cpu"))
    assert other == [[None, None]] * 2
    for mine, theirs in zip(leading, expected, strict=True):
        assert len(mine) == len(theirs) == 2
        for one, two in zip(mine, theirs, strict=True):
            assert one is not None
            assert two is not None
            assert float((one - two).abs().max() / two.abs().max()) < 1e-4


@pytest.mark.parametrize("who", [0, 1])
def test_all_ranks_end_where_one_asks_for_it_and_can_go_on(who: int) -> None:
    (expected,) = Pipeline.load(session=alone("cpu"), dtype="fp32").generate(REQUEST).latents
    found = run_ranks(cancelled_on_ranks, 2, who)
    assert [said for said, _, _ in found] == ["the callback ended the generation after step 2"] * 2
    assert [steps for _, steps, _ in found] == [[0, 1]] * 2
    assert expected is not None
    assert float((found[0][2] - expected).abs().max() / expected.abs().max()) < 1e-4
    assert found[1][2] is None
