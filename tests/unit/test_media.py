"""Writing videos and images: what is read back is what was given, and no half file ever shows."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from written import settings_in

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import UserError
from opensora_sp.media import writer as media
from opensora_sp.media.output_frames import open_output_frames
from opensora_sp.media.pixels import to_bytes
from opensora_sp.media.writer import (
    VideoWriter,
    exact_rate,
    probe_encoder,
    write_image,
)

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255)]
SETTINGS = {"prompt": 'a "café" 一只猫 \udcff\n\0', "seed": 42, "size": [240, 426], "crf": 0.5}


def read_frames(path: Path) -> NDArray[np.uint8]:
    """The frames as BT.709 defines them, whatever the reader makes of the tags."""
    bt709 = {"src_colorspace": "ITU709", "src_color_range": "MPEG", "dst_color_range": "JPEG"}
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            known: Any = bt709 if frame.format.name.startswith("yuv") else {}
            frames.append(frame.to_ndarray(format="rgb24", **known))
    return np.stack(frames).astype(np.uint8)


def colour_bars(count: int, height: int, width: int) -> NDArray[np.uint8]:
    bars = np.zeros((count, height, width, 3), np.uint8)
    for index, colour in enumerate(COLOURS):
        bars[:, :, index * width // len(COLOURS) : (index + 1) * width // len(COLOURS)] = colour
    return bars


def noise(count: int, height: int, width: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, height, width, 3)).astype(np.uint8)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Every write beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("fps", "rate", "height", "width"),
    [
        (24, Fraction(24), 90, 160),
        (23.976, Fraction(24000, 1001), 91, 161),
        (Fraction(25, 2), Fraction(25, 2), 64, 97),
    ],
)
def test_colours_rate_and_length_survive(
    tmp_path: Path, fps: Any, rate: Fraction, height: int, width: int
) -> None:
    bars = colour_bars(7, height, width)
    path = tmp_path / "made" / "bars.mp4"
    with VideoWriter(path, fps=fps, height=height, width=width, metadata={}) as writer:
        writer.write(torch.from_numpy(bars[:5]))
        writer.write(bars[5:])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert stream.average_rate == rate
        assert context.pix_fmt == "yuv420p"
        assert stream.duration is not None
        assert stream.time_base is not None
        assert abs(stream.duration * stream.time_base - 7 / rate) < Fraction(1, 1000)
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert tags == (1, 1, 1)  # BT.709
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([float(i / rate) for i in range(7)], abs=1e-4)
    frames = read_frames(path).astype(int)
    assert frames.shape == (7, height + height % 2, width + width % 2, 3)
    for index, colour in enumerate(COLOURS):
        centre = (2 * index + 1) * width // (2 * len(COLOURS))
        assert np.abs(frames[:, ::8, centre] - colour).max() <= 3
    # The row and column that were added repeat the edge.
    assert np.abs(frames[:, height - 1] - frames[:, -1]).max() <= 3
    assert np.abs(frames[:, :, width - 1] - frames[:, :, -1]).max() <= 3


def test_picture_is_near_what_was_given(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:96, 0:128]
    frames = np.stack(
        [
            np.stack([rows * 2, columns * 2 - rows, 128 + 100 * np.sin((columns + 4 * t) / 9)], -1)
            for t in range(6)
        ]
    )
    frames = frames.clip(0, 255).astype(np.uint8)
    path = tmp_path / "smooth.mp4"
    with VideoWriter(path, fps=24, height=96, width=128, metadata={}) as writer:
        writer.write(frames)
    error = read_frames(path).astype(float) - frames
    assert 10 * np.log10(255**2 / (error**2).mean()) > 38


def test_pieces_of_a_video_give_the_same_file(tmp_path: Path) -> None:
    frames = noise(6, 34, 50)
    for name, pieces in {"whole.mp4": [6], "pieces.mp4": [1, 0, 3, 2]}.items():
        with VideoWriter(tmp_path / name, fps=8, height=34, width=50, metadata={}) as writer:
            start = 0
            for count in pieces:
                writer.write(frames[start : start + count])
                start += count
            assert writer.frames_written == 6
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "pieces.mp4").read_bytes()
    content = (tmp_path / "whole.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is loaded


# A process of its own writes a moving picture [17,H,W,3]; what lies in its memory and how many
# cores it has differ from one process to the next, as between two runs of a command.
ENCODE = """
import hashlib, os, sys, pathlib
import numpy as np
from opensora_sp.media.writer import VideoWriter
height, width, cores, junk = map(int, sys.argv[2:6])
lossless = sys.argv[6] == "lossless"
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
random = np.random.default_rng(junk)
y, x = np.mgrid[:height, :width]
grain = np.random.default_rng(0).integers(0, 12, (height, width, 3))
planes = lambda i: (x / 37 + i / 5, y / 23 - i / 7, (x + y) / 51 + i / 9)
video = [np.stack([120 + 90 * np.sin(p) for p in planes(i)], -1) + grain for i in range(17)]
video = np.stack(video).astype(np.uint8)
for number in range(4):
    held = [random.bytes(int(size)) for size in random.integers(100, 300_000, 100)]
    del held[::2]
    path = pathlib.Path(sys.argv[1]) / f"{number}.mp4"
    writer = VideoWriter(
        path, fps=24, height=height, width=width, metadata={"seed": 1}, lossless=lossless
    )
    with writer:
        writer.write(video)
    print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


