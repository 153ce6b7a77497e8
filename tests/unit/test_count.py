"""The counter of kernels and bytes against counts by hand: operations, the program, the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import oracle_stdit3
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from opensora_sp.benchmark.count.command import sent
from opensora_sp.benchmark.count.counter import ATTENTION, RMS_NORM, Counter, Row
from opensora_sp.benchmark.count.forward import META, ForwardSize, first_rank, guided_forward
from opensora_sp.cli.benchmark import main
from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.planner.cost import Workload, step_traffic
from opensora_sp.request.runtime import Runtime
from opensora_sp.verification.suite import load_cases
from scripts import count_forwards, measure_step, step_switches

pytestmark = pytest.mark.slow

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
        (lambda: A + B[:1].expand(6, 8), [("add", 1, 224, 192)]),
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


T, S, C, H, L = 6, 10, 64, 4, 7  # frames, patches of a frame, channels, heads, text tokens
DEPTH = 3
SIZE = ForwardSize(
    frames=T,
    size=(4, 9),  # an odd side: 2 x 5 patches
    pixels=(32, 72),
    config=STDiT3Config(hidden_size=C, depth=DEPTH, num_heads=H, caption_channels=24),
    text=L,
)
X = 2 * T * S * C * 2  # bytes in bfloat16 of the residual stream of both branches
BLOCKS = 2 * DEPTH


def program_rows(size: ForwardSize, **runtime: Any) -> dict[tuple[str, str], Row]:
    forward = guided_forward(size, Runtime(**runtime))
    with Counter(device=META) as counter:
        forward()
    return {(row.part, row.operation): row for row in counter.rows}


def oracle_rows(size: ForwardSize) -> dict[tuple[str, str], Row]:
    oracle, inputs = oracle_stdit3.oracle_of(size), oracle_stdit3.inputs_of(size)
    with torch.no_grad(), Counter(device=META, parts=oracle_stdit3.PARTS) as counter:
        oracle.forward(inputs)
    return {(row.part, row.operation): row for row in counter.rows}


def test_the_program_moves_what_a_count_by_hand_says() -> None:
    rows = program_rows(SIZE, share_first=False)
    assert SIZE.residual_bytes == X
    hand = {
        # kernels, read, written. A branch is half of X, and has kernels of its own.
        ("MLP", "gelu"): (2 * BLOCKS, BLOCKS * 4 * X, BLOCKS * 4 * X),
        ("MLP", "addmm"): (
            4 * BLOCKS,
            BLOCKS * 5 * X + 2 * BLOCKS * 2 * (8 * C * C + 5 * C),
            BLOCKS * 5 * X,
        ),
        # Attention's gate and MLP's; then cross-attention, which has none.
        ("gates and residuals", "addcmul_"): (
            4 * BLOCKS,
            BLOCKS * 4 * X + 4 * BLOCKS * 2 * C,
            BLOCKS * 2 * X,
        ),
        # Of q and of k, in float32: each sum is of two halves of the channels, then joined.
        ("rotary embedding", "sub"): (4 * DEPTH, 2 * DEPTH * 2 * X, 2 * DEPTH * X),
        ("rotary embedding", "stack"): (4 * DEPTH, 2 * DEPTH * 2 * X, 2 * DEPTH * 2 * X),
        ("gates and residuals", "add_"): (2 * BLOCKS, BLOCKS * 2 * X, BLOCKS * X),
        ("spatial attention", ATTENTION): (2 * DEPTH, DEPTH * 3 * X, DEPTH * X),
        ("temporal attention", ATTENTION): (2 * DEPTH, DEPTH * 3 * X, DEPTH * X),
        # Its keys and values are made once a video; both are C wide for L tokens.
        ("cross-attention", ATTENTION): (
            2 * BLOCKS,
            BLOCKS * X + 2 * BLOCKS * 2 * L * C * 2,
            BLOCKS * X,
        ),
    }
    found = {key: (rows[key].kernels, rows[key].read, rows[key].written) for key in hand}
    assert found == hand
    # Attention reads views and leaves views: no layout copies.
    assert {operation for part, operation in rows if "attention" in part} == {"addmm", ATTENTION}


def test_the_first_spatial_attention_is_counted_once_where_it_is_shared() -> None:
    row = program_rows(SIZE)["spatial attention", ATTENTION]
    assert (row.kernels, row.bytes) == (2 * DEPTH - 1, 4 * X * DEPTH - 4 * X // 2)


def test_tiles_cost_kernels_and_copies() -> None:
    whole, tiled = program_rows(SIZE), program_rows(SIZE, tokens=2 * S)
    assert tiled["MLP", "gelu"].kernels > whole["MLP", "gelu"].kernels
    assert tiled["MLP", "gelu"].bytes == whole["MLP", "gelu"].bytes
    assert tiled["tiles", "copy_"].bytes > 0
    assert ("tiles", "copy_") not in whole


def test_the_oracle_computes_what_open_sora_computed(suite_dir: Path) -> None:
    folder = suite_dir / "dit"
    weights = {k: w.float() for k, w in load_file(folder / "model.safetensors").items()}
    oracle = oracle_stdit3.Oracle(STDiT3Config.load(folder), weights)
    cases = load_cases(folder / "cases.safetensors")
    assert any("x_mask" in case for case in cases.values())
    for name, case in cases.items():
        batch, expected, shown = case["x"].shape[0], case["out"], case.get("x_mask")
        out = oracle.forward(
            oracle_stdit3.Inputs(
                x=case["x"],
                timestep=case["timestep"],
                y=case["y"],
                mask=case["mask"],
                fps=case["fps"].repeat(batch // case["fps"].shape[0]),
                pixels=(float(case["height"][0]), float(case["width"][0])),
                x_mask=shown,
            )
        )
        error = (out - expected).abs()
        if shown is not None:  # Open-Sora throws the kept frames away
            error = error[shown[:, None, :, None, None].expand_as(error)]
        assert float(error.max()) <= 2e-5 * float(expected.abs().max()), name


def test_the_oracle_moves_what_a_count_by_hand_says() -> None:
    rows = oracle_rows(SIZE)
    # No sequence is longer than there are sequences, so all scores are materialised.
    scores = 2 * S * H * T * T + 2 * T * H * S * S  # numbers of one pair, both branches
    text = 2 * L * C * 2  # bytes of the text within its MLP
    hand = {
        ("MLP", "gelu"): (BLOCKS + 1, BLOCKS * 4 * X + text, BLOCKS * 4 * X + text),
        ("norm and modulation", "mul"): (
            2 * BLOCKS + 1,
            (2 * BLOCKS + 1) * (X + 2 * 2 * C),
            (2 * BLOCKS + 1) * X,
        ),
        ("query and key norm", "pow"): (2 * BLOCKS, 2 * BLOCKS * 2 * X, 2 * BLOCKS * 2 * X),
        ("query and key norm", "to_copy"): (
            4 * BLOCKS,
            2 * BLOCKS * (X + 2 * X),
            2 * BLOCKS * (2 * X + X),
        ),
        ("rotary embedding", "stack"): (2 * DEPTH, 2 * DEPTH * X, 2 * DEPTH * X),
        ("self-attention", "softmax"): (2 * DEPTH, DEPTH * 4 * scores, DEPTH * 4 * scores),
        ("cross-attention", ATTENTION): (
            BLOCKS,
            BLOCKS * (X + 2 * 2 * L * C * 2),
            BLOCKS * X,
        ),
    }
    found = {key: (rows[key].kernels, rows[key].read, rows[key].written) for key in hand}
    assert found == hand


def test_the_page_on_speed_says_what_is_counted_at_720p_and_16_seconds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    oracle = count_forwards.oracle_table()
    assert 250 < oracle.x_per_pair(oracle.bytes) < 265
    lines = [count_forwards.summary(count_forwards.REFERENCE, oracle)]
    if hasattr(F, "rms_norm"):
        folded = count_forwards.program_table(Runtime(step_kernels="folded"), cuda=True)
        assert folded.bytes < 5e12
        lines.append(count_forwards.summary("folded, operations of CUDA", folded))
        lines.append(count_forwards.rank_line(8))
    for line in lines:
        assert "| " + " | ".join(line) + " |" in page


@pytest.mark.parametrize("mesh", [Mesh(sequence=4), Mesh(guidance=2), Mesh(guidance=2, sequence=3)])
def test_a_rank_sends_what_the_plan_says_and_moves_its_share(mesh: Mesh) -> None:
    runtime = Runtime(step_kernels="folded", chunks=2, share_first=False)
    rows = {ranks: Counter(device=META) for ranks in (1, mesh.size)}
    comms = first_rank(mesh)
    for ranks, counter in rows.items():
        forward = guided_forward(SIZE, runtime, comms if ranks > 1 else first_rank(Mesh()))
        with counter:
            forward()
    work = Workload(frames=T, size=SIZE.size, channels=C, depth=DEPTH, itemsize=2)
    # 10 patches and 6 frames do not divide: the first rank's share is what the plan gives it.
    assert sent(comms.sequence) == step_traffic(work, mesh, 0, runtime)

    def moved(ranks: int, part: str, operation: str) -> int:
        found = (r for r in rows[ranks].rows if (r.part, r.operation) == (part, operation))
        return sum(row.bytes for row in found)

    patches = -(-S // mesh.sequence)
    whole = moved(1, "temporal attention", ATTENTION)
    assert moved(mesh.size, "temporal attention", ATTENTION) * 2 * S == (
        whole * patches * (3 - mesh.guidance)
    )


def test_the_command_counts_a_rank_of_several(
    embedded_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--count", "--count-ranks", "8", "--ckpt-path-dit", str(embedded_dir / "dit")]
    assert main([*flags, "--image-size", "64", "96", "--num-frames", "17"]) == 0
    out = capsys.readouterr().out
    assert "the first rank of 1 × 2 × 4 (replicas × guidance × sequence)" in out
    said = {line.split()[0] for line in out.splitlines() if line}
    assert {"patches_to_frames", "frames_to_patches", "velocity"} <= said


def test_the_command_counts_a_request(
    embedded_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--count", "--markdown", "--ckpt-path-dit", str(embedded_dir / "dit")]
    assert main([*flags, "--image-size", "64", "96", "--num-frames", "17", "--dtype", "fp32"]) == 0
    head, _, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("One guided forward of 17 frames of 64x96, fp32, --memory speed: X = ")
    assert table[0] == "| part | kernels | GB | X a pair | share |"
    assert any(line.startswith("| MLP | ") for line in table)
    assert any(line.startswith("| operation | ") for line in table)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--markdown"], "--markdown is how --count prints"),
        (["--count-ranks", "2"], "--count-ranks is what --count counts"),
        (["--count", "--count-ranks", "3", "--guidance-parallel", "2"], "does not fit 3 ranks"),
        (["--count", "--ckpt-path-dit", "/nowhere"], "/nowhere/config.json"),
        (["--count", "--sequence-parallel", "2"], "--sequence-parallel 2 does not fit 1 rank"),
    ],
)
def test_the_command_refuses_in_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("mode", "ways"), [([], 6), (["--alone"], 14)])
def test_the_measured_ways_compute_the_same(mode: list[str], ways: int, tmp_path: Path) -> None:
    words = ["--quick", "--sizes", "144p 17", "--dtypes", "fp32", "--threads", "1", *mode]
    assert measure_step.main([str(tmp_path / "step.json"), *words]) == 0
    lines = json.loads((tmp_path / "step.json").read_text())["lines"]
    found = {line["way"]: line["difference_from_plain"] for line in lines}
    assert len(found) == ways
    assert max(error for error in found.values() if error is not None) < 2e-6
    assert all(line["least"] > 0 for line in lines)


@pytest.mark.skipif(not hasattr(F, "rms_norm"), reason="this torch has no rms_norm")
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("base", ["plain", "folded"])
def test_all_switches_are_the_step_that_the_program_has(
    base: Literal["plain", "folded"], norms: bool
) -> None:
    """Both ends of the table of single optimisations are the program's own kernels and bytes."""
    (variant,) = (v for v in step_switches.every_variant() if v.label == base)
    on = variant.on | ({step_switches.FUSED_NORMS} if norms else set())
    runtime = Runtime(step_kernels=base, share_first=step_switches.SHARE_FIRST in on)
    program = count_forwards.program_table(runtime, size=SIZE, cuda=True, norms=norms)
    switched = step_switches.count(on, SIZE)
    assert (switched.kernels, switched.bytes) == (program.kernels, program.bytes)
    assert step_switches.whole_step(on, SIZE, cuda=True) == {
        "kernels": program.kernels,
        "bytes": program.bytes,
    }
