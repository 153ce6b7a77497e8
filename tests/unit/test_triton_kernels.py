"""The Triton kernels against plain torch, in Triton's interpreter, and compiled for two GPUs.

Skipped where Triton is not installed. What only a GPU can show is said in docs/kernels.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opensora_sp.engine.kernel_choice import choose_fused
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.models.kernels import fused, reference
from opensora_sp.request.runtime import Runtime

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def _has_triton() -> bool:
    try:
        return int(version("triton").split(".")[0]) >= 3
    except PackageNotFoundError:
        return False


needs_triton = pytest.mark.skipif(not _has_triton(), reason="triton 3 is not installed")


def started(*command: str, cache: Path, **more: str) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache), **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_kernels_give_the_numbers_of_plain_torch(tmp_path: Path) -> None:
    said = started("tests/triton_interpreted.py", cache=tmp_path, TRITON_INTERPRET="1")
    found: dict[str, Any] = json.loads(said)
    assert len(found["errors"]) == 6
    for case, error in found["errors"].items():
        assert error <= found["limits"][case.split()[0]], case
        assert error <= 1e-6 or "float32" not in case
    # A pair of blocks, with and without gradients' restriction to tensors of their own.
    assert max(found["blocks"].values()) <= 1e-6
    # A folded pair: one call for each MLP and part of a tile, more for tiles that torch would copy.
    assert max(found["folded"].values()) <= 2e-6
    assert found["calls folded"] > 0
    assert (found["calls"], found["calls with gradients"]) == (8, 0)
    assert found["takes"] == [True, False]
    assert found["empty"] == [2, 0, 3, 8]


@needs_triton
def test_kernels_compile_for_a_gpu_without_spilling_registers(tmp_path: Path) -> None:
    command = ["scripts/compile_kernels.py", "--arch", "80", "90", "--dtype", "bf16"]
    said = started(*command, cache=tmp_path)
    cells = re.findall(r"(\d+) / (\d+) / (\d+)", said)
    assert len(cells) == 12
    assert all(0 < int(registers) <= 64 and int(spilled) == 0 for registers, spilled, _ in cells)


class Double:
    """Fused kernels in plain torch; `wrong` gives other numbers, `broken` raises."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def takes_heads(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        return True

    def norm_rotary_(self, q: torch.Tensor, k: torch.Tensor, *more: Any) -> Any:
        if self.fault == "broken":
            raise RuntimeError("out of registers")
        return tuple(
            own.copy_(x) for own, x in zip((q, k), reference.norm_rotary(q, k, *more), strict=True)
        )

    def residual_norm_(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
        if self.fault == "wrong":
            more["shift"] = more["scale"]
        return reference.residual_norm_(x, **more)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", "json, checked"),
        ("wrong", r"plain torch: json's kernels differ from it by \d"),
        ("broken", "plain torch: json failed: RuntimeError: out of registers"),
    ],
)
def test_fused_kernels_are_used_only_where_they_are_right(
    fault: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_MODULES", {"cpu": ("json", "double")})
    monkeypatch.setattr(fused, "import_module", lambda name: Double(fault))
    module, why = fused.fused_kernels(torch.device("cpu"), torch.bfloat16, 4, 8)
    assert re.match(said, why)
    assert (module is not None) == (not fault)


def test_all_ranks_use_fused_kernels_or_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def decided(of_another_rank: str | None, **asked: Any) -> tuple[bool, str | None]:
        runtime = Runtime(**asked)
        models = Pipeline.load(dtype="fp32", runtime=runtime, transformer_only=True).models
        monkeypatch.setattr(
            models.session.control, "all_gather_object", lambda own: [own, of_another_rank]
        )
        assert choose_fused(models)
        assert not choose_fused(models)  # once
        return models.kernels.fused is not None, models.kernels.fused_why

    monkeypatch.setattr(
        "opensora_sp.engine.kernel_choice.fused_kernels",
        lambda *_: (SimpleNamespace(), "triton, checked"),
    )
    assert decided(None) == (True, "triton, checked")
    assert decided("plain torch: no triton") == (False, "plain torch: no triton")
    assert decided(None, fused_kernels="off") == (False, "plain torch, as asked for")
