"""What a step sends and how long it would take on other ranks: pure arithmetic on the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opensora_sp.base.geometry import PATCH
from opensora_sp.parallel.layout import Layout, share
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.overlap import OverlapChunk, cut
from opensora_sp.request.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One denoising step of a request on a model: what bytes and FLOPs follow from.

    frames, size: latent frames and (H, W) cells. batch: videos denoised together. text: tokens.
    itemsize: bytes of one activation.
    """

    frames: int
    size: tuple[int, int]
    channels: int
    depth: int
    text: int = 300
    batch: int = 1
    guided: bool = True
    itemsize: int = 2
    latent_channels: int = 4

    def layout(self, mesh: Mesh) -> Layout:
        """How a mesh shares it."""
        return Layout(frames=self.frames, size=self.size, ranks=mesh.sequence)


def step_traffic(
    work: Workload, mesh: Mesh, rank: int, runtime: Runtime
) -> dict[str, tuple[int, int]]:
    """Calls and bytes that `rank` sends to others in one step, per kind of collective."""
    place, layout = mesh.place(rank), work.layout(mesh)
    branches = 2 if work.guided and mesh.guidance == 1 else 1
    traffic: dict[str, tuple[int, int]] = {}
    if mesh.sequence > 1:
        groups = [1] * branches if runtime.serial_guidance else [branches]
        for streams in groups:
            chunks = cut([(work.batch, work.frames)] * streams, runtime.chunks)
            shared = streams > 1 and runtime.share_first
            for stream, parts in enumerate(chunks):
                blocks = work.depth - (1 if shared and stream > 0 else 0)
                for chunk in parts:
                    _add(traffic, _chunk_traffic(work, layout, place.sequence, chunk, blocks))
    if work.guided and mesh.guidance == 2:
        patches = share(layout.patch_count, layout.ranks, place.sequence)
        cells = work.batch * work.frames * patches * work.latent_channels * PATCH**2
        _add(traffic, {"velocity": (1, cells * work.itemsize)})
    return traffic


def _chunk_traffic(
    work: Workload, layout: Layout, rank: int, chunk: OverlapChunk, blocks: int
) -> dict[str, tuple[int, int]]:
    count = work.batch * (chunk.stop - chunk.start)
    mine = share(count, layout.ranks, rank, chunk.before)
    patches = share(layout.patch_count, layout.ranks, rank)
    row = work.channels * work.itemsize
    return {
        "patches_to_frames": (blocks, blocks * (count - mine) * patches * row),
        "frames_to_patches": (blocks, blocks * mine * (layout.patch_count - patches) * row),
    }


def _add(total: dict[str, tuple[int, int]], more: Mapping[str, tuple[int, int]]) -> None:
    for kind, (calls, size) in more.items():
        before = total.get(kind, (0, 0))
        total[kind] = (before[0] + calls, before[1] + size)


def step_flops(work: Workload, mesh: Mesh, rank: int) -> float:
    """FLOPs of one step on one rank: a multiplication and an addition are two.

    Per token and block pair 56·C² + 4·S·C + 4·T·C + 8·L·C, of which spatial attention and its qkv
    (4·S·C + 6·C²) follow the rank's frames and everything else its patches.
    """
    place, layout = mesh.place(rank), work.layout(mesh)
    s, c = layout.patch_count, work.channels
    branches = 2 if work.guided and mesh.guidance == 1 else 1
    before = [branch * work.batch * work.frames for branch in range(branches)]
    count = work.batch * work.frames
    frames = sum(share(count, layout.ranks, place.sequence, start) for start in before)
    by_frames = frames * s * (4 * s * c + 6 * c * c)
    tokens = branches * count * share(layout.patch_count, layout.ranks, place.sequence)
    by_patches = tokens * (50 * c * c + 4 * work.frames * c + 8 * work.text * c)
    return float(work.depth * (by_frames + by_patches))


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A projected, not measured, step: seconds of the slowest rank."""

    compute: float
    exchange: float

    @property
    def hidden(self) -> float:
        """If all of the exchange hides behind the compute."""
        return max(self.compute, self.exchange)

    @property
    def exposed(self) -> float:
        """If none of it does."""
        return self.compute + self.exchange


def project_step(
    work: Workload,
    mesh: Mesh,
    runtime: Runtime,
    *,
    one_rank_seconds: float,
    link_bytes_per_second: float,
    call_seconds: float = 20e-6,
    between_bytes_per_second: float | None = None,
    nodes: Sequence[int] = (),
) -> Projection:
    """The distance model: a measured one-rank step, spread over a mesh with given links.

    Compute falls with the slowest rank's share of the FLOPs at the FLOP/s that the one rank
    showed; the exchange is its bytes at the link's speed plus a latency per call. With `nodes`,
    each rank's node, a group that is spread over several runs at `between_bytes_per_second`: an
    all-to-all has ended when its slowest link has.
    """
    across = link_bytes_per_second if between_bytes_per_second is None else between_bytes_per_second

    def speed(kind: str) -> float:
        groups = mesh.guidance_groups() if kind == "velocity" else mesh.sequence_groups()
        spread = nodes and any(len({nodes[rank] for rank in ranks}) > 1 for ranks in groups)
        return across if spread else link_bytes_per_second

    alone = step_flops(work, Mesh(), 0)
    ranks = range(mesh.replica_size)
    compute = max(step_flops(work, mesh, rank) / alone for rank in ranks) * one_rank_seconds
    traffic = [step_traffic(work, mesh, rank, runtime).items() for rank in ranks]
    exchange = max(
        sum(calls * call_seconds + size / speed(kind) for kind, (calls, size) in kinds)
        for kinds in traffic
    )
    return Projection(compute=compute, exchange=exchange)
