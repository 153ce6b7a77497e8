"""Checks of the environment: versions, backend, devices, encoder, disk, memory."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from opensora_sp.base.cpu_threads import available_cores
from opensora_sp.base.free_memory import free_bytes
from opensora_sp.base.machine import run_tool
from opensora_sp.base.wording import plural
from opensora_sp.models.kernels.cpu_half import computes_natively
from opensora_sp.parallel.backend import device_module, load_plugin, visible_note
from opensora_sp.parallel.backend_table import for_device
from opensora_sp.parallel.session import Session
from opensora_sp.verification.doctor.check_result import (
    CheckResult,
    attempt,
    failed,
    passed,
    skipped,
)

# The oldest versions that the program is tested with, as in pyproject.toml; a test compares them.
OLDEST = {
    "torch": (2, 3),
    "transformers": (4, 44),
    "diffusers": (0, 29),
    "accelerate": (1, 0),
    "safetensors": (0, 4),
    "huggingface_hub": (0, 24),
    "av": (17, 0, 1),
    "pillow": (10, 1),
    "numpy": (1,),
    "sentencepiece": (0, 2),
    "protobuf": (4,),
    "ftfy": (6, 1),
    "beautifulsoup4": (4, 12),
    "pyyaml": (6,),
    "tqdm": (4, 66),
}
_LEAST_DISK = 2 << 30  # bytes; a 16 s clip is tens of megabytes, a lossless one a gigabyte
_LEAST_MEMORY = 2 << 30  # bytes a rank; the published models need more: opensora-sp plan says what
_GIB = 2**30


def check_versions() -> list[CheckResult]:
    """Python and every package that the program imports."""
    python = f"{platform.python_version()}, {sys.executable}"
    good = sys.version_info >= (3, 10)
    results = [(passed if good else failed)("versions", "python", python)]
    for package, oldest in OLDEST.items():
        results.append(attempt("versions", package, partial(_package, package, oldest)))
    return results


def _package(name: str, oldest: tuple[int, ...]) -> CheckResult:
    needed = ".".join(map(str, oldest))
    try:
        found = version(name)
    except PackageNotFoundError:
        return failed("versions", name, f"not installed; pip install '{name}>={needed}'")
    numbers = []
    for part in found.split("+")[0].split(".")[: len(oldest)]:
        if not part.isdecimal():
            break
        numbers.append(int(part))
    if tuple(numbers) < oldest:
        return failed("versions", name, f"{found} is older than {needed}")
    return passed("versions", name, found)


def check_device(session: Session) -> list[CheckResult]:
    """Check the backend's plugin and the devices. Returns this rank's results."""
    kind, device = session.device.type, session.device
    return [
        attempt("device", "backend", lambda: _backend(session)),
        attempt("device", "devices", lambda: _devices(kind)),
        attempt("device", "bf16", lambda: _bf16(device)),
        attempt("device", "free memory", lambda: _device_memory(device)),
        attempt("device", "tool", lambda: _tool(kind)),
    ]


def _backend(session: Session) -> CheckResult:
    load_plugin(session.device.type)
    row = session.backend
    plugin = "" if row.plugin is None else f", from {row.plugin}"
    ranks = plural(session.world_size, "rank")
    return passed("device", "backend", f"{row.name} on {session.device.type}{plugin}, {ranks}")


def _devices(kind: str) -> CheckResult:
    if kind == "cpu":
        return passed("device", "devices", f"cpu, {available_cores()} usable cores")
    module = device_module(kind)
    where = visible_note(kind)
    names = [str(module.get_device_name(i)) for i in range(module.device_count())]
    if not names:
        return failed("device", "devices", f"no {kind} device is visible{where}")
    return passed("device", "devices", f"{len(names)} × {', '.join(sorted(set(names)))}{where}")


def _bf16(device: torch.device) -> CheckResult:
    if device.type == "cpu":
        native = computes_natively(torch.bfloat16)
        return passed("device", "bf16", "native" if native else "stored; computed in float32")
    ask = getattr(device_module(device.type), "is_bf16_supported", None)
    if ask is None:
        return skipped("device", "bf16", "this build does not say; see the operations")
    return passed("device", "bf16", "native") if ask() else failed("device", "bf16", "no")


def _device_memory(device: torch.device) -> CheckResult:
    if device.type == "cpu":
        return skipped("device", "free memory", "the host's, below")
    free = free_bytes(device)
    if free == float("inf"):
        return skipped("device", "free memory", "this build does not say")
    return passed("device", "free memory", f"{free / _GIB:.1f} GiB")


def _tool(kind: str) -> CheckResult:
    tool = for_device(kind).tool
    if not tool:
        return skipped("device", "tool", "none for a CPU")
    if run_tool(tool) is None:
        return skipped("device", "tool", f"{tool[0]} is absent or does not answer")
    return passed("device", "tool", f"{tool[0]} answers")


def check_host(directory: Path, ranks_here: int) -> list[CheckResult]:
    """Check the encoder, disk and memory of this machine, on the leading rank."""
    return [
        attempt("host", "encoder", _encoder),
        attempt("host", "disk", lambda: _disk("disk", directory)),
        attempt("host", "temporary", lambda: _disk("temporary", Path(tempfile.gettempdir()))),
        attempt("host", "memory", lambda: _memory(ranks_here)),
        attempt("host", "shared memory", _shared_memory),
    ]


def _encoder() -> CheckResult:
    from opensora_sp.media.writer import probe_encoder

    probe_encoder(24, 96, 160)
    return passed("host", "encoder", "H.264 writes and reads back")


def _disk(name: str, directory: Path) -> CheckResult:
    place = directory.absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        return failed("host", name, f"{place} may not be written to")
    free = shutil.disk_usage(place).free
    said = f"{free / _GIB:.1f} GiB free at {place}"
    enough = free >= _LEAST_DISK
    return passed("host", name, said) if enough else failed("host", name, f"only {said}")


def _memory(ranks_here: int) -> CheckResult:
    free = free_bytes(torch.device("cpu"))
    if free == float("inf"):
        return skipped("host", "memory", "this system does not say")
    limit = next(_limits(), float("inf"))
    room = min(free, limit)
    said = f"{room / _GIB:.1f} GiB available for {plural(ranks_here, 'rank')}"
    enough = room >= _LEAST_MEMORY * ranks_here
    return passed("host", "memory", said) if enough else failed("host", "memory", f"only {said}")


def _limits(group: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Bytes of memory that the container's limit leaves."""
    with suppress(OSError, ValueError):
        most = int((group / "memory.max").read_text(encoding="ascii"))
        yield most - int((group / "memory.current").read_text(encoding="ascii"))


def _shared_memory(place: Path = Path("/dev/shm")) -> CheckResult:
    """Collectives within a node may use shared memory. Containers often have 64 MB of it."""
    if not place.exists():
        return skipped("host", "shared memory", "this system has none")
    free = shutil.disk_usage(place).free
    return passed("host", "shared memory", f"{free / _GIB:.2f} GiB at {place}")
