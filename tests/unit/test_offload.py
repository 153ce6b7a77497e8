"""Offloaded weights are on the device whenever they are used, and in host memory afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from opensora_sp.engine.blocks import _with_next
from opensora_sp.models import offload
from opensora_sp.models.offload import Lane, LayerOffload, OffloadedModuleList

# Of another type than the host, so that a weight's place can be told; never computed on.
DEVICE = torch.device("meta")


def places(modules: Sequence[nn.Module]) -> set[str]:
    return {weight.device.type for module in modules for weight in module.parameters()}


def test_a_pair_and_the_next_are_on_the_device() -> None:
    pairs = [(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(4)]
    layers = LayerOffload(pairs, DEVICE, offloaded=True, keep=2)
    for round_ in range(2):  # of sampling: every step passes all of them again
        seen = []
        for number, here, following in _with_next(layers):
            seen.append((number, following is None))
            used = [*here, *(following or ())]
            assert places(used) == {"meta"}, (round_, number)
            on_device = [pair for pair in pairs if places(pair) == {"meta"}]
            assert len(on_device) <= 2
        assert seen == [(0, False), (1, False), (2, False), (3, True)]
        assert places([m for pair in pairs for m in pair]) == {"cpu"}


def test_a_copy_that_is_not_used_arrives_before_its_memory_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy may still be running in its own stream when the loop that started it is left."""
    running: set[int] = set()

    class SlowLane(Lane):
        """Copies that end when they are waited for, and not before."""

        def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
            number = len(running)
            running.add(number)
            return lambda: running.discard(number)

    monkeypatch.setattr(offload, "Lane", SlowLane)
    layers = LayerOffload([(nn.Linear(2, 2),) for _ in range(4)], DEVICE, offloaded=True)
    passing = iter(layers)
    next(passing)
    assert running  # the second layer's copy
    passing.close()
    assert not running


def test_a_loop_that_is_left_early_gives_everything_back() -> None:
    modules = OffloadedModuleList([nn.Linear(2, 2) for _ in range(3)], DEVICE)
    before = list(modules.parameters())
    for module in modules:
        assert places([module]) == {"meta"}
        break
    assert all(a is b for a, b in zip(before, modules.parameters(), strict=True))
