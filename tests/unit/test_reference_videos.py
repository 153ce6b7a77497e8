"""Which of a file's streams is read, in what shape, turned how, and what is told of it."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from whole_reference import read_reference

from opensora_sp.base.errors import UserError
from opensora_sp.media.reader import check_reference
from opensora_sp.request.settings import build_job, parse_command_line, resolve

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (235, 235, 235)
COLOURS = (RED, GREEN, BLUE, WHITE)


def quadrants(height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    picture = np.zeros((height, width, 3), np.uint8)
    for place, colour in enumerate(COLOURS):
        top, left = place // 2 * (height // 2), place % 2 * (width // 2)
        picture[top : top + height // 2, left : left + width // 2] = colour
    return picture


def seen(path: Path, height: int = 64, width: int = 96) -> list[tuple[int, ...]]:
    video = read_reference(path, height, width).video[:, -1]
    levels = ((video + 1) * 127.5).round().int()
    places = [(y, x) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    return [tuple(levels[:, y, x].tolist()) for y, x in places]


def near(found: list[tuple[int, ...]], wanted: Any = COLOURS) -> bool:
    return bool(np.abs(np.array(found) - np.array(wanted)).max() <= 6)


def add_film(
    container: Any, picture: NDArray[np.uint8], rate: int = 24, codec: str = "libx264"
) -> Any:
    stream: Any = container.add_stream(codec, rate=rate)
    stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
    return stream


def fill(container: Any, stream: Any, picture: NDArray[np.uint8], frames: int = 5) -> None:
    for index in range(frames):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = index
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def add_cover(container: Any, side: int = 400) -> Any:
    cover: Any = container.add_stream("mjpeg", rate=1)
    cover.height = cover.width = side
    cover.pix_fmt = "yuvj420p"
    cover.disposition = Disposition.attached_pic
    return cover


def add_sound(container: Any, codec: str) -> Any:
    return container.add_stream(codec, rate=16000, layout="mono")


def fill_sound(container: Any, stream: Any) -> None:
    size = stream.codec_context.frame_size or 1024
    kind = stream.codec_context.format.name
    dtype: Any = {"s16": np.int16, "s32": np.int32}.get(kind.rstrip("p"), np.float32)
    for index in range(5):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, size), dtype), format=kind, layout="mono")
        frame.sample_rate, frame.pts = 16000, index * size
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def attachment(path: Path, sound: str | None = None, film: bool = True) -> None:
    """A Matroska file with a picture attached, which FFmpeg shows as a stream."""
    import io

    data = io.BytesIO()
    Image.new("RGB", (400, 400), (255, 0, 255)).save(data, format="JPEG")
    with av.open(str(path), "w") as container:
        stream = add_film(container, quadrants()) if film else add_sound(container, "aac")
        container.add_attachment("cover.jpg", "image/jpeg", data.getvalue())
        fill(container, stream, quadrants()) if film else fill_sound(container, stream)


MAGENTA = np.full((400, 400, 3), (255, 0, 255), np.uint8)


def covered(path: Path, *, film: bool, sound: str | None) -> None:
    container_format = "mp4" if path.suffix in (".m4v", ".m4a") else None
    with av.open(str(path), "w", format=container_format) as container:
        voice = add_sound(container, sound) if sound else None
        cover = add_cover(container)
        stream = add_film(container, quadrants()) if film else None
        fill(container, cover, MAGENTA, frames=1)
        if stream:
            fill(container, stream, quadrants())
        if voice:
            fill_sound(container, voice)


@pytest.mark.parametrize("name", ["a.mp4", "b.m4v", "d.mkv", "e.mp4"])
def test_the_film_is_read_and_not_its_cover(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("mkv"):
        attachment(path)
    else:
        covered(path, film=True, sound="aac" if name == "e.mp4" else None)
    with av.open(str(path)) as made:
        assert len(made.streams.video) == 2
    reference = read_reference(path, 64, 96)
    assert reference.video.shape[1] == 5
    assert near(seen(path))
    assert check_reference(path) == []


@pytest.mark.parametrize("name", ["a.m4a", "b.mp4", "c.mp3", "d.mka", "e.flac"])
def test_sound_with_a_cover_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("mka"):
        attachment(path, film=False)
    else:
        sounds = {"mp3": "libmp3lame", "flac": "flac"}
        covered(path, film=False, sound=sounds.get(name.split(".")[1], "aac"))
    with av.open(str(path)) as made:
        assert len(made.streams.video) == 1
    for use in (check_reference, lambda path: read_reference(path, 16, 16)):
        with pytest.raises(UserError, match="has no video, only cover art: give an image or"):
            use(path)


def test_of_several_videos_one_is_chosen_and_told(tmp_path: Path) -> None:
    small, other = np.full((32, 48, 3), 90, np.uint8), np.full((96, 144, 3), 90, np.uint8)
    for name, marked, wanted in (
        ("large.mkv", None, 1),  # both are default ones: the largest
        ("default.mkv", 1, 1),  # the default one, though another is larger
        ("first.mkv", 0, 0),
    ):
        path = tmp_path / name
        pictures = [small, quadrants()] if marked is None else [quadrants(), quadrants()]
        if marked is not None:
            pictures[1 - marked] = other
        with av.open(str(path), "w") as container:
            streams = [add_film(container, each) for each in pictures]
            for number, stream in enumerate(streams):
                chosen = marked in (None, number)
                stream.disposition = Disposition.default if chosen else Disposition.dub
            for stream, picture in zip(streams, pictures, strict=True):
                fill(container, stream, picture)
        assert near(seen(path)), name
        assert check_reference(path) == [
            f"reference {path} has 2 videos in it; stream {wanted} (96x64) is used"
        ]


# --- pixels that are not square ----------------------------------------------------------------


def write_shaped(path: Path, picture: NDArray[np.uint8], shape: Fraction) -> None:
    with av.open(str(path), "w") as container:
        stream = add_film(container, picture)
        stream.sample_aspect_ratio = shape
        stream.codec_context.sample_aspect_ratio = shape
        fill(container, stream, picture)


def disc(shape: Fraction, height: int = 96, width: int = 144) -> NDArray[np.uint8]:
    """A picture with a disc of 72x72, as seen; stored with pixels of this shape."""
    image = Image.new("RGB", (width, height), (20, 20, 20))
    left, top = (width - 72) // 2, (height - 72) // 2
    ImageDraw.Draw(image).ellipse((left, top, left + 71, top + 71), fill=(235, 235, 235))
    stored = (round(width / shape), height) if shape > 1 else (width, round(height * shape))
    return np.asarray(image.resize(stored, Image.Resampling.BICUBIC))


def sides(path: Path, height: int = 96, width: int = 144) -> tuple[int, int]:
    bright = read_reference(path, height, width).video[:, 0].mean(dim=0) > 0
    return int(bright.any(dim=1).sum()), int(bright.any(dim=0).sum())


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize(
    "shape", [Fraction(2), Fraction(1, 2), Fraction(4, 3), Fraction(9, 8), Fraction(1)]
)
def test_a_disc_stays_round(tmp_path: Path, suffix: str, shape: Fraction) -> None:
    path = tmp_path / f"x.{suffix}"
    write_shaped(path, disc(shape), shape)
    assert sides(path) == pytest.approx((72, 72), abs=2)


def test_a_shape_told_by_the_stream_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.mkv"
    picture = disc(Fraction(16, 15), width=160)
    with av.open(str(path), "w", format="h264") as container:
        stream = add_film(container, picture)
        stream.codec_context.sample_aspect_ratio = Fraction(16, 15)
        fill(container, stream, picture)
    assert sides(path, 96, 160) == pytest.approx((72, 72), abs=2)


# --- turned and mirrored -----------------------------------------------------------------------


def turn(path: Path, a: int, b: int, c: int, d: int) -> None:
    """The track header's matrix: (x, y) to (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">i", content, start)[0] != 0
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    content[start : start + 36] = matrix
    path.write_bytes(content)


