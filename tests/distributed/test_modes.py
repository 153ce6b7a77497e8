"""Every way to condition a video: what is kept is kept to the bit, and ranks change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from opensora_sp.engine.clips import ConditioningFrames, apply_strategy
from opensora_sp.engine.denoising import denoise
from opensora_sp.engine.noise import NoiseKey, draw_noise
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.progress import ResumePoint
from opensora_sp.media.pixels import to_bytes
from opensora_sp.media.writer import VideoWriter
from opensora_sp.parallel.session import alone, open_session
from opensora_sp.request.conditions import dropped_frames
from opensora_sp.request.mask_strategy import parse_mask_strategy, plan_strategy
from opensora_sp.request.prompts import caption
from opensora_sp.request.request import Request

SMALL: dict[str, Any] = {"height": 40, "width": 56, "num_frames": 34, "steps": 3}  # T = 10


def modes(folder: Path) -> dict[str, Request]:
    """One request per mode; `waves` has 3 chunks (15 latents), `picture` is one frame."""
    picture, other, waves = (str(folder / f) for f in ("picture.png", "other.png", "waves.mp4"))
    return {
        "image": Request(prompt="a cat", **{**SMALL, "num_frames": 1}),
        "image edit": Request(
            prompt="a cat",
            reference_path=picture,
            mask_strategy="0,0,0,0,1,0.6",
            **{**SMALL, "num_frames": 1},
        ),
        "image to video": Request(prompt="x", reference_path=picture, mask_strategy="0", **SMALL),
        "connect": Request(
            prompt="x",
            reference_path=f"{picture};{other}",
            mask_strategy="0;0,1,0,-1,1",
            align=1,
            **SMALL,
        ),
        "extend": Request(prompt="x", reference_path=waves, mask_strategy="0,0,-5,0,5", **SMALL),
        "edit": Request(
            prompt="x",
            reference_path=waves,
            mask_strategy="0,0,0,0,5,0.4;0,0,10,5,5",
            **SMALL,
        ),
        "loop": Request(prompt="|0|go|1|stop", loop=2, loop_carry="latents", **SMALL),
    }


# Mode → (reference, its frames, the clip's frames) where the mask is 0.
KEPT = {
    "image to video": [(0, slice(0, 1), slice(0, 1))],
    "connect": [(0, slice(0, 1), slice(0, 1)), (1, slice(0, 1), slice(9, 10))],
    "extend": [(0, slice(10, 15), slice(0, 5))],
    "edit": [(0, slice(10, 15), slice(5, 10))],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("references")
    random = np.random.default_rng(0)
    for name in ("picture", "other"):
        Image.fromarray(random.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(
            made / f"{name}.png"
        )
    with VideoWriter(made / "waves.mp4", fps=24, height=44, width=66, metadata={}) as writer:
        writer.write(random.integers(0, 255, (51, 44, 66, 3), dtype=np.uint8))
    return made


def latents_of_all(session: Any, folder: Path) -> dict[str, list[torch.Tensor | None]]:
    pipeline = Pipeline.load(session=session, dtype="fp32")
    return {name: pipeline.generate(r).latents for name, r in modes(folder).items()}


def on_ranks(rank: int, world: int, init_file: str, folder: Path) -> Any:
    with open_session("cpu") as session:
        return latents_of_all(session, folder)


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, list[torch.Tensor | None]]:
    return latents_of_all(alone("cpu"), folder)


@pytest.mark.parametrize("world", [2, 3])
def test_modes_on_ranks(world: int, single: Any, folder: Path) -> None:
    found = run_ranks(on_ranks, world, folder)[0]
    assert found.keys() == single.keys()
    for mode, clips in single.items():
        assert len(found[mode]) == len(clips)
        for got, want in zip(found[mode], clips, strict=True):
            assert float((got - want).abs().max() / want.abs().max()) < 2e-5, mode


@pytest.mark.parametrize("mode", sorted(KEPT))
def test_kept_latents_are_the_references_bit_for_bit(mode: str, single: Any, folder: Path) -> None:
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    with torch.no_grad():
        references = ConditioningFrames(pipeline.models, [modes(folder)[mode]]).references[0]
    latents = single[mode][0][0]  # [4,T,h,w]
    for reference, source, target in KEPT[mode]:
        assert torch.equal(latents[:, target], references[reference][:, source])
    kept = sum(target.stop - target.start for _, _, target in KEPT[mode])
    same = [
        torch.equal(latents[:, t], references[0][:, t % references[0].shape[1]])
        for t in range(latents.shape[1])
    ]
    assert sum(same) <= kept  # nothing else is a copy


@pytest.mark.parametrize("length", [5, 10])
def test_a_loop_is_its_clips_made_by_hand(length: int) -> None:
    request = Request(
        prompt="|0|go|2|stop",
        loop=4,
        condition_frame_length=length,
        **{**SMALL, "num_frames": 51, "steps": 2},
    )
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    result = pipeline.generate(request)
    joined, reference = [], None
    with torch.no_grad():
        vae = pipeline.models.vae(request, encoder=True)
        for clip in range(4):
            z, mask = draw_noise([request], clip), None
            if reference is not None:
                groups = parse_mask_strategy(f"{clip},0,-{length},0,{length},0")
                placements = plan_strategy(groups, clip, [15], 15, request.align)
                mask = apply_strategy(z[0], [reference], placements)[None]
            text = pipeline.text.broadcast([caption(request, clip)], 300)
            latents = denoise(pipeline.models, [request], clip, text, ResumePoint(0, z, mask))
            assert latents is not None
            got = result.latents[clip]
            assert got is not None
            assert torch.equal(got, latents), clip
            video = vae.decode(latents, 51)
            joined.append(to_bytes(video)[0].numpy()[(length // 5 * 17 if clip else 0) :])
            key = NoiseKey(request.seed, clip=clip)
            reference = vae.encode(video, lambda w, s, k=key: k.normal(s, f"carry {w}"))[0]  # type: ignore[misc]
    frames = result.videos[0]
    assert frames is not None
    assert dropped_frames(request) == length // 5 * 17
    assert len(frames) == 51 + 3 * (51 - length // 5 * 17)
    assert np.array_equal(frames, np.concatenate(joined))


def test_carrying_latents_skips_the_round_trip() -> None:
    request = Request(prompt="x", loop=3, loop_carry="latents", **SMALL)
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    first, second, third = pipeline.generate(request).latents
    assert first is not None
    assert second is not None
    assert third is not None
    assert torch.equal(second[:, :, :5], first[:, :, -5:])
    assert torch.equal(third[:, :, :5], second[:, :, -5:])


def test_earlier_clips_keep_their_numbers_while_they_are_asked_for() -> None:
    request = Request(
        prompt="x", loop=3, loop_carry="latents", mask_strategy="2,0,0,5,1,0", **SMALL
    )
    kept = ConditioningFrames(Pipeline.load(session=alone("cpu"), dtype="fp32").models, [request])
    for clip in range(2):
        kept.finish(clip, torch.full((1, 4, 10, 5, 7), 100.0 * (clip + 1)))
    z, _ = kept.start(2, torch.zeros(1, 4, 10, 5, 7))
    # Frame 5 is reference 0, which is clip 0; the first five continue clip 1.
    assert z[0, 0, :, 0, 0].tolist() == [200.0] * 5 + [100.0] + [0.0] * 4


def test_a_loop_keeps_one_clip_back_and_no_more() -> None:
    request = Request(prompt="x", loop=4, loop_carry="latents", **SMALL)
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    kept = ConditioningFrames(pipeline.models, [request])
    for clip in range(3):
        kept.finish(clip, torch.full((1, 4, 10, 5, 7), float(clip)))
        assert [z.shape[1] for z in kept.references[0]] == [0] * clip + [10]
        z, mask = kept.start(clip + 1, torch.zeros(1, 4, 10, 5, 7) - 1)
        assert mask is not None
        assert torch.equal(z[0, 0, :, 0, 0], torch.tensor([float(clip)] * 5 + [-1.0] * 5))
        assert torch.equal(mask[0], torch.tensor([0.0] * 5 + [1.0] * 5))
