"""Train the embedded model's two VAEs: python -m scripts.train_embedded.vae STATE_DIR

The spatial VAE first learns single pictures, then jumbles of many objects in any colour, which
teach more a picture, then both. Then its encoder is fixed, and with it what the transformer
learns: the temporal encoder hands on the latents of each group's last frame (see `keyframes`), so
that a clip's latents are those of its key frames and a picture is a clip of one. The temporal
decoder starts out fading from one to the next and learns to move what moved, first in latents.
Then both decoders learn the pixels together, from latents with a little noise, as the
transformer's have; at the end mostly of what comes out worst: pairs of objects, which are small,
and what turns or bounces. What moves far between two key frames was still the worst then: motion
and details come once more. The state is saved on the way and a run goes on from it.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_sp.models.temporal_vae import ResBlock, TemporalVAEConfig
from opensora_sp.models.video_vae import SPATIAL_SCALE, VideoVAE, VideoVAEConfig
from scripts.train_embedded.architecture import VAE2D, VAE3D
from scripts.train_embedded.keyframes import start_from_key_frames
from scripts.train_embedded.state import pick_device, read_state, save_state
from scripts.train_embedded.world import (
    BACKGROUNDS,
    COLOURS,
    EDGE,
    SHAPES,
    Array,
    distance,
    draw_scene,
    render,
)

SEED = 12
SAVE_EVERY = 90.0  # seconds
CLIP = 17  # frames of one chunk: what both VAEs work on
KL_SPATIAL = 1e-4
FRAMES = 4  # of each clip that are compared
MOVING = 320  # batches of the motion phases, encoded once and gone through again and again
LATENT_NOISE = 0.08  # most noise on a decoder's latents, in their standard deviations
SIZES = ((64, 64), (64, 96), (96, 64), (72, 72), (96, 96))
LARGE = ((96, 144), (144, 96), (144, 144))
LARGEST = (144, 256)


@dataclass(frozen=True)
class Phase:
    """Part of the training: what it trains, on how much a step, for how many steps."""

    name: str
    steps: int
    batch: int
    rate: float


PHASES = (
    Phase("pictures", 1600, 8, 3e-3),
    Phase("jumbles", 2200, 8, 2.5e-3),
    Phase("jumbles", 600, 8, 1.5e-3),
    Phase("mixed", 1600, 8, 1.5e-3),
    Phase("motion", 3000, 8, 1e-3),
    Phase("decoder", 1400, 4, 5e-4),
    Phase("decoder", 1800, 4, 5e-4),
    Phase("details", 4000, 4, 6e-4),
    Phase("motion", 3500, 4, 1e-3),
    Phase("details", 1900, 4, 5e-4),
    Phase("details", 2700, 4, 4e-4),
    Phase("details", 1800, 4, 4e-4),
)
SPATIAL = ("pictures", "jumbles", "mixed")  # what trains both halves of the spatial VAE
PIXELS = ("decoder", "details")  # what trains both decoders


def build() -> VideoVAE:
    """Both VAEs with weights drawn from the seed."""
    torch.manual_seed(SEED)
    temporal = TemporalVAEConfig.from_dict(VAE3D["vae_temporal"])
    vae = VideoVAE(VideoVAEConfig(spatial=VAE2D, temporal=temporal))
    start_from_key_frames(vae.temporal_vae)
    return vae


def pixels(rng: np.random.Generator, batch: int, phase: str) -> Tensor:
    """Clips [B,3,F,H,W] in [-1, 1], all of one size; F is 1 in the phases of single pictures."""
    if phase == "mixed":
        phase = "jumbles" if rng.random() < 0.4 else "pictures"
    if phase == "jumbles":
        size = ((64, 64), (64, 96))[int(rng.random() < 0.3)]
        return torch.stack([as_input(jumble(rng, size)) for _ in range(batch)])
    if phase in ("motion", "details"):
        return torch.stack(chosen_clips(rng, batch, phase))
    large = phase not in SPATIAL and rng.random() < 0.1
    choices = LARGE if large else SIZES
    size = choices[int(rng.integers(len(choices)))]
    clips = []
    for _ in range(batch):
        video = render(draw_scene(rng, size, CLIP, training=False))
        if phase == "pictures":
            video = video[int(rng.integers(CLIP))][None]
        clips.append(as_input(video))
    return torch.stack(clips)


def chosen_clips(rng: np.random.Generator, batch: int, phase: str) -> list[Tensor]:
    """Clips [3,F,H,W] of one size, the larger the fewer, with more than chance has of what is hard.

    For the details half of pairs. Some turn; some bounce, which moves furthest between key frames.
    """
    sizes = (*SIZES, *LARGE, LARGEST) if phase == "details" else (*SIZES, *LARGE)
    shares = np.array([min(1.0, 96**2 / (height * width)) for height, width in sizes])
    height, width = sizes[int(rng.choice(len(sizes), p=shares / shares.sum()))]
    clips = []
    for _ in range(max(1, min(batch, batch * 96**2 // (height * width)))):
        things = 2 if rng.random() < (0.5 if phase == "details" else 0.2) else 1
        motion = (None, "spin", "bounce")[int(rng.choice(3, p=(0.68, 0.12, 0.2)))]
        scene = draw_scene(rng, (height, width), CLIP, things=things, motion=motion, training=False)
        clips.append(as_input(render(scene)))
    return clips


def as_input(video: Array) -> Tensor:
    """[F,H,W,3] in 0..1 → [3,F,H,W] in [-1, 1]."""
    return torch.from_numpy(video).permute(3, 0, 1, 2) * 2 - 1


def jumble(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """One picture [1,H,W,3] of several turned objects, colours and background of any kind."""
    rows = np.arange(size[0], dtype=np.float32)[:, None] + 0.5
    columns = np.arange(size[1], dtype=np.float32)[None, :] + 0.5
    choices = [*BACKGROUNDS.values(), *rng.random((5, 3))]
    first, last = (np.array(choices[int(rng.integers(10))], np.float32) for _ in range(2))
    part = rows / size[0] + 0 * columns if rng.random() < 0.5 else columns / size[1] + 0 * rows
    picture = first + (0.0 if rng.random() < 0.6 else 1.0) * part[..., None] * (last - first)
    for _ in range(int(rng.integers(2, 6))):
        colours = [*COLOURS.values(), rng.random(3)]
        colour = np.array(colours[int(rng.integers(len(colours)))], np.float32)
        x = columns - float(rng.uniform(0, size[1]))
        y = rows - float(rng.uniform(0, size[0]))
        angle = float(rng.uniform(0, 2 * math.pi)) if rng.random() < 0.4 else 0.0
        x, y = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
        radius = float(rng.uniform(0.13, 0.3)) * min(size)
        away = distance(str(rng.choice(SHAPES)), x, y, radius)
        picture = picture + np.clip(0.5 - away / EDGE, 0, 1)[..., None] * (colour - picture)
    return picture[None].astype(np.float32)


def divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL divergence of a posterior from the standard normal, mean over its elements."""
    return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()


