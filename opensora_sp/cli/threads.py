"""Threads of each rank on the CPU. Call before torch is imported: it reads the variable once."""

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
VARIABLE = "OMP_NUM_THREADS"


def available_cores(quota_file: Path = _QUOTA_FILE) -> int:
    """Cores that this process may use: its affinity, cut by a container's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no quota file, or "max": no quota
        return cores


def choose_threads(
    wanted: int | None, device: str | None, environ: Mapping[str, str], cores: int
) -> int | None:
    """Threads for this rank; None leaves them to the environment and torch.

    `wanted` None shares the node's cores among its ranks, unless the device is an accelerator or
    the person has set OMP_NUM_THREADS. torchrun sets it to 1 where it was unset, so a 1 under
    torchrun is not taken for a person's choice.
    """
    if wanted is not None:
        return wanted
    if device not in (None, "cpu"):
        return None
    ranks = _positive(environ.get("LOCAL_WORLD_SIZE"))
    inherited = environ.get(VARIABLE)
    if inherited is not None and (ranks is None or inherited != "1"):
        return None
    return max(1, cores // (ranks or 1))


def apply_cpu_threads(
    wanted: int | None, device: str | None, environ: MutableMapping[str, str] = os.environ
) -> int | None:
    """Set OMP_NUM_THREADS for this rank; returns the number, or None where it is left alone."""
    threads = choose_threads(wanted, device, environ, available_cores())
    if threads is not None:
        environ[VARIABLE] = str(threads)
    return threads


def _positive(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and int(text) > 0 else None
