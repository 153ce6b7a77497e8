"""The folded step computes what the plain one does: in float32 exactly, in bf16 as closely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from blocks import MASK, distance, tables, through_blocks
from tiny import TINY, normal, tiny_transformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_sp.models import folded_step
from opensora_sp.models.folded_step import FoldedStep
from opensora_sp.models.frame_groups import FrameGroups
from opensora_sp.models.kernels import cpu_half
from opensora_sp.models.kernels import folded as folded_kernels
from opensora_sp.models.kernels.folded import accumulate_, gelu_, head_norm, linear_gelu
from opensora_sp.models.kernels.reference import rms_norm
from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.models.step_kernels import PlainStep
from opensora_sp.request.request import Request
from opensora_sp.request.step_kernels import kernels_of

pytestmark = pytest.mark.slow

PUBLISHED_PAIR = STDiT3Config(depth=1, model_max_length=12, caption_channels=16)


# A frame has 12 patches: parts of a frame, two frames of one sample, everything.
@pytest.mark.parametrize(
    ("config", "mask", "tokens"),
    [
        *((TINY, mask, tokens) for mask in (None, MASK) for tokens in (5, 24, None)),
        (PUBLISHED_PAIR, MASK, None),
    ],
)
def test_folded_is_plain(config: STDiT3Config, mask: Tensor | None, tokens: int | None) -> None:
    model = tiny_transformer(config)
    exact = through_blocks(model, PlainStep(), mask)
    folded = through_blocks(model, FoldedStep(tokens), mask)
    assert not torch.equal(folded, exact)  # or nothing was folded
    assert float((folded - exact).abs().max() / exact.abs().max()) <= 1e-5
    frequencies = model.rope.freqs
    model.bfloat16()
    model.rope.freqs = frequencies
    plain = distance(through_blocks(model, PlainStep(tokens), mask), exact)
    assert 0 < distance(through_blocks(model, FoldedStep(tokens), mask), exact) <= 1.5 * plain


def test_a_model_without_head_norms() -> None:
    model = tiny_transformer(replace(TINY, qk_norm=False))
    exact = through_blocks(model, PlainStep(), None)
    assert distance(through_blocks(model, FoldedStep(), None), exact) <= 1e-6


def test_what_is_not_folded_is_plain_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer()
    exact = through_blocks(model, PlainStep(), MASK)
    monkeypatch.setattr(folded_step, "_MOST_FOLDS", 1)
    assert torch.equal(through_blocks(model, FoldedStep(), MASK), exact)
    assert not torch.equal(through_blocks(model, FoldedStep(), None), exact)
    # Gradients need the weights themselves.
    x = normal(1, 2, 3, TINY.hidden_size)
    with torch.enable_grad():
        step = tables(model, 1, None)
        kernels = (FoldedStep(), PlainStep())
        folded, plain = (each.attn_in(model.pairs[0][0], x, step) for each in kernels)
    assert torch.equal(folded, plain)


def test_each_step_and_each_block_is_folded_anew() -> None:
    model = tiny_transformer(replace(TINY, depth=1))  # or another block comes between the steps
    kernels = FoldedStep()
    first = through_blocks(model, kernels, None)
    again = through_blocks(model, kernels, MASK)  # another step in the same memory
    assert not torch.equal(first, again)
    assert torch.equal(through_blocks(model, kernels, None), first)


def test_groups_of_frames() -> None:
    table = normal(2, 5, 6, 4)
    groups = FrameGroups.of_frames(table, MASK.tolist())
    assert torch.equal(groups.rows, torch.stack([table[0, 0], table[0, 1]]))
    assert list(groups.runs(0, 5)) == [
        (slice(0, 1), 0),
        (slice(1, 3), 1),
        (slice(3, 4), 0),
        (slice(4, 5), 1),
    ]
    assert list(groups.frames(1, 4).runs(1, 3)) == [(slice(0, 1), 1), (slice(1, 3), 0)]
    # Frames 3 and 4 of the first sample, 0 and 1 of the second.
    assert groups.held(slice(3, 7), 5).of == ((0, 1, 1, 1),)
    one = FrameGroups.of_frames(table[:, :1], [[True], [True]])
    assert list(one.runs(1, 5)) == [(slice(0, 5), 0)]
    assert one.held(slice(3, 7), 5).of == ((0, 0, 0, 0),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operations(dtype: torch.dtype) -> None:
    x, a, w = normal(3, 9, 8).to(dtype), normal(3, 4, 6, seed=3).to(dtype), normal(8, 6).to(dtype)
    wide = x.double()
    wide[:, 2:6] += a.double() @ w.double().t()
    accumulate_(x[:, 2:6], a, w)  # some positions of all frames; the others stay
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert distance(x.double(), wide) < limit
    bias = normal(8, seed=5).to(dtype)
    expected = F.gelu(F.linear(a.double(), w.double(), bias.double()), approximate="tanh")
    assert distance(linear_gelu(a, w, bias).double(), expected) < limit
    heads = (100 * normal(3, 4, 3, 2, 8)).to(dtype).unbind(-3)[1]  # strided, as in a qkv product
    expected = rms_norm(heads.double(), torch.ones(8).double())
    assert distance(head_norm(heads).double(), expected) < limit


class Record(TorchDispatchMode):
    """The operations that are called, and the formats of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        formats = {each.dtype for each in args if isinstance(each, Tensor)}
        self.called.append((str(func), formats))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [TINY, replace(TINY, qk_norm=False)])
