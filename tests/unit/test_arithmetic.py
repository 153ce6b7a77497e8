"""Half precision that is stored but not computed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import conditions, normal, tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_sp.benchmark import flops
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.models.kernels.cpu_half import Float32Arithmetic, arithmetic, computes_natively
from opensora_sp.parallel.layout import Layout


def test_heavy_operations_round_once() -> None:
    x, w = normal(4, 512).bfloat16(), normal(8, 512, seed=3).bfloat16()
    exact = F.linear(x.float(), w.float())
    with Float32Arithmetic():
        out = F.linear(x, w)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())
    residual = normal(4, 8, seed=4).bfloat16()
    exact += residual.float()
    with Float32Arithmetic():
        residual.addmm_(x, w.t())
    assert torch.equal(residual, exact.bfloat16())


def test_float32_and_integers_are_left_alone() -> None:
    x = normal(4, 8)
    with Float32Arithmetic():
        assert torch.equal(F.linear(x, x), x @ x.T)
        assert torch.equal(torch.arange(4) @ torch.arange(4), torch.tensor(14))


def test_a_measured_peak_is_of_the_arithmetic_that_the_models_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or a run on a CPU without bf16 would be far above its own peak."""
    monkeypatch.setattr(flops, "_GEMM_SIDE", {"cpu": 8})
    monkeypatch.setattr(flops, "_PEAK_SECONDS", 0.01)
    computed: set[torch.dtype] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.mm.default:
                computed.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Float32Arithmetic(), Products():
        assert flops.measure_peak(torch.device("cpu"), torch.bfloat16) > 0
    assert computed == {torch.float32}


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("something else\n", True),
    ],
)
def test_the_processor_is_asked(tmp_path: Path, cpuinfo: str, native: bool) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    assert computes_natively(torch.bfloat16, file) is native
    assert computes_natively(torch.float32, file)
    assert computes_natively(torch.bfloat16, tmp_path / "absent")


def test_the_whole_transformer_stays_within_bf16_noise() -> None:
    model = tiny_transformer()
    z = normal(1, 4, 3, 6, 8)
    layout = Layout(frames=3, size=(6, 8), ranks=1)

    def velocity() -> torch.Tensor:
        denoiser = parallelize(model, None, layout)
        return denoiser.prepare(conditions())(denoiser.shard(z), 500.0)

    exact = velocity()
    model.bfloat16()
    model.rope.freqs = tiny_transformer().rope.freqs
    rounded = velocity()
    with Float32Arithmetic():
        widened = velocity()
    scale = exact.norm()
    assert 0 < float((rounded - widened).norm() / scale) < 0.05
    assert float((widened - exact).norm()) < 1.5 * float((rounded - exact).norm())


def test_only_a_cpu_is_widened() -> None:
    assert not isinstance(arithmetic(torch.device("meta"), torch.bfloat16), Float32Arithmetic)
    assert not isinstance(arithmetic(torch.device("cpu"), torch.float32), Float32Arithmetic)
