"""The watermark that says that a picture was generated. It is drawn once and blended onto frames.

The text is in Pillow's built-in font, on a dark plate in the bottom right corner. numpy and Pillow
are imported inside the functions that need them, so that `fits` is cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from opensora_sp.media.sinks import Sink

SMALLEST_HEIGHT = 32  # pixels; on a smaller picture the mark would not be readable
SMALLEST_WIDTH = 64
MOST_OF_WIDTH = 5  # the mark takes at most a fifth of the width
MOST_OF_HEIGHT = 3  # and at most a third of the height

# The texts, longest first. A narrow picture gets the first text that is readable on it.
_TEXTS = ("AI generated · Open-Sora", "AI generated\nOpen-Sora", "AI\ngenerated", "AI")
_READABLE = 8  # pixels; a smaller font is used for the shortest text only
_PLATE = (0, 0.65)  # grey level and opacity; the contrast of letters is 4.5 or more on white
_LETTERS = (255, 0.95)
_BOLDER = 0.6  # exponent on the letters' coverage; makes thin strokes of small fonts brighter
_FINER = 4  # the plate is drawn so many times larger and scaled down, for smooth corners


def fits(height: int, width: int) -> bool:
    """Whether pictures of this size get a mark."""
    return height >= SMALLEST_HEIGHT and width >= SMALLEST_WIDTH


@dataclass(frozen=True)
class Mark:
    """A drawn mark and its position.

    top, left: of its box, in pixels. opacity, colour: uint16 [h,w,1] from 0 to 255, for each pixel.
    """

    top: int
    left: int
    opacity: NDArray[np.uint16]
    colour: NDArray[np.uint16]

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of a frame that the mark may change."""
        height, width, _ = self.opacity.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def onto(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A copy of uint8 [F,H,W,3] with the mark; bit-identical outside its box."""
        import numpy as np

        marked = frames.copy()
        rows, columns = self.box
        under = frames[:, rows, columns].astype(np.uint16)
        # At most 255 · 255 + 127, which uint16 holds.
        blended = (under * (255 - self.opacity) + (self.colour * self.opacity + 127)) // 255
        marked[:, rows, columns] = blended
        return marked


class Watermarked:
    """A sink that marks frames and passes them to another sink.

    Frames that are too small for a mark (see `fits`) are passed unchanged.
    """

    def __init__(self, sink: Sink, height: int, width: int) -> None:
        self._sink = sink
        self._mark = draw_mark(height, width)

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3]. The caller's array is not changed."""
        self._sink.write(frames if self._mark is None else self._mark.onto(frames))


def draw_mark(height: int, width: int) -> Mark | None:
    """The mark for pictures of height × width pixels; None where they are too small."""
    import numpy as np
    from PIL import Image

    if not fits(height, width):
        return None
    letters = _letters(height, width)
    padding = _padding(letters.height)
    size = (letters.width + 2 * padding, letters.height + 2 * padding)
    text = Image.new("L", size, 0)
    text.paste(letters, (padding, padding))
    plate = np.asarray(_plate(size, radius=2 * padding)) / 255 * _PLATE[1]
    ink = (np.asarray(text) / 255) ** _BOLDER * _LETTERS[1]
    opacity = ink + plate * (1 - ink)
    grey = _LETTERS[0] * ink + _PLATE[0] * plate * (1 - ink)
    colour = np.divide(grey, opacity, out=np.zeros_like(grey), where=opacity > 0)
    margin = max(2, min(height, width) // 40)
    return Mark(
        top=height - margin - size[1],
        left=width - margin - size[0],
        opacity=np.rint(opacity * 255).astype(np.uint16)[..., None],
        colour=np.rint(colour).astype(np.uint16)[..., None],
    )


def _padding(text_height: int) -> int:
    return max(2, text_height // 5)


def _letters(height: int, width: int) -> Image.Image:
    """White text on black ("L"), as large as the limits for this picture allow."""
    wanted = max(10, min(height, width) // 30)
    for text in _TEXTS:
        smallest = 1 if text == _TEXTS[-1] else _READABLE
        for size in range(wanted, smallest - 1, -1):
            drawn = _draw(text, size)
            margins = 2 * _padding(drawn.height)
            if (
                MOST_OF_WIDTH * (drawn.width + margins) <= width
                and MOST_OF_HEIGHT * (drawn.height + margins) <= height
            ):
                return drawn
    raise RuntimeError(f"no mark fits {height}x{width} pixels")


def _draw(text: str, size: int) -> Image.Image:
    """Text in a font size in pixels, cropped to its letters."""
    from PIL import Image, ImageDraw

    font = _font(size)
    spacing = max(1, size // 4)
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = probe.multiline_textbbox((0, 0), text, font=font, spacing=spacing)
    image = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(image).multiline_text(
        (1 - left, 1 - top), text, fill=255, font=font, spacing=spacing, align="center"
    )
    box = image.getbbox()
    return image if box is None else image.crop(box)


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _plate(size: tuple[int, int], radius: int) -> Image.Image:
    """A filled rectangle with round corners ("L")."""
    from PIL import Image, ImageDraw

    finer = (size[0] * _FINER, size[1] * _FINER)
    image = Image.new("L", finer, 0)
    ImageDraw.Draw(image).rounded_rectangle(
        (0, 0, finer[0] - 1, finer[1] - 1), radius=radius * _FINER // 2, fill=255
    )
    return image.resize(size, Image.Resampling.BOX)
