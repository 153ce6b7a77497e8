"""The doctor on ranks: a sound backend passes, one that mixes up or loses parts does not."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks

from opensora_sp.parallel.session import open_session
from opensora_sp.verification.doctor import collectives
from opensora_sp.verification.doctor.check_result import CheckResult, merge
from opensora_sp.verification.doctor.collectives import check_collectives


class _Done:
    """A collective that has arrived already, with parts where they do not belong."""

    def wait(self) -> None:
        pass


def _swap_parts(right: Any) -> Any:
    """all_to_all_single that swaps the first two received parts where they are as long."""

    def broken(recv: torch.Tensor, send: torch.Tensor, got: Any, sent: Any, **named: Any) -> Any:
        right(recv, send, got, sent, **named).wait()
        parts = list(recv.clone().split(got))
        if len(parts) > 1 and got[0] == got[1]:
            parts[0], parts[1] = parts[1], parts[0]
            recv.copy_(torch.cat(parts))
        return _Done()

    return broken


def _zero_broadcast(right: Any) -> Any:
    def broken(tensor: torch.Tensor, src: int, group: Any = None) -> None:
        right(tensor, src, group=group)
        if dist.get_rank() != src and tensor.dtype == torch.bfloat16:
            tensor[-1] = 0

    return broken


FAULTS = {"all_to_all_single": _swap_parts, "broadcast": _zero_broadcast}


def examined(rank: int, world: int, init_file: str, faults: list[str | None]) -> list[Any]:
    found = []
    collectives._SPEED_BYTES = 1 << 12  # the speed of the link is not what is tested
    with open_session("cpu") as session:
        for name in faults:
            right = getattr(dist, name) if name else None
            if name:
                setattr(dist, name, FAULTS[name](right))
            try:
                found.append(check_collectives(session))
            finally:
                if name:
                    setattr(dist, name, right)
    return found


def test_planted_faults_are_found() -> None:
    ranks = run_ranks(examined, 4, [None, "all_to_all_single", "broadcast"])
    sound, swapped, zeroed = (merge([rank[i] for rank in ranks]) for i in range(3))
    assert {f.state for f in sound} == {"ok"}
    names = {f.name for f in sound}
    for group in ("world", "sequence group", "guidance pair"):
        for dtype in ("float32", "float16", "bfloat16", "uint8"):
            assert f"all_to_all_single, {group}, {dtype}" in names
            assert f"broadcast, {group}, {dtype}" in names
    assert bad(swapped) == {name for name in names if name.startswith("all_to_all_single")}
    assert bad(zeroed) == {n for n in names if n.startswith("broadcast") and "bfloat16" in n}
    said = next(f.found for f in swapped if f.name == "all_to_all_single, world, float32")
    assert "even parts: what came from rank(s) 0, 1 of the group" in said


def bad(findings: list[CheckResult]) -> set[str]:
    return {f.name for f in findings if f.state == "FAILED"}


def test_sound_ranks_of_an_odd_number() -> None:
    ranks = run_ranks(examined, 3, [None])
    assert {f.state for f in merge([rank[0] for rank in ranks])} == {"ok"}