TURNS = {
    "upright": (1, 0, 0, 1),
    "right": (0, 1, -1, 0),
    "over": (-1, 0, 0, -1),
    "left": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "over the diagonal": (0, 1, 1, 0),
    "over the other diagonal": (0, -1, -1, 0),
}


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("shape", [Fraction(1), Fraction(2), Fraction(1, 2)])
def test_turned_mirrored_and_stretched(tmp_path: Path, name: str, shape: Fraction) -> None:
    a, b, c, d = TURNS[name]
    path = tmp_path / "x.mp4"
    write_shaped(path, quadrants(), shape)
    turn(path, a, b, c, d)
    wanted = {}
    for place, colour in enumerate(COLOURS):
        x, y = place % 2 * 2 - 1, place // 2 * 2 - 1
        wanted[(b * x + d * y, a * x + c * y)] = colour
    across, down = 96 * max(shape, Fraction(1)), 64 / min(shape, Fraction(1))
    height, width = (across, down) if a == 0 else (down, across)
    found = seen(path, int(height), int(width))
    assert near(found, [wanted[key] for key in sorted(wanted)])


# --- rates -------------------------------------------------------------------------------------


def write_rate(path: Path, rate: int, frames: int = 8) -> None:
    with av.open(str(path), "w") as container:
        fill(container, add_film(container, quadrants(), rate), quadrants(), frames)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_a_rate_that_is_not_24_is_told(tmp_path: Path, suffix: str) -> None:
    for rate, said in (
        (60, "2.5 times slower"),
        (30, "1.2 times slower"),
        (12, "2 times faster"),
        (24, None),
        (25, None),
    ):
        path = tmp_path / f"{rate}.{suffix}"
        write_rate(path, rate)
        notes = check_reference(path)
        assert check_reference(path, fps=24) == []
        if said is None:
            assert notes == []
        else:
            (note,) = notes
            assert f"has {rate} frames a second" in note
            assert said in note
            assert "--reference-fps 24" in note


def test_the_rate_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    for suffix, milliseconds, count in (("gif", 100, 1), ("png", 100, 1), ("gif", 40, 0)):
        path = tmp_path / f"{milliseconds}.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds)
        assert len(check_reference(path)) == count, suffix


def test_the_notes_are_the_jobs_and_each_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "60.mp4"
    write_rate(path, 60)
    line = ["--prompt", "a", "b", "--reference-path", str(path), str(path)]
    line += ["--mask-strategy", "0", "0", "--save-dir", str(tmp_path / "out")]
    job = build_job(resolve(parse_command_line(line)))
    assert len([note for note in job.notes if str(path) in note]) == 1
    job = build_job(resolve(parse_command_line([*line, "--reference-fps", "24"])))
    assert not [note for note in job.notes if "frames a second" in note]
