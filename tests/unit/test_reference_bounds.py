"""Too much is refused by what headers tell; damaged pictures end in one line, never in a crash."""

import contextlib
import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from whole_reference import read_reference

from opensora_sp.base.errors import UserError
from opensora_sp.media import bounds as reference_bounds
from opensora_sp.media import decoding
from opensora_sp.media.bounds import BoundedReads
from opensora_sp.media.reader import check_reference


def gif(
    width: int, height: int, frames: int, *, frame: tuple[int, int, int, int] | None = None
) -> bytes:
    """Frames of one colour, a few bytes each; `frame` is left, top, width, height."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"\x21\xf9\x04\0\x0a\0\0\0"
    picture = b"\x2c" + struct.pack("<HHHHB", *(frame or (0, 0, 1, 1)), 0) + b"\x02\x02\x44\x01\0"
    return head + (control + picture) * frames + b"\x3b"


def png_head(width: int, height: int, frames: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    data = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )
    if frames:
        data += chunk(b"acTL", struct.pack(">II", frames, 0))
        data += chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, width, height, 0, 0, 1, 24, 0, 0))
    return data + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def write_video(
    path: Path, frames: NDArray[np.uint8], times: list[int] | None = None, **kind: Any
) -> None:
    """times: in 24ths of a second."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(kind.get("codec", "libx264"), rate=24)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for index, each in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(each, format="rgb24")
            frame.pts, frame.time_base = times[index] if times else index, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


HUGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "wide.gif": (lambda: gif(13_300, 13_300, 1), r"13300x13300 pixels, but at most 36 million"),
    "two.gif": (lambda: gif(13_300, 13_300, 2), r"13300x13300 pixels"),
    "grown.gif": (lambda: gif(9, 9, 2, frame=(60_000, 60_000, 999, 999)), r"too many pixels"),
    "long.gif": (lambda: gif(16, 16, 100_000), r"20001 frames of 16x16, but at most 20000"),
    "work.gif": (lambda: gif(5000, 5000, 1000), r"1000 frames of 5000x5000, but at most 343"),
    "wide.png": (lambda: png_head(13_000, 13_000), r"13000x13000 pixels, but at most 134 million"),
    "wider.png": (lambda: png_head(60_000, 60_000), r"too many pixels"),
    "long.png": (lambda: png_head(64, 64, 50_000), r"50000 frames of 64x64, but at most 20000"),
    "wide_moving.png": (lambda: png_head(8000, 8000, 3), r"8000x8000 pixels"),
}


@pytest.mark.parametrize("name", HUGE)
def test_too_large_pictures_are_refused_before_a_pixel_is_decoded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import GifImagePlugin, ImageFile

    def decoded(*_: Any) -> None:
        raise AssertionError("was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "seek", decoded)
    make, said = HUGE[name]
    (tmp_path / name).write_bytes(make())
    for use in (check_reference, lambda path: read_reference(path, 16, 16)):
        with pytest.raises(UserError, match=said) as caught:
            use(tmp_path / name)
        assert "\n" not in str(caught.value)


def patched(path: Path, box: bytes, offset: int, value: bytes) -> None:
    """Overwrite bytes in the content of an mp4's box."""
    data = bytearray(path.read_bytes())
    at = data.index(box) + 4 + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)


def test_a_video_of_days_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    write_video(path, noise(3, 64, 64, 3))
    patched(path, b"stts", 12, struct.pack(">I", 2**31 - 1))
    patched(path, b"mdhd", 16, struct.pack(">I", 2**32 - 1))
    with pytest.raises(UserError, match=r"lasts \d+ s, but at most 86400 s are read"):
        check_reference(path)
    with pytest.raises(UserError, match=r"lasts \d+ s, but at most 86400 s are read"):
        read_reference(path, 16, 16, fps=24)


def test_resampling_is_bounded_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = noise(2, 64, 64, 3)
    for name, times in (("a.mp4", [0, 655 * 24]), ("b.mkv", [0, 655 * 24]), ("c.mov", [0, 9000])):
        path = tmp_path / name
        write_video(path, two, times)
        check_reference(path)
        assert check_reference(path, fps=24) == []
        monkeypatch.setattr(decoding, "_decoded", lambda *_: pytest.fail("was decoded"))
        with pytest.raises(UserError, match=r"frames at --reference-fps 1000, but at most"):
            check_reference(path, fps=1000)
        with pytest.raises(UserError, match="more than 100000 frames at the rate asked for"):
            read_reference(path, 16, 16, fps=1000)
        monkeypatch.undo()


def test_a_film_beyond_the_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "b.mkv"):
        write_video(tmp_path / name, noise(24, 64, 64, 3))
        check_reference(tmp_path / name)
        monkeypatch.setattr(reference_bounds, "MOST_VIDEO_PIXELS", 20 * 64 * 64)
        with pytest.raises(UserError, match=r"24 frames of 64x64, but at most 20 of this size"):
            check_reference(tmp_path / name)
        monkeypatch.undo()


MEASURED = """
import sys
from opensora_sp.benchmark.memory_meter import peak_host_bytes
from opensora_sp.base.errors import UserError
from opensora_sp.media.reader import check_reference
import av, numpy, PIL.Image
before = peak_host_bytes()  # of this process alone, unlike ru_maxrss
try:
    check_reference(sys.argv[1])
except UserError as error:
    print(error)
print((peak_host_bytes() - before) // 2**20)
"""


