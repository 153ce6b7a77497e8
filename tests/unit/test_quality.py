"""opensora-sp quality: what it says of files whose differences are known, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from opensora_sp.benchmark.quality import measure
from opensora_sp.benchmark.quality.sides import Pair
from opensora_sp.cli.main import main
from opensora_sp.media.line_plot import COLOURS, Line, Panel, write_plot
from opensora_sp.media.writer import VideoWriter, write_image

Frames = NDArray[np.uint8]


def clip(frames: int = 5, height: int = 16, width: int = 24, seed: int = 0) -> Frames:
    """Random frames [F, H, W, 3] with room above and below every value."""
    return np.random.default_rng(seed).integers(40, 200, (frames, height, width, 3), dtype=np.uint8)


def video(
    path: Path, frames: Frames, fps: float = 24, lossless: bool = True, **settings: Any
) -> Path:
    _, height, width, _ = frames.shape
    with VideoWriter(
        path, fps=fps, height=height, width=width, metadata=settings, lossless=lossless
    ) as writer:
        writer.write(frames)
    return path


def latents(path: Path, values: NDArray[Any], name: str = "latents", **about: str) -> Path:
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: values}, str(path), metadata=about or None)
    return path


def quality(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    """What the command prints; on standard error where it refuses."""
    ended = main(["quality", *map(str, argv)])
    out, err = capsys.readouterr()
    assert ended == code, err
    if code:
        assert not out
        assert len(err.splitlines()) == 1
    return err if code else out


def test_two_videos_and_a_noise_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = clip()
    b, c = a.copy(), a.copy()
    b[0] += 10  # frame 0: error 100; frame 2: 36 / 4; the others are equal
    b[2, :8, :12] += 6
    c[:, 0, 0, 0] += 1
    paths = [video(tmp_path / f"{n}.mp4", v, seed=s) for n, v, s in (("a", a, 1), ("b", b, 2))]
    floor = video(tmp_path / "c.mp4", c)
    out, svg = tmp_path / "q.json", tmp_path / "q.svg"
    said = quality(capsys, *paths, "--floor", floor, "--out", out, "--plot", svg)
    (pair,) = json.loads(out.read_text())["pairs"]
    assert (pair["kind"], pair["encoded_with_loss"]) == ("video", False)
    assert pair["differ_in"] == {"seed": {"a": 1, "b": 2}}
    found, of_floor = pair["quality"], pair["floors"][0]

    def db(error: float) -> Any:
        return pytest.approx(20 * math.log10(255) - 10 * math.log10(error))

    assert found["psnr_db"] == db((100 + 9) / 5)
    assert found["frames"]["psnr_db"] == [db(100), None, db(9), None, None]
    assert found["psnr_mean_db"] == db(30)  # the mean in dB is that of the geometric mean
    assert (found["psnr_worst_db"], found["worst_frame"]) == (db(100), 0)
    assert (found["equal_frames"], found["largest_difference"]) == (3, 10)
    assert found["frames"]["motion_psnr_db"] == [db(100), db(9), db(9), None]
    assert found["motion_psnr_db"] == db(118 / 4)
    assert found["frames"]["ssim"][1] == 1
    assert found["ssim_worst"] == min(found["frames"]["ssim"]) < 1
    assert found["ssim_mean"] == pytest.approx(np.mean(found["frames"]["ssim"]))
    assert of_floor["psnr_db"] == db(1 / (16 * 24 * 3))
    assert "5 frames of 16x24 at 24 a second" in said
    assert "made with other settings (A / B): seed 1 / 2" in said
    assert "B is farther from A than the floor." in said
    assert "encoded with loss" not in said
    assert f"{found['psnr_db']:.2f} dB" in said

    drawn = [e.attrib for e in ET.parse(svg).getroot() if "points" in e.attrib]
    of_b = [
        e["points"].split() for e in drawn if e["stroke"] == COLOURS[0] and len(e["points"]) > 20
    ]
    # PSNR of B has no stretch of two frames; SSIM is whole; motion has its first three.
    assert sorted(len(points) for points in of_b if len(points) > 2) == [3, 5]
    dashed = [e for e in drawn if "stroke-dasharray" in e and len(e["points"].split()) == 5]
    assert len(dashed) == 2  # the floor's PSNR and SSIM; its motion is equal


def test_frames_that_are_read_in_parts_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [video(tmp_path / f"{seed}.mp4", clip(7, seed=seed)) for seed in (1, 2)]
    found = []
    for held in (1 << 25, 2 * 16 * 24 * 3, 1):
        monkeypatch.setattr(measure, "_HELD", held)
        quality(capsys, *paths, "--out", tmp_path / "q.json")
        found.append(json.loads((tmp_path / "q.json").read_text()))
    assert found[0] == found[1] == found[2]
    assert len(found[0]["pairs"][0]["quality"]["frames"]["motion_psnr_db"]) == 6


def test_folders_are_compared_by_name_and_nothing_is_left_out_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, floor = (tmp_path / name for name in ("a", "b", "floor"))
    state = ".opensora-sp/one.mp4.clip0000.safetensors"
    z = np.random.default_rng(3).normal(size=(4, 3, 2, 5)).astype(np.float32)
    for folder, shift in ((a, 0), (b, 4), (floor, 1)):
        video(folder / "one.mp4", clip() + np.uint8(shift))
        write_image(folder / "two.png", clip()[0] + np.uint8(shift % 4), {})
        latents(folder / state, z * np.float32(1 + shift / 100))
    (a / ".opensora-sp" / "one.mp4.step.safetensors").touch()
    write_image(a / "lost.png", clip()[0], {})
    write_image(b / "new.png", clip()[0], {})
    (b / "sheet.html").touch()
    (floor / "two.png").unlink()
    said = quality(
        capsys, a, b, "--floor", floor, "--out", tmp_path / "q.json", "--plot", tmp_path / "q.png"
    )
    found = json.loads((tmp_path / "q.json").read_text())
    assert [one["name"] for one in found["pairs"]] == [
        "one.mp4",
        "two.png",
        "one.mp4, latents of clip 0",
    ]
    assert (found["only_in_a"], found["only_in_b"]) == (["lost.png"], ["new.png"])
    assert found["floors"][0]["missing"] == ["two.png"]
    assert found["pairs"][1]["floors"] == [None]
    for line in (
        "only in A, not compared: 1 output: lost.png",
        "only in B, not compared: 1 output: new.png",
        "no outputs, not compared: sheet.html",
        "without a partner in floor: 1 output: two.png",
        "2 of 2 pairs are farther from A than the floor.",
    ):
        assert line in said.splitlines()
    frames, errors = found["summary"]["frames"], found["summary"]["latents"]
    # The picture is equal: it is counted, and does not enter the mean.
    assert (frames["pairs"], frames["equal"]) == (2, 1)
    assert frames["psnr_db"]["mean"] == pytest.approx(20 * math.log10(255 / 4))
    assert frames["ssim"]["mean"] == found["pairs"][0]["quality"]["ssim_mean"] < 1
    assert errors["relative_error"]["worst"] == pytest.approx(0.04, rel=1e-5)
    assert found["floor_summaries"][0]["latents"]["relative_error"]["mean"] == pytest.approx(
        0.01, rel=1e-5
    )
    with Image.open(tmp_path / "q.png") as image:
        assert len(image.getcolors(1 << 16) or ()) > 5
    assert "All pairs are equal." in quality(capsys, a, a)


@pytest.mark.slow
def test_outputs_of_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs whose last step differs: the files say in what, and latents agree with frames."""
    flags = ["--prompt", "a red ball", "--image-size", "32", "48", "--num-frames", "9"]
    flags += ["--device", "cpu", "--dtype", "fp32", "--keep-state", "--text-cache", "off"]
    for name, steps in (("a", "3"), ("b", "4")):
        argv = ["generate", *flags, "--num-sampling-steps", steps, "--save-dir"]
        assert main([*argv, str(tmp_path / name)]) == 0
    capsys.readouterr()
    said = quality(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "q.json")
    found = json.loads((tmp_path / "q.json").read_text())
    frames, state = found["pairs"]
    for one in (frames, state):
        assert one["differ_in"] == {"steps": {"a": 3, "b": 4}}
    assert frames["encoded_with_loss"]
    assert "both are encoded with loss (h264 yuv420p)" in said
    from safetensors.numpy import load_file

    x, y = (load_file(state[side])["latents"].astype(float) for side in ("a", "b"))
    expected = math.sqrt(((y - x) ** 2).sum() / (x**2).sum())
    assert state["quality"]["relative_error"] == pytest.approx(expected, rel=1e-6)
    assert 0 < expected < 1
    assert 10 < frames["quality"]["psnr_db"] < 50
    assert "the same encoder settings are assumed" in said
    exact = video(tmp_path / "exact.mp4", clip(9, 32, 48))
    said = quality(capsys, exact, frames["b"])
    assert "B alone is encoded with loss (h264 yuv420p)" in said


