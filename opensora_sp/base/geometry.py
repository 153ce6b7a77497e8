"""Shapes of latents and patches for a video's size, and its micro-frame chunks. No torch."""

from dataclasses import dataclass

SPATIAL_FACTOR = 8  # pixels of height or width per latent cell
TIME_FACTOR = 4  # frames per latent frame inside one micro-frame chunk
PATCH = 2  # latent cells of height or width per patch
MICRO_FRAME_SIZE = 17


def latent_frames(frames: int, micro: int = MICRO_FRAME_SIZE) -> int:
    """Latent frames T of a video. Each chunk of `micro` frames is rounded up by itself."""
    chunks, rest = divmod(frames, micro)
    return chunks * -(-micro // TIME_FACTOR) + -(-rest // TIME_FACTOR)


def latent_shape(
    frames: int, height: int, width: int, micro: int = MICRO_FRAME_SIZE
) -> tuple[int, int, int]:
    """(T, height, width) of the latents of a video of `frames` × `height` × `width` pixels."""
    return latent_frames(frames, micro), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def patch_grid(latent_height: int, latent_width: int) -> tuple[int, int]:
    """Patches down and across; an odd latent side is padded with zeros by one cell."""
    return -(-latent_height // PATCH), -(-latent_width // PATCH)


@dataclass(frozen=True)
class Chunk:
    """One micro-frame chunk: where it begins and how long it is, in frames and latent frames."""

    frame_start: int
    frames: int
    latent_start: int
    latents: int


def split_chunks(
    num_frames: int, micro_frame_size: int | None, time_factor: int = TIME_FACTOR
) -> list[Chunk]:
    """The micro-frame chunks of a video. `micro_frame_size` None makes the video one chunk."""
    size = micro_frame_size or num_frames
    chunks: list[Chunk] = []
    latent_start = 0
    for start in range(0, num_frames, size):
        frames = min(size, num_frames - start)
        latents = -(-frames // time_factor)
        chunks.append(Chunk(start, frames, latent_start, latents))
        latent_start += latents
    return chunks
