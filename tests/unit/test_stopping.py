"""Ctrl-C and SIGTERM in the middle of a run: the exit code says so, what was done is saved."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["denoising", "writing"])
def test_a_stopped_run_leaves_its_state_alone(
    tmp_path: Path, number: signal.Signals, stage: str
) -> None:
    # Endless steps, or endless clips whose file is being written.
    endless = {
        "denoising": ["--num-sampling-steps", "90000", "--save-every", "0"],
        "writing": ["--num-sampling-steps", "1", "--loop", "9000", "--num-frames", "34"],
    }[stage]
    command = [sys.executable, "launch/infer.py", "--prompt", "x", "--image-size", "32", "48"]
    command += ["--num-frames", "17", "--device", "cpu", "--dtype", "fp32", *endless]
    process = subprocess.Popen(
        [*command, "--save-dir", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    if stage == "denoising":
        while "step/s" not in process.stderr.read(1000):
            assert process.poll() is None
    else:
        end = time.monotonic() + 240
        while not list(tmp_path.glob(".opensora-sp-*.tmp")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + number
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == [".opensora-sp"]
    saved = sorted(path.name for path in (tmp_path / ".opensora-sp").iterdir())
    assert saved[0] == (
        "sample_0000.mp4.clip0000.safetensors" if stage == "writing" else "sample_0000.mp4.json"
    )
    # Only an endless clip is far enough from its next regular save to need one at the end.
    assert saved[-1] == "sample_0000.mp4.step.safetensors" or stage == "writing"
    assert not [name for name in saved if name.endswith(".tmp")]
