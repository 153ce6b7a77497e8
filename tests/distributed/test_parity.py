"""launch/verify.py --parity: agrees where ranks agree, and catches what is broken on purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ranks import RankFailure, run_ranks

from opensora_sp.cli.verify import main
from opensora_sp.engine.blocks import Local
from opensora_sp.engine.guidance import Denoiser
from opensora_sp.engine.model_set import ModelSet, Parallelism
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.models.folded_weights import fold
from opensora_sp.models.kernels import reference
from opensora_sp.models.kernels.attention import Choice, run
from opensora_sp.parallel import exchange, layout
from opensora_sp.parallel.backend_table import BACKENDS
from opensora_sp.parallel.session import open_session
from opensora_sp.request.request import Request
from opensora_sp.verification import parity
from opensora_sp.verification.parity import check_parity

# Odd latent sides, so that padded cells exist; frames and patches that 3 does not divide.
REQUEST = Request(prompt="", height=72, width=56, num_frames=17, steps=3)


def swapped_order() -> None:
    """Frames come back in another order than they were sent."""
    original = exchange.Exchange.to_frames

    def to_frames(self, h, piece):  # type: ignore[no-untyped-def]
        return original(self, h.flip(1), piece)

    exchange.Exchange.to_frames = to_frames  # type: ignore[method-assign]


def split_off_by_one() -> None:
    """The receiver lays the patches end to end with the wrong lengths."""
    original = layout.Layout.patches

    def patches(self, rank):  # type: ignore[no-untyped-def]
        right = original(self, rank)
        shift = 1 if rank > 0 else 0
        return slice(right.start - shift, right.stop - shift)

    layout.Layout.patches = patches  # type: ignore[method-assign]


def velocity_on_padding() -> None:
    """Padded cells are moved like all others on the sharded denoiser only."""
    original = Denoiser.prepare

    def prepare(self, conditions, on_velocity=None):  # type: ignore[no-untyped-def]
        velocity = original(self, conditions, on_velocity)
        if not isinstance(self.sharding.reshard, Local):
            velocity._padding = None
        return velocity

    Denoiser.prepare = prepare  # type: ignore[method-assign]


BREAKAGES = {f.__name__: f for f in (swapped_order, split_off_by_one, velocity_on_padding)}


def compare(rank: int, world: int, init_file: str, broken: str, dtype: str) -> bool | None:
    if broken:
        BREAKAGES[broken]()
    with open_session("cpu") as session, torch.no_grad():
        pipeline = Pipeline.load(
            session=session,
            dtype=dtype,
            parallelism=Parallelism(guidance=1),
            transformer_only=True,
        )
        found = check_parity(pipeline, REQUEST, most_seconds=60)
    return None if found is None else found.ok


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parity_holds(dtype: str) -> None:
    assert run_ranks(compare, 3, "", dtype) == [True, None, None]


@pytest.mark.parametrize("broken", sorted(BREAKAGES))
def test_parity_finds_what_is_broken(broken: str) -> None:
    assert run_ranks(compare, 3, broken, "fp32") == [False, None, None]


def another_seed(rank: int, world: int, init_file: str) -> None:
    request = Request(prompt="a ball", height=64, width=64, num_frames=1, steps=1, seed=rank // 2)
    with open_session("cpu") as session:
        Pipeline.load(session=session, dtype="fp32").generate(request)


def test_a_rank_with_another_seed_is_named() -> None:
    with pytest.raises(RankFailure, match="rank 2 differs from rank 0 in its request"):
        run_ranks(another_seed, 3)


def reduced(rank: int, world: int, init_file: str) -> tuple[int, bool] | None:
    with open_session("cpu") as session, torch.no_grad():
        pipeline = Pipeline.load(session=session, dtype="fp32", transformer_only=True)
        request = Request(prompt="", height=32, width=32, num_frames=204, steps=1)
        found = check_parity(pipeline, request, most_seconds=0.0)
    return None if found is None else (found.request.num_frames, found.reduced)


def test_what_one_rank_cannot_do_in_time_is_made_smaller() -> None:
    assert run_ranks(reduced, 2) == [(17, True), None]


FOLDED = ("--parity", "--image-size", "32", "48", "--num-frames", "17", "--device", "cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fold_that_is_wrong_is_found(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All ranks fold alike, so they agree; only a plain step shows it."""
    words = [*FOLDED, "--step-kernels", "folded", "--num-sampling-steps", "1", "--dtype", dtype]
    assert main(words) == 0
    assert "steps: folded; attention: everywhere: sdpa; norms: plain" in capsys.readouterr().out

    def without_gate(block, row, into):  # type: ignore[no-untyped-def]
        return replace(fold(block, row, into), proj=block.attn.proj.weight)

    monkeypatch.setattr("opensora_sp.models.folded_step.fold", without_gate)
    assert main(words) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(wrong) == 1
    assert wrong[0].startswith("folded")
    assert wrong[0].endswith("FAILED: --step-kernels plain")


def test_parity_runs_with_the_kernels_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's choice is used, but not for float32, which it may not take."""
    used: list[tuple[torch.dtype, str]] = []

    def choose(models: ModelSet, requests: object, lengths: list[int]) -> bool:
        assert lengths == [60]
        models.kernels.anywhere = Choice("math", 80)
        return True

    def noted(choice: Choice, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        used.append((q.dtype, choice.kernel))
        return run(choice, q, k, v)

    monkeypatch.setattr(parity, "choose_kernels", choose)
    monkeypatch.setattr(reference, "run", noted)
    assert main([*FOLDED, "--num-sampling-steps", "1", "--dtype", "bf16"]) == 0
    assert set(used) == {(torch.bfloat16, "math"), (torch.float32, "sdpa")}
    assert main([*FOLDED, "--attention", "flash"]) == 2


def test_parity_exchanges_in_the_chunks_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator cuts a lone CFG branch in parts, and then those are what is compared."""
    monkeypatch.setitem(BACKENDS, "gloo", replace(BACKENDS["gloo"], chunks=2))
    seen: list[int] = []

    def check(pipeline: Pipeline, request: Request, *, most_seconds: float) -> object:
        seen.append(pipeline.models.runtime.chunks)
        return check_parity(pipeline, request, most_seconds=most_seconds)

    monkeypatch.setattr(parity, "check_parity", check)
    assert main([*FOLDED, "--num-sampling-steps", "1"]) == 0
    assert seen == [2]


def test_a_step_is_timed_from_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the leading rank waits for its forward; the others' devices may still compute it."""
    order: list[str] = []
    for name in ("_forward", "_run", "synchronize"):
        monkeypatch.setattr(parity, name, lambda *_, name=name: order.append(name))
    pipeline = Pipeline.load(dtype="fp32", transformer_only=True)
    parity._on_all_ranks(pipeline, REQUEST)
    assert order == ["_forward", "synchronize", "_run", "synchronize"]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--parity", "--image-size", "32", "48", "--num-frames", "17", "--device", "cpu"]
    assert main([*argv, "--num-sampling-steps", "1", "--link-gbps", "25"]) == 0
    out = capsys.readouterr().out
    for words in ("max error", "relative", "PSNR", "sent per step", "exchange", "projected on 8"):
        assert words in out
    assert main(["--parity", "--resolution", "333p"]) == 2
    assert main(["--parity", "--ckpt-path-dit", "none"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
