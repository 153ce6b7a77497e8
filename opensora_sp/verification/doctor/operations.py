"""The operations of the models on this device, compared with the CPU in float64.

Each operation runs through the function that the models call, in every dtype of a run. The shapes
are small, with 16 heads of width 72 as published. A limit is the relative RMS error of rounding,
with a margin. TF32 in place of float32, a wrong layout, or a kernel that reads wrong rows exceed it
by far. A limit of 0 means bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.media.pixels import to_bytes
from opensora_sp.models.kernels.attention import DEFAULT, KERNELS, Choice
from opensora_sp.models.kernels.cpu_half import arithmetic
from opensora_sp.models.kernels.folded import (
    accumulate_,
    head_norm,
    head_norm_,
    linear_gelu,
    rotation_matrices,
    turn,
)
from opensora_sp.models.kernels.fused import fused_kernels
from opensora_sp.models.kernels.probe import DTYPE_NAMES, works
from opensora_sp.models.kernels.reference import attend, modulated_norm, rms_norm, rotate
from opensora_sp.models.layers import rotary_tables, sinusoid
from opensora_sp.verification.doctor.check_result import CheckResult, attempt, failed, passed

AREA = "operations"
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_HEADS, _WIDTH = 16, 72
_CHANNELS = _HEADS * _WIDTH

Operation = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One operation: its function, and the shapes of its normally distributed inputs.

    exact: the operation computes nothing, so the values may not change.
    instead: what to set where the device computes it wrongly, and nothing else needs it.
    """

    name: str
    run: Operation
    shapes: Sequence[tuple[int, ...]]
    exact: bool = False
    dtypes: tuple[torch.dtype, ...] = tuple(LIMITS)
    instead: str = ""


def _rotate(x: Tensor) -> Tensor:
    frequencies = 10_000.0 ** -(torch.arange(0, _WIDTH, 2, dtype=torch.float32) / _WIDTH)
    cos, sin = rotary_tables(frequencies.to(x.device), x.shape[1])
    return rotate(x, (cos, sin))


def _causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight)


def _strided_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 1, 0)), weight, bias, stride=(2, 1, 1))


def _embed_tokens(table: Tensor) -> Tensor:
    """As T5 does it: the one place where the device is given 64-bit indices."""
    ids = torch.arange(table.shape[0]).view(4, -1).T
    return F.embedding(ids.to(table.device), table)


def _bytes(video: Tensor) -> Tensor:
    return to_bytes(video).to(video.dtype)  # up to 255, which every dtype holds exactly


def _fill_padding(x: Tensor) -> Tensor:
    marked = torch.arange(x.shape[-1]) % 5 == 0
    return x.masked_fill(marked.to(x.device), 0.0)


def _choose(x: Tensor, y: Tensor) -> Tensor:
    marked = (torch.arange(x.shape[0]) % 2 == 0).to(x.device)
    return torch.where(marked.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _heads_apart(x: Tensor) -> Tensor:
    q, k, v = x.unflatten(-1, (3, _HEADS, -1)).unbind(-3)
    return torch.stack([part.transpose(1, 2).contiguous() for part in (v, q, k)])


def _sinusoid(x: Tensor) -> Tensor:
    return sinusoid(x.float().abs() * 300).to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight / math.sqrt(weight.shape[1]), bias)


def _guide(a: Tensor, b: Tensor) -> Tensor:
    return torch.lerp(a, b, 7.0)


