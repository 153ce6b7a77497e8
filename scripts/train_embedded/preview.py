"""Clips side by side, for the README: python -m scripts.train_embedded.preview [OUT.webp]

Nine clips that the program made of the embedded model with its default steps and guidance, each
over its prompt, with the first seed: seven single objects and two pairs. Nothing spins, as that
comes apart. It takes two to three minutes of one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.parallel.session import open_session
from opensora_sp.request.request import Request
from opensora_sp.request.sizes import EMBEDDED_FRAMES, EMBEDDED_LARGEST

PROMPTS = (
    "a red ball rolls to the right on a gray background",
    "a yellow triangle flies up on a navy background",
    "a blue square drifts to the left on a white background",
    "a purple circle bounces on a beige background",
    "a red square and a blue circle move to the right on a white background",
    "a cyan square moves to the lower right on a black background",
    "a green square moves to the lower left on a black background",
    "a cyan ball goes up and to the left on a gray background",
    "a yellow triangle and a cyan circle move down on a navy background",
)
(HEIGHT, WIDTH), FRAMES = EMBEDDED_LARGEST, EMBEDDED_FRAMES
COLUMNS, GAP, CAPTION = 3, 6, 28
KEPT, PAUSE = 2, 700  # every second frame is shown; milliseconds that the last one stays
QUALITY = 75
TARGET = Path(__file__).resolve().parents[2] / "docs" / "images" / "embedded.webp"


def lines_of(prompt: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The prompt in lines that are no wider than a clip."""
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= WIDTH else [*lines, word]
    return "\n".join(lines)


def sheet(clips: list[np.ndarray], frame: int) -> Image.Image:
    """One frame of all clips [F,H,W,3] uint8, each over its prompt, on white."""
    font = ImageFont.load_default(size=11)
    cell = WIDTH + GAP, HEIGHT + CAPTION + GAP
    rows = -(-len(clips) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * cell[0] + GAP, rows * cell[1] + GAP), "white")
    draw = ImageDraw.Draw(page)
    for index, (clip, prompt) in enumerate(zip(clips, PROMPTS, strict=True)):
        left, top = GAP + index % COLUMNS * cell[0], GAP + index // COLUMNS * cell[1]
        page.paste(Image.fromarray(clip[frame]), (left, top))
        words = lines_of(prompt, font)
        draw.multiline_text((left, top + HEIGHT + 2), words, "black", font, spacing=1)
    return page


def main() -> None:
    """Make the clips and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=TARGET)
    out: Path = parser.parse_args().out
    clips = []
    with open_session() as session:
        pipeline = Pipeline.load(session=session, dtype="fp32")
        for index, prompt in enumerate(PROMPTS):
            request = Request(
                prompt=prompt, prompt_index=index, height=HEIGHT, width=WIDTH, num_frames=FRAMES
            )
            video = pipeline.generate(request).videos[0]
            assert video is not None
            clips.append(np.asarray(video))
    frames = [sheet(clips, number) for number in range(0, FRAMES, KEPT)]
    out.parent.mkdir(parents=True, exist_ok=True)
    durations = [round(1000 * KEPT / 24)] * (len(frames) - 1) + [PAUSE]
    frames[0].save(
        out, save_all=True, append_images=frames[1:], duration=durations, loop=0,
        quality=QUALITY, method=6,
    )  # fmt: skip
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
