"""Test doubles of accelerators: what a device and its plugin are to torch, on host memory.

A double is a name in DOUBLES and a folder of the device's name, which processes have on their path:
it holds the module that makes the device known to torch, such as the plugin. The rest is shared:
device.cpp is the device, double.py its Python side, collectives.py its process group.
"""

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
# What torch's own code calls the device; PrivateUse1 is any that a plugin brings.
DOUBLES = {"gcu": "PrivateUse1"}


class CannotBuildError(Exception):
    """No compiler, no ninja, no headers: the last line of what the build said."""


def build(device: str) -> Path:
    """The double's extension for this Python and torch, built once for each of them on a machine.

    Raises CannotBuildError.
    """
    key = DOUBLES[device]
    known = f"{key} {sys.version} {torch.__version__} {torch.__config__.show()}"
    digest = hashlib.sha256(known.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"opensora-sp-device-doubles-{os.getuid()}" / digest
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = f"device_double_{key.lower()}"
    # The test workers all come here. Not in the folder itself, where torch has a lock of its own.
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            _compile(folder, name, key)
            (folder / "complete").touch()
    return folder / f"{name}.so"


def _compile(folder: Path, name: str, key: str) -> None:
    from torch.utils.cpp_extension import load

    flags = ["-O0", f"-DDEVICE_KEY={key}"]
    try:
        load(name, [str(SOURCE)], build_directory=str(folder), extra_cflags=flags)
    except Exception as error:  # what is missing differs by machine, and so does what is raised
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise CannotBuildError(lines[-1] if lines else str(error).strip()[:200]) from error
