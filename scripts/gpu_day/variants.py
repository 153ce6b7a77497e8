"""The ways in which one guided step can be computed. Each is a function that computes it.

All of a case compute on the same weights, latents and text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_sp.engine.guidance import Conditions
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.models.kernels.active import Kernels, Lengths, using
from opensora_sp.models.kernels.fused import fused_kernels
from opensora_sp.models.kernels.probe import Shape, fastest, probe
from opensora_sp.models.stdit3 import STDiT3, patchify
from opensora_sp.parallel.layout import Layout
from opensora_sp.request.runtime import Runtime
from scripts.gpu_day.day import Day
from scripts.gpu_day.sizes import Case
from scripts.gpu_day.weights import random_transformer

ORACLE = "Open-Sora 1.2's operations"
SCALE, TIME, FPS = 7.0, 500.0, 24

Step = Callable[[], Tensor]


class LeftOutError(Exception):
    """The variant is not measured; its words say why."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The weights and the inputs of one case. z: latents [1,4,T,H,W]; text [L,caption]."""

    day: Day
    case: Case
    model: STDiT3
    z: Tensor
    text: Tensor

    @classmethod
    def of(cls, day: Day, case: Case) -> Scene:
        """Random ones, on the day's device."""
        config, generator = day.sizes.transformer, torch.Generator().manual_seed(0)
        model = random_transformer(config, day.device, day.dtype)
        shape = (1, config.in_channels, *case.latent)
        z = torch.randn(shape, generator=generator).to(day.device)
        text = torch.randn(config.model_max_length, config.caption_channels, generator=generator)
        return cls(day=day, case=case, model=model, z=z, text=text.to(day.device, day.dtype))

    @property
    def layout(self) -> Layout:
        """Of one rank."""
        frames, *size = self.case.latent
        return Layout(frames=frames, size=(size[0], size[1]), ranks=1)

    def conditions(self) -> Conditions:
        """What the guided velocity depends on."""
        return Conditions(
            tokens=[self.text],
            masks=torch.ones(1, len(self.text), dtype=torch.int64),
            height=self.case.height,
            width=self.case.width,
            fps=FPS,
            cfg_scale=SCALE,
        )


def variants(scene: Scene) -> dict[str, Callable[[], Step]]:
    """Each variant's name → what makes its step, or raises LeftOutError."""
    made = {
        "plain": lambda: program_step(scene, step_kernels="plain"),
        "folded": lambda: program_step(scene, step_kernels="folded"),
        "plain, the device's kernels": lambda: _with_kernels(scene, "plain"),
        "folded, the device's kernels": lambda: _with_kernels(scene, "folded"),
        "compiled": lambda: _compiled(scene),
    }
    # The last: it needs most memory.
    return {**made, ORACLE: lambda: oracle_step(scene)}


def program_step(scene: Scene, **settings: Any) -> Step:
    """A step of the program, all on the device, in the tiles of `--memory speed`.

    settings: those of `Runtime` that make this variant what it is.
    """
    denoiser = parallelize(scene.model, None, scene.layout, Runtime.of("speed", **settings))
    velocity = denoiser.prepare(scene.conditions())
    z = denoiser.shard(scene.z)
    return lambda: velocity(z, TIME)


def oracle_step(scene: Scene) -> Step:
    """A step in the order of operations of Open-Sora 1.2: see tests/oracle_stdit3.py."""
    oracle = _oracle_module().Oracle(scene.day.sizes.transformer, scene.model.state_dict())
    null = scene.model.y_embedder.y_embedding.to(scene.text.device)
    inputs = _oracle_module().Inputs(
        x=torch.cat([scene.z, scene.z]),
        timestep=torch.full((2,), TIME),
        y=torch.stack([scene.text, null])[:, None],
        mask=torch.ones(1, len(scene.text), dtype=torch.int64),
        fps=torch.full((2,), float(FPS)),
        pixels=(scene.case.height, scene.case.width),
    )
    channels = scene.day.sizes.transformer.in_channels

    def step() -> Tensor:
        conditional, unconditional = oracle.forward(inputs)[:, :channels].chunk(2)
        return patchify(unconditional + SCALE * (conditional - unconditional))

    return step


def _oracle_module() -> Any:
    tests = str(Path(__file__).resolve().parents[2] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    return import_module("oracle_stdit3")


def _compiled(scene: Scene) -> Step:
    """A step whose pieces are compiled."""
    if scene.day.device.type == "meta":
        raise LeftOutError("what is compiled is compared, for which tensors need contents")
    return program_step(scene, compile=True)


def _with_kernels(scene: Scene, step_kernels: str) -> Step:
    """A step with the fused kernels and the fastest attention kernels that the device has."""
    step = program_step(scene, step_kernels=step_kernels)
    kernels = _device_kernels(scene)

    def with_kernels() -> Tensor:
        with using(kernels):
            return step()

    return with_kernels


def _device_kernels(scene: Scene) -> Kernels:
    """As `opensora_sp.engine.kernel_choice` chooses them for a video of this size."""
    config, device, dtype = scene.day.sizes.transformer, scene.day.device, scene.day.dtype
    heads, width = config.num_heads, config.hidden_size // config.num_heads
    module, why = fused_kernels(device, dtype, heads, width)
    attention = {
        Lengths.of(queries, keys): fastest(
            probe(Shape(count, heads, queries, keys, width), dtype, device).seconds, width
        )
        for count, queries, keys in attention_lengths(scene.day, scene.case).values()
    }
    return Kernels(attention=attention, fused=module, fused_why=why)


def attention_lengths(day: Day, case: Case) -> Mapping[str, tuple[int, int, int]]:
    """The three attentions of a case: (sequences, queries, keys) of one tile of tokens."""
    frames, height, width = case.latent
    patches = Layout(frames=frames, size=(height, width), ranks=1).patch_count
    tokens = min(day.sizes.tokens, frames * patches)
    return {
        "spatial": (max(1, tokens // patches), patches, patches),
        "temporal": (max(1, tokens // frames), frames, frames),
        "cross": (1, tokens, day.sizes.transformer.model_max_length),
    }
