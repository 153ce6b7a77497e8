"""What references and strategies do: said before loading, right to the last frame, no more work
than what is kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from whole_reference import decoded_whole, read_reference

from opensora_sp.base.errors import UserError
from opensora_sp.base.geometry import latent_frames
from opensora_sp.engine.clips import ConditioningFrames
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.media import decoding
from opensora_sp.media.frames import open_reference
from opensora_sp.models.video_vae import VideoVAE
from opensora_sp.parallel.session import alone
from opensora_sp.request.conditions import all_groups, dropped_frames
from opensora_sp.request.mask_strategy import (
    END,
    FrameLayout,
    Group,
    parse_mask_strategy,
    plan_clip,
    plan_strategy,
)
from opensora_sp.request.request import Request
from opensora_sp.request.settings import build_job, parse_command_line, resolve

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 34, "steps": 1}  # T = 10


def write(path: Path, frames: int, codec: str = "libx264", rate: int = 24, gop: int = 12) -> Path:
    """A clip whose frame number n has a level of its own."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.gop_size = gop
        for number in range(frames):
            picture = np.full((32, 48, 3), number * 7 % 251, np.uint8)
            picture[:16, :24] = number // 2 % 251
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def animation(path: Path, frames: int) -> Path:
    shown = [Image.new("L", (48, 32), number * 7 % 251) for number in range(frames)]
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=40)
    return path


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(session=alone("cpu"), dtype="fp32")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts frames that are decoded, converted and encoded."""
    counts = {"decoded": 0, "converted": 0, "encoded": 0}
    decoded, picture, encode = decoding._decoded, decoding._picture, VideoVAE.encode

    def count_decoded(*arguments: Any) -> Iterator[Any]:
        for frame in decoded(*arguments):
            counts["decoded"] += 1
            yield frame

    def count_converted(*arguments: Any) -> Any:
        counts["converted"] += 1
        return picture(*arguments)

    def count_encoded(self: VideoVAE, video: torch.Tensor, draw: Any = None) -> torch.Tensor:
        counts["encoded"] += video.shape[2]
        return encode(self, video, draw)

    monkeypatch.setattr(decoding, "_decoded", count_decoded)
    monkeypatch.setattr(decoding, "_picture", count_converted)
    monkeypatch.setattr(VideoVAE, "encode", count_encoded)
    return counts


def notes_of(tmp_path: Path, *argv: str) -> list[str]:
    argv = ("--save-dir", str(tmp_path / "out"), "--image-size", "32", "48", *argv)
    command = parse_command_line(["--prompt", "x", *argv])
    notes = build_job(resolve(command)).notes
    return [n for n in notes if "size table" not in n and "embedded model" not in n]


# --- the last frame ----------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [17, 10])
@pytest.mark.parametrize("clip", [17, 20, 34, 51, 100])
def test_the_end_is_the_last_frame_for_every_length(clip: int, micro: int) -> None:
    layout = FrameLayout(clip, micro)
    assert layout.frames_before(layout.latents) == clip
    for length in range(1, layout.latents + 1):
        for frames in range(17, 401):
            group = Group(0, 0, END, 0, length)
            if frames < layout.frames_shown(0, length):
                with pytest.raises(UserError, match=f"has {frames} frames, but its last"):
                    plan_clip([group], 0, [frames], layout, 5)
                continue
            (placed,) = plan_clip([group], 0, [frames], layout, 5)
            assert placed.frames is not None
            first, count = placed.frames
            assert first + count == frames
            assert (placed.target_start, placed.length) == (0, length)
            assert latent_frames(count, micro) == length  # encoded, they are what is placed
            assert count == layout.frames_before(length)  # and stand where the clip shows them


def test_the_end_is_what_the_references_own_syntax_keeps_where_chunks_allow() -> None:
    for frames in range(17, 401, 17):
        (own,) = plan_strategy([Group(0, 0, -5, 0, 5)], 0, [latent_frames(frames)], 15, 5)
        (end,) = plan_clip([Group(0, 0, END, 0, 5)], 0, [frames], FrameLayout(51), 5)
        assert end.frames == (frames - 17, 17)
        assert FrameLayout(frames).frames_before(own.ref_start) == frames - 17


@pytest.mark.parametrize("text", ["0,0,end,0,5", " 0, 0, END ,0,5,0 "])
def test_end_is_a_word_of_the_syntax(text: str) -> None:
    assert parse_mask_strategy(text) == [Group(0, 0, END, 0, 5)]


@pytest.mark.parametrize("text", ["end", "0,end", "0,0,0,end", "0,0,0,0,end", "0,0,ends"])
def test_end_is_a_ref_start_only(text: str) -> None:
    with pytest.raises(UserError, match="whole numbers"):
        parse_mask_strategy(text)


@pytest.mark.parametrize(
    ("frames", "length"), [(17, 5), (18, 5), (33, 5), (34, 5), (50, 10), (60, 7), (100, 5), (9, 3)]
)
def test_extending_keeps_the_last_frames(
    frames: int, length: int, pipeline: Pipeline, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.mp4", frames)
    request = Request(
        prompt="x", reference_path=str(path), mask_strategy=f"0,0,end,0,{length}", **SMALL
    )
    with torch.no_grad():
        z, mask = ConditioningFrames(pipeline.models, [request]).start(
            0, torch.zeros(1, 4, 10, 4, 6)
        )
        count = FrameLayout(34).frames_before(length)
        last = read_reference(path, 32, 48).video[:, -count:]
        mean = pipeline.models.vae(request, encoder=True).encode(last[None])
    assert mask is not None
    assert mask[0].tolist() == [0.0] * length + [1.0] * (10 - length)
    # The posterior is sampled; its mean is near, and that of other frames is not.
    assert (z[:, :, :length] - mean).abs().mean() < 0.3 * mean.abs().mean()


@pytest.mark.parametrize("frames", [17, 34, 51])
def test_extending_whole_chunks_is_what_it_was(
    frames: int, pipeline: Pipeline, tmp_path: Path
) -> None:
    path = str(write(tmp_path / "a.mp4", frames))
    starts = []
    for strategy in ("0,0,end,0,5", "0,0,-5,0,5"):
        request = Request(prompt="x", reference_path=path, mask_strategy=strategy, **SMALL)
        with torch.no_grad():
            starts.append(
                ConditioningFrames(pipeline.models, [request]).start(
                    0, torch.zeros(1, 4, 10, 4, 6)
                )[0]
            )
    assert torch.equal(*starts)


@pytest.mark.parametrize("frames", [20, 30, 33, 34, 40])
def test_a_loop_continues_the_last_frame(frames: int, pipeline: Pipeline) -> None:
    request = Request(prompt="x", loop=2, **{**SMALL, "num_frames": frames})
    result = pipeline.generate(request)
    first, second = result.latents
    assert first is not None
    assert second is not None
    with torch.no_grad():
        vae = pipeline.models.vae(request, encoder=True)
        last = vae.decode(first, frames)[:, :, -17:].float()
        mean = vae.encode(last)
    kept = second[:, :, :5]
    assert (kept - mean).abs().mean() < 0.3 * mean.abs().mean()
    assert dropped_frames(request) == 17
    assert result.videos[0] is not None
    assert len(result.videos[0]) == 2 * frames - 17


def test_a_loops_own_groups_reach_all_of_the_clip_before(pipeline: Pipeline) -> None:
    """Only its last chunks were encoded, and the others were zeros."""
    request = Request(prompt="x", loop=2, mask_strategy="1,0,0,5,5", **SMALL)
    first, second = pipeline.generate(request).latents
    assert first is not None
    assert second is not None
    with torch.no_grad():
        vae = pipeline.models.vae(request, encoder=True)
        mean = vae.encode(vae.decode(first, 34)[:, :, :17].float())
    assert (second[:, :, 5:] - mean).abs().mean() < 0.3 * mean.abs().mean()


def test_groups_from_the_end_of_a_clip_fit_both_ways_to_carry() -> None:
    own = {"loop": 2, "mask_strategy": "1,0,end,5,5"}
    frames = all_groups(Request(prompt="x", **own, **SMALL))  # type: ignore[arg-type]
    latents = all_groups(Request(prompt="x", loop_carry="latents", **own, **SMALL))  # type: ignore[arg-type]
    assert [g.ref_start for g in frames] == [END, END]
    assert [g.ref_start for g in latents] == [-5, -5]


# --- only what is kept -------------------------------------------------------------------------


def whole(pipeline: Pipeline, request: Request, path: Path) -> torch.Tensor:
    """Latents [4,T,h,w] of all of a reference, encoded in one go."""
    from opensora_sp.engine.noise import noise_key

    video = decoded_whole(path, 32, 48, request.reference_fps)
    key = noise_key(request, 0)
    vae = pipeline.models.vae(request, encoder=True)
    return vae.encode(video[None], lambda w, s: key.normal(s, f"reference 0 {w}"))[0].float()


@pytest.mark.parametrize(
    "strategy", ["0", "0,0,-5,0,5", "0,0,7,5,3;0,0,-3,0,3", "0,0,11,2,9,0.5", "0,0,0,0,10,0.4"]
)
@pytest.mark.parametrize(("align", "fps"), [(5, None), (1, None), (1, 10.0)])
def test_parts_are_what_the_whole_gives(
    strategy: str, align: int, fps: float | None, pipeline: Pipeline, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.mp4", 100)
    request = Request(
        prompt="x", reference_path=str(path), mask_strategy=strategy, align=align,
        reference_fps=fps, **SMALL,
    )  # fmt: skip
    with torch.no_grad():
        kept = ConditioningFrames(pipeline.models, [request])
        z, _ = kept.start(0, torch.zeros(1, 4, 10, 4, 6))
        latents = whole(pipeline, request, path)
    for p in plan_strategy(parse_mask_strategy(strategy), 0, [latents.shape[1]], 10, align)[-1:]:
        target = slice(p.target_start, p.target_start + p.length)
        assert torch.equal(z[0][:, target], latents[:, p.ref_start : p.ref_start + p.length])


@pytest.mark.parametrize("strategy", ["0,0,end,0,5", "0,0,-5,0,5", "0,0,0,0,5", "0", "0,0,200,0,5"])
@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("mpeg4", "mkv")])
def test_work_is_bounded_by_what_is_kept(
    strategy: str, codec: str, suffix: str, pipeline: Pipeline, tmp_path: Path, work: dict[str, int]
) -> None:
    path = write(tmp_path / f"long.{suffix}", 1500, codec)
    request = Request(prompt="x", reference_path=str(path), mask_strategy=strategy, **SMALL)
    with torch.no_grad():
        ConditioningFrames(pipeline.models, [request])
    assert work["encoded"] <= 17
    assert work["converted"] <= 17
    assert work["decoded"] <= 17 + 40  # from a keyframe on, with what the decoder holds back


def test_what_nothing_keeps_is_not_read(
    pipeline: Pipeline, tmp_path: Path, work: dict[str, int]
) -> None:
    paths = f"{write(tmp_path / 'a.mp4', 20)};{write(tmp_path / 'b.mp4', 20)}"
    for strategy in ("", "1,0", "0,0,90", "0,1,0,0,0"):
        request = Request(prompt="x", reference_path=paths, mask_strategy=strategy, **SMALL)
        with torch.no_grad():
            ConditioningFrames(pipeline.models, [request])
    assert work == {"decoded": 0, "converted": 0, "encoded": 0}


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4")),
        *(("a.webm", "libvpx"), ("b.webm", "libvpx-vp9"), ("a.gif", "")),
    ],
)
@pytest.mark.parametrize("fps", [None, 10.0, 60.0])
def test_any_part_of_any_kind_is_that_of_all_of_it(
    name: str, codec: str, fps: float | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    if codec:
        write(path, 40, codec)
    else:
        animation(path, 40)
    video = decoded_whole(path, 16, 16, fps)
    with open_reference(path, fps=fps) as reference:
        assert reference.count == video.shape[1]
        for first, count in ((0, 1), (0, 5), (reference.count - 9, 9), (7, 6)):
            (part,) = reference.read([(first, count)], 16, 16)
            assert torch.equal(part, video[:, first : first + count])
        parts = reference.read([(0, 2), (reference.count - 1, 1)], 16, 16)
        assert torch.equal(torch.cat(parts, 1), video[:, [0, 1, -1]])


def test_a_wrong_count_is_found_and_mended(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the packets had told of fewer frames than are decoded."""
    from opensora_sp.media import frames as reference_frames

    path = write(tmp_path / "a.mp4", 60)
    request = Request(prompt="x", reference_path=str(path), mask_strategy="0,0,end,0,5", **SMALL)
    with torch.no_grad():
        right = ConditioningFrames(pipeline.models, [request]).start(
            0, torch.zeros(1, 4, 10, 4, 6)
        )[0]
        count = reference_frames._count_packets

        def too_few(*arguments: Any) -> Any:
            found = count(*arguments)
            assert found is not None
            return reference_frames._Timeline(found.frames[:-20], found.keys[:-2], exact=False)

        monkeypatch.setattr(reference_frames, "_count_packets", too_few)
        mended = ConditioningFrames(pipeline.models, [request]).start(
            0, torch.zeros(1, 4, 10, 4, 6)
        )[0]
    assert torch.equal(right, mended)


