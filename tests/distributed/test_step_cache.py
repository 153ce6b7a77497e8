"""A step cache: exact where it reuses nothing, and the same steps on every rank where it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from opensora_sp.engine.step_cache.first_block import FirstBlockCache
from ranks import RankFailure, run_ranks
from tiny import TINY, conditions, normal, tiny_transformer

from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.sampling import sample
from opensora_sp.engine.step_cache.policy import NoCache, StepCache
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import open_session
from opensora_sp.request.memory_modes import Offload
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime

FRAMES, SIZE = 5, (6, 9)  # 15 patches a frame, odd sides
TIMES = [1000.0, 900.0, 800.0, 700.0, 500.0, 300.0, 200.0, 100.0]
MODEL = tiny_transformer(replace(TINY, depth=3))
CACHE = FirstBlockCache(threshold=0.2)
LAYERS = Offload(models=True, layers=True)


@dataclass(frozen=True)
class Listening:
    """A policy that notes what it is asked, and answers as another one."""

    inner: StepCache
    asked: list[tuple[int, float, float]] = field(default_factory=list)
    name: str = "listening"

    def reuse(self, step: int, t: float, change: float) -> bool:
        """As the inner one."""
        self.asked.append((step, t, change))
        return self.inner.reuse(step, t, change)


@dataclass(frozen=True)
class Always:
    """Reuse whenever asked."""

    name: str = "always"

    def reuse(self, step: int, t: float, change: float) -> bool:
        """Yes."""
        return True


def run(
    runtime: Runtime,
    mask: Sequence[float] | None = None,
    mesh: Mesh | None = None,
    session: object = None,
) -> tuple[torch.Tensor | None, list[int]]:
    """Latents on the leading rank after all steps, and the steps that were reused on this one."""
    layout = Layout(frames=FRAMES, size=SIZE, ranks=1 if mesh is None else mesh.sequence)
    comms = None if mesh is None else session.build(mesh)  # type: ignore[attr-defined]
    gather = None if session is None else session.control.all_gather_object  # type: ignore[attr-defined]
    denoiser = parallelize(MODEL, comms, layout, runtime, gather)
    velocity = denoiser.prepare(conditions())
    frame_mask = None if mask is None else torch.tensor([mask])
    z = denoiser.shard(normal(1, 4, FRAMES, *SIZE))
    with torch.no_grad():
        z = sample(z, TIMES, velocity, frame_mask, lambda step: torch.zeros_like(z))
    return denoiser.gather(z), velocity.cached.reused


@pytest.mark.parametrize(
    "runtime",
    [
        Runtime(),
        Runtime(serial_guidance=True, tokens=20),
        Runtime(serial_guidance=True, offload=LAYERS),
    ],
)
@pytest.mark.parametrize("cache", [NoCache(), FirstBlockCache(threshold=0)])
def test_a_cache_that_reuses_nothing_changes_no_bit(runtime: Runtime, cache: StepCache) -> None:
    plain, _ = run(runtime)
    cached, reused = run(replace(runtime, step_cache=cache))
    assert plain is not None
    assert cached is not None
    assert torch.equal(plain, cached)
    assert reused == []


def test_the_first_step_is_computed_and_so_is_one_with_other_frames() -> None:
    always = Runtime(step_cache=Always())
    assert run(always)[1] == [1, 2, 3, 4, 5, 6, 7]
    # The last frame joins at t = 500, the fifth step: its kept frames were computed as kept.
    assert run(always, mask=[1, 1, 1, 1, 0.6])[1] == [1, 2, 3, 5, 6, 7]


def test_a_reused_step_adds_what_the_last_computed_one_added() -> None:
    listening = Listening(Always())
    layout = Layout(frames=FRAMES, size=SIZE, ranks=1)
    denoiser = parallelize(MODEL, None, layout, Runtime(step_cache=listening))
    velocity, z = denoiser.prepare(conditions()), denoiser.shard(normal(1, 4, FRAMES, *SIZE))
    with torch.no_grad():
        first, other, again = velocity(z, 500.0), velocity(z, 100.0), velocity(z, 500.0)
    assert velocity.cached.reused == [1, 2]
    # What the first pair says is compared with the last computed step, not with the last one.
    (_, _, change), (_, _, none) = listening.asked
    assert change > 0.1
    assert none == 0
    # From equal inputs the reused step is the exact one, but for the rounding of the residual.
    assert float((first - again).abs().max() / first.abs().max()) <= 1e-5
    assert float((first - other).abs().max() / first.abs().max()) > 1e-3


def ranks_reuse(
    rank: int, world: int, init_file: str, mesh: Mesh
) -> dict[str, tuple[list[int], list[float], float | None]]:
    """Per runtime: the steps reused, the changes seen, and on rank 0 how far from one rank."""
    found = {}
    with open_session("cpu") as session:
        for name, runtime in RUNTIMES.items():
            listening = Listening(CACHE)
            got, reused = run(replace(runtime, step_cache=listening), None, mesh, session)
            alone, alone_reused = run(replace(runtime, step_cache=CACHE))
            assert reused == alone_reused
            assert alone is not None
            error = None if got is None else float((got - alone).abs().max() / alone.abs().max())
            found[name] = (reused, [change for _, _, change in listening.asked], error)
    return found


RUNTIMES = {
    "together": Runtime(),
    "chunks": Runtime(serial_guidance=True, chunks=2),
    "offload": Runtime(serial_guidance=True, tokens=20, offload=LAYERS),
}


@pytest.mark.parametrize(
    "mesh",
    [Mesh(sequence=2), Mesh(guidance=2), Mesh(sequence=3), Mesh(guidance=2, sequence=2)],
)
def test_all_ranks_reuse_the_steps_that_one_rank_reuses(mesh: Mesh) -> None:
    ranks = run_ranks(ranks_reuse, mesh.size, mesh)
    for name in RUNTIMES:
        steps, changes, error = ranks[0][name]
        assert 0 < len(steps) < len(TIMES) - 1
        # Far enough from the threshold that the last bits of a sum cannot decide.
        assert all(abs(change / CACHE.threshold - 1) > 1e-3 for change in changes)
        assert all(rank[name][:2] == (steps, changes) for rank in ranks), name
        assert error is not None
        assert error <= 1e-4, (name, error)


def with_threshold(rank: int, world: int, init_file: str, thresholds: Sequence[float]) -> None:
    """Generate with each rank's own threshold."""
    with open_session("cpu") as session:
        cache = FirstBlockCache(threshold=thresholds[rank])
        pipeline = Pipeline.load(session=session, runtime=Runtime(step_cache=cache))
        pipeline.generate(Request(prompt="a red ball", height=32, width=48, num_frames=1, steps=1))


def test_ranks_with_other_thresholds_are_refused_before_the_first_step() -> None:
    expected = r"differs from .* in its step cache \(first-block 0.2 instead of first-block 0.1\)"
    with pytest.raises(RankFailure, match=expected):
        run_ranks(with_threshold, 2, [0.1, 0.2])
