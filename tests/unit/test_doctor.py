"""The doctor finds what is planted: a wrong operation, a missing encoder, an old package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_sp.cli.verify import main
from opensora_sp.verification.doctor import surroundings
from opensora_sp.verification.doctor.check_result import failed, merge, passed
from opensora_sp.verification.doctor.operations import CASES, check_operations
from opensora_sp.verification.doctor.surroundings import check_host, check_versions

CPU = torch.device("cpu")


def planted(
    right: Callable[..., torch.Tensor], spoil: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """An operation as a broken device has it: the reference, in float64, stays right."""

    def broken(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        result = right(x, *rest, **named)
        return result if x.dtype == torch.float64 else spoil(result)

    return broken


@pytest.mark.parametrize(
    ("name", "operation", "spoil"),
    [
        ("silu", "silu", lambda y: y * 1.05),
        ("attention, 72 wide", "scaled_dot_product_attention", lambda y: y.flip(0)),
        ("conv3d, causal", "conv3d", lambda y: y.roll(1, 2)),
        ("group norm", "group_norm", lambda y: y.where(y < 3, y * float("nan"))),
    ],
)
def test_a_wrong_operation_is_found(
    name: str, operation: str, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = planted(getattr(F, operation), spoil)
    monkeypatch.setattr(F, operation, broken)
    cases = [case for case in CASES if case.name == name]
    monkeypatch.setattr("opensora_sp.verification.doctor.operations.CASES", (*cases, CASES[0]))
    bad, good, kernels, norms, whole = check_operations(CPU)
    assert (bad.name, bad.state) == (name, "FAILED")
    assert all(kind in bad.found for kind in ("fp32", "fp16", "bf16"))
    assert good.state == whole.state == "ok"
    assert kernels.found.startswith("not math" if name == "attention, 72 wide" else "math fp32")
    assert norms.found == "plain torch: there are no fused kernels for cpu"


@pytest.mark.parametrize(
    ("name", "owner", "operation", "spoil"),
    [
        # What was there before is lost, or other positions are written too.
        ("folded: product added", torch.Tensor, "addmm_", lambda y: y.mul_(0.5)),
        ("folded: added to a part", torch.Tensor, "addmm_", lambda y: y.mul_(0.5)),
        ("folded: rotary product", torch, "bmm", lambda y: y.roll(1, 0)),
        ("folded: head norm", torch.linalg, "vector_norm", lambda y: y * 1.05),
        ("folded: weights", torch, "mul", lambda y: y.mul_(1.05)),
        ("folded: attention of views", F, "scaled_dot_product_attention", lambda y: y.flip(0)),
    ],
)
def test_an_operation_of_the_folded_step_says_what_to_set(
    name: str, owner: Any, operation: str, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = (case for case in CASES if case.name == name)
    monkeypatch.setattr("opensora_sp.verification.doctor.operations.CASES", (case,))
    assert check_operations(CPU)[0].state == "ok"
    monkeypatch.setattr(owner, operation, planted(getattr(owner, operation), spoil))
    found = check_operations(CPU)[0]
    assert found.state == "FAILED"
    assert all(kind in found.found for kind in ("fp32", "fp16", "bf16"))
    assert found.found.endswith("; set --step-kernels plain")


def test_the_gelu_of_a_product_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused form computes the erf form where its kernel does not take the other."""
    (case,) = (case for case in CASES if case.name == "folded: product, gelu")
    monkeypatch.setattr("opensora_sp.verification.doctor.operations.CASES", (case,))
    assert check_operations(CPU)[0].state == "ok"

    def erf(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        form = "tanh" if x.dtype == torch.float64 else "none"
        return F.gelu(F.linear(x, weight, bias), approximate=form)

    monkeypatch.setattr("opensora_sp.verification.doctor.operations.linear_gelu", erf)
    assert check_operations(CPU)[0].found.startswith("fp32 differs from the CPU by")


def test_no_check_indexes_by_a_mask() -> None:
    """The models do not, because it has spoilt memory on accelerators."""
    indexed_by: list[str] = []

    class Indices(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.index.Tensor:
                indexed_by.extend(str(i.dtype) for i in args[1] if i is not None)
            return func(*args, **(kwargs or {}))

    with Indices():
        results = check_operations(CPU)
    assert {result.state for result in results} == {"ok"}
    assert indexed_by == []


def test_a_missing_encoder_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    def missing(self: Any, codec: Any, *rest: Any, **named: Any) -> Any:
        raise av.codec.codec.UnknownCodecError(str(codec))

    command = ["--doctor", "--device", "cpu", "--save-dir", str(tmp_path)]
    assert main(command) == 0
    assert " 0 failed" in capsys.readouterr().out
    monkeypatch.setattr("opensora_sp.media.writer.VideoWriter._add_stream", missing)
    assert main(command) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(said) == 1
    assert said[0].split()[:3] == ["host", "encoder", "FAILED"]


def test_an_old_or_absent_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    oldest = {**surroundings.OLDEST, "torch": (99, 1), "no-such-package": (1, 0)}
    monkeypatch.setattr(surroundings, "OLDEST", oldest)
    found = {f.name: f for f in check_versions()}
    assert found["torch"].state == "FAILED"
    assert "older than 99.1" in found["torch"].found
    assert "pip install 'no-such-package>=1.0'" in found["no-such-package"].found
    assert found["numpy"].state == "ok"


def test_too_little_room_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(surroundings, "_encoder", lambda: passed("host", "encoder"))
    monkeypatch.setattr(surroundings, "_LEAST_DISK", 1 << 60)
    monkeypatch.setattr(surroundings, "_LEAST_MEMORY", 1 << 60)
    states = {f.name: f.state for f in check_host(tmp_path / "later", 2)}
    assert states["disk"] == states["memory"] == "FAILED"
    assert states["encoder"] == "ok"


def test_ranks_are_merged() -> None:
    good, bad = passed("device", "x"), failed("device", "x", "gone")
    assert merge([[good], [good]]) == [good]
    assert merge([[good], [bad], [bad]]) == [failed("device", "x", "rank 1 (and 1 more): gone")]