def test_two_ways_to_turn_heads(config: STDiT3Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer(config)
    found = []
    for by_pairs in (True, False):
        monkeypatch.setattr(folded_step, "turns_pairs", lambda x, by_pairs=by_pairs: by_pairs)
        with Record() as record:
            found.append(through_blocks(model, FoldedStep(5), MASK))
        assert any("bmm" in name for name, _ in record.called) is not by_pairs
    assert distance(*found) < 1e-6


def test_gelu_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded_kernels, "_CACHED", 100)
    x = 6 * normal(3, 7, 31)  # 651 numbers: six parts and a rest
    x[0, 0, :4] = torch.tensor([0.0, -60.0, 60.0, 1e30])
    expected = F.gelu(x.double(), approximate="tanh")
    strided = x.clone().transpose(0, 1)
    assert gelu_(x) is x
    assert float(((x - expected).abs() / expected.abs().clamp_min(1)).max()) < 1e-6
    assert distance(gelu_(strided).double(), expected.transpose(0, 1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_half_precision_only_the_residual_stream_is_stored_in_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = tiny_transformer()
    exact = through_blocks(model, PlainStep(), MASK)
    frequencies = model.rope.freqs
    model.to(dtype)
    model.rope.freqs = frequencies
    step, inputs = FoldedStep(5), Record()
    monkeypatch.setattr(step, "rest", _recorded(step.rest, inputs))
    monkeypatch.setattr(step, "attend", _recorded(step.attend, inputs))
    monkeypatch.setattr(step, "along_time", _recorded(step.along_time, inputs))
    with cpu_half.Float32Arithmetic():
        found = distance(through_blocks(model, step, MASK), exact)
        plain = distance(through_blocks(model, PlainStep(5), MASK), exact)
    heavy = [each for each in inputs.called if any(name in each[0] for name in _HEAVY)]
    assert {name for name in _HEAVY for called, _ in heavy if name in called} == set(_HEAVY)
    assert all(formats == {torch.float32} for _, formats in heavy)
    assert 0 < found < plain


_HEAVY = ("addmm", "scaled_dot_product", "exp2", "view_as_complex")


def _recorded(method: Callable[..., Tensor], record: Record) -> Callable[..., Tensor]:
    def call(*given: object) -> Tensor:
        with record:
            return method(*given)

    return call


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch has no such product"
)
@pytest.mark.parametrize(("capability", "fused"), [("AVX2", False), ("AVX512", True)])
def test_gelu_in_a_float32_product_where_that_is_faster(
    capability: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    x, w, bias = normal(3, 4, 6), normal(8, 6), normal(8, seed=5)
    with Record() as record:
        made = linear_gelu(x, w, bias)
    assert any("_linear_pointwise" in name for name, _ in record.called) is fused
    assert distance(made, F.gelu(F.linear(x, w, bias), approximate="tanh")) < 1e-6


def test_auto_is_chosen_by_the_whole_video() -> None:
    def chosen(**more: object) -> str:
        return kernels_of(Request(prompt="p", **more), "auto")  # type: ignore[arg-type]

    assert chosen() == "folded"
    assert chosen(height=144, width=256, num_frames=51) == "folded"
    assert chosen(height=144, width=256, num_frames=51, cfg_scale=1.0) == "plain"
    assert chosen(num_frames=1) == "plain"
    assert kernels_of(Request(prompt="p", num_frames=1), "folded") == "folded"
