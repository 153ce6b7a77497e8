"""Before the first step, every rank must be about to compute the same thing.

Unsynchronised seeds, another prompt list or another checkpoint on one node do not crash a
sharded run: they silently spoil the picture. So what every rank believes is compared first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from opensora_sp.parallel.session import Session

_SAMPLED_VALUES = 16  # per weight: enough to tell two checkpoints apart, too few to cost anything


class DisagreementError(RuntimeError):
    """Ranks differ in something they must share; the message names the rank and the thing."""


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
    """Compare every rank's facts with rank 0's, over the side group. Every rank calls this.

    Raises DisagreementError on every rank, naming the first rank that differs and in what.
    """
    everyone = session.collect(dict(facts))
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise DisagreementError(
                    f"rank {rank} differs from rank 0 in its {name} ({theirs.get(name)} instead "
                    f"of {value}): the ranks would not compute the same video"
                )
