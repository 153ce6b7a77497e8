"""Seconds and memory of the stages beside the transformer: decoding, and encoding of a text."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from opensora_sp.base.geometry import latent_shape
from opensora_sp.benchmark.memory_meter import MemoryMeter
from opensora_sp.engine.decode import decode_alone
from opensora_sp.request.memory_modes import FASTEST
from scripts.gpu_day.day import Day
from scripts.gpu_day.memory import compared, plan_of
from scripts.gpu_day.rows import Row, left_out
from scripts.gpu_day.timing import Budget, release, repeat, timed
from scripts.gpu_day.weights import random_t5, random_vae

DECODE, TEXT = "decode", "text"


def measure_decode(day: Day, budget: Budget) -> Iterator[Row]:
    """Latents to bytes in host memory, shorter videos first; after a chunk as a warm-up."""
    case, seconds_a_frame = day.sizes.largest, 0.0
    with torch.no_grad(), day.arithmetic():
        meter = MemoryMeter(day.device)
        meter.reset()
        vae = random_vae(day.sizes, day.device, day.dtype)
        _, height, width = case.latent

        def decode(frames: int) -> float:
            shape = latent_shape(frames, case.height, case.width)
            z = torch.randn(1, 4, *shape).to(day.device)
            return timed(lambda: [*map(_nothing, decode_alone(vae, z, frames))], day.device)

        warm_up = decode(day.sizes.decode[0])
        for frames in day.sizes.decode:
            name = f"{frames} frames of {height * 8}x{width * 8}"
            expected = frames * seconds_a_frame
            if not budget.allows(expected):
                reason = f"{expected:.0f} s were expected and {budget.left:.0f} s left"
                yield left_out(DECODE, name, reason)
                continue
            meter.reset()
            seconds = decode(frames)
            seconds_a_frame = seconds / frames
            plan = None
            if day.sizes.planned is not None:
                stages = plan_of(day, case, FASTEST).stages
                weights = day.sizes.planned.vae_weights(encoder=False) * day.dtype.itemsize
                plan = weights + next(s.peak for s in stages if s.name == "decode")
            figures = {"seconds": seconds, "warm_up": warm_up, "frames": frames}
            figures |= compared(meter.peak_device_bytes(), plan)
            yield Row(part=DECODE, case=name, figures=figures)
    release(day.device)


def _nothing(decoded: object) -> None:
    """Frames are in host memory when they come, and nobody needs them."""


def measure_text(day: Day, budget: Budget) -> Iterator[Row]:
    """One text of the longest length through T5."""
    length = day.sizes.transformer.model_max_length
    with torch.no_grad(), day.arithmetic():
        meter = MemoryMeter(day.device)
        meter.reset()
        model = random_t5(day.sizes, day.device, day.dtype)
        ids = torch.ones(1, length, dtype=torch.int64).to(day.device)
        mask = torch.ones_like(ids)
        figures = repeat(
            lambda: model(input_ids=ids, attention_mask=mask),
            day.device,
            budget,
            day.sizes.rounds,
        )
        plan = None
        if day.sizes.planned is not None:
            stages = plan_of(day, day.sizes.largest, FASTEST).stages
            plan = next(s.total for s in stages if s.name == "text")
        figures |= compared(meter.peak_device_bytes(), plan)
    yield Row(part=TEXT, case=f"{length} tokens", figures=figures)
