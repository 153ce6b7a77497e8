"""A step waits for nothing: it copies nothing between host and device but pinned memory.

The device is torch's meta device, whose tensors have no contents, so a read that is missed here
fails there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import conditions, normal, tiny_transformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_sp.base import transfer
from opensora_sp.base.errors import UserError
from opensora_sp.base.finite import FiniteChecks
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.sampling import sample
from opensora_sp.parallel.layout import Layout

META = torch.device("meta")
SIZE, FRAMES = (8, 12), 5
TIMES = [1000.0, 700.0, 400.0, 100.0]


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device; notes the copies that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        first: Any = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.device == META:
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        indices = args[1] if name in ("index", "index_put_") else []
        assert not any(i is not None and i.dtype == torch.bool for i in indices), name
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else first
            target = first.device if name == "copy_" else kwargs.get("device") or source.device
            target = torch.device(target)
            if source.device != target:
                assert kwargs.get("non_blocking"), f"{source.device} to {target}: a copy that waits"
                self.copies.append((source.device.type, target.type))
                if target.type == "cpu":
                    return torch.zeros(source.shape, dtype=source.dtype)
        return func(*args, **kwargs)


class Event:
    """As torch.cuda.Event; there is nothing to wait for."""

    def synchronize(self) -> None: ...


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has pinned memory and events."""
    monkeypatch.setattr(transfer, "_PINS", frozenset({"meta"}))
    monkeypatch.setattr(transfer, "_recorded_event", lambda device: Event())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


@contextmanager
def one_run() -> Iterator[tuple[Any, Any, FiniteChecks]]:
    finite = FiniteChecks()
    denoiser = parallelize(
        tiny_transformer().to(META), None, Layout(frames=FRAMES, size=SIZE, ranks=1)
    )
    denoiser.model.null_tokens = lambda masks: [  # type: ignore[method-assign]
        torch.empty(int(mask.sum()), denoiser.model.config.caption_channels, device=META)
        for mask in masks
    ]
    velocity = denoiser.prepare(conditions(), lambda v, t: finite.add(v, f"t = {t}"))
    yield denoiser, velocity, finite


@pytest.mark.parametrize("mask", [None, [[1.0, 0.0, 0.5, 0.2, 1.0]]], ids=["plain", "masked"])
@pytest.mark.usefixtures("pinned")
def test_a_step_waits_for_nothing(mask: list[list[float]] | None) -> None:
    frame_mask = None if mask is None else torch.tensor(mask)
    with one_run() as (denoiser, velocity, finite), torch.no_grad(), NoWaiting() as watched:
        z = denoiser.shard(normal(1, 4, FRAMES, *SIZE))
        drawn = normal(1, 4, FRAMES, *SIZE, seed=3)
        z = sample(z, TIMES, velocity, frame_mask, lambda step: denoiser.shard(drawn))
        finite.settle()
    assert z.device == META
    assert watched.copies.count(("meta", "cpu")) == len(TIMES)  # each step was checked
    if mask is not None:  # without a mask only small tables go to the device
        assert watched.copies.count(("cpu", "meta")) > 4 * len(TIMES)


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool(x.any()), Tensor.cpu])
def test_the_watch_sees_a_read(read: Any) -> None:
    with NoWaiting(), pytest.raises(AssertionError):
        read(torch.empty(3, device=META))


class Late:
    """Counts that are known only when they are waited for."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    def wait(self) -> Tensor:
        return self.counts


class OnDevice(Tensor):
    """A tensor that says that it is on a device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def test_what_is_not_finite_is_named_one_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora_sp.base.finite.Arriving", Late)
    good = torch.ones(6).as_subclass(OnDevice)
    bad = torch.tensor([1.0, torch.nan, torch.inf, 1.0, 1.0, torch.nan]).as_subclass(OnDevice)
    said = r"^step 2 holds 3 values of 6 that are NaN or infinite \(2 NaN\): look there$"
    checks = FiniteChecks("look there")
    checks.add(good, "step 1")
    checks.add(bad, "step 2")
    with pytest.raises(UserError, match=said):
        checks.add(good, "step 3")
    checks = FiniteChecks("look there")
    checks.add(bad, "step 2")
    with pytest.raises(UserError, match=said):
        checks.settle()
    with pytest.raises(UserError, match=said):  # a CPU has nothing to wait for
        FiniteChecks("look there").add(bad.as_subclass(Tensor), "step 2")