# --- said before loading -----------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Image.new("RGBA", (48, 32), (9, 9, 9, 99)).save(f"{name}.png")
    for frames in (9, 16, 40, 100):
        write(Path(f"v{frames}.mp4"), frames)
    animation(Path("g12.gif"), 12)


RAW = ("--num-frames", "51", "--reference-path")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*RAW, "a.png"], "a.png is not used, because no --mask-strategy"),
        ([*RAW, "a.png;v40.mp4"], "references a.png, v40.mp4 are not used"),
        ([*RAW, "a.png", "--mask-strategy", "1,0"], "is for clip 1, but --loop 1"),
        ([*RAW, "a.png", "--mask-strategy", "5,0", "--loop", "2"], "is for clip 5, but --loop 2"),
        ([*RAW, "a.png", "--mask-strategy", "0,0,9"], "latent frame 5 of a.png, which has 1"),
        ([*RAW, "v40.mp4", "--mask-strategy", "0,0,30"], "30 of v40.mp4, which has 12"),
        ([*RAW, "a.png", "--mask-strategy", "0,0,0,15"], "15 of the clip, which has 15"),
        ([*RAW, "a.png", "--mask-strategy", "0,0,0,0,0"], "length of 0"),
        ([*RAW, "a.png;b.png", "--mask-strategy", "0"], "reference b.png is not used"),
        ([*RAW, "a.png;b.png", "--mask-strategy", "0,1"], "reference a.png is not used"),
        (
            [*RAW, "v100.mp4", "--mask-strategy", "0,0,-5,0,5"],
            "frames 69 to 85 of 100 are kept and the 15 after",
        ),
        (
            [*RAW, "v40.mp4", "--mask-strategy", "0,0,-5,0,5"],
            "frames 18 to 34 of 40 are kept and the 6 after",
        ),
        (
            [*RAW, "a.png;b.png", "--mask-strategy", "0;0,1,0,-1"],
            "ends at frame 35 of 51",
        ),
        (["--num-frames", "51", "--image", "v40.mp4"], "--image v40.mp4 is a video of 40 frames"),
        (["--num-frames", "51", "--last-image", "a.png"], "a.png is frame 35 of 51 and 16 follow"),
        (["--num-frames", "51", "--edit", "v100.mp4"], "has 100 frames: its first 51 are used"),
        (["--num-frames", "51", "--edit", "v40.mp4"], "the 11 after them of the clip's 51"),
    ],
)
def test_what_has_no_effect_is_said(tmp_path: Path, argv: list[str], said: str) -> None:
    notes = notes_of(tmp_path, *argv)
    assert len([note for note in notes if said in note]) == 1, notes


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "argv",
    [
        [*RAW, "a.png", "--mask-strategy", "0"],
        [*RAW, "a.png", "--mask-strategy", "0,0,0,0,1,1"],
        [*RAW, "v100.mp4", "--mask-strategy", "0,0,end,0,5"],
        [*RAW, "v100.mp4", "--mask-strategy", "0,0,0,0,5"],
        [*RAW, "a.png;b.png", "--mask-strategy", "0;0,1,0,5"],
        ["--num-frames", "51", "--extend", "v100.mp4"],
        ["--num-frames", "51", "--extend", "v40.mp4", "--loop", "3"],
        ["--num-frames", "51", "--image", "a.png"],
        ["--num-frames", "17", "--last-image", "a.png", "--align", "1"],
        ["--num-frames", "40", "--edit", "v40.mp4"],
        ["--num-frames", "40", "--loop", "2"],
    ],
)
def test_nothing_is_said_of_what_is_plain(tmp_path: Path, argv: list[str]) -> None:
    assert notes_of(tmp_path, *argv) == []


