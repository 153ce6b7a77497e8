"""Reading references: the reference's geometry, every odd kind of file, and clear refusals."""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from whole_reference import read_reference

from opensora_sp.base.errors import UserError
from opensora_sp.media import reader as references
from opensora_sp.media.reader import check_reference, fit_image, fit_video
from opensora_sp.media.writer import VideoWriter

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def levels(video: torch.Tensor) -> NDArray[np.int64]:
    """`[3, F, H, W]` in [-1, 1] back to grey levels `[F, H, W, 3]`."""
    return ((video + 1) * 127.5).round().long().permute(1, 2, 3, 0).numpy()


def write_video(
    path: Path,
    frames: NDArray[np.uint8],
    times: list[int] | None = None,
    time_base: Fraction = Fraction(1, 24),
    codec: str = "libx264rgb",
) -> None:
    """A bit-exact video; `times` in units of `time_base`."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=24, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        stream.codec_context.time_base = stream.time_base = time_base
        for index, each in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(each, format="rgb24")
            frame.pts, frame.time_base = times[index] if times else index, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbered(count: int) -> NDArray[np.uint8]:
    """Frames whose every pixel is 10 times the frame's index."""
    frames = np.zeros((count, 16, 16, 3), np.uint8)
    frames += (10 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    return frames


def numbers(path: Path, fps: float | None) -> list[int]:
    return [
        int(frame.mean()) // 10 for frame in levels(read_reference(path, 16, 16, fps=fps).video)
    ]


# --- geometry --------------------------------------------------------------------------------


def test_conformance_cases(suite_dir: Path) -> None:
    cases = load_file(suite_dir / "media" / "cases.safetensors")
    names = {key.split(".")[0] for key in cases}
    assert {name.rstrip("0123456789") for name in names} == {"image", "video"}
    for name in names:
        out = cases[f"{name}.out"]
        height, width = out.shape[-2:]
        if name.startswith("image"):
            error = (fit_image(cases[f"{name}.rgb"].numpy(), height, width) - out).abs()
            assert error.max() <= 2 / 255 + 1e-6, name
            assert (error > 1e-5).float().mean() <= 1e-3, name
        else:
            error = (fit_video(cases[f"{name}.frames"].numpy(), height, width) - out).abs()
            assert error.max() <= 1e-5, name


@pytest.mark.parametrize(
    ("extra", "image_offset", "video_offset"), [(1, 0, 0), (3, 2, 1), (5, 2, 2)]
)
def test_crop_of_an_odd_rest(extra: int, image_offset: int, video_offset: int) -> None:
    """Images round half to even, videos down; without scaling every pixel shows which."""
    for axis in (0, 1):
        size = [12, 12]
        size[axis] += extra
        picture = noise(*size, 3)
        for offset, fitted in (
            (image_offset, fit_image(picture, 12, 12)[:, None]),
            (video_offset, fit_video(picture[None], 12, 12)),
        ):
            cut = np.take(picture, range(offset, offset + 12), axis=axis)
            assert np.array_equal(levels(fitted)[0], cut)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 333), (2160, 3840)])
def test_any_size_fills_the_target(size: tuple[int, int]) -> None:
    picture = noise(*size, 3)
    image, video = fit_image(picture, 24, 32), fit_video(picture[None], 24, 32)
    assert image.shape == (3, 24, 32)
    assert video.shape == (3, 1, 24, 32)
    assert image.dtype == video.dtype == torch.float32
    assert -1 <= image.min() <= image.max() <= 1
    assert -1 <= video.min() <= video.max() <= 1
    if size == (1, 1):
        assert np.array_equal(levels(video)[0], np.broadcast_to(picture, (24, 32, 3)))


def test_a_thread_of_a_picture_is_refused_before_memory_is_asked_for() -> None:
    thread = np.zeros((1, 30_000, 3), np.uint8)
    for fit in (lambda: fit_image(thread, 720, 1280), lambda: fit_video(thread[None], 720, 1280)):
        with pytest.raises(UserError, match="1x30000 is too elongated to fill 720x1280"):
            fit()
    # 680 MB in float32, of a picture that is small itself.
    thread = np.zeros((1, 25_000, 3), np.uint8)
    for fit in (lambda: fit_image(thread, 48, 48), lambda: fit_video(thread[None], 48, 48)):
        with pytest.raises(UserError, match="1x25000 is too elongated to fill 48x48"):
            fit()


# --- images ----------------------------------------------------------------------------------


def two_halves(mode: str = "RGB") -> Image.Image:
    """Left red, right blue."""
    image = Image.new("RGB", (16, 16), RED)
    image.paste(BLUE, (8, 0, 16, 16))
    return image.convert(mode)


