"""How good the embedded model is: python -m scripts.train_embedded.evaluate [WHAT ...]

Everything goes through the program's own pipeline and is seen by the judge. WHAT, all by default:

    prompts    60 fixed prompts x 2 seeds, in phrasings and combinations that were not trained
    beside     144 lines, long clips, two objects: reported as they are
    large      the largest size at its full length
    spins      squares and triangles that spin
    image      40 pictures set in motion
    extend     20 clips continued: how far the object is at the seam from where it should be
    vae        round trips: of held-out clips, and of pairs of objects as the judge sees them
    guidance   the prompts again with other guidance scales and numbers of steps
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.parallel.session import open_session
from opensora_sp.request.request import Checkpoints, Request
from scripts.train_embedded.captions import UNTRAINED, describe
from scripts.train_embedded.judge import Seen, as_uint8, look
from scripts.train_embedded.vae import LARGEST, as_input, psnr, round_trip
from scripts.train_embedded.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Scene,
    Thing,
    centres,
    draw_scene,
    held_out,
    render,
)

PROMPTS = Path(__file__).with_name("prompts.json")
SIZES = ((64, 96), (96, 96), (80, 128), (96, 144))
SEEDS = (1, 2)
FRAMES = 51  # of the longest clips
BATCH = 10


@dataclass(frozen=True)
class Asked:
    """A prompt and what its clip should show."""

    prompt: str
    colour: str
    shape: str
    motion: str


def write_prompts() -> None:
    """Choose the fixed prompts; they were chosen once and are not to change."""
    rng = np.random.default_rng(60)
    kept = [
        (colour, shape, motion)
        for colour in COLOURS
        for shape in SHAPES
        for motion in DIRECTIONS
        if held_out(colour, shape, motion)
    ]
    chosen = []
    for index in range(60):
        colour, shape, motion = kept[index % len(kept)]
        ground = str(rng.choice(list(BACKGROUNDS)))
        thing = Thing(colour, shape, motion, 0.5, (0.5, 0.5))
        scene = Scene(64, 96, 17, (thing,), ground, ground)
        template = UNTRAINED[index % len(UNTRAINED)]
        if "{on}," in template:
            template = template.replace("{on},", f"on a {ground} background,")
        prompt = describe(scene, rng, (template,))
        chosen.append({"prompt": prompt, "colour": colour, "shape": shape, "motion": motion})
    PROMPTS.write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


def fixed_prompts() -> list[Asked]:
    """The 60 prompts."""
    return [Asked(**entry) for entry in json.loads(PROMPTS.read_text(encoding="utf-8"))]


class Clips:
    """Makes clips of the given requests, several at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def make(self, requests: Sequence[Request]) -> list[NDArray[np.uint8]]:
        """The frames of requests of one shape, in order."""
        videos: list[NDArray[np.uint8]] = []
        for start in range(0, len(requests), BATCH):
            result = self.pipeline.generate(requests[start : start + BATCH])
            videos += [video for video in result.videos if video is not None]
        return videos


def share(name: str, right: Iterable[bool]) -> str:
    """Such as: colour 58/60 (96.7%)."""
    found = list(right)
    return f"{name} {sum(found)}/{len(found)} ({sum(found) / len(found):.1%})"


def score(asked: Sequence[Asked], videos: Sequence[NDArray[np.uint8]]) -> str:
    """Shares of clips whose largest object has the colour, the shape, the motion that was asked."""
    seen = [look(video) for video in videos]
    pairs = [(a, found[0] if found else None) for a, found in zip(asked, seen, strict=True)]
    return ", ".join(
        share(name, (o is not None and getattr(o, name) == getattr(a, name) for a, o in pairs))
        for name in ("colour", "shape", "motion")
    )


def ask(asked: Sequence[Asked], seed: int, size: tuple[int, int], **other: Any) -> list[Request]:
    """One request per prompt, of the default steps and guidance unless told otherwise."""
    keys = {"height": size[0], "width": size[1], "num_frames": 17, "seed": seed, **other}
    return [Request(prompt=a.prompt, prompt_index=i, **keys) for i, a in enumerate(asked)]


