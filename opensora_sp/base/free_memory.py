"""How much memory is free on a device."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> float:
    """Bytes that are free on the device; infinite where the backend cannot tell."""
    if device.type == "cpu":
        return _available_host_bytes(_MEMINFO)
    module = getattr(torch, device.type, None)
    try:
        return float(module.mem_get_info(device)[0])  # type: ignore[union-attr]
    except Exception:  # older vendor builds lack it, or refuse the argument
        return float("inf")


def _available_host_bytes(meminfo: Path) -> float:
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float("inf")
