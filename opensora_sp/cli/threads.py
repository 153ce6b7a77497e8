"""Threads of each rank on the CPU. Call before torch is imported: it reads the variable once."""

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from opensora_sp.launcher import read_launch

_CGROUPS = Path("/sys/fs/cgroup")
VARIABLE = "OMP_NUM_THREADS"
# Up to this width a rank's products are too small to be worth a second thread: the embedded model
# has 96, the published one 1152.
NARROW = 256


def available_cores(cgroups: Path = _CGROUPS) -> int:
    """Cores that this process may use: its affinity, cut by a container's quota (v1 and v2)."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    for share in _quotas(cgroups):
        cores = max(1, min(cores, math.ceil(share)))
    return cores


def _quotas(cgroups: Path) -> list[float]:
    """Cores that each group of this process may use, where one is limited."""
    files = [(cgroups / "cpu.max", None)]
    for name in ("cpu", "cpu,cpuacct"):
        folder = cgroups / name
        files.append((folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"))
    found = []
    for file, period_file in files:
        try:
            words = file.read_text(encoding="ascii").split()
            if period_file is not None:
                words += period_file.read_text(encoding="ascii").split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):  # no such file, or "max": no quota
            continue
        if quota > 0 and period > 0:  # -1: no quota
            found.append(quota / period)
    return found


def crowding() -> float:
    """Processes that want a core, for each core of the machine; 0 where that is not known."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 0.0


def choose_threads(
    wanted: int | None,
    device: str | None,
    environ: Mapping[str, str],
    cores: int,
    *,
    width: int | None = None,
    crowd: float = 0.0,
) -> int | None:
    """Threads for this rank; None leaves them to the environment and torch.

    `wanted` None shares the node's cores among its ranks, unless the device is an accelerator or
    the person has set OMP_NUM_THREADS. torchrun sets it to 1 where it was unset, so a 1 under
    torchrun is not taken for a person's choice. width: the transformer's hidden size; a narrow one
    takes one thread. crowd: as `crowding`; above 1 per core a rank takes that much less.
    """
    if wanted is not None:
        return wanted
    if device not in (None, "cpu"):
        return None
    launched = environ.get("LOCAL_WORLD_SIZE") is not None
    inherited = environ.get(VARIABLE)
    if inherited is not None and not (launched and inherited == "1"):
        return None
    if width is not None and width <= NARROW:
        return 1
    share = cores / read_launch(environ).local_world_size
    return max(1, int(share / max(1.0, crowd)))


def apply_cpu_threads(
    wanted: int | None,
    device: str | None,
    environ: MutableMapping[str, str] = os.environ,
    *,
    width: int | None = None,
) -> int | None:
    """Set OMP_NUM_THREADS for this rank; returns the number, or None where it is left alone.

    width: as for `choose_threads`.
    """
    cores, crowd = available_cores(), crowding()
    threads = choose_threads(wanted, device, environ, cores, width=width, crowd=crowd)
    if threads is not None:
        environ[VARIABLE] = str(threads)
    return threads
