"""Clips side by side, for a look: python -m scripts.train_embedded.preview [OUT.gif]

Twelve clips that the program made of the embedded model with its default steps and guidance, one
beside the other, first seeds and nothing chosen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.parallel.session import open_session
from opensora_sp.request.request import Request

PROMPTS = (
    "a red ball rolls to the right on a gray background",
    "a yellow triangle flies up on a navy background",
    "a blue ring drifts to the left on a white background",
    "a green square spins on a black background",
    "a purple circle bounces on a beige background",
    "a cyan square moves to the lower right on a black background",
    "a green triangle moves down on a white background",
    "a red ring grows on a navy background",
    "a cyan ball goes up and to the left on a gray background",
    "a purple triangle glides to the left on a black background",
    "a yellow square slides down and to the left on a navy background",
    "a blue ball stays still on a background that fades from white to gray",
)
COLUMNS = 4
TARGET = Path(__file__).resolve().parents[2] / "docs" / "images" / "embedded.gif"


def main() -> None:
    """Make the clips and write the picture."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=TARGET)
    out: Path = parser.parse_args().out
    requests = [
        Request(prompt=prompt, prompt_index=index, height=64, width=96, num_frames=17)
        for index, prompt in enumerate(PROMPTS)
    ]
    with open_session() as session:
        videos = Pipeline.load(session=session, dtype="fp32").generate(requests).videos
    framed = [np.pad(v, ((0, 0), (2, 2), (2, 2), (0, 0))) for v in videos if v is not None]
    rows = [np.concatenate(framed[i : i + COLUMNS], 2) for i in range(0, len(framed), COLUMNS)]
    frames = [Image.fromarray(frame) for frame in np.concatenate(rows, 1)]
    out.parent.mkdir(parents=True, exist_ok=True)
    pauses = [60] * (len(frames) - 1) + [700]
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=pauses, loop=0)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
