"""The watermark that says that a picture was generated. It is drawn once and blended onto frames.

The text is on a dark plate in a corner. The plain mark is in Pillow's built-in font; marks with a
text or a size of their own are in the label font of the package, which has Chinese, or in a font
file. numpy and Pillow are imported inside the functions that need them, so that `fits` is cheap.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opensora_sp.base.errors import UserError

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

Place = Literal["bottom-right", "bottom-left", "top-right", "top-left"]

# The texts, longest first. A narrow picture gets the first text that is readable on it.
TEXTS = ("AI generated · Open-Sora", "AI generated\nOpen-Sora", "AI\ngenerated", "AI")
_READABLE = 8  # pixels; a smaller font is used for the shortest text only
_PLATE = (0, 0.65)  # grey level and opacity; the contrast of letters is 4.5 or more on white
_LETTERS = (255, 0.95)
_BOLDER = 0.6  # exponent on the letters' coverage; makes thin strokes of small fonts brighter
_FINER = 4  # the plate is drawn so many times larger and scaled down, for smooth corners

# Of marks with a style of their own.
LABEL_FONT = Path(__file__).resolve().parents[1] / "assets" / "label_font" / "label_font.otf"
_LONG_PART = 3  # all texts but the last take at most a third of the width
_READABLE_CHINESE = 14  # pixels of font size; below, the strokes of one character run together
_MOST_PER_HEIGHT = 8  # font size in heights of a capital; usual fonts have less than 2
_SOLID = 128  # coverage from which a pixel counts as part of a letter


@dataclass(frozen=True)
class MarkStyle:
    """How a mark looks.

    texts: longest first; the first that fits is drawn. None: those of the plain mark.
    size: least height of a capital letter, in percent of the picture's shorter side. Chinese
        characters are taller than that. None: a thirtieth of the shorter side as font size, and
        less where the picture is narrow.
    font: a font file, None for the label font.
    """

    texts: tuple[str, ...] | None = None
    size: float | None = None
    place: Place = "bottom-right"
    font: Path | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the plain mark: in Pillow's font, small, and short where it must be."""
        return self.texts is None and self.size is None and self.font is None


PLAIN = MarkStyle()


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

    Frames that are too small for the plain mark (see `fits`) are passed unchanged. Raises UserError
    where a mark of another style does not fit.
    """

    def __init__(self, sink: Sink, height: int, width: int, style: MarkStyle = PLAIN) -> None:
        self._sink = sink
        self._mark = draw_mark(height, width, style)
        if self._mark is None and not style.plain:
            raise UserError(f"the mark does not fit {height}x{width} pixels (height x width)")

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3]. The caller's array is not changed."""
        self._sink.write(frames if self._mark is None else self._mark.onto(frames))


def draw_mark(height: int, width: int, style: MarkStyle = PLAIN) -> Mark | None:
    """The mark for pictures of height × width pixels; None where they are too small for it."""
    import numpy as np
    from PIL import Image

    if not fits(height, width):
        return None
    letters = _letters(height, width) if style.plain else _styled(height, width, style)
    if letters is None:
        return None
    padding = _padding(letters.height)
    size = (letters.width + 2 * padding, letters.height + 2 * padding)
    text = Image.new("L", size, 0)
    text.paste(letters, (padding, padding))
    plate = np.asarray(_plate(size, radius=2 * padding)) / 255 * _PLATE[1]
    ink = (np.asarray(text) / 255) ** _BOLDER * _LETTERS[1]
    opacity = ink + plate * (1 - ink)
    grey = _LETTERS[0] * ink + _PLATE[0] * plate * (1 - ink)
    colour = np.divide(grey, opacity, out=np.zeros_like(grey), where=opacity > 0)
    margin = _margin(height, width)
    vertical, horizontal = style.place.split("-")
    return Mark(
        top=margin if vertical == "top" else height - margin - size[1],
        left=margin if horizontal == "left" else width - margin - size[0],
        opacity=np.rint(opacity * 255).astype(np.uint16)[..., None],
        colour=np.rint(colour).astype(np.uint16)[..., None],
    )


