"""In a list a file is completed while the next video is made, and its state stays till then."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from command import SMALL, saved, stages

from opensora_sp.cli.infer import main
from opensora_sp.jobs import run as jobs
from opensora_sp.jobs.records import Stage, write_record
from opensora_sp.media.writer import VideoWriter

WITHIN_S = 120.0


def test_the_next_video_begins_before_the_file_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_begins = threading.Event()
    found: dict[str, Any] = {}
    close = VideoWriter._close

    def noted(output: Path, identity: Any, stage: Stage) -> None:
        write_record(output, identity, stage)
        if (output.name, stage) == ("sample_0001.mp4", "denoising"):
            next_begins.set()

    def late(self: VideoWriter, *error: Any) -> None:
        if self.path.name == "sample_0000.mp4":
            found["overlapped"] = next_begins.wait(WITHIN_S)
            found["there"] = self.path.exists()
            found["stage"] = stages(tmp_path)["sample_0000.mp4"]
            found["saved"] = [name for name in saved(tmp_path) if "sample_0000" in name]
        close(self, *error)

    monkeypatch.setattr(jobs, "write_record", noted)
    monkeypatch.setattr(VideoWriter, "_close", late)
    flags = ["--prompt", "one", "two", "--num-frames", "17", "--num-sampling-steps", "1"]
    assert main([*SMALL, *flags, "--save-every", "1", "--save-dir", str(tmp_path)]) == 0
    assert found["overlapped"]
    assert not found["there"]
    assert found["stage"] == "latents saved"
    assert found["saved"]
    assert stages(tmp_path) == {"sample_0000.mp4": "done", "sample_0001.mp4": "done"}
    assert saved(tmp_path) == {}
