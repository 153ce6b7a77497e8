"""Every collective of the program, named by what it is for.

Only all_to_all_single with split sizes and broadcast travel on the device's backend: both exist
on every backend of the table. Buffers are contiguous, in and out: some backends read or write the
raw memory of one that is not, without an error. Control data (objects, sizes, checksums) goes over
the control plane instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_sp.base import faults
from opensora_sp.parallel.layout import Layout, bounds
from opensora_sp.parallel.ledger import Ledger
from opensora_sp.parallel.overlap import OverlapChunk

_FAULT_POINTS = {
    "patches_to_frames": "exchange",
    "velocity": "velocity",
    "gather_latents": "last-gather",
}


@dataclass(frozen=True)
class Comm:
    """A process group, this rank's index in it, and the ledger its collectives are booked in.

    through_host: the backend does not serve the device, so buffers pass through host memory.
    elsewhere: the indices in it of ranks on other nodes.
    all_to_all: in the place of torch.distributed's, where one rank is computed without the others.
    """

    group: Any
    rank: int
    size: int
    ledger: Ledger = field(default_factory=Ledger)
    through_host: bool = False
    elsewhere: frozenset[int] = frozenset()
    all_to_all: Callable[..., Any] | None = None


class Transfer:
    """An all-to-all under way. Keeps its send buffer alive until it has been waited for."""

    def __init__(
        self,
        comm: Comm,
        kind: str,
        send: Tensor,
        send_sizes: Sequence[int],
        recv_sizes: Sequence[int],
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        self._comm, self._kind, self._finish, self._device = comm, kind, finish, send.device
        if kind in _FAULT_POINTS:
            faults.reach(_FAULT_POINTS[kind])
        if comm.through_host:
            send = send.cpu()
        recv = torch.empty(sum(recv_sizes), dtype=send.dtype, device=send.device)
        _check(kind, send, send_sizes, comm)
        _check(kind, recv, recv_sizes, comm)
        with comm.ledger.waiting(kind):
            start = comm.all_to_all or dist.all_to_all_single
            self._work = start(
                recv, send, list(recv_sizes), list(send_sizes), group=comm.group, async_op=True
            )
        self._send, self._recv = send, recv
        leaving = sum(send_sizes) - send_sizes[comm.rank]
        between = sum(send_sizes[rank] for rank in comm.elsewhere)
        comm.ledger.add(
            kind,
            calls=1,
            bytes_sent=leaving * send.element_size(),
            bytes_between=between * send.element_size(),
        )

    def wait(self) -> Tensor:
        """The received tensor in its final shape."""
        with self._comm.ledger.waiting(self._kind):
            self._work.wait()
        received = self._recv.to(self._device)
        del self._send, self._recv  # callers may keep this object longer than the result
        return self._finish(received)


def _check(kind: str, buffer: Tensor, sizes: Sequence[int], comm: Comm) -> None:
    if not buffer.is_contiguous():
        raise RuntimeError(f"{kind}: buffer of shape {tuple(buffer.shape)} is not contiguous")
    if buffer.ndim != 1 or len(sizes) != comm.size or sum(sizes) != buffer.numel():
        raise RuntimeError(
            f"{kind}: sizes {tuple(sizes)} for {comm.size} ranks do not add up to a flat buffer "
            f"of shape {tuple(buffer.shape)}"
        )


class Exchange:
    """Resharding between patches and frames over the ranks of one sequence group."""

    def __init__(self, comm: Comm, layout: Layout) -> None:
        if comm.size != layout.ranks:
            raise ValueError(f"layout for {layout.ranks} ranks on a group of {comm.size}")
        self.comm, self.layout = comm, layout

    def to_frames(self, h: Tensor, chunk: OverlapChunk) -> Transfer:
        """All-to-all from patch to frame sharding: h [B,t,S_local,C] → whole frames [F_local,S,C].

        The frames are cut from the flattened B·t. So what goes to each rank is contiguous already,
        and only the receiver has to sort.
        """
        batch, frames, local, channels = h.shape
        shares = self.layout.frame_split(batch * frames, chunk.before)
        mine, patches = shares[self.comm.rank], self.layout.patch_split
        arriving = [mine * count * channels for count in patches]

        def join(received: Tensor) -> Tensor:
            parts = zip(received.split(arriving), patches, strict=True)
            return torch.cat([part.view(mine, count, channels) for part, count in parts], dim=1)

        return Transfer(
            self.comm,
            "patches_to_frames",
            h.contiguous().view(-1),
            [share * local * channels for share in shares],
            arriving,
            join,
        )

    def to_patches(self, attended: Tensor, chunk: OverlapChunk, batch: int) -> Transfer:
        """All-to-all back from frame to patch sharding: [F_local,S,C] → [B,t,S_local,C]."""
        mine, _, channels = attended.shape
        frames = chunk.stop - chunk.start
        shares = self.layout.frame_split(batch * frames, chunk.before)
        patches = self.layout.patch_split
        local = patches[self.comm.rank]
        if mine != shares[self.comm.rank]:
            raise RuntimeError(f"frames_to_patches: {mine} frames, expected {shares}")
        # Straight into the buffer: parts and their concatenation would be two more copies of it.
        sorted_by_rank = attended.new_empty(attended.numel())
        places = bounds([mine * count * channels for count in patches])
        for part, (start, stop) in zip(attended.split(list(patches), dim=1), places, strict=True):
            sorted_by_rank[start:stop].view(part.shape).copy_(part)
        return Transfer(
            self.comm,
            "frames_to_patches",
            sorted_by_rank,
            [mine * count * channels for count in patches],
            [share * local * channels for share in shares],
            lambda received: received.view(batch, frames, local, channels),
        )

    def held(self, chunk: OverlapChunk, batch: int) -> slice:
        """Which frames of the chunk's B·t, flattened, `to_frames` brings to this rank."""
        shares = self.layout.frame_split(batch * (chunk.stop - chunk.start), chunk.before)
        return slice(*bounds(shares)[self.comm.rank])


