"""From command lines and YAML files to requests."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.request.config_file import read_config
from opensora_sp.request.flags.docs import base_config, docs_page, help_text
from opensora_sp.request.flags.table import all_flags
from opensora_sp.request.naming import output_stems, safe_stem
from opensora_sp.request.request import EngineSettings, Job, JobSettings, Request
from opensora_sp.request.settings import build_job, parse_command_line, print_config, resolve

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def values_of(*argv: str) -> dict[str, Any]:
    return resolve(parse_command_line(argv))


def job_of(tmp_path: Path, *argv: str) -> Job:
    return build_job(values_of("--save-dir", str(tmp_path), *argv))


def test_defaults_are_the_ones_that_existing_command_lines_count_on() -> None:
    expected = {
        "resolution": "240p",
        "aspect_ratio": "9:16",
        "num_frames": 51,
        "fps": 24,
        "save_fps": 24,
        "frame_interval": 1,
        "num_sampling_steps": 30,
        "cfg_scale": 7.0,
        "aes": 6.5,
        "flow": None,
        "seed": 42,
        "batch_size": 1,
        "num_sample": 1,
        "loop": 1,
        "dtype": "bf16",
        "align": 5,
        "condition_frame_length": 5,
        "micro_batch_size": 4,
        "micro_frame_size": 17,
        "save_dir": "./samples/samples/",
        "warmup_count": 1,
        "eval_count": 1,
        "benchmark_save_path": "./benchmark/report-opensora-v1.2.json",
        "flash_attn": False,
        "layernorm_kernel": False,
        "enable_compile": False,
        "llm_refine": False,
        "watermark": False,
        "qk_norm": True,
        "prompt_as_path": False,
    }
    values = values_of()
    assert {key: values[key] for key in expected} == expected


def test_request_and_settings_have_the_defaults_of_the_flags(tmp_path: Path) -> None:
    job = job_of(tmp_path, "--prompt", "x")
    assert job.tasks[0].request == Request(prompt="x")
    assert job.engine == EngineSettings()
    assert job.settings == JobSettings(save_dir=tmp_path)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("cfg-scale: 3\nnum_frames: 4s\naspect_ratio: 16:9\nseed: 7\nflow: null\n")
    values = values_of("--config", str(config), "--seed=9", "--cfg_scale", "2.5")
    assert (values["cfg_scale"], values["num_frames"], values["seed"]) == (2.5, 102, 9)
    assert (values["aspect_ratio"], values["num_sampling_steps"]) == ("16:9", 30)


@pytest.mark.parametrize("word", ["True", "true", "t", "yes", "Y", "1"])
def test_words_for_true(word: str) -> None:
    assert values_of("--flash-attn", word)["flash_attn"] is True


@pytest.mark.parametrize("word", ["False", "FALSE", "f", "no", "n", "0"])
def test_words_for_false(word: str) -> None:
    assert values_of("--qk_norm", word)["qk_norm"] is False


def test_printed_config_reads_back_to_the_same_values(tmp_path: Path) -> None:
    prompts = [
        "a: b # c",
        "",
        "null",
        "9:16",
        "yes",
        "- x",
        "zwei\nZeilen",
        "一只猫 🐈",
        "'\"",
        "~",
    ]
    argv = ["--prompt", *prompts, "--image-size", "97", "163", "--aes", "none", "--seed", "5"]
    argv += ["--camera-motion", "none", "--prompt-as-path", "--cpu-threads", "3"]
    argv += ["--cfg-scale", "1e-3", "--frame-interval", "3"]
    values = values_of(*argv)
    saved = tmp_path / "saved.yaml"
    saved.write_text(print_config(values), encoding="utf-8")
    again = values_of("--config", str(saved))
    assert again == values
    assert again["prompt"] == prompts
    assert (again["aes"], again["camera_motion"], again["save_fps"]) == (None, "none", 24)


def test_a_file_that_is_not_there_is_told_with_the_flag_that_names_it() -> None:
    with pytest.raises(UserError, match=r"^--sweep 'nowhere': there is no such file"):
        read_config("nowhere", "--sweep")


def test_a_printed_config_holds_no_login_of_a_video_that_is_not_used() -> None:
    address = "https://me:hunter2@videos.example/a.mp4"
    for strength in ("0.5", "1"):
        text = print_config(values_of("--edit", address, "--edit-strength", strength))
        assert "hunter2" not in text


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_makes_a_request(config: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, "--config", str(config), "--prompt", "x")
    request = job.tasks[0].request
    resolution, _, duration = config.stem.partition("-")
    if duration:
        frames = {"image": 1, "2s": 51, "4s": 102, "8s": 204, "16s": 408}
        assert request.height == int(resolution.removesuffix("p"))
        assert request.num_frames == frames[duration]
        size = ("--resolution", resolution, "--num-frames", duration)
        assert job.notes == values_notes("--prompt", "x", *size)
    assert job.tasks[0].output.suffix == (".png" if request.is_image else ".mp4")


def values_notes(*argv: str) -> tuple[str, ...]:
    return build_job(values_of(*argv)).notes


def test_base_config_writes_out_every_default() -> None:
    keys = {flag.key for flag in all_flags() if not flag.control and flag.program is None}
    path = ROOT / "configs" / "base.yaml"
    written = path.read_text(encoding="utf-8")
    assert written == base_config(), (
        "run: python -m opensora_sp.request.flags.docs base > configs/base.yaml"
    )
    assert set(read_config(str(path))) == keys
    assert values_of("--config", str(path)) == values_of()


def test_flags_page_is_the_one_that_the_table_writes() -> None:
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == docs_page(), "run: python -m opensora_sp.request.flags.docs > docs/flags.md"


def test_help_names_every_flag_of_its_program_and_no_other() -> None:
    said = help_text("infer")
    for flag in all_flags():
        assert (f"  {flag.name}" in said) == (flag.program is None), flag.name
    assert max(map(len, said.splitlines())) <= 100
    assert "--warmup-count" in help_text("benchmark")


def test_names_of_outputs(tmp_path: Path) -> None:
    def names(*argv: str) -> list[str]:
        tasks = job_of(tmp_path, *argv).tasks
        assert all(task.output.parent == tmp_path for task in tasks)
        return [task.output.name for task in tasks]

    assert names("--prompt", "a", "b") == ["sample_0000.mp4", "sample_0001.mp4"]
    assert names("--prompt", "a", "--num-frames", "image") == ["sample_0000.png"]
    assert names("--prompt", "a", "--num-sample", "2", "--sample-name", "x y") == [
        "x y_0000-0.mp4",
        "x y_0000-1.mp4",
    ]
    assert names("--prompt", "a cat", "a dog", "--prompt-as-path") == ["a cat.mp4", "a dog.mp4"]


AWKWARD = ["../../etc/passwd", "/abs", "..", ".", "", "   ", "a/b", "a\\b", "a\0b", "two\nlines"]
AWKWARD += [".hidden", ". . /x", "x" * 5000, "猫" * 300, "a cat", "A cat", "a cat", "x" * 4999]


def test_prompts_as_names_stay_in_the_directory_and_differ() -> None:
    stems = output_stems(list(enumerate(AWKWARD)), sample_name=None, prompt_as_path=True)
    assert len({stem.casefold() for stem in stems}) == len(AWKWARD)
    for stem in stems:
        assert stem.strip()
        assert not stem.startswith(".")
        assert not set("/\\\0\n") & set(stem)
        assert len(stem.encode()) < 230
        assert (Path("/out") / f"{stem}.mp4").parent == Path("/out")
    assert safe_stem("a cat, running") == "a cat, running"
    assert safe_stem("x" * 5000) != safe_stem("x" * 4999)


def test_prompt_file_keeps_the_indices_of_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff one \r\n\r\ntwo\u2028half\r\n三\r\nfive\r\n".encode())

    def read(*argv: str) -> list[tuple[int, str, str]]:
        tasks = job_of(tmp_path, "--prompt-path", str(file), *argv).tasks
        return [(t.request.prompt_index, t.request.prompt, t.output.stem[-4:]) for t in tasks]

    lines = [(0, "one", "0000"), (2, "two\u2028half", "0002"), (3, "三", "0003")]
    assert read() == [*lines, (4, "five", "0004")]
    assert read("--start-index", "1", "--end-index", "4") == lines[1:]
    assert read("--start-index", "4", "--end-index", "99") == [(4, "five", "0004")]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (1, [["a0"], ["a1"], ["b0"], ["b1"], ["c0"], ["c1"]]),
        (2, [["a0", "b0"], ["a1", "b1"], ["c0"], ["c1"]]),
        (9, [["a0", "b0", "c0"], ["a1", "b1", "c1"]]),
    ],
)
def test_batches_hold_one_sample_of_several_prompts(
    tmp_path: Path, batch: int, expected: list[list[str]]
) -> None:
    argv = ["--prompt", "a", "b", "c", "--num-sample", "2", "--batch-size", str(batch)]
    batches = job_of(tmp_path, *argv).batches()
    requests = [[task.request for task in group] for group in batches]
    assert [[f"{r.prompt}{r.sample_index}" for r in group] for group in requests] == expected


def test_request_facts_and_digest() -> None:
    request = Request(prompt="x", cfg_scale=7, height=720, width=1280, num_frames=408)
    assert request.latent_shape == (120, 90, 160)
    assert request.patch_grid == (45, 80)
    assert request.model_fps == 24
    assert Request(prompt="x", num_frames=1, fps=30).model_fps == 120
    assert Request(prompt="x", num_frames=51, micro_frame_size=51).latent_shape[0] == 13
    assert Request(prompt="x").decoded_size == (240, 424)
    same = Request(**json.loads(json.dumps(request.to_dict())))
    assert same == request
    assert same.digest() == request.digest()
    assert request.digest() == Request(**{**request.to_dict(), "cfg_scale": 7.0}).digest()
    changed = {"prompt": "y", "seed": 1, "prompt_index": 1, "cfg_scale": 6.9, "aes": None}
    digests = {Request(**{**request.to_dict(), key: v}).digest() for key, v in changed.items()}
    assert len(digests | {request.digest()}) == len(changed) + 1


@pytest.mark.parametrize(
    "field",
    [
        {"cfg_scale": math.nan},
        {"cfg_scale": math.inf},
        {"aes": -math.inf},
        {"steps": 0},
        {"steps": 3.0},
        {"seed": -1},
        {"seed": 2**63},
        {"num_frames": True},
        {"height": 8},
        {"prompt": None},
        {"prompt": "\udcff"},
        {"camera_motion": ""},
    ],
    ids=str,
)
def test_the_api_refuses_what_the_flags_refuse(field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        Request(**{"prompt": "x", **field})
