"""Builds one rank's denoiser from a model, a mesh and a layout."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from opensora_sp.engine.blocks import Local, Reshard
from opensora_sp.engine.guidance import Denoiser, Sharding
from opensora_sp.models.compiler import Compiler
from opensora_sp.models.stdit3 import STDiT3
from opensora_sp.parallel.exchange import Exchange, Transfer, gather_patches, swap_branches
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.session import MeshComms
from opensora_sp.request.runtime import Runtime


def parallelize(
    model: STDiT3,
    comms: MeshComms | None,
    layout: Layout,
    runtime: Runtime | None = None,
    compiler: Compiler | None = None,
) -> Denoiser:
    """The denoiser of this rank's shard. Changes neither the model nor anything else.

    comms None, or a mesh of one rank, is one device alone without exchange. So a one-rank denoiser
    can be built beside a sharded one on the same weights; `opensora-sp parity` compares the two.
    compiler: has graphs of this model already; a runtime that compiles makes one without.
    """
    runtime = runtime or Runtime()
    if comms is None or comms.mesh.replica_size == 1:
        alone = Sharding(
            reshard=Local(),
            patches=slice(None),
            branches=(0, 1),
            swap=None,
            gather=_identity,
        )
        return Denoiser(model, layout.size, alone, replace(runtime, chunks=1), compiler)

    sequence, pair = comms.sequence, comms.guidance
    split_branches = pair.size == 2

    def gather(z: Tensor) -> Tensor | None:
        # Both CFG branches end with the same latents; the conditional one gathers them.
        if comms.place.guidance != 0:
            return None
        return z if sequence.size == 1 else gather_patches(sequence, layout, z)

    def swap(velocity: Tensor) -> Transfer:
        return swap_branches(pair, velocity)

    reshard: Reshard = Local() if sequence.size == 1 else Exchange(sequence, layout)
    sharding = Sharding(
        reshard=reshard,
        patches=layout.patches(sequence.rank),
        branches=(comms.place.guidance,) if split_branches else (0, 1),
        swap=swap if split_branches else None,
        gather=gather,
    )
    return Denoiser(model, layout.size, sharding, runtime, compiler)


def _identity(z: Tensor) -> Tensor:
    return z
