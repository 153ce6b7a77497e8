"""Small pictures of an output: a thumbnail and a spritesheet, made once and kept beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opensora_sp.base.atomic import atomic_output

THUMBNAIL_SIDE = 320
SPRITES, SPRITE_SIDE = 10, 160


def preview(output: Path, variant: str) -> Path:
    """The picture of a variant, "thumbnail" or "spritesheet", made where it is not there yet."""
    path = output.with_name(f"{output.stem}.{variant}.webp")
    if not path.exists():
        from PIL import Image

        frames = _frames(output)
        if variant == "thumbnail":
            picture = _fitted(frames[len(frames) // 2], THUMBNAIL_SIDE)
        else:
            step = max(1, len(frames) // SPRITES)
            small = [_fitted(frame, SPRITE_SIDE) for frame in frames[::step][:SPRITES]]
            picture = Image.new("RGB", (sum(p.width for p in small), small[0].height))
            for number, one in enumerate(small):
                picture.paste(one, (number * one.width, 0))
        with atomic_output(path) as temporary:
            picture.save(temporary, "WEBP", quality=80)
    return path


def _fitted(picture: Any, side: int) -> Any:
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size])


def _frames(output: Path) -> list[Any]:
    """About `SPRITES` pictures spread over an output."""
    from PIL import Image

    if output.suffix != ".mp4":
        return [Image.open(output).convert("RGB")]
    import av

    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        total = stream.frames or 1
        wanted = {round(k * (total - 1) / max(1, SPRITES - 1)) for k in range(SPRITES)}
        return [
            frame.to_image()
            for number, frame in enumerate(container.decode(stream))
            if number in wanted
        ]