def prompts(clips: Clips) -> None:
    """The 60 prompts: 15 of each size, each with both seeds."""
    asked = fixed_prompts()
    everything: list[Asked] = []
    videos: list[NDArray[np.uint8]] = []
    for number, size in enumerate(SIZES):
        # Shapes follow one another in the list: each size is to have its share of every one.
        part = [a for i, a in enumerate(asked) if (i + i // len(SHAPES)) % len(SIZES) == number]
        made = [v for seed in SEEDS for v in clips.make(ask(part, seed, size))]
        print(f"  {size[0]}x{size[1]}: {score(part * 2, made)}", flush=True)
        everything += part * 2
        videos += made
    print(f"prompts: {score(everything, videos)}", flush=True)


def beside(clips: Clips) -> None:
    """What the model was taught less of."""
    asked = fixed_prompts()[:20]
    print("144 lines:", score(asked, clips.make(ask(asked, 1, (144, 144)))), flush=True)
    for frames in (34, 51):
        made = clips.make(ask(asked, 1, (64, 96), num_frames=frames))
        print(f"{frames} frames:", score(asked, made), flush=True)
    for size, frames in (((64, 96), 17), (LARGEST, FRAMES)):
        two_objects(clips, size, frames)


def large(clips: Clips) -> None:
    """The largest size at its full length."""
    asked = fixed_prompts()[:20]
    made = clips.make(ask(asked, 1, LARGEST, num_frames=FRAMES))
    print(f"{LARGEST[0]}x{LARGEST[1]}, {FRAMES} frames: {score(asked, made)}", flush=True)


def two_objects(clips: Clips, size: tuple[int, int], frames: int) -> None:
    """20 clips of two objects: whether both have their colours, and their shapes too."""
    rng = np.random.default_rng(2)
    wanted, texts = [], []
    for _ in range(20):
        scene = draw_scene(rng, size, frames, things=2)
        wanted.append(pairs_of(scene.things))
        texts.append(Asked(describe(scene, rng), "", "", ""))
    made = clips.make(ask(texts, 1, size, num_frames=frames))
    seen = [pairs_of(look(video)) for video in made]
    both = list(zip(wanted, seen, strict=True))
    colours = ({c for c, _ in want} == {c for c, _ in found} for want, found in both)
    print(f"two objects, {size[0]}x{size[1]}, {frames} frames:", end=" ")
    print(share("both colours", colours), end=", ")
    print(share("both colours and shapes", (want == found for want, found in both)), flush=True)


def pairs_of(things: Iterable[Thing | Seen]) -> set[tuple[str, str]]:
    """Colour and shape of each."""
    return {(one.colour, one.shape) for one in things}


def spins(clips: Clips) -> None:
    """20 clips of a square or triangle that spins, small and short, then large and long."""
    for size, frames in (((64, 96), 17), (LARGEST, FRAMES)):
        rng = np.random.default_rng(5)
        asked = []
        for _ in range(20):
            scene = draw_scene(rng, size, frames, things=1, motion="spin")
            thing = scene.things[0]
            asked.append(Asked(describe(scene, rng), thing.colour, thing.shape, "spin"))
        made = clips.make(ask(asked, 1, size, num_frames=frames))
        print(f"spins, {size[0]}x{size[1]}, {frames} frames: {score(asked, made)}", flush=True)


def image(clips: Clips) -> None:
    """40 pictures: the object keeps colour and shape and moves as told."""
    from PIL import Image

    rng = np.random.default_rng(3)
    requests: list[Request] = []
    asked: list[Asked] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(asked) < 40:
            scene = draw_scene(rng, (64, 96), 17, things=1)
            thing = scene.things[0]
            if thing.motion not in DIRECTIONS:
                continue
            path = Path(folder) / f"{len(asked)}.png"
            Image.fromarray(as_uint8(render(scene, [0]))[0]).save(path)
            prompt = describe(scene, rng)
            asked.append(Asked(prompt, thing.colour, thing.shape, thing.motion))
            requests.append(
                Request(
                    prompt=prompt,
                    prompt_index=len(requests),
                    height=64,
                    width=96,
                    num_frames=17,
                    reference_path=str(path),
                    mask_strategy="0",
                )
            )
        seen = [look(video) for video in clips.make(requests)]
    pairs = [(a, f[0] if f else None) for a, f in zip(asked, seen, strict=True)]
    for names in (("colour",), ("shape",), ("motion",), ("colour", "shape", "motion")):
        right = [
            o is not None and all(getattr(a, n) == getattr(o, n) for n in names) for a, o in pairs
        ]
        print("image to video:", share(" and ".join(names), right), flush=True)


def extend(clips: Clips) -> None:
    """20 clips of 34 frames whose second half is made: distance from the true path at the seam."""
    rng = np.random.default_rng(4)
    errors: list[float] = []
    asked: list[Asked] = []
    videos: list[NDArray[np.uint8]] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(errors) < 20:
            scene = draw_scene(rng, (64, 96), 34, things=1)
            thing = scene.things[0]
            if thing.motion not in DIRECTIONS or scene.pan:
                continue
            path = Path(folder) / f"{len(errors)}.mp4"
            write_clip(path, as_uint8(render(scene, range(17))))
            a = Asked(describe(scene, rng), thing.colour, thing.shape, thing.motion)
            other = {"reference_path": str(path), "mask_strategy": "0,0,0,0,5,0"}
            made = clips.make(ask([a], 1, (64, 96), num_frames=34, **other))[0]
            found = look(made[17:20])
            true = centres(scene, thing)[17:20] - 0.5
            away = np.hypot(*(found[0].path - true).T).mean() if found else 64.0
            errors.append(float(away))
            asked.append(a)
            videos.append(made)
    print("extension:", score(asked, videos))
    print(f"extension: {np.mean(errors):.2f} pixels at the seam, median {np.median(errors):.2f}")


def write_clip(path: Path, frames: NDArray[np.uint8]) -> None:
    """A lossless mp4."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=24, options={"crf": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@torch.no_grad()
def vae(clips: Clips) -> None:
    """PSNR of clips that were not trained on, through the posteriors' means; what is seen of pairs.

    What the judge does not see in a round trip of a true clip, it cannot see in a generated one.
    """
    model = clips.pipeline.models.vae(Request(prompt=""), encoder=True)
    print(f"VAE round trip: {psnr(model, 24, seed=1):.2f} dB", flush=True)
    for size, frames, count in ((LARGEST, FRAMES, 6), ((64, 96), 17, 20)):
        rng = np.random.default_rng(2)
        right, decibels = [], []
        for _ in range(count):
            scene = draw_scene(rng, size, frames, things=2)
            made, quality = round_trip(model, as_input(render(scene))[None])
            decibels.append(quality)
            pixels = as_uint8((made[0].permute(1, 2, 3, 0).numpy() + 1) / 2)
            right.append(pairs_of(look(pixels)) == pairs_of(scene.things))
        print(f"round trip of two objects, {size[0]}x{size[1]}, {frames} frames:", end=" ")
        print(f"{min(decibels):.1f} to {max(decibels):.1f} dB,", end=" ")
        print(share("both colours and shapes", right), flush=True)


def guidance(clips: Clips) -> None:
    """The first 24 prompts under other guidance scales and numbers of steps, and two seeds."""
    asked = fixed_prompts()[:24]
    for scale, steps in ((1.0, 30), (3.0, 30), (7.0, 30), (7.0, 10)):
        other = {"cfg_scale": scale, "steps": steps}
        made = clips.make(ask(asked, 1, (64, 96), **other))
        print(f"guidance {scale}, {steps} steps: {score(asked, made)}", flush=True)
    first, second = (clips.make(ask(asked[:8], seed, (64, 96))) for seed in SEEDS)
    away = [float(np.abs(a.astype(float) - b).mean()) for a, b in zip(first, second, strict=True)]
    print(f"seeds: clips of one prompt differ by {np.mean(away):.1f} gray levels a pixel")


WHAT = {
    "prompts": prompts,
    "beside": beside,
    "large": large,
    "spins": spins,
    "image": image,
    "extend": extend,
    "vae": vae,
    "guidance": guidance,
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", choices=[[], *WHAT], help="default: all")
    parser.add_argument("--model", type=Path, help="four directories; default: the shipped model")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    given = None
    if arguments.model:
        names = ("dit", "t5", "vae2d", "vae3d")
        given = Checkpoints(**{name: arguments.model / name for name in names})
    with open_session() as session:
        clips = Clips(Pipeline.load(given, session=session, dtype=arguments.dtype))
        for name in arguments.what or WHAT:
            start = time.monotonic()
            WHAT[name](clips)
            print(f"  ({name}: {time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
