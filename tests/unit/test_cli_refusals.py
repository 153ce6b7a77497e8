"""Requests that cannot be run: one clear line, exit code 2, nothing written, torch not imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_sp.cli.console import HEAD_START_S
from opensora_sp.cli.infer import main

ROOT = Path(__file__).resolve().parents[2]

DIGITS = "9" * 5000  # more than int() reads

# What is typed ({tmp} is an empty folder with the files below), and what the line must say.
REFUSALS: list[tuple[list[str], list[str]]] = [
    ([], ["--prompt", "--prompt-path"]),
    (["--prompt"], ["--prompt"]),
    (["--prompt", "x", "--resolution", "333p"], ["--resolution", "333p", "240p"]),
    (["--prompt", "x", "--resolution", "256"], ["--resolution", "256", "9:16", "12:25"]),
    (["--prompt", "x", "--aspect-ratio", "16x9"], ["--aspect-ratio", "16x9", "16:9"]),
    (["--prompt", "x", "--image-size", "0", "64"], ["--image-size", "0"]),
    (["--prompt", "x", "--image-size", "64"], ["--image-size"]),
    (["--prompt", "x", "--num-frames", "2.5"], ["--num-frames", "2.5", "16s"]),
    (["--prompt", "x", "--num-frames", "-4"], ["--num-frames", "-4"]),
    (["--prompt", "x", "--num-sampling-steps", "0"], ["--num-sampling-steps", "0"]),
    (["--prompt", "x", "--cfg-scale", "nan"], ["--cfg-scale", "nan"]),
    (["--prompt", "x", "--cfg-scale=-inf"], ["--cfg-scale", "-inf"]),
    (["--prompt", "x", "--cfg-scale", "-1"], ["--cfg-scale", "-1"]),
    (["--prompt", "x", "--aes", "inf"], ["--aes", "inf"]),
    (["--prompt", "x", "--fps", "0"], ["--fps", "0"]),
    (["--prompt", "x", "--save-fps", "1e9"], ["--save-fps", "1e9"]),
    (["--prompt", "x", "--seed", "1.5"], ["--seed", "1.5"]),
    (["--prompt", "x", "--seed", "-1"], ["--seed", "-1"]),
    (["--prompt", "x", "--batch-size", "0"], ["--batch-size", "0"]),
    (["--prompt", "x", "--micro-frame-size", "0"], ["--micro-frame-size", "0"]),
    (["--prompt", "x", "--dtype", "fp8"], ["--dtype", "fp8", "bf16"]),
    (["--prompt", "x", "--device", "tpu"], ["--device", "tpu", "gcu"]),
    (["--prompt", "x", "--device", "cpu", "--backend", "nccl"], ["--backend", "nccl"]),
    (["--prompt", "x", "--flash-attn", "maybe"], ["--flash-attn", "maybe"]),
    (["--prompt", "x", "--promt-as-path"], ["--promt-as-path", "--prompt-as-path"]),
    (["--prompt", "x", "--seed", "1", "2"], ["2"]),
    (["--prompt", "x", "--cpu-threads", "0"], ["--cpu-threads", "0"]),
    (["--prompt", "x", "--sequence-parallel", "3"], ["--sequence-parallel", "3"]),
    (["--prompt", "x", "--watermark", "maybe"], ["--watermark", "maybe"]),
    (["--prompt", "x", "--llm-refine", "y"], ["--llm-refine", "OPENAI_API_KEY"]),
    (["--prompt", "x", "--prompt-generator", ""], ["--prompt-generator", "''"]),
    (["--prompt", "x", "--eval-count", "3"], ["--eval-count", "3", "opensora-sp benchmark"]),
    (["--prompt", 'x {"reference_path": "a.png"}'], ["reference", "a.png"]),
    (["--prompt", 'x {"reference": "a.png"}'], ["prompt", "reference", "mask_strategy"]),
    (["--prompt", 'x {"mask_strategy": "0"'], ["prompt", "JSON"]),
    (["--prompt", "x", "--image", "{tmp}/none.png"], ["reference", "none.png"]),
    (["--prompt", "x", "--edit", "{tmp}/one.txt"], ["reference", "one.txt"]),
    (["--prompt", "x", "--image", "http://x/a.png"], ["http://x/a.png", "--allow-remote"]),
    (["--prompt", "x", "--mask-strategy", "0,0,0,0,1,2"], ["mask strategy", "edit_ratio"]),
    (["--prompt", "x", "--mask-strategy", "0,1"], ["mask strategy", "reference 1"]),
    (["--prompt", "x", "--loop", "2", "--num-frames", "17"], ["--loop", "17"]),
    (["--prompt", "x", "--edit", "a", "--edit-strength", "2"], ["--edit-strength", "2"]),
    (["--prompt", "|0|a cat|two|a dog"], ["prompt", "two"]),
    (["--prompt", "bad \udcff byte"], ["--prompt", "byte", "UTF-8"]),
    (["--prompt-path", "{tmp}/none.txt"], ["--prompt-path", "none.txt"]),
    (["--prompt-path", "{tmp}/empty.txt"], ["--prompt-path", "empty.txt", "no prompt"]),
    (["--prompt-path", "{tmp}/latin.txt"], ["--prompt-path", "latin.txt", "UTF-8"]),
    (["--prompt-path", "{tmp}"], ["--prompt-path"]),
    (["--prompt-path", "{tmp}/one.txt", "--start-index", "7"], ["--start-index", "7"]),
    (["--prompt-path", "{tmp}/one.txt", "--end-index", "0"], ["--end-index", "0"]),
    (["--prompt", "x", "--save-dir", "{tmp}/one.txt/out"], ["--save-dir", "one.txt"]),
    (["--prompt", "x", "--save-dir", ""], ["--save-dir", "''"]),
    (["--prompt", "x", "--sample-name", "../x"], ["--sample-name", "../x"]),
    (["--prompt", "x", "--ckpt-path-dit", "{tmp}"], ["--ckpt-path-t5", "--ckpt-path-vae3d"]),
    (
        ["--prompt", "x", *(f"--ckpt-path-{m}={{tmp}}" for m in ("dit", "t5", "vae2d", "vae3d"))],
        ["--ckpt-path-dit", "config.json"],
    ),
    (["--config", "{tmp}/none.yaml"], ["--config", "none.yaml"]),
    (["--config", "{tmp}/typo.yaml"], ["--config", "cfg_scael", "cfg_scale"]),
    (["--config", "{tmp}/twice.yaml"], ["--config", "seed", "line 2", "twice"]),
    (["--config", "{tmp}/broken.yaml"], ["--config", "broken.yaml", "line"]),
    (["--config", "{tmp}/object.yaml"], ["--config", "object.yaml"]),
    (["--config", "{tmp}/tag.yaml"], ["--config", "tag.yaml", "line 1", "python/int"]),
    (["--config", "{tmp}/value.yaml"], ["--cfg-scale", ".nan"]),
    (["--config", "{tmp}/escape.yaml"], ["--config", "escape.yaml", "not YAML"]),
    (["--config", "{tmp}/huge_escape.yaml"], ["--config", "huge_escape.yaml", "not YAML"]),
    (["--config", "{tmp}/version.yaml"], ["--config", "version.yaml", "not YAML"]),
    (["--config", "{tmp}/half.yaml"], ["--prompt", "ud800", "UTF-8"]),
    (["--config", "{tmp}/half_path.yaml"], ["--save-dir", "ud800", "usable path"]),
    (["--config", "{tmp}/half_key.yaml"], ["--config", "ud800", "not a key"]),
    (["--config", "{tmp}/half_word.yaml"], ["--dtype", "ud800", "bf16"]),
    (["--config", "{tmp}/half_tag.yaml"], ["--config", "half_tag.yaml"]),
    (["--prompt", "x", "--seed", DIGITS], ["--seed", "999", "whole number"]),
    (["--prompt", "x", "--num-frames", DIGITS], ["--num-frames", "999"]),
    (["--prompt", "x", "--image-size", DIGITS, "64"], ["--image-size", "999"]),
    (["--prompt", "x", "--cfg-scale", DIGITS], ["--cfg-scale", "999"]),
    (["--prompt", "x", "--verbose", DIGITS], ["--verbose", "999"]),
    (["--prompt", "x", "--deadlines", f"step={DIGITS}x"], ["--deadlines"]),
    (["--prompt", "x", "--aspect-ratio", f"{DIGITS}:9"], ["--aspect-ratio", "999"]),
    (["--prompt", "x", "--mask-strategy", f"0,{DIGITS}"], ["mask strategy", "whole numbers"]),
    (["--prompt", "x", "--mask-strategy", f"0,{DIGITS[:4000]}"], ["mask strategy", "999"]),
    (["--prompt", f"|0|a|{DIGITS}|b"], ["prompt", "not a clip number"]),
    (["--prompt", f"|0|a|{DIGITS[:4000]}|b"], ["prompt", "not a clip number"]),
    (["--prompt", 'x{"mask_strategy": ' + DIGITS + "}"], ["prompt", "not JSON"]),
    (["--prompt", 'x{"mask_strategy": ' + "[" * 50_000], ["prompt", "not JSON"]),
    (["--prompt", 'x{"mask_strategy": ' + "[" * 400 + "]" * 400 + "}"], ["must be a string"]),
    (["--prompt", "a." * 20_000], ["prompt", "40000 characters", "10000"]),
    (["--prompt", f"|0|a|2|{'aGVsbG8' * 2000}"], ["prompt", "14000 characters"]),
]
FILES: dict[str, bytes] = {
    "empty.txt": b"\n\n",
    "one.txt": b"a prompt\n",
    "latin.txt": "M\u00fcnchen\n".encode("latin-1"),
    "typo.yaml": b"cfg_scael: 3\n",
    "twice.yaml": b"seed: 1\nseed: 2\n",
    "broken.yaml": b"prompt: [x\n",
    "object.yaml": b"prompt: !!python/object/apply:os.system [ls]\n",
    "tag.yaml": b"seed: !!python/int 3\n",
    "value.yaml": b"cfg_scale: .nan\n",
    "escape.yaml": b'prompt: "\\U00110000"\n',
    "huge_escape.yaml": b'prompt: "\\UFFFFFFFF"\n',
    "version.yaml": b"%YAML 1." + b"9" * 5000 + b"\n---\nseed: 1\n",
    "half.yaml": b'prompt: "\\ud800"\n',
    "half_path.yaml": b'save_dir: "\\ud800"\n',
    "half_key.yaml": b'"\\ud800": 1\n',
    "half_word.yaml": b'dtype: "\\ud800"\n',
    "half_tag.yaml": b"seed: !<%ED%A0%80> 1\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the files above, for a single process of one rank."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def in_folder(argv: list[str], folder: Path) -> list[str]:
    return [word.replace("{tmp}", str(folder)) for word in argv]


@pytest.mark.parametrize(("argv", "told"), REFUSALS, ids=lambda part: " ".join(part)[:60])
def test_one_line_and_exit_2_and_nothing_written(
    argv: list[str], told: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = in_folder(argv, folder)
    if "--save-dir" not in argv:
        argv += ["--save-dir", str(folder / "out")]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for word in told:
        assert word in err
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_only_rank_0_speaks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert main(["--prompt", "x", "--seed", "no"]) == 2
    assert capsys.readouterr() == ("", "")
    assert waited == [HEAD_START_S]  # so that torchrun does not end rank 0 before it has spoken


def launch(*argv: str) -> subprocess.CompletedProcess[str]:
    """The real command, away from the checkout and without its installation in the way."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "infer.py"), *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "PYTHONPATH"}},
    )


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--prompt", "x", "--cfg_scale", "nan"], "--cfg-scale 'nan'"),
        (["--config", "{tmp}/typo.yaml"], "did you mean cfg_scale"),
        (["--prompt-path", "{tmp}/empty.txt"], "no prompt"),
    ],
)
def test_the_real_command_refuses(argv: list[str], told: str, folder: Path) -> None:
    done = launch(*in_folder(argv, folder))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_the_real_command_answers_without_running(folder: Path) -> None:
    helped, version = launch("--help"), launch("--version")
    assert helped.returncode == version.returncode == 0
    assert "--ckpt-path-dit" in helped.stdout
    assert version.stdout.startswith("opensora_sp ")
    printed = launch("--print-config", "--resolution", "720p", "--num-frames", "16s")
    assert printed.returncode == 0
    assert "latents 120x90x160" in printed.stdout
    assert "num_frames: 408" in printed.stdout


def test_refusals_import_nothing_heavy(folder: Path) -> None:
    """In a fresh process, because the tests themselves import torch."""
    # A reference that is there is looked into, which needs PyAV.
    light = [argv for argv, _ in REFUSALS if "{tmp}/one.txt" not in argv or "--edit" not in argv]
    argvs = [in_folder(argv, folder) for argv in light] + [["--help"], ["--print-config"]]
    program = (
        "import sys\n"
        "from opensora_sp.cli.infer import main\n"
        f"codes = {{main(argv) for argv in {argvs!r}}}\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'accelerate', 'av', 'numpy', 'tqdm'}\n"
        "assert codes == {0, 2}, codes\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-"],
        input=program,  # longer than a command line may be
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
