"""Ctrl-C and SIGTERM in the middle of a run: the exit code says so, what was done is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Copies

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--prompt", "x", "--image-size", "32", "48", "--num-frames", "17", "--device", "cpu"]
FLAGS += ["--dtype", "fp32"]
# Endless steps, or endless clips whose file is being written.
ENDLESS = {
    "denoising": ["--num-sampling-steps", "90000", "--save-every", "0"],
    "writing": ["--num-sampling-steps", "1", "--loop", "9000", "--num-frames", "34"],
}


def wait_until(stage: str, folder: Path, err: Path, running: Callable[[], bool]) -> None:
    """Return when a run into `folder` is in this stage."""
    end = time.monotonic() + 240
    while True:
        # The bar is drawn before the first step too.
        if stage == "denoising" and err.read_text(errors="replace").count("step/s") > 2:
            return
        if stage == "writing" and list(folder.glob(".opensora-sp-*.tmp")):
            return
        assert running(), err.read_text(errors="replace")
        assert time.monotonic() < end
        time.sleep(0.05)


def check_what_is_left(stage: str, folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == [".opensora-sp"]
    saved = sorted(path.name for path in (folder / ".opensora-sp").iterdir())
    assert saved[0] == (
        "sample_0000.mp4.clip0000.safetensors" if stage == "writing" else "sample_0000.mp4.json"
    )
    # Only an endless clip is far enough from its next regular save to need one at the end.
    assert saved[-1] == "sample_0000.mp4.step.safetensors" or stage == "writing"
    assert not [name for name in saved if name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("denoising", signal.SIGTERM),
        ("writing", signal.SIGINT),
        ("writing", signal.SIGTERM),
    ],
)
def test_a_stopped_run_leaves_its_state_alone(
    tmp_path: Path, number: signal.Signals, stage: str
) -> None:
    out, err, made = tmp_path / "stdout", tmp_path / "stderr", tmp_path / "made"
    made.mkdir()
    argv = [*FLAGS, *ENDLESS[stage], "--save-dir", str(made)]
    copy = Copies(argv, [dict(os.environ)], out, err)
    try:
        wait_until(stage, made, err, lambda: copy.codes() == [None])
        os.kill(copy.pids[0], number)
        assert copy.finish() == [128 + number]
    finally:
        copy.kill()
    assert out.read_text() == ""
    check_what_is_left(stage, made)


def test_ctrl_c_ends_the_program_that_a_person_started(tmp_path: Path) -> None:
    """As the cases above, in an interpreter of its own."""
    err, made = tmp_path / "stderr", tmp_path / "made"
    made.mkdir()
    argv = [*FLAGS, *ENDLESS["denoising"], "--save-dir", str(made)]
    with err.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "launch/infer.py", *argv],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
    try:
        wait_until("denoising", made, err, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert said == ""
    check_what_is_left("denoising", made)
