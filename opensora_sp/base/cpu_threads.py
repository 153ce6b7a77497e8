"""The number of CPU threads of each rank.

`apply_cpu_threads` has to run before torch is imported, because torch reads OMP_NUM_THREADS once.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from opensora_sp.base.errors import UserError
from opensora_sp.base.launcher import read_launch
from opensora_sp.base.outside_json import read_object

VARIABLE = "OMP_NUM_THREADS"
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_LOAD = Path("/proc/loadavg")
_LOOKS, _LOOK_SECONDS = 5, 0.01
# A narrower transformer gains nothing from a second thread: on two cores the embedded model is no
# faster with two threads than with one.
SMALL_WIDTH = 512


def available_cores(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """Cores that this process may use: its CPU affinity, limited by the quotas of its cgroups."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in _quotas(cgroups, own)]
    return max(1, min([cores, *quotas]))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """The quota, in cores, of each cgroup that this process belongs to."""
    places = [cgroups, cgroups / "cpu"]  # a container often sees its own cgroup as the root
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        base = cgroups / "cpu" if "cpu" in controllers.split(",") else cgroups
        if controllers == "" or base != cgroups:
            inner = base / path.strip("/")
            places += [inner, *(p for p in inner.parents if p.is_relative_to(base))]
    found = []
    for place in dict.fromkeys(places):
        quota, period = [*_text(place / "cpu.max").split(), "", ""][:2]
        if not quota:  # cgroup v1 has two files
            quota = _text(place / "cpu.cfs_quota_us").strip()
            period = _text(place / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            found.append(int(quota) / int(period))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def busy_elsewhere(ranks: int = 1, load: Path = _LOAD) -> int:
    """Threads of other programs that are ready to run now; 0 where the system does not tell.

    ranks: processes of this run on this machine. They are busy starting and are subtracted.
    """
    looks = []
    for look in range(_LOOKS):
        if look:
            time.sleep(_LOOK_SECONDS)
        running = [*_text(load).split(), *[""] * 4][3].partition("/")[0]
        if not running.isdecimal():
            return 0
        looks.append(int(running))
    return max(0, sorted(looks)[len(looks) // 2] - ranks)


def fair_share(cores: int, busy: int) -> int:
    """How many cores' time this process gets beside `busy` threads of other programs; at least 1.

    More threads would wait for each other, because an operation ends when its last thread ends.
    Measured on two cores beside two busy loops: a full-width pair of blocks takes 1.5 s with one
    thread, and 1.7 to 2.2 s with two.
    """
    return max(1, cores * cores // (cores + busy))


def transformer_width(directory: Path | None) -> int | None:
    """Channels of the transformer; None where config.json lacks them; 0 for the embedded model."""
    if directory is None:
        return 0
    try:
        width = read_object(directory / "config.json").get("hidden_size", None)
    except UserError:
        return None  # loading the model will report what is wrong with the file
    return width if isinstance(width, int) else None


def choose_threads(
    wanted: int | None,
    device: str | None,
    environ: Mapping[str, str],
    cores: int,
    width: int | None = None,
    busy: int = 0,
) -> int | None:
    """Threads for this rank; None leaves them to the environment and torch.

    wanted: the user's choice. None chooses, unless the device is an accelerator or the user has set
    OMP_NUM_THREADS. torchrun sets that variable to 1 where it was unset, so a 1 under torchrun does
    not count as the user's choice.
    width: channels of the transformer. A narrow one gets one thread.
    busy: threads of other programs, see `fair_share`.
    """
    if wanted is not None:
        return wanted
    if device not in (None, "cpu"):
        return None
    launched = bool(environ.get("LOCAL_WORLD_SIZE"))
    ranks = read_launch(environ).local_world_size if launched else None
    inherited = environ.get(VARIABLE)
    if inherited is not None and (ranks is None or inherited != "1"):
        return None
    if width is not None and width < SMALL_WIDTH:
        return 1
    return max(1, fair_share(cores, busy) // (ranks or 1))


def apply_cpu_threads(
    wanted: int | None,
    device: str | None,
    environ: MutableMapping[str, str] = os.environ,
    transformer: Path | None = None,
) -> int | None:
    """Set OMP_NUM_THREADS for this rank. Returns the number, or None where it is left unchanged.

    transformer: its checkpoint directory; None for the embedded model.
    """
    ranks = read_launch(environ).local_world_size
    width = transformer_width(transformer)
    small = width is not None and width < SMALL_WIDTH
    threads = choose_threads(
        wanted,
        device,
        environ,
        available_cores(),
        width,
        0 if small or wanted is not None else busy_elsewhere(ranks),
    )
    if threads is not None:
        environ[VARIABLE] = str(threads)
    return threads
