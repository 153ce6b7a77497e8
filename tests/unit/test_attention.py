"""The attention table: padding, the probe and its choice, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_sp.base.errors import UserError
from opensora_sp.engine import kernel_choice
from opensora_sp.engine.kernel_choice import choose_attention, described_attention
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.models.kernels.active import Kernels, Lengths, using
from opensora_sp.models.kernels.attention import (
    KERNELS,
    Choice,
    Kernel,
    check_attention,
    run,
    usable,
)
from opensora_sp.models.kernels.probe import Shape, fastest, probe
from opensora_sp.models.kernels.reference import attend
from opensora_sp.request.engine_settings import EngineSettings
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime

CPU = torch.device("cpu")
WIDTH = 72


def heads(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def three(count: int, queries: int, keys: int) -> tuple[Tensor, ...]:
    lengths = (queries, keys, keys)
    return tuple(heads(count, 4, n, WIDTH, seed=i) for i, n in enumerate(lengths))


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("width", [80, 96, 128])
def test_heads_padded_with_zeros_attend_as_they_are(kernel: str, width: int) -> None:
    q, k, v = three(3, 45, 19)
    padded, bare = (run(Choice(kernel, wide), q, k, v) for wide in (width, WIDTH))
    assert padded.shape == bare.shape
    torch.testing.assert_close(padded, bare, rtol=0, atol=1e-6)


def test_a_broken_package_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for a module in a package, Python imports the package."""
    (tmp_path / "flash_attn").mkdir()
    broken = "raise AttributeError('built for another torch')\n"
    (tmp_path / "flash_attn" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert "fa4" not in {row.name for row in usable("cuda", "bf16")}
    with pytest.raises(UserError, match="needs the Python module flash_attn"):
        check_attention("fa4", "cuda", "bf16")


def test_the_interface_of_flash_attn_is_used_as_it_is_defined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A double of the package with its two functions, which see [.., length, H, D]."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = KERNELS["sdpa"].call(q, k, v, scale=softmax_scale)
        return out.transpose(1, 2).contiguous(), "statistics"

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int,
        softmax_scale: float | None,
    ) -> Tensor:  # fmt: skip
        assert q_ends.dtype == k_ends.dtype == torch.int32
        assert (most_q, most_k) == (int(q_ends.diff().max()), int(k_ends.diff().max()))
        out = []
        for i in range(len(q_ends) - 1):
            own_q, own_k = slice(*q_ends[i : i + 2]), slice(*k_ends[i : i + 2])
            of_one = flash_attn_func(q[None, own_q], k[None, own_k], v[None, own_k], softmax_scale)
            out.append(of_one[0][0])
        return torch.cat(out)

    double: Any = type(sys)("flash_attn")
    double.flash_attn_func, double.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", double)
    q, k, v = three(3, 45, 19)
    for name in ("fa2", "fa-gcu"):
        for width in (WIDTH, 96):
            found = run(Choice(name, width), q, k, v)
            torch.testing.assert_close(found, attend(q, k, v), rtol=0, atol=1e-6)


def fake(name: str, call: Callable[..., Tensor] | None = None, **more: Any) -> Kernel:
    return Kernel(name=name, about="a fake", call=call or KERNELS["sdpa"].call, **more)


def table(*rows: Kernel) -> dict[str, Kernel]:
    return {row.name: row for row in rows}


