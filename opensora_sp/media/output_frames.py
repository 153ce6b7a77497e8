"""The frames of finished outputs, one after the other, at their own size and rate.

For comparisons: nothing is scaled or resampled. Files are opened, bounded and converted to sRGB as
references are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.media.decoding import SourceFrames, opened
from opensora_sp.media.fetch import open_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

Kind = Literal["video", "picture"]

# Pictures that keep every pixel, by the first bytes of their files: PNG, BMP, TIFF, PNM.
_EXACT_PICTURES = (b"\x89PNG", b"BM", b"II*\x00", b"MM\x00*", b"P5", b"P6")
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp", "lerc", "jpeg2000")
_EXACT_ANIMATIONS = (b"\x89PNG",)  # not GIF, which has at most 256 colours
_EXACT_CODECS = ("ffv1", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "png", "qtrle")
_MOST_SETTINGS = 1 << 20  # characters of the JSON that this program writes into its outputs


@dataclass(frozen=True)
class OutputFrames:
    """An open output.

    kind: an animation is a video. encoding: the codec and pixel format of a video; of others the
    ending of the name. exact: whether the file keeps every pixel; H.264 in RGB counts, which is
    what `--lossless` writes. rate: frames per second, None where unknown. announced: the number of
    frames by the header, None where it says none. settings: what this program wrote into the file,
    None for files of others. notes: what a person should know, a sentence each. frames: uint8
    [H, W, 3] each, to be taken once; raises UserError for a damaged file.
    """

    kind: Kind
    encoding: str
    exact: bool
    rate: Fraction | None
    announced: int | None
    settings: dict[str, Any] | None
    notes: tuple[str, ...]
    frames: Iterator[NDArray[np.uint8]]


@contextmanager
def open_output_frames(path: Path) -> Iterator[OutputFrames]:
    """Open a picture, an animation or a video of this machine.

    Raises:
        UserError: one line that says why this file cannot be read.
    """
    notes: list[str] = []
    with ExitStack() as stack:
        with _without_role():
            file = stack.enter_context(open_file(path))
            start = file.read(8)
            file.seek(0)
            source = stack.enter_context(opened(file, path, notes))
        said = tuple(f"{path} {note}" for note in dict.fromkeys(notes))
        if isinstance(source, SourceFrames):
            yield _video(source, path, start, said)
        else:
            yield _picture(source, path, start, said)


def _picture(image: Image, path: Path, start: bytes, notes: tuple[str, ...]) -> OutputFrames:
    import numpy as np

    return OutputFrames(
        kind="picture",
        encoding=_ending(path),
        exact=start.startswith(_EXACT_PICTURES)
        and image.info.get("compression") not in _LOSSY_IN_TIFF,
        rate=None,
        announced=1,
        settings=_settings(image.info.get("comment")),
        notes=notes,
        frames=iter([np.asarray(image)]),
    )


def _video(source: SourceFrames, path: Path, start: bytes, notes: tuple[str, ...]) -> OutputFrames:
    encoding, exact = _ending(path), start.startswith(_EXACT_ANIMATIONS)
    announced, settings = None, None
    if source.video_stream is not None:
        container, stream = source.video_stream
        codec = stream.codec_context
        encoding = f"{codec.name} {codec.pix_fmt or ''}".strip()
        exact = codec.name in _EXACT_CODECS or (codec.name == "h264" and codec.pix_fmt == "gbrp")
        announced = stream.frames or None
        settings = _settings(container.metadata.get("comment"))
    return OutputFrames(
        kind="video",
        encoding=encoding,
        exact=exact,
        rate=source.rate,
        announced=announced,
        settings=settings,
        notes=notes,
        frames=_pictures(source),
    )


def _ending(path: Path) -> str:
    return path.suffix[1:].lower() or "a picture"


def _pictures(source: SourceFrames) -> Iterator[NDArray[np.uint8]]:
    with _without_role():
        for frame in source.frames():
            yield frame.picture


def _settings(comment: object) -> dict[str, Any] | None:
    """The settings in a file's comment; None where it is no object of JSON."""
    if not isinstance(comment, str) or len(comment) > _MOST_SETTINGS:
        return None
    try:
        found = parse_json(comment)
    except NotJson:
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _without_role() -> Iterator[None]:
    """Errors of reading call every file a reference; here a file is called by its name alone."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("reference ", "", 1)) from error
