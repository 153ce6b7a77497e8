"""The one place where a model meets a mesh."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from opensora_sp.engine.blocks import Local, Reshard
from opensora_sp.engine.guidance import Denoiser, Share
from opensora_sp.engine.step_cache.residuals import AllGather
from opensora_sp.models.stdit3 import STDiT3
from opensora_sp.parallel.exchange import Exchange, Transfer, gather_patches, swap_halves
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.session import MeshComms
from opensora_sp.request.runtime import Runtime


def parallelize(
    model: STDiT3,
    comms: MeshComms | None,
    layout: Layout,
    runtime: Runtime | None = None,
    all_gather: AllGather | None = None,
) -> Denoiser:
    """The denoiser of this rank's share. Returns; changes neither the model nor anything else.

    comms None (or a mesh of one rank) is one device alone, with nothing in between: so a one-rank
    denoiser can be built beside a sharded one on the same weights, which is how parity is proved.
    all_gather: of the ranks of `comms`, for a step cache; a runtime without one needs none.
    """
    runtime = runtime or Runtime()
    if comms is None or comms.mesh.replica_size == 1:
        alone = Share(
            reshard=Local(),
            patches=slice(None),
            halves=(0, 1),
            swap=None,
            gather=_identity,
            all_gather=_of_one,
        )
        return Denoiser(model, layout.size, alone, replace(runtime, chunks=1))

    sequence, pair = comms.sequence, comms.guidance
    split_halves = pair.size == 2

    def gather(z: Tensor) -> Tensor | None:
        # Both guidance halves end with the same latents; the conditional one brings them home.
        if comms.place.guidance != 0:
            return None
        return z if sequence.size == 1 else gather_patches(sequence, layout, z)

    def swap(velocity: Tensor) -> Transfer:
        return swap_halves(pair, velocity)

    reshard: Reshard = Local() if sequence.size == 1 else Exchange(sequence, layout)
    share = Share(
        reshard=reshard,
        patches=layout.patches(sequence.rank),
        halves=(comms.place.guidance,) if split_halves else (0, 1),
        swap=swap if split_halves else None,
        gather=gather,
        all_gather=all_gather or _not_given,
    )
    return Denoiser(model, layout.size, share, runtime)


def _identity(z: Tensor) -> Tensor:
    return z


def _of_one(values: list[float]) -> list[list[float]]:
    return [values]


def _not_given(values: list[float]) -> list[list[float]]:
    raise ValueError("a step cache on several ranks needs all_gather")