def wrong_scale(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return KERNELS["sdpa"].call(q, k, v, scale=1 / q.shape[-1])


def broken(*_: Tensor, scale: float | None = None) -> Tensor:
    raise RuntimeError("no kernel image")


def test_a_probe_times_what_is_right_and_says_why_the_rest_is_out() -> None:
    rows = table(
        fake("sdpa"),
        fake("wrong", wrong_scale),
        fake("broken", broken),
        fake("wide", multiple=16, also=(96,)),
        fake("elsewhere", devices=("cuda",)),
        fake("half", dtypes=("bf16",)),
        fake("absent", module="no_such_module_here"),
        fake("yardstick", probed=False),
    )
    order = iter([4.0, 3.0, 2.0])

    def measure(call: Callable[[], Tensor], _: torch.device) -> float:
        assert bool(call().isfinite().all())
        return next(order)

    trial = probe(Shape(2, 4, 33, 33, WIDTH), torch.float32, CPU, table=rows, measure=measure)
    assert trial.seconds == {
        Choice("sdpa", 72): 4.0,
        Choice("wide", 80): 3.0,
        Choice("wide", 96): 2.0,
    }
    assert set(trial.out) == {Choice("wrong", 72), Choice("broken", 72)}
    assert "differs from the formula" in trial.out[Choice("wrong", 72)]
    assert "no kernel image" in trial.out[Choice("broken", 72)]
    assert fastest(trial.seconds, WIDTH) == Choice("wide", 96)


def test_the_default_stays_unless_another_is_clearly_faster() -> None:
    sdpa, other = Choice("sdpa", 72), Choice("other", 72)
    assert fastest({sdpa: 1.0, other: 0.97}, 72, margin=1.05) == sdpa
    assert fastest({sdpa: 1.0, other: 0.90}, 72, margin=1.05) == other
    assert fastest({other: 1.0}, 72) == other  # the default was wrong here
    assert fastest({}, 72) == sdpa


def test_a_probe_stays_small_where_a_run_is_large() -> None:
    spatial = Shape(120, 16, 3600, 3600, WIDTH).bounded()
    text = Shape(1, 16, 432_000, 300, WIDTH).bounded()
    assert (spatial.count, spatial.queries, spatial.keys) == (4, 3600, 3600)
    assert text.count == 1
    assert text.keys == 300
    assert 10_000 < text.queries < 20_000


def test_a_choice_holds_for_any_number_of_ranks() -> None:
    """Ranks change how many sequences there are, and how many tokens look at the text."""
    kernels = Kernels()
    kernels.attention = {
        Lengths.of(405, 405): Choice("a", 72),
        Lengths.of(15, 15): Choice("b", 72),
        Lengths.text(19): Choice("c", 80),
    }
    assert kernels.choice(405, 405, 72) == Choice("a", 72)
    assert kernels.choice(15, 15, 72) == Choice("b", 72)
    for own_tokens in (6075, 3045, 1530, 19):
        assert kernels.choice(own_tokens, 19, 72) == Choice("c", 80)
    assert kernels.choice(7, 7, 72) == Choice("sdpa", 72)


def test_attention_calls_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        called.append(q.shape[-1])
        return KERNELS["sdpa"].call(q, k, v, scale=scale)

    row = dataclasses.replace(KERNELS["math"], call=noted)
    monkeypatch.setattr(
        "opensora_sp.models.kernels.reference.run",
        lambda choice, q, k, v: run(choice, q, k, v, table={**KERNELS, "math": row}),
    )
    q, k, v = three(1, 5, 5)
    with using(Kernels(anywhere=Choice("math", 80))):
        inside = attend(q, k, v)
    torch.testing.assert_close(inside, attend(q, k, v), rtol=0, atol=1e-6)
    assert called == [80]


def test_rank_0_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a rank that does not lead nothing is timed: what rank 0 says is used."""
    pipeline = Pipeline.load(dtype="fp32", transformer_only=True)
    models = pipeline.models
    request = Request(prompt="x", height=32, width=48, num_frames=17)
    assert not choose_attention(models, [request], [7])  # a CPU measures nothing
    assert described_attention(models) == {"everywhere": "sdpa"}

    session = models.session
    said: list[Any] = []

    def broadcast(value: Any) -> Any:
        said.append(value)
        return {Lengths.text(7): Choice("math", 72)}

    monkeypatch.setattr(session, "device", torch.device("meta"))
    monkeypatch.setattr(type(session), "leads", False)
    monkeypatch.setattr(session.control, "broadcast_object", broadcast)
    monkeypatch.setattr(kernel_choice, "probe", lambda *_: pytest.fail("only rank 0 measures"))
    assert choose_attention(models, [request], [7])
    assert said == [None]
    assert models.kernels.choice(90, 7, 72) == Choice("math", 72)


def test_a_kernel_that_cannot_run_is_refused_in_one_line() -> None:
    for name, device, dtype, words in (
        (
            "flash",
            "cpu",
            "bf16",
            "runs on cuda only, not on cpu: leave it out, or give one",
        ),
        ("fa3", None, "bf16", "needs the Python module flash_attn_interface"),
        ("cudnn", "cuda", "fp32", "takes fp16 and bf16 only, not fp32"),
    ):
        with pytest.raises(UserError) as caught:
            check_attention(name, device, dtype)
        assert str(caught.value).startswith(f"--attention {name}: it ")
        assert words in str(caught.value)
    check_attention("flash", None, "bf16")  # the device is not known yet
    with pytest.raises(UserError, match="runs on cuda only"):
        Pipeline.load(dtype="fp32", runtime=Runtime(attention="efficient"), transformer_only=True)
    with pytest.raises(UserError, match="attention 'best' is not one of auto, sdpa, flash"):
        EngineSettings(attention="best")


def test_the_command_refuses_before_torch_is_there() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "opensora_sp.cli.infer", "--prompt", "x"]
    more = ["--device", "cpu", "--attention", "cudnn"]
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert done.returncode == 2
    assert [line for line in lines if line.startswith("error")] == [
        "error: --attention cudnn: it runs on cuda only, not on cpu: leave it out, or give one of "
        "auto, sdpa, math"
    ]
    assert " torch\n" not in done.stderr
