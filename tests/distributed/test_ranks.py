"""The helper under the distributed tests: a rank that fails must never pass or hang unnoticed."""

from __future__ import annotations

import gc
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import RankFailure, run_ranks


@dataclass(frozen=True)
class Payload:
    """Defined here on purpose: arguments and results may be of a test module's own classes."""

    value: int


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _sum_over_ranks(
    rank: int, world_size: int, init_file: str, payload: Payload
) -> tuple[Payload, str]:
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size
    )
    total = torch.tensor(payload.value * (rank + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return Payload(int(total)), os.environ["RANK"]


def _fail_on_rank_1(rank: int, world_size: int, init_file: str, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        while len(list(folder.iterdir())) < world_size:
            time.sleep(0.01)
        print("about to fail")
        raise ValueError("the reason")
    time.sleep(600)


def _vanish_on_rank_0(rank: int, world_size: int, init_file: str) -> None:
    if rank == 0:
        os._exit(7)
    time.sleep(600)


def _sleep(rank: int, world_size: int, init_file: str) -> None:
    time.sleep(600)


def _found_imported(rank: int, world_size: int, init_file: str) -> tuple[set[str], bool]:
    return sys.modules.keys() & {"torch", "opensora_sp.cli.infer"}, gc.get_freeze_count() > 0


def test_a_rank_finds_torch_and_the_package_imported() -> None:
    """The server of ranks passes over what it cannot import, and the suite would only be slow."""
    assert run_ranks(_found_imported, 1) == [({"torch", "opensora_sp.cli.infer"}, True)]


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(_sum_over_ranks, 3, Payload(10))
    assert results == [(Payload(60), "0"), (Payload(60), "1"), (Payload(60), "2")]


def test_env_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSORA_SP_TEST_VARIABLE", "handed on")
    assert run_ranks(_join_by_environment, 2) == [(2, "handed on")] * 2


def _join_by_environment(rank: int, world_size: int, init_file: str) -> tuple[int, str]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="env://")
    size = dist.get_world_size()
    dist.barrier()  # a rank that leaves early breaks the connections of one that is still joining
    dist.destroy_process_group()
    return size, os.environ["OPENSORA_SP_TEST_VARIABLE"]


def test_one_failure_is_reported_and_the_others_are_killed(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(_fail_on_rank_1, 3, tmp_path)
    text = str(failure.value)
    assert text.startswith("rank 1 failed first:")
    assert "ValueError: the reason" in text
    assert "_fail_on_rank_1" in text, "the traceback names the place"
    assert "rank 0 was still running a moment after that and was killed" in text
    assert "about to fail" in text
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert not any(_alive(pid) for pid in pids)


def test_a_rank_that_dies_without_a_word_is_named() -> None:
    with pytest.raises(RankFailure, match="rank 0 died with exit code 7"):
        run_ranks(_vanish_on_rank_0, 2, timeout_s=60)


def test_ranks_that_hang_are_ended_at_the_limit() -> None:
    with pytest.raises(RankFailure, match="rank 1 was still running at the limit of 2 s"):
        run_ranks(_sleep, 2, timeout_s=2)