@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", "mp4"), ("mpeg4", "mkv"), ("ffv1", "mkv")]
)
def test_a_frame_too_large_takes_no_memory(tmp_path: Path, codec: str, suffix: str) -> None:
    """Of 8000x8000, which FFmpeg would decode while it opens the file."""
    path = tmp_path / f"x.{suffix}"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=24, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 8000, 8000, "yuv420p"
        frame = av.VideoFrame(8000, 8000, "yuv420p")
        for plane in frame.planes:
            plane.update(b"\x80" * plane.buffer_size)
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, timeout=300
    )
    said, megabytes = done.stdout.splitlines()[0], int(done.stdout.splitlines()[-1])
    assert re.search("8000x8000 pixels, but at most 36 million|frames of over 36 million", said), (
        said
    )
    assert megabytes < 80, "a frame was decoded: it takes 96 MB"


# --- cut off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "m4v"])
def test_a_cut_video_is_refused_by_its_headers(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole.{suffix}"
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    options = {} if suffix in ("mkv", "webm") else {"movflags": "faststart"}
    with av.open(str(whole), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=24)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for each in noise(20, 64, 64, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode(None))
    check_reference(whole)
    data = whole.read_bytes()
    for share in (0.5, 0.9, 0.99):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError, match=r"cut off, \d+ of \d+ bytes are there"):
            check_reference(path)
    (tmp_path / f"more.{suffix}").write_bytes(data + b"rubbish behind it")
    check_reference(tmp_path / f"more.{suffix}")


def test_a_matroska_header_that_ends_behind_any_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(b"\x1a\x45\xdf\xa3" + b"\x01" + b"\xfe" * 7 + bytes(100))
    with pytest.raises(UserError, match=r"cut off, 112 of 71\d{15} bytes are there"):
        check_reference(path)


def test_no_read_asks_for_more_than_the_file_has(tmp_path: Path) -> None:
    asked: list[int] = []

    class Seen(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(-1 if size is None else size)
            return super().read(size)

    file = BoundedReads(Seen(bytes(range(100))))
    assert file.read(10) == bytes(range(10))
    assert file.seek(60) == file.tell() == 60
    assert file.read(1 << 31) == bytes(range(60, 100))
    assert file.read(1 << 31) == b""
    file.seek(98)
    assert file.read() == b"bc"
    assert max(asked) == 40
    assert min(asked) >= 0


def test_ffmpeg_reads_through_that_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Watched(BoundedReads):
        def read(self, size: int = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    monkeypatch.setattr(decoding, "BoundedReads", Watched)
    # Found by fuzzing: FFmpeg asks for 1.3 GB of these 1,940 bytes.
    path = Path(__file__).parents[1] / "data" / "found" / "large_read.avif"
    with pytest.raises(UserError, match="large_read"):
        check_reference(path)
    assert max(asked) > 1 << 30


def animation(kind: str) -> bytes:
    data = io.BytesIO()
    frames = [Image.fromarray(each) for each in noise(4, 24, 24, 3) // 64 * 64]
    frames[0].save(data, format=kind, save_all=True, append_images=frames[1:], duration=40)
    return data.getvalue()


def test_a_gif_cut_anywhere_is_one_line(tmp_path: Path) -> None:
    whole, path = animation("GIF"), tmp_path / "cut.gif"
    refused = 0
    for length in range(1, len(whole), 5):
        path.write_bytes(whole[:length])
        with contextlib.suppress(UserError):
            check_reference(path)
            read_reference(path, 16, 16)
            continue
        refused += 1
    assert refused > len(range(1, len(whole), 5)) * 0.9


def still(kind: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(noise(24, 24, 3)).save(data, format=kind)
    return data.getvalue()


def film(suffix: str) -> bytes:
    data = io.BytesIO()
    with av.open(data, "w", format={"mkv": "matroska"}.get(suffix, suffix)) as container:
        stream: Any = container.add_stream("mpeg4", rate=24)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for each in noise(3, 32, 32, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode(None))
    return data.getvalue()


MUTATED: dict[str, tuple[Callable[[], bytes], int]] = {
    "GIF": (lambda: animation("GIF"), 800),
    "moving PNG": (lambda: animation("PNG"), 150),
    "moving WebP": (lambda: animation("WEBP"), 150),
    "PNG": (lambda: still("PNG"), 200),
    "JPEG": (lambda: still("JPEG"), 200),
    "WebP": (lambda: still("WEBP"), 200),
    "TIFF": (lambda: still("TIFF"), 200),
    "BMP": (lambda: still("BMP"), 200),
    "small GIF": (lambda: gif(9, 9, 3), 300),
    "mp4": (lambda: film("mp4"), 150),
    "mkv": (lambda: film("mkv"), 150),
}  # fmt: skip


@pytest.mark.parametrize("kind", MUTATED)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_mutations_end_in_one_line_or_a_picture(tmp_path: Path, kind: str) -> None:
    make, count = MUTATED[kind]
    whole, path = make(), tmp_path / "x"
    random = np.random.default_rng(zlib.crc32(kind.encode()))
    said = []
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            # Headers matter most.
            at = int(len(data) * random.random() ** 2)
            data[at] = random.integers(0, 256)
        if random.random() < 0.25:
            del data[random.integers(1, len(data)) :]
        path.write_bytes(data)
        try:
            check_reference(path)
            read_reference(path, 16, 16)
        except UserError as error:
            said.append(str(error))
    assert said
    assert not [line for line in said if "\n" in line]