def difference(made: Tensor, true: Tensor) -> Tensor:
    """What pixels are trained on: absolute error for edges, squared for PSNR."""
    return F.l1_loss(made, true) + 8 * F.mse_loss(made, true)


def spatial_encode(vae: VideoVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B,4,F,h,w], unscaled, of video [B,3,F,H,W]."""
    batch = video.shape[0]
    posterior = vae.spatial_vae.encode(video.transpose(1, 2).flatten(0, 1))
    mean, std = (part.unflatten(0, (batch, -1)).transpose(1, 2) for part in posterior)
    return mean, std


def spatial_decode(vae: VideoVAE, latents: Tensor) -> Tensor:
    """Pixels [B,3,F,H,W] of unscaled latents [B,4,F,h,w]."""
    frames = vae.spatial_vae.decode(latents.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)


def loss_of(vae: VideoVAE, phase: str, video: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of one step in pixels; of a motion phase see `motion_loss`."""
    if phase in SPATIAL:
        mean, std = spatial_encode(vae, video)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        made = spatial_decode(vae, mean + std * noise)
        return difference(made, video) + KL_SPATIAL * divergence(mean, std)
    frames = video.shape[2]
    with torch.no_grad():
        mean, _ = spatial_encode(vae, video[:, :, keys_of(frames)])
    made = decode_moved(vae, mean, frames, generator)
    few = torch.randperm(frames, generator=generator)[:FRAMES].to(video.device)
    return difference(spatial_decode(vae, made[:, :, few]), video[:, :, few])


def motion_loss(vae: VideoVAE, true: Tensor, generator: torch.Generator) -> Tensor:
    """How far decoded latents are from those of every frame, true [B,4,F,h,w], unscaled."""
    frames = true.shape[2]
    made = decode_moved(vae, true[:, :, keys_of(frames)], frames, generator)
    return F.mse_loss(made * SPATIAL_SCALE / vae.scale, true * SPATIAL_SCALE / vae.scale)


def keys_of(frames: int) -> slice:
    """The last of every four frames, counted from the end."""
    return slice((frames - 1) % 4, None, 4)