def swap_branches(comm: Comm, mine: Tensor) -> Transfer:
    """CFG pair: send this branch's velocity to the other rank and receive the other branch's."""
    sizes = [0 if rank == comm.rank else mine.numel() for rank in range(comm.size)]
    return Transfer(
        comm, "velocity", mine.contiguous().view(-1), sizes, sizes, lambda got: got.view(mine.shape)
    )


def gather_patches(comm: Comm, layout: Layout, z: Tensor) -> Tensor | None:
    """Gather patch shards [B,T,S_local,c] → [B,T,S,c] on the group's rank 0, None elsewhere.

    It is an all-to-all with empty parts, for not every backend has a gather.
    """
    batch, frames, _, channels = z.shape
    patches = layout.patch_split
    leads = comm.rank == 0
    recv = [batch * frames * count * channels if leads else 0 for count in patches]

    def join(received: Tensor) -> Tensor:
        if not leads:
            return received
        parts = zip(received.split(recv), bounds(patches), strict=True)
        shards = [part.view(batch, frames, stop - start, channels) for part, (start, stop) in parts]
        return torch.cat(shards, dim=2)

    send = [z.numel() if rank == 0 else 0 for rank in range(comm.size)]
    whole = Transfer(comm, "gather_latents", z.contiguous().view(-1), send, recv, join).wait()
    return whole if leads else None


def scatter_parts(
    comm: Comm, parts: Sequence[Tensor] | None, sizes: Sequence[int], like: Tensor
) -> Transfer:
    """Scatter flat parts, of `sizes[rank]` elements, from the group's rank 0, which has them all.

    like: any tensor of the dtype and device that the parts have. It is an all-to-all with empty
    parts, for not every backend has a scatter.
    """
    leads = comm.rank == 0
    flat = torch.cat([part.reshape(-1) for part in parts or []]) if leads else like.new_empty(0)
    send = list(sizes) if leads else [0] * comm.size
    recv = [sizes[comm.rank] if rank == 0 else 0 for rank in range(comm.size)]
    return Transfer(comm, "latents", flat.contiguous(), send, recv, lambda got: got)


def gather_parts(comm: Comm, mine: Tensor, sizes: Sequence[int]) -> Transfer:
    """Gather flat parts, of `sizes[rank]` elements, end to end on rank 0; empty elsewhere."""
    send = [mine.numel() if rank == 0 else 0 for rank in range(comm.size)]
    recv = list(sizes) if comm.rank == 0 else [0] * comm.size
    return Transfer(comm, "frames", mine, send, recv, lambda got: got)


def broadcast(
    comm: Comm,
    tensor: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    source: int = 0,
) -> Tensor:
    """Broadcast the tensor of rank `source`; `shape` and `dtype` are known to all beforehand."""
    if comm.rank == source:
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            raise RuntimeError(f"broadcast: expected shape {tuple(shape)}")
        buffer = tensor.to(device, dtype).contiguous()
    else:
        buffer = torch.empty(tuple(shape), dtype=dtype, device=device)
    if comm.size == 1:
        return buffer
    with comm.ledger.waiting("hand_out"):
        travelling = buffer.cpu() if comm.through_host else buffer
        dist.broadcast(travelling, dist.get_global_rank(comm.group, source), group=comm.group)
    leaving = travelling.numel() * travelling.element_size() if comm.rank == source else 0
    comm.ledger.add(
        "hand_out",
        calls=1,
        bytes_sent=leaving,
        bytes_between=leaving if comm.elsewhere else 0,
    )
    arrived = travelling.to(device)
    if faults.reach("hand-out"):
        arrived.view(-1)[:1] += 1
    return arrived
