"""Requests that cannot be run: one clear line, exit code 2, nothing written, torch not imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import FILES, BadInput, cell, given, rows, try_it, wrong

from opensora_sp.cli.console import HEAD_START_S
from opensora_sp.cli.infer import main
from opensora_sp.cli.serve import main as serve

ROOT = Path(__file__).resolve().parents[2]
ROWS = rows()


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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: given(row)[:60])
def test_one_line_and_exit_2_and_nothing_written(row: BadInput, tmp_path: Path) -> None:
    if row.argv[0] in ("serve", "work"):
        pytest.importorskip("dbos")  # without the extra it says so before it looks at the rest
    assert wrong(row, try_it(row, tmp_path)) == ""


def test_the_page_is_made_from_the_table() -> None:
    page = (ROOT / "docs" / "bad_inputs.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(shown) == len(ROWS)
    for row, line in zip(ROWS, shown, strict=True):
        assert line.startswith(f"| {row.kind} | {cell(given(row))} | `error: ") or "note: " in line


def test_only_rank_0_speaks(
    sleeps: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(["--prompt", "x", "--seed", "no"]) == 2
    assert capsys.readouterr() == ("", "")
    assert sleeps == [HEAD_START_S]  # so that torchrun does not end rank 0 before it has spoken


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
    plain = [row for row in ROWS if not (row.heavy or row.makes or row.env)]
    light = [row.argv[1:] for row in plain if row.argv[0] == "generate"]
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


@pytest.mark.parametrize("flag", ["--version", "--count", "--markdown", "--print-config"])
def test_a_server_is_not_started_by_a_flag_of_another_command(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each was left out in silence, and the server started."""
    pytest.importorskip("dbos")
    assert serve(["--save-dir", "nowhere", flag]) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} ")