def decode_moved(vae: VideoVAE, keys: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Unscaled latents [B,4,F,h,w] of all frames, from those of the key frames with some noise."""
    latents = keys * SPATIAL_SCALE
    noise = torch.randn(latents.shape, generator=generator).to(latents.device) * vae.scale
    latents = latents + LATENT_NOISE * torch.rand((), generator=generator) * noise
    return vae.temporal_vae.decode(latents, frames) / SPATIAL_SCALE


def trained_weights(vae: VideoVAE, phase: str) -> list[torch.nn.Parameter]:
    """The weights that a phase changes."""
    spatial = vae.spatial_vae.module
    parts: list[torch.nn.Module] = [spatial]
    if phase not in SPATIAL:
        # The residual branches start at zero, beside the fade; what carries the fade stays.
        blocks = [m for m in vae.temporal_vae.decoder.modules() if isinstance(m, ResBlock)]
        parts = [part for b in blocks for part in (b.norm1, b.conv1, b.norm2, b.conv2)]
    if phase in PIXELS:
        parts += [spatial.decoder, spatial.post_quant_conv]
    return [weight for part in parts for weight in part.parameters()]


@torch.no_grad()
def fit_normalisation(vae: VideoVAE, device: torch.device, pictures: int = 256) -> None:
    """Set shift and scale to the mean and deviation of the latents of fresh pictures."""
    rng = np.random.default_rng([SEED, 10**6])
    found = []
    for _ in range(pictures // 8):
        mean, _ = spatial_encode(vae, pixels(rng, 8, "pictures").to(device))
        found.append((mean * SPATIAL_SCALE).transpose(0, 1).flatten(1))
    z = torch.cat(found, dim=1)
    vae.shift.copy_(z.mean(1).view_as(vae.shift))
    vae.scale.copy_(z.std(1).view_as(vae.scale))


@torch.no_grad()
def psnr(vae: VideoVAE, clips: int = 12, seed: int = 999) -> float:
    """Mean PSNR in dB of held-out clips after a round trip through the posteriors' means."""
    rng = np.random.default_rng([SEED, 2 * 10**6, seed])
    values = []
    for index in range(clips):
        size = (*SIZES, LARGE[0])[index % 6]
        video = as_input(render(draw_scene(rng, size, CLIP, training=False)))[None]
        values.append(round_trip(vae, video.to(vae.device))[1])
    return sum(values) / len(values)


def round_trip(vae: VideoVAE, video: Tensor) -> tuple[Tensor, float]:
    """A video [1,3,F,H,W] in [-1, 1] through the posterior's mean and back, and its PSNR in dB."""
    made = vae.decode(vae.encode(video), video.shape[2]).clamp(-1, 1)
    return made, 10 * math.log10(4 / float(F.mse_loss(made, video)))


def train(directory: Path, device: torch.device) -> None:
    """Run what is left of every phase."""
    vae = build().to(device)
    state = read_state(directory / "vae.pt", device)
    if state:
        vae.load_state_dict(state["model"])
    for number, phase in enumerate(PHASES):
        if state and state["phase"] > number:
            continue
        encoder_ends = phase.name not in SPATIAL and PHASES[number - 1].name in SPATIAL
        if encoder_ends and not (state and state["phase"] == number):
            fit_normalisation(vae, device)
            save_state(directory / "vae_encoder.pt", {"model": vae.state_dict()})
        trained = trained_weights(vae, phase.name)
        optimizer = torch.optim.AdamW(trained, lr=phase.rate, betas=(0.9, 0.98), weight_decay=0.0)
        first = 0
        if state and state["phase"] == number:
            first = state["step"]
            if first:
                optimizer.load_state_dict(state["optimizer"])
        _run_phase(vae, number, phase, first, optimizer, directory, device)
        state = None


def _run_phase(
    vae: VideoVAE,
    number: int,
    phase: Phase,
    first: int,
    optimizer: torch.optim.Optimizer,
    directory: Path,
    device: torch.device,
) -> None:
    """The steps of one phase from `first` on; the state is saved on the way and at the end."""
    saved, losses = time.monotonic(), []
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    @cache
    def moving(chosen: int) -> Tensor:
        """Unscaled latents of every frame of a motion phase's batch [B,4,F,h,w]."""
        rng = np.random.default_rng([SEED, number, 10**6 + chosen])
        with torch.no_grad():
            return spatial_encode(vae, pixels(rng, phase.batch, phase.name).to(device))[0]

    for step in range(first, phase.steps):
        warm = min(1.0, (step + 1) / 50)
        rate = (
            phase.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / phase.steps)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Data and noise follow from the step's number alone, so a resumed run is the same run.
        rng = np.random.default_rng([SEED, number, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        optimizer.zero_grad(set_to_none=True)
        if phase.name == "motion":
            loss = motion_loss(vae, moving(step % MOVING), generator)
        else:
            video = pixels(rng, phase.batch, phase.name).to(device)
            loss = loss_of(vae, phase.name, video, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        last = step + 1 == phase.steps
        if last or time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(directory / "vae.pt", {**state, "phase": number, "step": step + 1})
            quality = f"round trip {psnr(vae, 6):.2f} dB" if phase.name not in SPATIAL else ""
            mean = sum(losses) / len(losses)
            losses.clear()
            print(f"{phase.name} {step + 1}/{phase.steps} loss {mean:.4f} {quality}", flush=True)


def main() -> None:
    """Train to the end, or until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the state is kept")
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator's name in torch")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    train(arguments.directory, pick_device(arguments.device))


if __name__ == "__main__":
    main()