def test_a_gif_and_a_jpeg_in_a_tiff_are_encoded_with_loss(tmp_path: Path) -> None:
    first, *more = (Image.fromarray(frame) for frame in clip())

    def written(name: str, animated: bool = False, **how: Any) -> str | None:
        path = tmp_path / name
        if animated:
            how |= {"save_all": True, "append_images": more}
        first.save(path, **how)
        return measure.look(Pair(name, path, path)).loss

    assert written("a.png", animated=True) is None
    assert "encoded with loss (gif)" in str(written("a.gif", animated=True))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate"):
        assert written("a.tiff", compression=compression) is None
    assert "encoded with loss (tiff)" in str(written("a.tiff", compression="jpeg"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("v.mp4 short.mp4", "v.mp4 has 5 frames, but short.mp4 has 4"),
        ("v.mp4 wide.mp4", "v.mp4 has frames of 16x24, but wide.mp4 of 16x26"),
        ("v.mp4 slow.mp4", "v.mp4 has 24 frames a second, but slow.mp4 has 12"),
        ("v.mp4 p.png", "v.mp4 is a video, but p.png is a picture"),
        ("v.mp4 v.mp4 --floor short.mp4", "v.mp4 has 5 frames, but short.mp4 has 4"),
        ("v.mp4 z.safetensors", "one is saved latents and the other is not"),
        ("v.mp4 folder", "A v.mp4 is a file, but B folder is a folder"),
        ("folder other", "no output in A folder (1 output: v.mp4) has the name of one in B other"),
        ("folder folder --floor other", "no output in A folder"),
        ("v.mp4 none.mp4", "B none.mp4 does not exist"),
        ("v.mp4 https://example.org/v.mp4", "does not exist"),
        ("v.mp4 cut.mp4", "cut.mp4 is damaged"),
        ("v.mp4 text.mp4", "text.mp4 is not a kind that is read (text)"),
        ("v.mp4 empty.mp4", "empty.mp4 is empty"),
        ("z.safetensors long.safetensors", "[4, 2, 3, 3], but long.safetensors [4, 3, 3, 3]"),
        ("z.safetensors nan.safetensors", "nan.safetensors holds latents that are NaN"),
        ("z.safetensors later.safetensors", "at step None, but later.safetensors at step 7"),
        ("z.safetensors weights.safetensors", "holds no tensor called latents but ['weight']"),
        ("z.safetensors torn.safetensors", "torn.safetensors is not a whole file of saved latents"),
        ("z.safetensors bad.safetensors", "bad.safetensors is damaged (its checksum"),
        ("v.mp4 v.mp4 --plot q.jpg", "--plot q.jpg: the name has to end in .svg or .png"),
        ("v.mp4 v.mp4 --out folder", "--out folder is a directory"),
        ("v.mp4 p.png --out p.png", "--out p.png is one of the compared files"),
        ("v.mp4 v.mp4 --out q.svg --plot q.svg", "--out and --plot are both q.svg"),
        ("v.mp4 v.mp4 --out v.mp4/q.json", "v.mp4 is not a directory"),
        ("v.mp4", "required: B"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    argv: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {word for word in argv.split() if not word.startswith("--")}
    made = video(Path("v.mp4"), clip())
    if "short.mp4" in named:
        video(Path("short.mp4"), clip(4))
    if "wide.mp4" in named:
        video(Path("wide.mp4"), clip(width=26))
    if "slow.mp4" in named:
        video(Path("slow.mp4"), clip(), fps=12)
    write_image(Path("p.png"), clip()[0], {})
    video(Path("folder/v.mp4"), clip())
    write_image(Path("other/p.png"), clip()[0], {})
    Path("cut.mp4").write_bytes(made.read_bytes()[:-900])
    Path("text.mp4").write_text("no video\n" * 9)
    Path("empty.mp4").touch()
    z = np.ones((4, 2, 3, 3), np.float32)
    whole = latents(Path("z.safetensors"), z)
    latents(Path("long.safetensors"), np.ones((4, 3, 3, 3), np.float32))
    latents(Path("nan.safetensors"), z * np.float32("nan"))
    latents(Path("later.safetensors"), z, step="7")
    latents(Path("weights.safetensors"), z, name="weight")
    latents(Path("bad.safetensors"), z, format="opensora-sp latents 2", checksum="0")
    Path("torn.safetensors").write_bytes(whole.read_bytes()[:-9])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert words in quality(capsys, *argv.split(), code=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_video_that_ends_early_is_found_where_no_header_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, count in (("long.gif", 5), ("short.gif", 3)):
        frames = [Image.fromarray(frame) for frame in clip(count)]
        paths.append(tmp_path / name)
        frames[0].save(paths[-1], save_all=True, append_images=frames[1:])
    long, short = paths
    for a, b, words in ((long, short, ("5", "3")), (short, long, ("3", "5"))):
        assert main(["quality", str(a), str(b)]) == 2
        err = capsys.readouterr().err
        assert f"{a} has {words[0]} frames, but {b} has {words[1]}" in err


def test_a_plot_keeps_gaps_and_names_what_it_cannot_draw(tmp_path: Path) -> None:
    line = Line("a <b> & c", [(0, 1.0), (1, 2.0), (2, math.inf), (3, 3.0)])
    panels = [Panel("x", [line], [("limit", 5.0)]), Panel("y", [Line("", [(0, math.nan)])])]
    write_plot(tmp_path / "p.svg", panels, title="\ud800 title", x_title="frame")
    root = ET.parse(tmp_path / "p.svg").getroot()
    texts = [element.text for element in root if element.tag.endswith("text")]
    assert {"a <b> & c", "limit", "frame", "nothing to draw: no value is finite"} <= set(texts)
    (drawn,) = (
        element.attrib["points"].split()
        for element in root
        if element.attrib.get("stroke") == COLOURS[0] and float(element.attrib["stroke-width"]) == 2
        if element.attrib["points"].count(" ") == 1 and "98.0" not in element.attrib["points"]
    )
    (x0, y0), (x1, y1) = ([float(n) for n in point.split(",")] for point in drawn)
    assert x1 > x0
    assert y1 < y0  # larger values are higher
    dots = [element for element in root if element.tag.endswith("circle")]
    assert len(dots) == 1
    assert float(dots[0].attrib["cy"]) < y1


def test_pictures_and_videos_are_compared_without_torch(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4", clip())
    code = (
        "import sys; from opensora_sp.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 9 * any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "quality", path, path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "B is equal to A." in done.stdout
