"""Decoding on several ranks: the same frames, bit for bit, in order, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peak import PeakBytes
from ranks import run_ranks

from opensora_sp.base.errors import SharedFault
from opensora_sp.base.geometry import latent_frames
from opensora_sp.engine.decode import Decoded, decode_alone, decode_shared
from opensora_sp.models.video_vae import VideoVAE
from opensora_sp.parallel.decode_plan import decoded_frames, plan_decode
from opensora_sp.parallel.exchange import Comm
from opensora_sp.parallel.session import Session, open_session

SUITE = Path(__file__).resolve().parents[2] / "opensora_sp_conformance"
LENGTHS = (1, 17, 20, 51, 60, 102)
SIDE = (1, 2)


def tiny_vae() -> VideoVAE:
    return VideoVAE.load(
        SUITE / "vae3d", SUITE / "vae2d", dtype=torch.float32, device="cpu", with_encoder=False
    )


def latents(frames: int, batch: int = 1, side: tuple[int, int] = SIDE) -> torch.Tensor:
    shape = (batch, 4, latent_frames(frames), *side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(frames))


def share(
    session: Session, vae: VideoVAE, z: torch.Tensor, frames: int, keep_from: int | None = None
) -> list[Decoded]:
    known = z if session.leads else None
    shape = (z.shape[0], 4, z.shape[3], z.shape[4])
    return list(decode_shared(session, vae, known, shape, frames, keep_from))


def joined(parts: list[Decoded]) -> torch.Tensor:
    return torch.cat([part.frames for part in parts], dim=1)


def first_ranks(session: Session, count: int) -> Session:
    """A session of the first ranks among themselves, as replicas have theirs."""
    if count == session.world_size:
        return session
    group, side = dist.new_group(range(count)), dist.new_group(range(count))
    comm = Comm(group, session.rank, count, session.ledger)
    control = replace(session.control, world_size=count, side=side)
    return replace(session, world_size=count, world=comm, control=control)


def compare(rank: int, world: int, init_file: str) -> int:
    """Every length, shared by 1 to 8 ranks, and alone; the comparisons on the leading rank."""
    vae, compared = tiny_vae(), 0
    inputs = {frames: latents(frames, batch=2 if frames == 20 else 1) for frames in LENGTHS}
    with open_session("cpu") as session, torch.no_grad():
        if rank == 0:
            wanted = {n: joined(list(decode_alone(vae, z, n))) for n, z in inputs.items()}
        for count in range(1, world + 1):
            some = first_ranks(session, count)
            for frames, z in inputs.items() if rank < count else ():
                parts = share(some, vae, z, frames)
                assert bool(parts) == (rank == 0)
                if rank == 0:
                    assert torch.equal(joined(parts), wanted[frames]), (count, frames)
                    compared += 1
    return compared


def test_shared_by_one_to_eight_ranks_is_alone_bit_for_bit() -> None:
    assert run_ranks(compare, 8)[0] == 8 * len(LENGTHS)


def keep(rank: int, world: int, init_file: str) -> None:
    """Pixels of the last two chunks travel as they are, for the clip that continues them."""
    vae = tiny_vae()
    with open_session("cpu") as session, torch.no_grad():
        z = latents(60)
        parts = share(session, vae, z, 60, keep_from=2)
        if rank == 0:
            whole = vae.decode(z, 60)
            kept = [part.pixels for part in parts if part.pixels is not None]
            assert torch.equal(torch.cat(kept, dim=2), whole[:, :, 34:])
            assert torch.equal(joined(parts), joined(list(decode_alone(vae, z, 60))))


def test_pixels_that_the_next_clip_needs_arrive_too() -> None:
    run_ranks(keep, 3)


def broken(rank: int, world: int, init_file: str) -> str:
    vae = tiny_vae()
    with open_session("cpu") as session, torch.no_grad():
        z = latents(102)
        z[:, :, 20] = torch.nan  # the last chunks, which are not the leading rank's
        try:
            share(session, vae, z, 102)
        except SharedFault as fault:
            return str(fault)
    return "nothing"


def test_what_is_not_finite_ends_every_rank() -> None:
    said = run_ranks(broken, 3)
    assert len(set(said)) == 1
    assert "near frame 6" in said[0]
    assert "NaN" in said[0]


def peak_of_a_decode(rank: int, world: int, init_file: str, lengths: tuple[int, ...]) -> Any:
    """Most bytes of tensors that this rank held, by number of frames; the latents not counted."""
    vae, peaks = tiny_vae(), []
    with open_session("cpu") as session, torch.no_grad():
        for frames in lengths:
            z = latents(frames, side=(4, 6)) if rank == 0 else None
            with PeakBytes() as counter:
                for _ in decode_shared(session, vae, z, (1, 4, 4, 6), frames):
                    pass
            peaks.append(counter.peak)
    return peaks


def test_memory_of_every_rank_is_flat_in_the_frames() -> None:
    for peaks in run_ranks(peak_of_a_decode, 4, (102, 204, 408)):
        assert max(peaks) <= 1.02 * min(peaks), peaks


def chunks(frames: int) -> list[int]:
    return [min(17, frames - start) for start in range(0, frames, 17)]


def test_the_plan_covers_every_frame_once_and_evenly() -> None:
    for frames in (*LENGTHS, 204, 408):
        for ranks in range(1, 17):
            rounds = plan_decode(chunks(frames), ranks, 4)
            parts = [part for units in rounds for unit in units for part in unit]
            seen = [17 * p.chunk + i for p in parts for i in range(p.start, p.stop)]
            assert seen == list(range(frames)), "each frame once, in order"
            assert all(p.start % 4 == 0 for p in parts), "only whole groups"
    for frames, ranks in [(408, 2), (408, 3), (408, 5), (408, 7), (408, 8), (102, 4), (51, 2)]:
        shares = decoded_frames(plan_decode(chunks(frames), ranks, 4))
        assert sum(shares) / ranks >= 0.95 * max(shares), shares
