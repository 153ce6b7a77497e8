"""Which device a rank takes: its number's, or the only one that its launcher shows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opensora_sp.base.errors import UserError
from opensora_sp.parallel import session


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for torch.cuda: how many devices there are, and which one was made current."""
    stand_in = SimpleNamespace(count=1, current=None, uuid="GPU-1")
    stand_in.device_count = lambda: stand_in.count
    stand_in.set_device = lambda index: setattr(stand_in, "current", index)
    stand_in.get_device_properties = lambda _: SimpleNamespace(uuid=stand_in.uuid)
    monkeypatch.setattr(session, "device_module", lambda kind: stand_in)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return stand_in


@pytest.mark.parametrize(("count", "taken"), [(8, 5), (1, 0)])
def test_a_rank_takes_its_own_device(devices: SimpleNamespace, count: int, taken: int) -> None:
    devices.count = count
    assert session._claim_device("cuda", 5, 8) == torch.device("cuda", taken)
    assert devices.current == taken


@pytest.mark.parametrize(("count", "launcher"), [(1, "torchrun"), (4, "torchrun"), (4, "srun")])
def test_fewer_devices_than_ranks_are_refused(
    devices: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, count: int, launcher: str
) -> None:
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    devices.count = count
    with pytest.raises(UserError, match=f"^8 ranks on this node but {count} visible cuda device"):
        session._claim_device("cuda", 5, 8)
    assert devices.current is None


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a", "b", "c"], None),
        (["", "", ""], None),  # of a torch that does not tell
        (["a", "b", "a"], r"^ranks 0 and 2 have the same cuda device \(a\): show each rank"),
    ],
)
def test_no_two_ranks_have_one_device(
    devices: SimpleNamespace, names: list[str], told: str | None
) -> None:
    control: Any = SimpleNamespace(all_gather_object=lambda own: names)
    if told is None:
        session._require_own_devices(torch.device("cuda", 0), control)
    else:
        with pytest.raises(UserError, match=told):
            session._require_own_devices(torch.device("cuda", 0), control)
