"""Checks, before the first step, that all ranks are about to compute the same video.

Unsynchronised seeds, another prompt list or another checkpoint on one node do not crash a sharded
run: they silently spoil the picture. So every rank's facts are compared first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from opensora_sp.parallel.exchange import broadcast
from opensora_sp.parallel.session import Session

_SAMPLED_VALUES = 16  # per weight: enough to tell two checkpoints apart, too few to cost anything


class DisagreementError(RuntimeError):
    """Ranks differ in something they must share; the message names the rank and the thing."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


def checksum(tensors: Iterable[Tensor]) -> str:
    """A short hash of shapes, dtypes and every bit."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A short hash of every weight's first values."""
    return checksum(weight.reshape(-1)[:_SAMPLED_VALUES] for weight in model.state_dict().values())


def ensure_agreement(session: Session, facts: Mapping[str, str]) -> None:
    """Compare every rank's facts, over the side group. Every rank calls this.

    Raises DisagreementError on every rank, naming the first rank that differs from what most of
    them have (from rank 0 where there is no majority), and in what.
    """
    everyone = session.control.all_gather_object(dict(facts))
    for name, value in everyone[0].items():
        values = [theirs.get(name) for theirs in everyone]
        common, count = Counter(values).most_common(1)[0]
        expected = common if 2 * count > len(values) else value
        for rank, found in enumerate(values):
            if found != expected:
                first, rank = session.world_rank(0), session.world_rank(rank)
                others = f"rank {first}" if rank != first else "the others"
                raise DisagreementError(
                    f"rank {rank} differs from {others} in its {name} ({found} instead of "
                    f"{expected}): the ranks would not compute the same video",
                    rank,
                )


def broadcast_checked(
    session: Session, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Broadcast the leading rank's tensor, and prove by a checksum that it arrived as it was sent.

    Raises DisagreementError on the rank where it did not.
    """
    if tensor is not None:
        tensor = tensor.to(session.device, dtype).contiguous()
    expected = session.control.broadcast_object(None if tensor is None else checksum([tensor]))
    arrived = broadcast(session.world, tensor, shape, dtype, session.device)
    if session.world_size > 1 and checksum([arrived]) != expected:
        rank = session.whole.rank
        raise DisagreementError(
            f"what rank {rank} was handed (a tensor of shape {tuple(shape)}) is not what the "
            "leading rank sent: check the links between the devices",
            rank,
        )
    return arrived