def _add_product(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    return accumulate_(x.clone(), a, weight / math.sqrt(weight.shape[1]))


def _add_product_to_part(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """Into some positions of all frames. The others are returned too: they must stay."""
    x = x.clone()
    accumulate_(x[:, 3:-2], a, weight / math.sqrt(weight.shape[1]))
    return x


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_gelu(x, weight / math.sqrt(weight.shape[1]), bias)


def _norm_heads(qkv: Tensor, weight: Tensor) -> Tensor:
    """Queries where they lie in the product of qkv, keys into a tensor of their own."""
    q, k, _ = qkv.clone().unflatten(-1, (3, _HEADS, -1)).unbind(-3)
    return torch.stack([head_norm_(q, weight), head_norm(k)])


def _turn(x: Tensor) -> Tensor:
    frequencies = 10_000.0 ** -(torch.arange(0, _WIDTH, 2, dtype=torch.float32) / _WIDTH)
    matrices = rotation_matrices(rotary_tables(frequencies.to(x.device), x.shape[0]))
    return turn(x, matrices.to(x.dtype))


def _attend_views(qkv: Tensor) -> Tensor:
    """Within frames, then along time, on views of the product of qkv [T,S,3C]."""
    q, k, v = qkv.unflatten(-1, (3, _HEADS, -1)).unbind(-3)
    within = attend(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
    along = attend(*(part.permute(1, 2, 0, 3) for part in (q, k, v))).permute(2, 0, 1, 3)
    return torch.stack([within.flatten(2), along.flatten(2)])


def _scale_weight(weight: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    by_column, by_row = torch.empty_like(weight), torch.empty_like(weight)
    torch.mul(weight, 1 + columns, out=by_column)
    torch.mul(weight, rows[:, None], out=by_row)
    return torch.stack([by_column, by_row])


F32 = (torch.float32,)
_folded = partial(Case, instead="--step-kernels plain")
_C = _CHANNELS
CASES: tuple[Case, ...] = (
    Case("there and back", lambda x: x * 1, [(513, 7)], exact=True),
    Case("linear", _linear, [(2, 45, _C), (3 * _C, _C), (3 * _C,)]),
    Case("attention, 72 wide", attend, [(3, _HEADS, 45, _WIDTH)] * 3),
    Case(
        "attention to text",
        attend,
        [(1, _HEADS, 90, _WIDTH), (1, _HEADS, 19, _WIDTH), (1, _HEADS, 19, _WIDTH)],
    ),
    Case("attention, no frames", attend, [(0, _HEADS, 5, _WIDTH)] * 3, exact=True),
    Case("layer norm, modulated", modulated_norm, [(2, 3, 17, _C), (2, 3, 1, _C), (2, 3, 1, _C)]),
    Case("rms norm", rms_norm, [(2, 5, _HEADS, _WIDTH), (_WIDTH,)]),
    Case("rotary", _rotate, [(1, 15, 4, _HEADS, _WIDTH)]),
    Case("gelu, tanh", lambda x: F.gelu(x, approximate="tanh"), [(3, 4 * _C)]),
    Case("silu", lambda x: F.silu(x), [(3, _C)]),
    Case("sinusoid", _sinusoid, [(9,)]),
    Case("addcmul, gate", torch.addcmul, [(2, 3, 17, _C), (2, 1, 1, _C), (2, 3, 17, _C)]),
    Case("lerp, guidance", _guide, [(2, 3, 17, 16)] * 2, dtypes=F32),
    Case("softmax", lambda x: x.float().softmax(-1).to(x.dtype), [(2, 8, 30, 30)]),
    Case("matmul", lambda a, b: a @ b / math.sqrt(a.shape[-1]), [(2, 8, 30, 64), (2, 8, 64, 30)]),
    Case("conv3d, causal", _causal_conv, [(1, 32, 5, 9, 11), (48, 32, 3, 3, 3)]),
    Case("conv3d, stride in time", _strided_conv, [(1, 32, 5, 9, 11), (32, 32, 3, 3, 3), (32,)]),
    Case("conv2d", lambda x, w: F.conv2d(x, w, padding=1), [(4, 32, 9, 11), (48, 32, 3, 3)]),
    Case(
        "group norm",
        lambda x, w, b: F.group_norm(x, 32, w, b, 1e-5),
        [(2, 64, 5, 9, 7), (64,), (64,)],
    ),
    Case("nearest, twice", lambda x: F.interpolate(x, scale_factor=2.0), [(4, 16, 5, 7)], True),
    Case("embedding of tokens", _embed_tokens, [(32, 24)], exact=True),
    Case("pixels to bytes", _bytes, [(3, 2, 9, 11)], exact=True),
    Case("fill padding", _fill_padding, [(3, 40)], exact=True),
    Case("where", _choose, [(4, 3, 24)] * 2, exact=True),
    Case("qkv apart", _heads_apart, [(2, 5, 3 * _C)], exact=True),
    # What a folded step needs beside them.
    _folded("folded: weights", _scale_weight, [(48, _C), (_C,), (48,)]),
    _folded("folded: product added", _add_product, [(3, 17, _C), (3, 17, 96), (_C, 96)]),
    _folded("folded: added to a part", _add_product_to_part, [(3, 17, _C), (3, 12, 96), (_C, 96)]),
    _folded("folded: product, gelu", _linear_gelu, [(3, 17, _C), (2 * _C, _C), (2 * _C,)]),
    _folded("folded: head norm", _norm_heads, [(3, 7, 3 * _C), (_WIDTH,)]),
    _folded("folded: rotary product", _turn, [(15, 4, _HEADS, _WIDTH)]),
    _folded("folded: attention of views", _attend_views, [(5, 19, 3 * _C)]),
)


def check_operations(device: torch.device) -> list[CheckResult]:
    """Check every operation in every dtype on a device. Returns this rank's results."""
    results = []
    for number, case in enumerate(CASES):
        inputs = [_draw(shape, 100 * number + i) for i, shape in enumerate(case.shapes)]
        results.append(attempt(AREA, case.name, partial(_check, case, inputs, device)))
    results.append(attempt(AREA, "attention kernels", partial(_check_attention_kernels, device)))
    results.append(attempt(AREA, "fused norms", partial(_check_fused, device)))
    results.append(attempt(AREA, "whole numbers", partial(_check_whole_numbers, device)))
    return results


def _draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _check(case: Case, inputs: Sequence[Tensor], device: torch.device) -> CheckResult:
    """One operation in all of its dtypes. It fails if one of them fails."""
    bad, good = [], []
    for dtype in case.dtypes:
        kind = DTYPE_NAMES[dtype]
        limit = 0.0 if case.exact else LIMITS[dtype]
        try:
            error = _error(case, inputs, dtype, device)
        except Exception as trouble:  # the other dtypes may still work
            bad.append(f"{kind} {type(trouble).__name__}: {' '.join(str(trouble).split())[:120]}")
            continue
        # NaN is never below the limit.
        if error <= limit:
            good.append(f"{kind} {'exact' if case.exact else f'{error:.1e}'}")
        else:
            bad.append(f"{kind} differs from the CPU by {error:.1e}, limit {limit:.0e}")
    if not bad:
        return passed(AREA, case.name, "  ".join(good))
    instead = f"; set {case.instead}" if case.instead else ""
    return failed(AREA, case.name, "; ".join(bad) + instead)


def _error(case: Case, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> float:
    rounded = [x.to(dtype) for x in inputs]
    expected = case.run(*(x.double() for x in rounded))
    with torch.no_grad(), arithmetic(device, dtype):
        actual = case.run(*(x.to(device) for x in rounded))
    if actual.shape != expected.shape or actual.dtype != dtype:
        raise ValueError(f"{list(actual.shape)} {actual.dtype} came out")
    return relative_error(actual, expected)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖Δ‖ / ‖expected‖ in float64; 0 for empty tensors."""
    if not expected.numel():
        return 0.0
    return float((actual.cpu().double() - expected).norm() / expected.norm())


def _check_attention_kernels(device: torch.device) -> CheckResult:
    """The attention kernels that --attention may name here, beside the default."""
    good, bad = [], []
    for row in KERNELS.values():
        for dtype, short in DTYPE_NAMES.items():
            if row.name == DEFAULT or row.objection(device.type, short) is not None:
                continue
            trouble = works(Choice(row.name, row.widths(_WIDTH)[0]), dtype, device, _WIDTH)
            if trouble is None:
                good.append(f"{row.name} {short}")
            else:
                bad.append(f"not {row.name} {short}: {trouble}")
    # One that does not work is never chosen by "auto", so it fails nothing.
    return passed(AREA, "attention kernels", "; ".join(good + bad))


def _check_fused(device: torch.device) -> CheckResult:
    """Whether norms are computed by fused kernels here. Where they are not, plain torch is used."""
    found = (fused_kernels(device, dtype, _HEADS, _WIDTH)[1] for dtype in DTYPE_NAMES)
    return passed(AREA, "fused norms", "; ".join(dict.fromkeys(found)))


def _check_whole_numbers(device: torch.device) -> CheckResult:
    """Integer arithmetic on the device, within 32 bits. Wider numbers stay on the CPU."""
    numbers = torch.arange(-1000, 1000, 7)
    back = (numbers.to(device) * 3 + 1).cpu()
    if back.equal(numbers * 3 + 1):
        return passed(AREA, "whole numbers", "exact")
    return failed(AREA, "whole numbers", "int64 arithmetic gives other numbers than the CPU")
