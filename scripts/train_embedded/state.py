"""Training states on disk, and the device to train on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from opensora_sp.models.tensor_files import load_tensor_file


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def read_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state that was saved there, or None."""
    if not path.is_file():
        return None
    state: dict[str, Any] = load_tensor_file(path, device)
    return state


def pick_device(name: str) -> torch.device:
    """The device of that name; an accelerator that torch does not have is refused."""
    device = torch.device(name)
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and not (module and module.is_available()):
        raise SystemExit(f"--device {name}: torch sees no such device here")
    return device
