"""Compiled pieces compute what the pieces do, from graphs that all blocks and steps share."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import pytest
import torch
import torch._dynamo
from blocks import MASK, distance, through_blocks
from tiny import TINY, normal, tiny_transformer
from torch import Tensor

from opensora_sp.models import compiler
from opensora_sp.models.compiler import Backend, Compiler
from opensora_sp.models.folded_step import FoldedStep
from opensora_sp.models.kernels import reference
from opensora_sp.models.kernels.active import Kernels, using
from opensora_sp.models.step_kernels import PlainStep

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def compiler_of(monkeypatch: pytest.MonkeyPatch, backend: str) -> Compiler:
    monkeypatch.setitem(compiler.BACKENDS, "cpu", Backend(backend))
    return Compiler(CPU)


# In tiles of two of its twelve patches, without a remainder; then everything at once.
@pytest.mark.parametrize(("step", "tokens"), [(PlainStep, 4), (FoldedStep, None)])
def test_blocks_and_steps_share_graphs(
    step: Any, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = compiler_of(monkeypatch, "eager")
    deep = tiny_transformer(replace(TINY, depth=3))
    expected = through_blocks(deep, step(tokens), MASK)
    assert distance(through_blocks(deep, step(tokens, compiling), MASK), expected) <= 1e-6
    assert compiling.trouble is None
    pieces = {key[0].__qualname__ for key in compiling._graphs}
    assert pieces == (
        {"_heads_in_frames", "_turned", "_to_mlp"}
        if step is FoldedStep
        else {
            *("Block.attn_in", "SelfAttention.heads_of", "TemporalBlock.heads"),
            *("Block.to_text", "Block.to_mlp", "Block.through_mlp"),
        }
    )
    before = compiling.compilations
    assert before == compiling.graphs
    # Another step, and a block whose weights are others.
    other = tiny_transformer(replace(TINY, depth=1), seed=5)
    expected = through_blocks(other, step(tokens), MASK)
    assert distance(through_blocks(other, step(tokens, compiling), MASK), expected) <= 1e-6
    assert compiling.compilations == before


def test_a_compiler_that_is_missing_or_wrong_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_transformer()
    expected = through_blocks(model, PlainStep(), None)

    def said(backend: str) -> str:
        caplog.clear()
        compiling = compiler_of(monkeypatch, backend)
        with caplog.at_level(logging.WARNING):
            found = through_blocks(model, PlainStep(None, compiling), None)
        assert torch.equal(found, expected)
        assert compiling.graphs == 0
        [line] = [
            record.getMessage() for record in caplog.records if record.name == compiler.__name__
        ]
        assert line.endswith("the run goes on without it")
        return line

    assert "topsgraph failed: InvalidBackend" in said("topsgraph")

    torch._dynamo.register_backend(_spoiling, name="spoils")
    assert "spoils computes something else in Block.attn_in, by 1.0e-02" in said("spoils")
    # One that breaks when it has updated x: the update is taken back.
    torch._dynamo.register_backend(_breaking, name="breaks")
    compiling = compiler_of(monkeypatch, "breaks")
    given = (normal(1, 3, 8, 32), normal(1, 1, 1, 32), True)
    found, wanted = normal(1, 3, 8, 32, seed=5), normal(1, 3, 8, 32, seed=5)
    with torch.no_grad():
        compiling(model.pairs[0][0].to_text, found, *given)
        model.pairs[0][0].to_text(wanted, *given)
    assert torch.equal(found, wanted)
    assert compiling.trouble == "breaks failed: RuntimeError: in the middle"


class _FusedNorms:
    """Fused kernels in plain torch. As Triton's, they give each of q and k its own weight."""

    def takes_heads(self, q: Tensor, k: Tensor) -> bool:
        return True

    def norm_rotary_(self, q: Tensor, k: Tensor, *more: Any) -> None:
        for own, x in zip((q, k), reference.norm_rotary(q, k, *more), strict=True):
            own.copy_(x)

    residual_norm_ = staticmethod(reference.residual_norm_)


def test_fused_norms_do_not_end_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, model = compiler_of(monkeypatch, "eager"), tiny_transformer()
    with using(Kernels(fused=cast(ModuleType, _FusedNorms()))):
        expected = through_blocks(model, FoldedStep(), None)
        assert distance(through_blocks(model, FoldedStep(None, compiling), None), expected) <= 1e-6
    assert compiling.trouble is None


def test_running_out_of_memory_beside_a_graph_ends_compilation_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def piece(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        x += y
        if len(calls) == failing:
            raise RuntimeError("no memory for both")
        return x, x * y

    def no_memory(*_: Any) -> float:
        raise RuntimeError("no memory to compare")

    for failing, said in ((2, "for both"), (0, "to compare")):  # the first call is traced
        calls.clear()
        compiling = compiler_of(monkeypatch, "eager")
        x = torch.ones(2, 3)
        with torch.no_grad(), monkeypatch.context() as patched:
            if not failing:
                patched.setattr(compiler, "_distance", no_memory)
            own, product = compiling(piece, x, torch.full((2, 3), 2.0))
        assert own is x
        assert (x.unique().tolist(), product.unique().tolist()) == ([3.0], [6.0])
        assert str(compiling.trouble).endswith(f"RuntimeError: no memory {said}")


def test_graphs_that_only_old_shapes_need_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MOST_SHAPES", 2)
    compiling, block = compiler_of(monkeypatch, "eager"), tiny_transformer().pairs[0][0]

    def rehearsed(shape: str, *lengths: int) -> None:
        if not compiling.knows(shape):
            with compiling.rehearsing(shape), torch.no_grad():
                for length in lengths:
                    compiling(block.to_mlp, *[normal(1, 1, length, 32)] * 4, False)

    rehearsed("one", 2, 3)
    rehearsed("two", 3, 4)
    rehearsed("one", 2, 3)
    dropped = [weakref.ref(graph) for graph in compiling._graphs.values()]
    rehearsed("three", 5)  # "two" is older than "one", which needs 3 too
    gc.collect()
    assert [graph() is None for graph in dropped] == [False, False, True]
    assert (compiling.compilations, compiling.graphs) == (4, 3)
    rehearsed("two", 3, 4)
    assert (compiling.compilations, compiling.graphs) == (5, 3)


def _spoiling(module: Any, inputs: Any) -> Any:
    return lambda *given: [1.01 * each for each in module(*given)]


def _breaking(module: Any, inputs: Any) -> Any:
    def run(*given: Tensor) -> Any:
        module(*given)
        raise RuntimeError("in the middle")

    return run


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compiling = compiler_of(monkeypatch, "inductor")
    block = tiny_transformer().bfloat16().pairs[0][0]
    shift = scale = normal(1, 1, 1, 32).bfloat16()
    whole, seen = normal(1, 3, 8, 32).bfloat16(), normal(1, 12, 32, seed=3).bfloat16()
    expected, tile = whole.clone(), (slice(None), slice(None), slice(2, 6))

    given = (seen, shift, scale, True)
    with torch.no_grad():
        for _ in range(2):  # the first call is compared with the piece, the second is not
            _, h = compiling(block.to_mlp, whole[tile], *given)
            _, wanted = block.to_mlp(expected[tile], *given)
            assert distance(h.float(), wanted.float()) <= 1e-2
            assert distance(whole.float(), expected.float()) <= 1e-2
    assert compiling.trouble is None
    assert compiling.compilations == 1
    assert any(tmp_path.iterdir())  # kept for the next run
