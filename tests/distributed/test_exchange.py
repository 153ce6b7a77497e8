"""Resharding moves every number to its place and back, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import RankFailure, run_ranks

from opensora_sp.parallel.exchange import Comm, Exchange, Transfer, gather_patches, swap_branches
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.overlap import OverlapChunk
from opensora_sp.parallel.session import open_session

# (frames, latent size): T and S below, at and above the rank counts, every remainder among them.
SHAPES = [(1, (2, 2)), (1, (9, 7)), (5, (3, 11)), (15, (6, 7)), (16, (8, 8)), (30, (5, 13))]


def numbered(frames: int, layout: Layout, batch: int = 1, channels: int = 3) -> torch.Tensor:
    """[B,T,S,C] in which every number is different."""
    count = batch * frames * layout.patch_count * channels
    return torch.arange(count, dtype=torch.float32).view(batch, frames, -1, channels)


def round_trips(rank: int, world: int, init_file: str) -> int:
    """Every shape there and back; returns the number of comparisons."""
    compared = 0
    with open_session("cpu") as session:
        comm = session.build(Mesh(sequence=world)).sequence
        for frames, size in SHAPES:
            layout = Layout(frames=frames, size=size, ranks=world)
            exchange = Exchange(comm, layout)
            for batch in (1, 2):
                whole = numbered(frames, layout, batch)
                mine = whole[:, :, layout.patches(rank)]
                for before in range(world):
                    chunk = OverlapChunk(0, 0, frames, before)
                    arrived = exchange.to_frames(mine, chunk).wait()
                    shares = layout.frame_split(batch * frames, before)
                    start = sum(shares[:rank])
                    expected = whole.flatten(0, 1)[start : start + shares[rank]]
                    assert torch.equal(arrived, expected), (frames, size, batch, before)
                    back = exchange.to_patches(arrived, chunk, batch).wait()
                    assert torch.equal(back, mine), (frames, size, batch, before)
                    compared += 1
                gathered = gather_patches(comm, layout, mine)
                assert (gathered is None) == (rank != 0)
                assert gathered is None or torch.equal(gathered, whole)
    return compared


@pytest.mark.parametrize("world", [2, 3, 4, 5, 7, 8])
def test_round_trip_is_bit_equal(world: int) -> None:
    assert run_ranks(round_trips, world) == [len(SHAPES) * 2 * world] * world


def in_bf16(rank: int, world: int, init_file: str) -> Any:
    with open_session("cpu") as session:
        comm = session.build(Mesh(guidance=2)).guidance
        mine = torch.full((2, 3), float(rank), dtype=torch.bfloat16)
        return swap_branches(comm, mine).wait().float()


def test_guidance_pair_swaps() -> None:
    first, second = run_ranks(in_bf16, 2)
    assert torch.equal(first, torch.ones(2, 3))
    assert torch.equal(second, torch.zeros(2, 3))


def non_contiguous(rank: int, world: int, init_file: str) -> None:
    with open_session("cpu") as session:
        Transfer(
            session.world, "test", torch.arange(8.0)[::2], [2, 2], [2, 2], lambda received: received
        ).wait()


def test_non_contiguous_buffers_are_refused() -> None:
    with pytest.raises(RankFailure, match="not contiguous"):
        run_ranks(non_contiguous, 2)


def wrong_split(rank: int, world: int, init_file: str) -> None:
    with open_session("cpu") as session:
        Transfer(session.world, "test", torch.arange(8.0), [4, 3], [4, 4], lambda got: got).wait()


def test_splits_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(RankFailure, match="do not add up"):
        run_ranks(wrong_split, 2)


def test_layout_must_be_for_the_group() -> None:
    with pytest.raises(ValueError, match="layout for 2 ranks on a group of 3"):
        Exchange(Comm(None, 0, 3), Layout(frames=1, size=(2, 2), ranks=2))