def missing_characters(text: str, font: Path | None) -> str:
    """The characters of a text that a font lacks, each once. font: a file, None: the label font.

    A character is lacking where it is drawn as U+FFFF is, which no font has, or is empty. Raises
    UserError where the file is no font.
    """
    probe = _load(font, 32)
    nothing = _pixels(probe, "\uffff")

    def lacking(one: str) -> bool:
        invisible = unicodedata.category(one)[0] in "CZ"
        drawn = _pixels(probe, one)
        return invisible or drawn == nothing or not any(drawn[1])

    return "".join(one for one in dict.fromkeys(text) if one not in " \n" and lacking(one))


def _pixels(font: FreeTypeFont, text: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(text, mode="L")
    return mask.size, bytes(mask)


def _margin(height: int, width: int) -> int:
    return max(2, min(height, width) // 40)


def _padding(text_height: int) -> int:
    return max(2, text_height // 5)


def _styled(height: int, width: int, style: MarkStyle) -> Image.Image | None:
    """The first text that fits, white on black ("L"); None where none does."""
    texts = style.texts or TEXTS
    for text in texts:
        for size in _sizes(text, height, width, style):
            drawn = _draw(text, _load(style.font, size))
            around = 2 * _padding(drawn.height)
            free = 2 * _margin(height, width)
            if drawn.height + around > height - free or drawn.width + around > width - free:
                continue
            if text == texts[-1] or _LONG_PART * (drawn.width + around) <= width:
                return drawn
    return None


def _sizes(text: str, height: int, width: int, style: MarkStyle) -> range:
    """Font sizes in pixels to try, the best first."""
    shorter = min(height, width)
    readable = _READABLE_CHINESE if any(map(_is_chinese, text)) else _READABLE
    if style.size is None:
        wanted = max(10, shorter // 30, readable)
        return range(wanted, readable - 1, -1)
    target = shorter * style.size / 100
    size = max(readable, int(target))
    while _capital_height(_load(style.font, size), text) < target:
        size += 1
        if size > _MOST_PER_HEIGHT * target + readable:
            raise UserError(
                f"{style.font or LABEL_FONT}: its letters are empty or too thin for a mark: give "
                "--watermark-font another font"
            )
    return range(size, size + 1)


def _is_chinese(one: str) -> bool:
    return unicodedata.name(one, "").startswith("CJK")


def _capital_height(font: FreeTypeFont, text: str) -> int:
    """Rows of pixels that a capital letter fills; of the text's first character without one."""
    import numpy as np

    drawn = _pixels(font, "A")
    letter = "A" if any(drawn[1]) and drawn != _pixels(font, "\uffff") else text[:1]
    mask = font.getmask(letter, mode="L")
    pixels = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1])
    return int((pixels.max(axis=1, initial=0) >= _SOLID).sum())


def _load(font: Path | None, size: int) -> FreeTypeFont:
    """A font file in a size in pixels. Raises UserError where it is none."""
    from PIL import ImageFont

    path = font or LABEL_FONT
    try:
        # The basic layout is in every build of Pillow, so that all draw the same.
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a font file that can be read: {error}") from error


def _letters(height: int, width: int) -> Image.Image:
    """White text on black ("L"), as large as the limits for this picture allow."""
    wanted = max(10, min(height, width) // 30)
    for text in TEXTS:
        smallest = 1 if text == TEXTS[-1] else _READABLE
        for size in range(wanted, smallest - 1, -1):
            drawn = _draw(text, _font(size))
            margins = 2 * _padding(drawn.height)
            if (
                MOST_OF_WIDTH * (drawn.width + margins) <= width
                and MOST_OF_HEIGHT * (drawn.height + margins) <= height
            ):
                return drawn
    raise RuntimeError(f"no mark fits {height}x{width} pixels")


def _draw(text: str, font: FreeTypeFont | ImageFont) -> Image.Image:
    """Text cropped to its letters."""
    from PIL import Image, ImageDraw

    spacing = max(1, int(getattr(font, "size", 10)) // 4)
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
