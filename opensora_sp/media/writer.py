"""Writing of outputs: H.264 in mp4, frame by frame, and PNG. A file appears whole or not at all.

PyAV and Pillow are imported inside the functions that need them, so that checking a request does
not load them. `media.output_frames` reads what is written here, the metadata too.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.base.errors import UserError
from opensora_sp.media.labels import FileLabel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

# BT.709's number in ITU-T H.273, as matrix, primaries and transfer. FFmpeg's numbers of ranges.
BT709 = 1
TV_RANGE = 1
FULL_RANGE = 2
_COMMENT = "comment"
_XMP = "XML:com.adobe.xmp"  # the keyword of PNG's text chunk for XMP
MAX_FPS = 1000
# These options make the same frames give the same bytes. x264's macroblock tree depends on the
# CPU's vector instructions and on uninitialised memory; cpu-independent uses its plain form. With
# several threads the result depends on their order and on the number of cores.
_REPEATABLE = {"threads": "1", "x264-params": "cpu-independent=1"}


def exact_rate(fps: int | float | Fraction) -> Fraction:
    """Frames per second as an exact fraction; 23.976, 29.97 and their like become n·1000/1001.

    Raises:
        UserError: `fps` is not a finite number above 0 and at most 1000.
    """
    if not math.isfinite(fps) or not 0 < fps <= MAX_FPS:
        raise UserError(
            f"frame rate {fps} is not possible: give a number above 0, at most {MAX_FPS}"
        )
    if isinstance(fps, float):
        nominal = round(fps * 1.001)
        if nominal and not fps.is_integer() and abs(fps * 1.001 - nominal) < 1e-3:
            return Fraction(nominal * 1000, 1001)
        # At least 1/1001, so that a tiny rate does not become 0.
        return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
    return Fraction(fps)


class VideoWriter:
    """Context manager that encodes frames to an mp4. The file appears when the block ends well.

    It writes H.264 in mp4 with the index in front, yuv420p, converted to and tagged as BT.709. An
    odd side is made even by repeating the last row or column. `lossless` writes RGB H.264: every
    frame reads back bit for bit and no side is padded, but few players show it. The same frames and
    settings give the same bytes on every machine.

    Args:
        path: the file. Its directory is created.
        fps: frames per second.
        height, width: of every frame, in pixels.
        metadata: written as JSON into the container's comment tag.
        label: says that the content was generated.
        codec: an FFmpeg encoder that takes yuv420p and crf.
        crf: constant rate factor from 0, the best, to 51. 17 is nearly transparent.
        lossless: see above. `codec` and `crf` are then not used.

    Raises:
        UserError: the frame rate is not possible, or the directory, the encoder or the disk fails.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: int | float | Fraction,
        height: int,
        width: int,
        metadata: Mapping[str, Any],
        codec: str = "libx264",
        crf: int = 17,
        lossless: bool = False,
        label: FileLabel | None = None,
    ) -> None:
        self.path = Path(path)
        self.frames_written = 0
        self._rate = exact_rate(fps)
        self._shape = (height, width, 3)
        self._codec = "libx264rgb" if lossless else codec
        self._crf = 0 if lossless else crf
        self._lossless = lossless
        self._comment = _to_json(metadata)
        self._label = label or FileLabel()
        self._stack = ExitStack()

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_output(self.path))
            with reported(self.path):
                self._open(temporary)
                stack.push(self._close)
                self._add_stream()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """Encode `[F, H, W, 3]` uint8 frames, a CPU tensor or an array; F may be 0.

        Raises:
            UserError: the disk is full or the encoder fails.
            ValueError: shape or dtype is not the video's.
        """
        array = _as_array(frames)
        if array.ndim != 4 or array.shape[1:] != self._shape or array.dtype.name != "uint8":
            raise ValueError(
                f"frames are uint8 [F, {', '.join(map(str, self._shape))}], "
                f"not {array.dtype.name} {list(array.shape)}"
            )
        with reported(self.path):
            for frame in array:
                self._encode(frame)

    def _open(self, temporary: Path) -> None:
        import av

        # Without the second flag FFmpeg drops keys that are not its own, and says nothing.
        flags = "+faststart+use_metadata_tags" if self._label.tags else "+faststart"
        self._container = av.open(str(temporary), "w", format="mp4", options={"movflags": flags})
        self._container.metadata[_COMMENT] = self._comment
        self._container.metadata.update(self._label.tags)
        self._temporary = temporary

    def _add_stream(self) -> None:
        height, width, _ = self._shape
        try:
            stream: Any = self._container.add_stream(
                self._codec, rate=self._rate, options={"crf": str(self._crf), **_REPEATABLE}
            )
        except ValueError as error:  # PyAV raises it for an encoder that it lacks
            raise UserError(
                f"PyAV has no encoder {self._codec!r} for mp4: pip install 'av>=17.0.1' "
                "brings libx264"
            ) from error
        stream.height, stream.width = height, width
        stream.pix_fmt = "rgb24"
        if not self._lossless:
            stream.height, stream.width = height + height % 2, width + width % 2
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = TV_RANGE
        self._stream = stream

    def _encode(self, frame: NDArray[np.uint8]) -> None:
        import av
        import numpy as np

        if not self._lossless:
            height, width, _ = frame.shape
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if not self._lossless:
            # Tags convert nothing. Without these arguments the matrix would be BT.601's.
            picture = picture.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
        picture.pts = self.frames_written
        picture.time_base = 1 / self._rate
        for packet in self._stream.encode(picture):
            self._container.mux(packet)
        self.frames_written += 1

    def _close(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._abandon()
            return
        try:
            if not self.frames_written:
                raise ValueError(f"no frame was written to {self.path}")
            with reported(self.path):
                for packet in self._stream.encode(None):
                    self._container.mux(packet)
                self._container.close()
                self._label.finish(self._temporary, "video/mp4")
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        # The file is removed next, so an error of closing it does not matter.
        with suppress(Exception):
            self._container.close()


def write_image(
    path: Path,
    frame: Tensor | NDArray[np.uint8],
    metadata: Mapping[str, Any],
    label: FileLabel | None = None,
) -> None:
    """Write one `[H, W, 3]` uint8 frame as PNG with `metadata` as JSON in a "comment" text chunk.

    label: says that the content was generated. The file appears whole or not at all.

    Raises:
        UserError: the directory or the disk does not allow it.
        ValueError: shape or dtype is not a frame's.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    array = _as_array(frame)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype.name != "uint8":
        raise ValueError(f"a frame is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    info = PngInfo()
    info.add_text(_COMMENT, _to_json(metadata))
    label = label or FileLabel()
    if label.picture_xmp is not None:
        info.add_itxt(_XMP, label.picture_xmp)
    with atomic_output(path) as temporary, reported(path):
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=info)
        label.finish(temporary, "image/png")


def probe_encoder(
    fps: int | float | Fraction, height: int, width: int, directory: Path | None = None
) -> None:
    """Check, with three frames of the real size, that a video can be encoded and read back.

    Args:
        fps, height, width: of the video that will be written.
        directory: where to try, by default the system's temporary directory. Nothing stays there.

    Raises:
        UserError: encoding or reading back fails.
    """
    import numpy as np

    ramp = np.linspace(0, 255, 3 * height * width).reshape(3, height, width)
    frames = np.repeat(ramp[..., None].astype(np.uint8), 3, axis=-1)  # [3, H, W, 3]
    if directory is not None:
        with reported(directory):
            directory.mkdir(parents=True, exist_ok=True)
    with (
        reported(directory or Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix=".opensora-sp-probe-", dir=directory) as folder,
    ):
        path = Path(folder) / "probe.mp4"
        with VideoWriter(path, fps=fps, height=height, width=width, metadata={}) as writer:
            writer.write(frames)
        found = _count_frames(path)
    if found != len(frames):
        raise UserError(
            f"the H.264 encoder does not work at {height}x{width}: {found} of {len(frames)} "
            "frames read back; install another build of PyAV (pip install av)"
        )


def _count_frames(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def _as_array(frames: Tensor | NDArray[np.uint8]) -> NDArray[Any]:
    # Checked by attribute, so that writing an array does not import torch.
    detach: Callable[[], Tensor] | None = getattr(frames, "detach", None)
    if detach is not None:
        return detach().cpu().numpy()
    import numpy as np

    return np.asarray(frames)


def _to_json(metadata: Mapping[str, Any]) -> str:
    # ASCII fits every tag format, and can express lone surrogates from a command line. Values that
    # JSON lacks become text, so that none of them can fail a finished video.
    return json.dumps(dict(metadata), ensure_ascii=True, default=str)
