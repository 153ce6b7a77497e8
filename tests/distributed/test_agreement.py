"""A rank that would compute something else ends the run before its first step, by name."""

from __future__ import annotations

import pytest
import torch
from ranks import RankFailure, run_ranks
from tiny import normal, tiny_transformer

from opensora_sp.parallel.agreement import checksum, ensure_agreement, fingerprint
from opensora_sp.parallel.session import open_session


def with_facts(rank: int, world: int, init_file: str, odd_rank: int, odd_fact: str) -> None:
    seed = 7 + (odd_fact == "noise" and rank == odd_rank)
    model = tiny_transformer(seed=1 if odd_fact == "weights" and rank == odd_rank else 0)
    with open_session("cpu") as session:
        ensure_agreement(
            session, {"noise": checksum([normal(2, 3, seed=seed)]), "weights": fingerprint(model)}
        )


def test_equal_ranks_agree() -> None:
    assert run_ranks(with_facts, 3, -1, "") == [None] * 3


@pytest.mark.parametrize("fact", ["noise", "weights"])
def test_the_rank_that_differs_is_named(fact: str) -> None:
    with pytest.raises(RankFailure, match=f"rank 2 differs from rank 0 in its {fact}"):
        run_ranks(with_facts, 3, 2, fact)


def test_checksum_sees_every_bit_and_the_shape() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16)
    changed = tensor.clone()
    changed[3] = -0.0
    assert checksum([tensor]) == checksum([tensor.clone()])
    assert checksum([tensor]) != checksum([changed])
    assert checksum([tensor]) != checksum([tensor.view(2, 2)])
