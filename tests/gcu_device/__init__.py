"""Builds the test double of an accelerator; see device.cpp and torch_gcu/ beside this file."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).parent
SOURCE = HERE / "device.cpp"
NAME = "gcu_test_device"


class CannotBuildError(Exception):
    """No compiler, no ninja, no headers: the last line of what the build said."""


def build() -> Path:
    """The extension for this Python and torch, built once for each of them on a machine."""
    known = f"{sys.version} {torch.__version__} {torch.__config__.show()}"
    key = hashlib.sha256(known.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"opensora-sp-gcu-device-{os.getuid()}" / key
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    built = folder / f"{NAME}.so"
    # The test workers all come here. Not in the folder itself, where torch has a lock of its own.
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            _compile(folder)
            (folder / "complete").touch()
    return built


def _compile(folder: Path) -> None:
    from torch.utils.cpp_extension import load

    try:
        load(NAME, [str(SOURCE)], build_directory=str(folder), extra_cflags=["-O0"])
    except Exception as error:  # what is missing differs by machine, and so does what is raised
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise CannotBuildError(lines[-1] if lines else str(error).strip()[:200]) from error