@pytest.mark.parametrize(
    ("height", "width", "kind"),
    [
        (240, 424, "h264"),
        (64, 96, "h264"),
        (480, 848, "h264"),
        (75, 117, "h264"),
        (240, 424, "lossless"),
    ],
)
def test_the_same_frames_are_the_same_bytes(
    height: int, width: int, kind: str, tmp_path: Path
) -> None:
    found: list[str] = []
    for number, (cores, perturb) in enumerate([(1, "0"), (1000, "85"), (2, "255")]):
        arguments = [str(tmp_path), str(height), str(width), str(cores), str(number), kind]
        done = subprocess.run(
            [sys.executable, "-c", ENCODE, *arguments],
            env={**os.environ, "MALLOC_PERTURB_": perturb},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        found += done.stdout.split()
    assert len(found) == 12
    assert len(set(found)) == 1


def test_lossless_is_bit_exact_at_odd_sizes(tmp_path: Path) -> None:
    frames = noise(4, 31, 45)
    path = tmp_path / "exact.mp4"
    with VideoWriter(path, fps=24, height=31, width=45, metadata={}, lossless=True) as writer:
        writer.write(frames)
    assert np.array_equal(read_frames(path), frames)


def test_settings_come_back_from_video_and_image(tmp_path: Path) -> None:
    settings = {**SETTINGS, "prompt": SETTINGS["prompt"] * 5000, "path": Path("a")}  # type: ignore[operator]
    video, image = tmp_path / "v.mp4", tmp_path / "i.png"
    with VideoWriter(video, fps=24, height=16, width=16, metadata=settings) as writer:
        writer.write(noise(2, 16, 16))
    write_image(image, noise(1, 15, 17)[0], settings)
    assert settings_in(video) == settings_in(image) == {**settings, "path": "a"}


def test_image_is_exact(tmp_path: Path) -> None:
    from PIL import Image

    frame = noise(1, 15, 17)[0]
    write_image(tmp_path / "i.png", torch.from_numpy(frame), {})
    with Image.open(tmp_path / "i.png") as image:
        assert np.array_equal(np.asarray(image), frame)


def test_a_file_of_another_program_has_no_settings(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with open_output_frames(tmp_path / "plain.png") as found:
        assert found.settings is None


def test_rounding_is_the_reference_rounding() -> None:
    levels = torch.linspace(-1.2, 1.2, 3 * 20 * 4 * 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        video = levels.to(dtype).reshape(1, 3, 20, 4, 5)
        exact = (video[0].double().numpy().clip(-1, 1) + 1) / 2 * 255 + 0.5
        expected = np.floor(exact).clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0)
        clear = np.abs(exact - np.round(exact)).transpose(1, 2, 3, 0) > 1e-4  # not on an edge
        frames = to_bytes(video)[0].numpy()
        assert frames.shape == (20, 4, 5, 3)
        assert np.array_equal(frames[clear], expected[clear])
    corners = to_bytes(torch.tensor([-1.0, 1.0, 0.0]).reshape(3, 1, 1, 1))
    assert corners.flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_values_are_named(bad: float) -> None:
    video = torch.zeros(3, 4, 2, 2)
    video[1, 1, 1, 0] = bad
    with pytest.raises(UserError, match=r"near frame 16.*--dtype"):
        to_bytes(video, 16)


def test_shapes_that_are_no_video_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a frame is"):
        write_image(tmp_path / "i.png", np.zeros((4, 4), np.uint8), {})
    wrong: list[Any] = [np.zeros((1, 16, 18, 3), np.uint8), np.zeros((1, 16, 16, 3), np.float32)]
    for frames in wrong:
        with (
            pytest.raises(ValueError, match="frames are uint8"),
            VideoWriter(tmp_path / "v.mp4", fps=24, height=16, width=16, metadata={}) as writer,
        ):
            writer.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_text("the video of yesterday")

    def interrupted() -> None:
        with VideoWriter(path, fps=24, height=64, width=64, metadata={}) as writer:
            for _ in range(20):
                writer.write(noise(4, 64, 64))
            assert path.read_text() == "the video of yesterday"
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [each.name for each in tmp_path.iterdir()] == ["v.mp4"]
    assert path.read_text() == "the video of yesterday"


def test_a_video_without_frames_is_no_video(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no frame"),
        VideoWriter(tmp_path / "v.mp4", fps=24, height=16, width=16, metadata={}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frames", [2, 100])  # found when closing, found while writing
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, frames: int) -> None:
    writer = VideoWriter(tmp_path / "v.mp4", fps=24, height=128, width=128, metadata={})

    def write() -> None:
        with writer:
            for frame in noise(frames, 128, 128):
                writer.write(frame[None])

    with full_disk(10_000), pytest.raises(UserError, match=r"cannot write .*v\.mp4: ") as caught:
        write()
    assert (writer.frames_written == frames) == (frames == 2)
    assert "\n" not in str(caught.value)
    with full_disk(10_000), pytest.raises(UserError, match=r"cannot write .*i\.png: "):
        write_image(tmp_path / "i.png", noise(1, 128, 128)[0], {})
    assert list(tmp_path.iterdir()) == []


def test_impossible_targets_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for target in ("x" * 260 + ".mp4", "folder", "file/v.mp4"):
        with (
            pytest.raises(UserError, match="cannot write"),
            VideoWriter(tmp_path / target, fps=24, height=16, width=16, metadata={}),
        ):
            pytest.fail("the writer opened")
    with (
        pytest.raises(UserError, match="no encoder 'nonesuch'"),
        VideoWriter(tmp_path / "v", fps=24, height=16, width=16, metadata={}, codec="nonesuch"),
    ):
        pytest.fail("the writer opened")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


def test_a_name_of_the_greatest_length_is_possible(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".mp4")
    with VideoWriter(path, fps=24, height=16, width=16, metadata={}) as writer:
        writer.write(noise(1, 16, 16))
    assert len(read_frames(path)) == 1


def test_an_output_does_not_take_the_place_of_a_device_or_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null"):
        with (
            pytest.raises(UserError, match="a device or a pipe has that name"),
            atomic_output(tmp_path / name),
        ):
            raise AssertionError("its content is made in vain")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "null").is_symlink()


def test_errors_of_the_body_pass_unchanged(tmp_path: Path) -> None:
    error = FileNotFoundError("somebody else's file")

    def fails() -> None:
        with atomic_output(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(FileNotFoundError) as caught:
        fails()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_became_read_only_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuses)
    with pytest.raises(UserError, match="cannot write it"), atomic_output(tmp_path / "a"):
        raise UserError("cannot write it")


def test_frame_rates() -> None:
    for value, rate in {
        24: Fraction(24),
        29.97: Fraction(30000, 1001),
        59.94: Fraction(60000, 1001),
        12.5: Fraction(25, 2),
        30.0: Fraction(30),
        0.0001: Fraction(1, 1001),
    }.items():
        assert exact_rate(value) == rate
    for bad in (0, -1, float("nan"), float("inf"), 1001):
        with pytest.raises(UserError, match="frame rate"):
            exact_rate(bad)


def test_the_probe_finds_a_working_and_a_failing_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_encoder(23.976, 91, 161, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    with full_disk(300), pytest.raises(UserError, match="cannot write"):
        probe_encoder(24, 90, 160, tmp_path)
    monkeypatch.setattr(media, "_count_frames", lambda path: 2)
    with pytest.raises(UserError, match="2 of 3 frames"):
        probe_encoder(24, 90, 160)


def test_importing_costs_none_of_the_heavy_modules() -> None:
    code = (
        "import sys, opensora_sp.media.writer, opensora_sp.media.reader\n"
        "import opensora_sp.media.contact_sheet\n"
        "heavy = {'torch', 'av', 'PIL', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
