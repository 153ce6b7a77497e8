"""The counter of kernels and bytes against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.benchmark.count.counter import ATTENTION, RMS_NORM, Counter

A, B = torch.zeros(6, 8), torch.ones(6, 8)  # 192 bytes each
ROW = torch.ones(8)  # 32 bytes
SIX = torch.ones(6)
HALF = torch.zeros(6, 8, dtype=torch.bfloat16)
Q = torch.zeros(2, 3, 5, 8)  # 960 bytes
LONG = torch.zeros(2, 3, 7, 8)  # 1344 bytes


def counted(run: Callable[[], Any], **settings: Any) -> list[tuple[str, int, int, int]]:
    """(operation, kernels, bytes read, bytes written) of each operation, by name."""
    with Counter(**settings) as counter:
        run()
    return sorted((row.operation, row.kernels, row.read, row.written) for row in counter.rows)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: A + B, [("add", 1, 384, 192)]),
        (lambda: A * A, [("mul", 1, 192, 192)]),  # read once
        (lambda: A + ROW, [("add", 1, 224, 192)]),  # a broadcast operand as it is stored
        (lambda: A + ROW.expand(6, 8), [("add", 1, 224, 192)]),
        (lambda: A[:, :2] + 1, [("add", 1, 48, 48)]),  # some columns of a view
        (lambda: A.view(8, 6).t().unflatten(0, (2, 3)).unbind(0), []),  # views
        (lambda: A.t().contiguous(), [("clone", 1, 192, 192)]),
        (lambda: A.contiguous(), []),  # it is already
        (lambda: A.to(torch.bfloat16), [("to_copy", 1, 192, 96)]),
        (lambda: A.clone().add_(B), [("add_", 1, 384, 192), ("clone", 1, 192, 192)]),
        (lambda: torch.empty(6, 8).copy_(B), [("copy_", 1, 192, 192)]),  # not read before
        (lambda: torch.empty(6, 8).zero_(), [("zero_", 1, 0, 192)]),
        (lambda: torch.addcmul(A, B, ROW), [("addcmul", 1, 416, 192)]),
        (lambda: torch.cat([A, B]), [("cat", 1, 384, 384)]),
        (lambda: A[torch.tensor([4, 1])], [("index", 1, 64 + 16, 64)]),  # the rows taken
        (lambda: torch.add(A, B, out=torch.empty(6, 8)), [("add", 1, 384, 192)]),
        (lambda: F.linear(A, B, SIX), [("addmm", 1, 192 + 192 + 24, 144)]),  # bias + A·Bᵀ
        (lambda: F.gelu(HALF, approximate="tanh"), [("gelu", 1, 96, 96)]),
    ],
)
def test_an_operation_reads_its_operands_and_writes_its_result(
    run: Callable[[], Tensor], expected: list[tuple[str, int, int, int]]
) -> None:
    assert counted(run) == expected


def test_a_product_that_accumulates_reads_what_it_adds_to() -> None:
    x, weight = A.clone(), torch.zeros(8, 8)
    assert counted(lambda: x.addmm_(B, weight)) == [("addmm_", 1, 192 + 192 + 256, 192)]
    assert counted(lambda: x.addmm_(B, weight, beta=0)) == [("addmm_", 1, 192 + 256, 192)]
    assert counted(lambda: x.addcmul_(B, ROW)) == [("addcmul_", 1, 192 + 192 + 32, 192)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_one_operation(device: str) -> None:
    q, kv = Q.to(device), LONG.to(device)
    assert counted(lambda: F.scaled_dot_product_attention(q, kv, kv)) == [
        (ATTENTION, 1, 960 + 1344, 960)  # k and v are the same tensor here
    ]


def test_attention_comes_apart_where_its_parts_are_asked_for() -> None:
    q, kv = Q.to("meta"), LONG.to("meta")
    found = counted(lambda: F.scaled_dot_product_attention(q, kv, kv), fused=())
    assert {"bmm", "mul"} <= {line[0] for line in found}


@pytest.mark.skipif(not hasattr(F, "rms_norm"), reason="this torch has no rms_norm")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rms_norm_is_one_operation_or_its_parts(device: str) -> None:
    x, weight = A.to(device), ROW.to(device)
    run = lambda: F.rms_norm(x, (8,), weight, 1e-6)
    assert counted(run) == [(RMS_NORM, 1, 192 + 32, 192)]
    assert {"pow", "mean", "rsqrt", "mul"} <= {line[0] for line in counted(run, fused=())}
