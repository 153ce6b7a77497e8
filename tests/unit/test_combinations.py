"""What goes together, and conditions written as strategies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opensora_sp.base.errors import UserError
from opensora_sp.request.flags.rules import COMBINATIONS
from opensora_sp.request.request import Job
from opensora_sp.request.settings import (
    build_job,
    check_request,
    parse_command_line,
    print_config,
    resolve,
)


def values_of(*argv: str) -> dict[str, Any]:
    return resolve(parse_command_line(argv))


def job_of(tmp_path: Path, *argv: str) -> Job:
    return build_job(values_of("--save-dir", str(tmp_path), *argv))


# For every row of the table: values that meet it.
MEETING: dict[str, list[str]] = {
    "--prompt + --prompt-path": ["--prompt", "x", "--prompt-path", "none.txt"],
    "--prompt + --start-index / --end-index": ["--prompt", "x", "--end-index", "3"],
    "--start-index + --end-index": ["--start-index", "5", "--end-index", "5"],
    "--image-size + --resolution / --aspect-ratio": [
        *("--image-size", "64", "64"),
        *("--resolution", "144p"),
    ],
    "one frame + --fps": ["--num-frames", "image", "--fps", "30"],
    "one frame + --loop": ["--num-frames", "1", "--loop", "2"],
    "--loop + --condition-frame-length": ["--loop", "2", "--condition-frame-length", "7"],
    "--loop + --num-frames": ["--loop", "2", "--num-frames", "17"],
    "--loop + frames that are not whole chunks": [
        *("--loop", "2", "--num-frames", "60"),
        *("--loop-carry", "latents"),
    ],
    "typed references + --reference-path / --mask-strategy": [
        *("--image", "a.png"),
        *("--mask-strategy", "0"),
    ],
    "--edit + --image / --last-image / --extend": ["--edit", "a.mp4", "--image", "a.png"],
    "--image + --extend": ["--image", "a.png", "--extend", "a.mp4"],
    "one frame + --last-image / --extend": ["--num-frames", "1", "--extend", "a.mp4"],
    "--edit + --edit-strength 1": ["--edit", "a.mp4", "--edit-strength", "1"],
    "--allow-private without --allow-remote": ["--allow-private"],
    "--edit-strength without --edit": ["--edit-strength", "0.2"],
    "--loop-carry without --loop": ["--loop-carry", "latents"],
    "--cfg-scale 1 + --guidance": ["--cfg-scale", "1", "--guidance", "serial"],
    "--cfg-scale 1 + --guidance-parallel 2": ["--cfg-scale", "1", "--guidance-parallel", "2"],
    "--device + --backend": ["--device", "cpu", "--backend", "nccl"],
    "--launcher colossalai + --timeout": ["--launcher", "colossalai", "--timeout", "60"],
    "--device cpu + --dtype fp16": ["--device", "cpu", "--dtype", "fp16"],
    "--resume + --overwrite": ["--resume", "--overwrite"],
    "--watermark + a small picture": ["--watermark", "true", "--image-size", "31", "64"],
    "--watermark + --label cn": [
        "--watermark",
        "true",
        "--label",
        "cn",
        "--label-producer",
        "X",
    ],
    "--label-producer without --label cn": ["--label-producer", "X"],
    "--prompt-generator without --llm-refine": ["--prompt-generator", "some-model"],
    "--prompt-as-path + --sample-name": ["--prompt-as-path", "--sample-name", "x"],
}


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: row.features)
def test_combinations_do_what_the_table_says(row: Any) -> None:
    assert not row.meets(values_of())
    values = values_of(*MEETING[row.features])
    if row.outcome == "refused":
        with pytest.raises(UserError) as caught:
            check_request(values, world_size=2)
        said = str(caught.value)
    else:
        said = "\n".join(check_request(values))
    assert row.text.format(**values) in said
    assert "{" not in said


def test_conditions_come_one_per_prompt_and_json_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        Image.new("RGB", (9, 7)).save(f"{name}.png")
    argv = ["--prompt", "one", 'two {"reference_path": "c.png;d.png"}', "three"]
    argv += ["--reference-path", "a.png", "b.png", "", "--mask-strategy", "0", "0,0,0,-1,1", ""]
    requests = [task.request for task in job_of(tmp_path, *argv).tasks]
    assert [r.prompt for r in requests] == ["one", "two ", "three"]
    assert [r.reference_path for r in requests] == ["a.png", "c.png;d.png", ""]
    assert [r.mask_strategy for r in requests] == ["0", "0,0,0,-1,1", ""]
    with pytest.raises(UserError, match=r"--mask-strategy .*1 entries.* 2 prompts"):
        job_of(tmp_path, "--prompt", "a", "b", "--mask-strategy", "0")


def test_ranks_must_fit_the_world() -> None:
    values = values_of("--sequence-parallel", "4", "--guidance-parallel", "2")
    assert check_request(values, world_size=8) == []
    with pytest.raises(UserError, match="--sequence-parallel 4"):
        check_request(values, world_size=6)


def test_the_checkpoint_layout_is_accepted_and_a_gap_is_named(
    suite_dir: Path, tmp_path: Path
) -> None:
    argv: Sequence[str] = ["--prompt", "x"]
    for name in ("dit", "t5", "vae2d", "vae3d"):
        argv = [*argv, f"--ckpt-path-{name}", str(suite_dir / name)]
    checkpoints = job_of(tmp_path, *argv).engine.checkpoints
    assert checkpoints is not None
    assert (checkpoints.dit, checkpoints.vae3d) == (suite_dir / "dit", suite_dir / "vae3d")

    broken = tmp_path / "t5"
    broken.mkdir()
    for file in (suite_dir / "t5").iterdir():
        if file.name != "pytorch_model-00002-of-00002.bin":
            (broken / file.name).symlink_to(file)
    with pytest.raises(UserError, match=r"--ckpt-path-t5 .*pytorch_model-00002-of-00002\.bin"):
        job_of(tmp_path, *argv, "--ckpt-path-t5", str(broken))


@pytest.mark.parametrize(
    ("argv", "paths", "strategy"),
    [
        (["--image", "a.png"], "a.png", "0,0,0,0,1,0"),
        (["--last-image", "b.png"], "b.png", "0,0,0,-1,1,0"),
        (
            ["--image", "a.png", "--last-image", "b.png"],
            "a.png;b.png",
            "0,0,0,0,1,0;0,1,0,-1,1,0",
        ),
        (["--extend", "c.gif"], "c.gif", "0,0,end,0,5,0"),
        (["--edit", "a.png", "--edit-strength", "0.4"], "a.png", "0,0,0,0,15,0.4"),
        (["--edit", "a.png", "--edit-strength", "1"], "", ""),
    ],
)
def test_typed_references_are_strategies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    paths: str,
    strategy: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Image.new("RGB", (9, 7)).save(f"{name}.png")
    frames = [Image.new("L", (9, 7), 10 * level) for level in range(17)]
    frames[0].save("c.gif", save_all=True, append_images=frames[1:])
    argv = ["--prompt", "x", "y", *argv]
    requests = [task.request for task in job_of(tmp_path, *argv).tasks]
    assert [(r.reference_path, r.mask_strategy) for r in requests] == [(paths, strategy)] * 2
    saved = tmp_path / "saved.yaml"
    saved.write_text(print_config(values_of(*argv)), encoding="utf-8")
    again = job_of(tmp_path, "--config", str(saved)).tasks
    assert [task.request for task in again] == requests
