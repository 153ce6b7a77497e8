"""Compiled pieces compute what the pieces do, from graphs that all blocks and steps share."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from blocks import MASK, distance, through_blocks
from tiny import TINY, normal, tiny_transformer
from torch import Tensor

from opensora_sp.models import compiler
from opensora_sp.models.compiler import Backend, Compiler
from opensora_sp.models.folded_step import FoldedStep
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
