"""The one command in front: its commands, their help, configurations by name, completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import environments
from started import start

from opensora_sp.cli.infer import main as infer
from opensora_sp.cli.main import COMMANDS, main
from opensora_sp.request.flags.docs import PROGRAMS
from opensora_sp.request.flags.table import all_flags
from opensora_sp.request.named_configs import names

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    *("torch", "transformers", "diffusers", "accelerate", "av", "numpy", "tqdm", "yaml"),
    *("http.client", "ssl", "urllib.request"),
)
OLD_NAMES = re.compile(r"launch/|\w+\.py\b|opensora_sp\.")
PROGRAM_COMMANDS = {about.command: program for program, about in PROGRAMS.items()}
TINY = ["--device", "cpu", "--dtype", "fp32", "--image-size", "32", "48", "--num-frames", "image"]
TINY += ["--num-sampling-steps", "1", "--text-cache", "off"]


def said(
    capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0, run: object = main
) -> tuple[str, str]:
    """Standard output and error of a command line that ends with `code`."""
    assert callable(run)
    try:
        ended = run(list(argv))
    except SystemExit as end:  # argparse's own --help
        ended = end.code or 0
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_names_installed_commands(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short, err = said(capsys, command, "--help")
    assert err == ""
    assert short.startswith(f"usage: opensora-sp {command}")
    assert not OLD_NAMES.search(short)
    assert max(map(len, short.splitlines())) <= 100
    flags = set(re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", short, re.MULTILINE))
    assert len(flags) <= 20
    if command in PROGRAM_COMMANDS:
        assert 5 <= len(flags) <= 15
        assert f"opensora-sp {command} --help all" in short
    whole, _ = said(capsys, command, "--help", "all")
    assert flags <= set(re.findall(r"--[a-z0-9-]+", whole))
    assert not OLD_NAMES.search(whole)


def test_help_all_names_every_flag_of_its_program(capsys: pytest.CaptureFixture[str]) -> None:
    for command, program in PROGRAM_COMMANDS.items():
        whole, _ = said(capsys, command, "--help", "all")
        for flag in all_flags():
            assert (f"  {flag.name}" in whole) == (flag.program in (None, program)), flag.name
        listed = {flag.name for flag in all_flags() if flag.program in (None, program)}
        assert set(PROGRAMS[program].first) <= listed
    assert said(capsys, "--help", run=infer) == said(capsys, "generate", "--help")


def test_help_loads_nothing_heavy() -> None:
    argvs = [["--help"], ["--version"], []]
    argvs += [[command, *words] for command in COMMANDS for words in (["--help"], ["-h", "all"])]
    code = (
        "import sys\n"
        "from opensora_sp.cli.main import main\n"
        f"for argv in {argvs!r}:\n"
        "    try:\n"
        "        main(argv)\n"
        "    except SystemExit:\n"
        "        pass\n"
        f"    loaded = set({HEAVY!r}) & set(sys.modules)\n"
        "    assert not loaded, (argv, loaded)\n"
    )
    done = start("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    overview, _ = said(capsys, "--help")
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", overview, re.MULTILINE)
    for named in re.findall(r"^  opensora-sp (\w+)", overview, re.MULTILINE):
        assert named in COMMANDS
    assert said(capsys, "--version")[0].startswith("opensora_sp ")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "a command is needed, one of generate, plan"),
        (["genrate"], "'genrate' is not a command; did you mean generate?"),
        (["--prompt", "x"], "opensora-sp generate --prompt"),
        (["\x1b[31m"], "'\\x1b[31m' is not a command"),
        (["compare", "a.json"], "takes 2 files, not 1: opensora-sp compare A.json B.json"),
        (["compare", "/none/a.json", "/none/b.json"], "--compare '/none/a.json'"),
        (["generate", "--prompt", "x", "--eval-count", "2"], "belongs to opensora-sp benchmark"),
        (["plan", "--device-memory", "lots"], "--device-memory 'lots'"),
        (["parity", "--doctor"], "--doctor and --parity are two examinations"),
        (["doctor", "--save"], "--save"),
        (["download"], "give a directory to download into"),
        (["convert", "dit", "/none/a", "/none/b"], "/none/a does not exist"),
        (["completion"], "completion bash"),
        (["completion", "fish"], "bash, zsh"),
    ],
    ids=lambda part: " ".join(part)[:40] if isinstance(part, list) else "",
)
def test_refusals_are_one_line(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, *argv, code=2)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_commands_do_what_the_old_names_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, "generate", "--prompt", "x", *TINY, "--save-dir", str(tmp_path / "new"))
    old = [*TINY, "--save-dir", str(tmp_path / "old")]
    said(capsys, "--prompt", "x", *old, run=infer)
    assert out == f"{tmp_path / 'new' / 'sample_0000.png'}\n"
    made = [(tmp_path / folder / "sample_0000.png").read_bytes() for folder in ("new", "old")]
    assert made[0] == made[1]
    reports = [str(tmp_path / f"{name}.json") for name in "ab"]
    for report in reports:
        measured = ["--warmup-count", "0", "--benchmark-save-path", report]
        said(capsys, "benchmark", "--prompt", "x", *measured, *old)
    compared, _ = said(capsys, "compare", *reports)
    assert compared == said(capsys, "benchmark", "--compare", *reports)[0]
    assert reports[0] in compared


def test_a_config_is_known_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"720p-16s", "144p-image", "base", "embedded"} <= set(names())
    for name in names():
        by_name = said(capsys, "generate", "--config", name, "--print-config")
        path = str(ROOT / "configs" / f"{name}.yaml")
        assert by_name == said(capsys, "generate", "--config", path, "--print-config")


def test_a_name_of_no_config_is_refused_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, err = said(capsys, "generate", "--config", "720p-16", "--print-config", code=2)
    assert err.startswith("error: --config '720p-16': there is no such file, and no configuration")
    assert "the nearest are 720p-16s" in err
    _, err = said(capsys, "plan", "--config", "zzz", code=2)
    assert all(name in err for name in names())
    # A path stays a path, and a file that is there is meant before a name.
    _, err = said(capsys, "generate", "--config", "./720p-16s", code=2)
    assert "No such file" in err
    (tmp_path / "720p-16s").write_text("seed: 7\n", encoding="utf-8")
    out, _ = said(capsys, "generate", "--config", "720p-16s", "--print-config")
    assert "seed: 7" in out
    assert "resolution: 240p" in out


# The vendor's two scripts, flag for flag, as its guide starts them.
VENDOR = """
--device cpu --ckpt-path-dit dit --ckpt-path-t5 t5 --ckpt-path-vae2d vae2d --ckpt-path-vae3d vae3d
--num-frames 2s --resolution 720p --aspect-ratio 9:16 --sample-name sample
--save-dir ./samples/samples/ --prompt a b --start-index 0 --end-index 2 --num-sample 1
--prompt-as-path --batch-size 1 --seed 42 --dtype bf16 --fps 24 --save-fps 24 --frame-interval 1
--num-sampling-steps 30 --cfg-scale 7.0 --loop 1 --condition-frame-length 5
--reference-path a.png b.png --mask-strategy 0 0 --align 5 --aes 6.5 --flow 3 --camera-motion none
--watermark False --verbose True --model-max-length 300 --micro-batch-size 4 --micro-frame-size 17
--enable-compile False --flash-attn False --layernorm-kernel False --qk-norm True
--llm-refine False --prompt-generator m
"""


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("demo_open_sora", "--image-size 720 1280"),
        (
            "benchmark_open_sora",
            "--warmup-count 1 --eval-count 1 --benchmark-save-path r.json",
        ),
    ],
)
def test_the_vendor_s_command_lines_are_accepted(script: str, more: str) -> None:
    flags = f"{VENDOR} {more}".split()
    done = start(f"scripts/{script}.py", *flags, "--print-config", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resolution: 720p" in done.stdout
    assert "num_frames: 51" in done.stdout
    assert ("eval_count: 1" in done.stdout) == (script == "benchmark_open_sora")
    refused = start(f"scripts/{script}.py", *flags, "--dtype", "fp8", cwd=ROOT)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --dtype 'fp8'")


def test_the_vendor_s_demo_generates(tmp_path: Path) -> None:
    door = str(ROOT / "scripts" / "demo_open_sora.py")
    done = start(door, "--prompt", "x", *TINY, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "samples/samples/sample_0000.png\n"


def complete(shell_script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = f"source {shell_script}; COMP_WORDS=({' '.join(words[:-1])} '{words[-1]}'); "
    line += f"COMP_CWORD={len(words) - 1}; _shtab_opensora_sp opensora-sp '{words[-1]}' "
    line += f"'{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_flags_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(said(capsys, "completion", "bash")[0], encoding="utf-8")
    assert set(complete(script, "opensora-sp", "")) >= set(COMMANDS)
    saving = ["--save-fps", "--save-dir", "--save-every"]
    assert complete(script, "opensora-sp", "generate", "--sav") == saving
    assert complete(script, "opensora-sp", "generate", "--dtype", "") == ["fp32", "fp16", "bf16"]
    assert complete(script, "opensora-sp", "plan", "--rank") == ["--ranks"]
    assert "--link-gbps" in complete(script, "opensora-sp", "parity", "--")
    assert "--doctor" not in complete(script, "opensora-sp", "doctor", "--")
    assert complete(script, "opensora-sp", "convert", "d") == ["dit"]
    assert "--floor" in complete(script, "opensora-sp", "quality", "--")
    zsh = said(capsys, "completion", "zsh")[0]
    assert zsh.startswith("#compdef opensora-sp")


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    _, err = said(capsys, "completion", "bash", code=2)
    assert "needs shtab" in err
    assert "pip install 'opensora_sp[completion]'" in err


def test_torchrun_starts_the_command_without_a_script(tmp_path: Path) -> None:
    """As `torchrun --no-python opensora-sp generate …`, with the command as pip installs it."""
    command = tmp_path / "bin" / "opensora-sp"
    command.parent.mkdir()
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom opensora_sp.cli.main import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    launcher += ["--no-python", "opensora-sp"]
    done = start(*launcher, "generate", "--prompt", "x", *TINY, cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "samples/samples/sample_0000.png\n"
    assert "on 2 x cpu" in done.stderr
    plan_help = ("-m", "opensora_sp", "plan", "--help")
    helped = [start(*plan_help, cwd=tmp_path, **own) for own in environments(2)]
    assert [done.stdout.count("usage: ") for done in helped] == [1, 0]  # rank 0 alone
