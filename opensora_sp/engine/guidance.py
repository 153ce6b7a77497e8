"""Classifier-free guidance (CFG): the guided velocity of a step, on one rank's shard.

Nothing here knows how many ranks there are. A `Sharding` says which patches and which CFG branches
this rank computes, and how velocities and latents are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opensora_sp.base.geometry import patch_grid
from opensora_sp.base.transfer import to_device
from opensora_sp.engine.blocks import Pending, Reshard, Stream, Unsent, run_blocks
from opensora_sp.models.compiler import Compiler, directly
from opensora_sp.models.folded_step import FoldedStep
from opensora_sp.models.stdit3 import (
    STDiT3,
    patchify,
    real_cells,
    unpatchify,
)
from opensora_sp.models.step_kernels import PlainStep, StepKernels, by_tokens
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.step_kernels import chosen_kernels


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The part of a video that one rank computes; made by `opensora_sp.engine.parallelize`.

    reshard: moves activations for the spatial attention.
    patches: the patches of every frame that this rank holds.
    branches: the CFG branches it computes when a request is guided; 0 is the conditional one.
    swap: exchanges this branch's velocity for the other's, where they are on different ranks.
    gather: patch shards [B,T,S_local,c] → [B,T,S,c] on the leading rank, None elsewhere.
    """

    reshard: Reshard
    patches: slice
    branches: tuple[int, ...]
    swap: Callable[[Tensor], Pending] | None
    gather: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the velocity depends on besides the latents, per sample: the same on every rank.

    tokens: B × [L_b, caption_channels], the real tokens only; masks [B,L] of 0/1, where L is the
    padded length: the unconditional branch sees the null embedding under the same mask.
    height, width: pixels as in the size table; fps: as given to the model.
    """

    tokens: Sequence[Tensor]
    masks: Tensor
    height: int
    width: int
    fps: float
    cfg_scale: float


class Denoiser:
    """The guided velocity on one rank's shard. Holds weights it does not own; mutates nothing."""

    def __init__(
        self,
        model: STDiT3,
        size: tuple[int, int],
        sharding: Sharding,
        runtime: Runtime,
        compiler: Compiler | None = None,
    ) -> None:
        self.model, self.size, self.runtime = model, size, runtime
        self.sharding = sharding
        if compiler is None and runtime.compile:
            compiler = Compiler(model.device)
        self.compiler = compiler
        self.layers = model.layers(offloaded=runtime.offload.layers)

    def shard(self, z: Tensor) -> Tensor:
        """Latents [B,4,T,H,W] → this rank's patches [B,T,S_local,16] on the model's device."""
        mine = patchify(z)[:, :, self.sharding.patches].contiguous()
        return to_device(mine, self.model.device)

    def gather(self, patches: Tensor) -> Tensor | None:
        """Patches [B,T,S_local,16] → latents [B,4,T,H,W] on the leading rank, None elsewhere."""
        whole = self.sharding.gather(patches)
        return None if whole is None else unpatchify(whole, self.size)

    def positions(self, height: float, width: float) -> Tensor:
        """Positions [S_local,C] of this rank's patches, for a request of these pixels."""
        grid = patch_grid(*self.size)
        return self.model.positions(grid, height, width)[self.sharding.patches]

    def step_kernels(self, frames: int, *, guided: bool) -> StepKernels:
        """The kernels of one step of T frames: the same on every rank of the video."""
        rows, columns = patch_grid(*self.size)
        chosen = chosen_kernels(
            self.runtime.step_kernels, frames=frames, patches=rows * columns, guided=guided
        )
        step = FoldedStep if chosen == "folded" else PlainStep
        return step(self.runtime.tokens, self.compiler or directly)

    def rehearse(self, batch: int, frames: int, generate: Tensor | None, *, guided: bool) -> None:
        """Compute a pair of blocks for latents [B,4,T,H,W] of made-up numbers, without exchange.

        Every form of tensors is met that a step has which generates these frames (bool [B,T]; None
        is all), except for those of the text.
        """
        model, runtime = self.model, self.runtime
        rows, columns = patch_grid(*self.size)
        local = len(range(rows * columns)[self.sharding.patches])
        heads, width = model.config.num_heads, model.config.hidden_size // model.config.num_heads
        ones = torch.ones(batch, device=model.device)
        tables = model.tables(500 * ones, 24 * ones, generate).grouped(
            [[True]] * batch if generate is None else generate.tolist()
        )
        alone = runtime.serial_guidance or not guided
        together = 1 if alone else len(self.sharding.branches)
        text = [tuple(_made_up(model, 2, 1, heads, 1, width)) for _ in range(batch)]
        streams = [
            Stream(_made_up(model, batch, frames, local, heads * width), tables, [text] * 2)  # type: ignore[list-item]
            for _ in range(together)
        ]
        run_blocks(
            model,
            streams,
            Unsent(self.sharding.reshard, rows * columns, local, partial(_made_up, model)),
            runtime,
            # Not as equal inputs: only in the first pair do streams share the frames of a rank.
            layers=self.layers,
            kernels=self.step_kernels(frames, guided=guided),
            pairs=1,
        )

    def prepare(
        self, conditions: Conditions, on_velocity: Callable[[Tensor, float], None] | None = None
    ) -> Velocity:
        """Everything that is computed once per video: positions, text K/V, padding.

        on_velocity(velocity, t): looks at the guided velocity of every step.
        """
        return Velocity(self, conditions, on_velocity)