REFUSED = [
    (["--extend", "v9.mp4"], "--extend 'v9.mp4' has 9 frames, .* 17 .*--condition-frame-length 3"),
    (["--extend", "v16.mp4"], "--extend 'v16.mp4' has 16 frames.*--condition-frame-length 4"),
    (["--extend", "g12.gif"], "--extend 'g12.gif' has 12 frames.*--condition-frame-length 3"),
    (["--extend", "a.png"], "--extend 'a.png' has one frame.*--image"),
    (["--extend", "v40.mp4", "--reference-fps", "5"], "has 9 frames at --reference-fps 5"),
    ([*RAW[2:], "v9.mp4", "--mask-strategy", "0,0,end,0,5"], "reference 0 has 9 frames"),
    ([*RAW[2:], "v9.mp4", "--mask-strategy", "0,0,-5,0,5"], "ref_start -5 lies before .* 3"),
    ([*RAW[2:], "a.png", "--mask-strategy", "0,0,0,-18,8"], "target_start -18 lies before"),
    ([*RAW[2:], "a.png", "--mask-strategy", "0,3"], "asks for reference 3"),
    (["--loop", "2", "--mask-strategy", "1,0,-20"], "ref_start -20 lies before the first of 15"),
]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("argv", "said"), REFUSED)
def test_what_cannot_be_followed_is_refused_in_the_flags_words(
    tmp_path: Path, argv: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        notes_of(tmp_path, "--num-frames", "51", *argv)
    typed = argv[0] in ("--extend", "--image", "--edit", "--last-image")
    assert not (typed and "mask strategy" in str(caught.value))


@pytest.mark.usefixtures("files")
def test_it_is_refused_before_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom opensora_sp.cli.infer import main\n"
        "code = main(sys.argv[1:])\n"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    for argv in (REFUSED[0][0], REFUSED[4][0], REFUSED[6][0], REFUSED[9][0]):
        argv = ["--prompt", "x", "--num-frames", "51", "--save-dir", str(tmp_path / "o"), *argv]
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "o").exists()


def test_looking_decodes_one_frame_and_each_file_once(
    tmp_path: Path, work: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "long.mp4", 500)
    argv = [*("a", "b", "c", "d"), "--extend", str(path), "--num-frames", "17"]
    command = parse_command_line(["--prompt", *argv, "--save-dir", str(tmp_path / "out")])
    assert len(build_job(resolve(command)).tasks) == 4
    assert work["decoded"] <= 30
    assert work["converted"] == 1


def test_json_in_a_prompt_speaks_the_references_own_words(tmp_path: Path) -> None:
    path, short = write(tmp_path / "a.mp4", 40), write(tmp_path / "s.mp4", 9)
    own = f'x {{"reference_path": "{short}", "mask_strategy": "0,0,-5,0,5"}}'
    argv = ("--prompt", "x", own, "--extend", str(path), "--num-frames", "17")
    job = build_job(resolve(parse_command_line([*argv, "--save-dir", str(tmp_path / "out")])))
    assert [task.request.prompt for task in job.tasks] == ["x"]
    (failed,) = job.failed
    assert "mask strategy: ref_start -5" in failed