def upright(_: Path) -> Image.Image:
    return two_halves()


def palette(_: Path) -> Image.Image:
    return two_halves().quantize(4)


def transparent(_: Path) -> Image.Image:
    image = two_halves("RGBA")
    image.putalpha(0)
    return image


def inks(_: Path) -> Image.Image:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image.paste((255, 255, 0, 0), (8, 0, 16, 16))
    return image


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (upright, "png"),
        (upright, "bmp"),
        (upright, "webp"),
        (upright, "tga"),  # not among Pillow's formats here: read by PyAV
        (palette, "png"),
        (palette, "gif"),
        (transparent, "png"),
        (inks, "tiff"),
    ],
)
def test_image_modes(tmp_path: Path, make: Callable[[Path], Image.Image], suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    make(path).save(path, **options)
    check_reference(path)
    reference = read_reference(str(path), 16, 16)
    assert reference.is_image
    assert reference.video.shape == (3, 1, 16, 16)
    assert np.array_equal(levels(reference.video)[0], np.asarray(two_halves()))


def test_what_counts_is_the_content_not_the_name(tmp_path: Path) -> None:
    two_halves().save(tmp_path / "picture.mp4", format="PNG")
    assert read_reference(tmp_path / "picture.mp4", 16, 16).is_image
    write_video(tmp_path / "film.mp4", numbered(3))
    (tmp_path / "film.mp4").rename(tmp_path / "film.png")
    assert numbers(tmp_path / "film.png", None) == [0, 1, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    corners = Image.new("RGB", (16, 16), (0, 0, 0))
    corners.paste(RED, (0, 0, 8, 8))
    corners.paste(GREEN, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners.save(tmp_path / "photo.png", exif=exif)
    picture = levels(read_reference(tmp_path / "photo.png", 16, 16).video)[0]
    quarters = [tuple(picture[y, x]) for y in (4, 12) for x in (4, 12)]
    # Where the stored top-left and top-right quarters are to be seen, by the EXIF standard.
    red, green = {
        1: (0, 1), 2: (1, 0), 3: (3, 2), 4: (2, 3), 5: (0, 2), 6: (1, 3), 7: (3, 1), 8: (2, 0),
    }[orientation]  # fmt: skip
    assert quarters[red] == RED
    assert quarters[green] == GREEN


def test_grey_of_8_and_16_bits(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(ramp * 256 + 255 - ramp).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        picture = levels(read_reference(tmp_path / name, 16, 16).video)[0]
        assert np.array_equal(picture, np.repeat(ramp[..., None], 3, -1)), name


def test_animations_are_videos(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"moving.{suffix}"
        options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(
            path, save_all=True, append_images=frames[1:], duration=[100, 300, 100], **options
        )
        check_reference(path)
        reference = read_reference(path, 16, 16)
        assert not reference.is_image
        assert [tuple(f[5, 5]) for f in levels(reference.video)] == [RED, GREEN, BLUE], suffix
        steady = read_reference(path, 16, 16, fps=10)
        shown = [tuple(f[5, 5]) for f in levels(steady.video)]
        assert shown == [RED, GREEN, GREEN, GREEN, BLUE], suffix


# --- videos ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264rgb"), ("mkv", "libx264rgb")])
def test_video_frames_are_taken_as_they_are(tmp_path: Path, suffix: str, codec: str) -> None:
    frames = noise(5, 37, 51, 3)  # odd sides
    path = tmp_path / f"video.{suffix}"
    write_video(path, frames, codec=codec)
    check_reference(path)
    reference = read_reference(path, 24, 32)
    assert not reference.is_image
    assert torch.equal(reference.video, fit_video(frames, 24, 32))


def test_what_this_program_writes_it_reads(tmp_path: Path) -> None:
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    frames[:] = (200, 30, 90)
    with VideoWriter(tmp_path / "v.mp4", fps=24, height=32, width=48, metadata={}) as writer:
        writer.write(frames)
    assert np.abs(levels(read_reference(tmp_path / "v.mp4", 32, 48).video) - frames).max() <= 3


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_tag(tmp_path: Path, turns: int) -> None:
    frames = noise(2, 24, 32, 3)
    path = tmp_path / "phone.mp4"
    write_video(path, frames)
    # The track header's matrix maps (x, y) to (a x + c y, b x + d y) before it is moved.
    a, b, c, d = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}[turns]
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">i", content, start) == (1 << 16,)
    content[start : start + 36] = matrix
    path.write_bytes(content)
    turned = np.rot90(frames, -turns, axes=(1, 2))  # clockwise: x axis to y axis
    reference = read_reference(path, *turned.shape[1:3])
    assert np.array_equal(levels(reference.video), turned)


def test_resampling_by_time(tmp_path: Path) -> None:
    even, uneven, coarse = (tmp_path / name for name in ("even.mp4", "uneven.mp4", "coarse.mkv"))
    write_video(even, numbered(12))
    write_video(uneven, numbered(5), times=[3, 4, 8, 9, 14])  # 24ths of a second
    write_video(coarse, numbered(12))  # Matroska rounds times to milliseconds
    assert numbers(even, None) == list(range(12))
    assert numbers(uneven, None) == list(range(5))
    assert numbers(even, 24) == numbers(coarse, 24) == list(range(12))
    assert numbers(even, 12) == [0, 2, 4, 6, 8, 10]
    assert numbers(even, 48) == [index // 2 for index in range(24)]
    assert numbers(even, 0.5) == [0]
    assert numbers(uneven, 24)[:12] == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 4]
    with pytest.raises(UserError, match="frame rate 0"):
        read_reference(even, 16, 16, fps=0)


# --- refusals --------------------------------------------------------------------------------


def silent_film(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        for index in range(5):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16000, index * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def cut(path: Path, share: float) -> None:
    whole = path.with_name("whole.mp4")
    with VideoWriter(whole, fps=24, height=64, width=64, metadata={}) as writer:
        writer.write(noise(20, 64, 64, 3))
    content = whole.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def playlist(path: Path) -> None:
    write_video(path.with_name("part.mp4"), numbered(3))
    path.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path.with_name('part.mp4').as_uri()}\n"
        "#EXT-X-ENDLIST\n"
    )


def concat(path: Path) -> None:
    write_video(path.with_name("part.mp4"), numbered(3))
    path.write_text("ffconcat version 1.0\nfile part.mp4\n")


def half_a_picture(path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(data, format="PNG")
    path.write_bytes(data.getvalue()[:3000])


def measurements(path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(path)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.png": (lambda path: None, "No such file"),
    "folder": (Path.mkdir, "is not a file"),
    "pipe": (os.mkfifo, "is not a file"),
    "empty.mp4": (Path.touch, "is empty"),
    "text.txt": (lambda path: path.write_text("words\n" * 99), "not a kind that is read .text"),
    "text.mp4": (lambda path: path.write_text("words\n" * 99), "not a kind that is read .text"),
    "random.mp4": (lambda path: path.write_bytes(noise(9999).tobytes()), "neither an image nor"),
    "sound.mp4": (silent_film, "no picture in it"),
    "frameless.y4m": (lambda path: path.write_text("YUV4MPEG2 W16 H16 F24:1\n"), "has no frame"),
    "header.mp4": (lambda path: cut(path, 0.01), "reference .*header.mp4"),
    "list.m3u8": (playlist, "not a kind that is read .a playlist"),
    "list.ffconcat": (concat, "not a kind that is read .a playlist"),
    "half.png": (half_a_picture, "is damaged"),
    "float.tiff": (measurements, "is damaged .32-bit pixels"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, said = UNUSABLE[name]
    path = tmp_path / name
    make(path)
    for use in (lambda: check_reference(path), lambda: read_reference(path, 16, 16)):
        with pytest.raises(UserError, match=said) as caught:
            use()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_video_cut_in_the_middle_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    cut(tmp_path / "cut.mp4", 0.6)
    for use in (check_reference, lambda path: read_reference(path, 16, 16)):
        with pytest.raises(UserError, match=r"cut\.mp4 is damaged: .* cut off, \d+ of \d+ bytes"):
            use(tmp_path / "cut.mp4")


def test_a_film_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "film.mp4", numbered(12))
    monkeypatch.setattr(references, "MAX_REFERENCE_BYTES", 12 * 3 * 16 * 16 * 4)
    assert len(numbers(tmp_path / "film.mp4", None)) == 12
    monkeypatch.setattr(references, "MAX_REFERENCE_BYTES", 11 * 3 * 16 * 16 * 4)
    with pytest.raises(UserError, match="is to give 12 frames, more than the 11 that fit at 16x16"):
        read_reference(tmp_path / "film.mp4", 16, 16)


def test_checking_imports_no_torch(tmp_path: Path) -> None:
    two_halves().save(tmp_path / "image.png")
    write_video(tmp_path / "video.mp4", numbered(2))
    code = (
        "import sys\nfrom opensora_sp.media.reader import check_reference\n"
        "for path in sys.argv[1:]: check_reference(path)\n"
        "sys.exit('torch' in sys.modules)"
    )
    paths = [str(path) for path in tmp_path.iterdir()]
    assert len(paths) == 2
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