def _made_up(model: STDiT3, *shape: int) -> Tensor:
    """Numbers in -1..1 of the model's dtype, on its device; no two rows are alike."""
    count = torch.arange(math.prod(shape), dtype=torch.float32, device=model.device)
    return count.mul_(0.7).sin_().view(shape).to(model.dtype)


class Velocity:
    """The guided velocity as `opensora_sp.engine.sampling.sample` calls it, on patch shards."""

    def __init__(
        self,
        denoiser: Denoiser,
        conditions: Conditions,
        on_velocity: Callable[[Tensor, float], None] | None = None,
    ) -> None:
        self._on_velocity = on_velocity
        model, sharding = denoiser.model, denoiser.sharding
        self._model, self._sharding, self._runtime = model, sharding, denoiser.runtime
        self._positions = denoiser.positions(conditions.height, conditions.width)
        self._fps, self._cfg_scale = conditions.fps, conditions.cfg_scale
        self._layers = denoiser.layers
        self._denoiser = denoiser
        guided = conditions.cfg_scale != 1
        self._branches = sharding.branches if guided else (0,)
        self._swap = sharding.swap if guided else None
        self._text = {
            branch: model.text_kv(
                model.null_tokens(conditions.masks) if branch else list(conditions.tokens),
                self._layers,
            )
            for branch in self._branches
        }
        padding = ~real_cells(denoiser.size, model.config.in_channels)[sharding.patches]
        self._padding = padding.to(model.device) if bool(padding.any()) else None

    def __call__(self, z: Tensor, t: float, generate: Tensor | None = None) -> Tensor:
        """z [B,T,S_local,16], t in 0..1000 → the guided velocity, float32 of z's shape.

        generate: bool [B,T], False for conditioning frames. Padded cells have velocity zero, or
        they would drift into the picture at the next step.
        """
        model, runtime, batch = self._model, self._runtime, z.shape[0]
        # Made where they are used: a copy from the host would wait for the device at every step.
        fps = torch.full((batch,), float(self._fps), device=model.device)
        time = torch.full((batch,), t, device=model.device)
        tables = model.tables(time, fps, generate).grouped(
            [[True]] * batch if generate is None else generate.tolist()
        )
        kernels = self._denoiser.step_kernels(z.shape[1], guided=self._cfg_scale != 1)
        mine: list[Tensor] = []
        # Branches that advance together share what is equal in both; serial ones need less memory.
        branches = self._branches
        for together in [[b] for b in branches] if runtime.serial_guidance else [branches]:
            x = model.embed(z, self._positions)
            streams = [Stream(x.clone(), tables, self._text[b]) for b in together[1:]]
            streams.insert(0, Stream(x, tables, self._text[together[0]]))
            del x  # or it outlives its stream
            outputs = run_blocks(
                model,
                streams,
                self._sharding.reshard,
                runtime,
                equal_inputs=len(streams) > 1,
                layers=self._layers,
                kernels=kernels,
            )
            mine += [by_tokens(model.head, out, tables, runtime.tokens) for out in outputs]
            del streams, outputs  # or they are there while the other branch is computed
        velocity = mine[0].float()
        if len(self._text) == 2 or self._swap is not None:
            other = mine[1] if self._swap is None else self._swap(mine[0]).wait()
            if branches == (1,):
                velocity, other = other.float(), mine[0]
            # Classifier-free guidance combines both branches: away from the unconditional
            # velocity, by the scale.
            velocity = torch.lerp(other.float(), velocity, self._cfg_scale)
        if self._padding is not None:
            velocity = velocity.masked_fill(self._padding, 0.0)
        if self._on_velocity is not None:
            self._on_velocity(velocity, t)
        return velocity
