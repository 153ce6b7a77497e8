"""A description of the machine for a report: device, driver, packages, OS, CPU, disk, host.

What cannot be found out is None and never an error. Tools run without a shell and with a timeout.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOOL_SECONDS = 10.0
_LONGEST_OUTPUT = 8000  # characters of a tool's table that are kept
_CPU_INFO = Path("/proc/cpuinfo")
_MEM_INFO = Path("/proc/meminfo")
_OS_RELEASE = Path("/etc/os-release")
_BLOCK_DEVICES = Path("/sys/block")


def run_tool(command: Sequence[str]) -> str | None:
    """The output of a command; None where it is absent, fails, is silent or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.strip() else None


def describe_machine(
    device: torch.device,
    save_dir: Path,
    *,
    tool: Sequence[str] = (),
    driver_query: Sequence[str] = (),
    driver_packages: str = "",
) -> dict[str, Any]:
    """The parts of a report that the vendor's has beside its `performance_info`.

    tool: the command that prints the driver's table of devices. driver_query: the one that prints
    the driver's version alone. driver_packages: what names of system packages of any driver begin
    with, a regular expression. Empty where there is none.
    """
    return {
        "device": device_info(device, tool, driver_query),
        "driver_packages": packages_of_drivers(driver_packages),
        "python_packages": python_packages(),
        "os": os_info(),
        "cpu": cpu_info(),
        "disk": disk_info(save_dir),
        "host": host_info(),
    }


def device_info(
    device: torch.device, tool: Sequence[str] = (), driver_query: Sequence[str] = ()
) -> dict[str, Any]:
    """Type, name, count and memory of the accelerator, and what its own tool says of it."""
    import torch

    module: Any = getattr(torch, device.type, None)

    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(module, name)(*arguments)
        except Exception:  # vendor builds lack calls, or refuse arguments
            return None

    if device.type == "cpu":
        name, count, total, driver = cpu_name(), 1, None, None
    else:
        name = ask("get_device_name", device)
        count = ask("device_count")
        total = getattr(ask("get_device_properties", device), "total_memory", None)
        driver = driver_version(tool, driver_query)
    said = run_tool(tool) if tool else None
    return {
        "type": device.type,
        "name": None if name is None else str(name),
        "visible": count,
        "total_memory_bytes": total,
        "driver": driver,
        "tool": " ".join(tool) or None,
        "tool_output": None if said is None else said[:_LONGEST_OUTPUT],
    }


def driver_version(tool: Sequence[str], query: Sequence[str]) -> str | None:
    """What the query prints first; without a query what the tool's table calls the driver."""
    if query:
        said = run_tool(query)
        return said.splitlines()[0].strip() if said else None
    said = run_tool(tool) if tool else None
    found = re.search(r"driver(?: ver(?:sion)?)?\s*[:=]?\s*v?([0-9][\w.+-]*)", said or "", re.I)
    return found[1] if found else None


def packages_of_drivers(names: str) -> dict[str, str] | None:
    """Installed system packages whose names begin as a driver's or runtime's do; None: no dpkg."""
    said = run_tool(("dpkg-query", "-W", "-f", "${Package} ${Version}\n"))
    if said is None:
        return None
    pairs = (line.split(" ", 1) for line in said.splitlines() if " " in line)
    return {name: version for name, version in pairs if names and re.match(names, name)}


def python_packages() -> dict[str, str]:
    """Every installed Python distribution and its version."""
    found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def os_info() -> dict[str, Any]:
    """Name, kernel, architecture and Python version."""
    pretty = None
    for line in _read(_OS_RELEASE).splitlines():
        if line.startswith("PRETTY_NAME="):
            pretty = line.partition("=")[2].strip().strip('"')
    return {
        "name": pretty or platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }


def cpu_name() -> str | None:
    """The processor's model name."""
    for line in _read(_CPU_INFO).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def cpu_info() -> dict[str, Any]:
    """The processor, its cores, the cores that this process may use, and threads of a rank."""
    from opensora_sp.base.cpu_threads import VARIABLE, available_cores

    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": available_cores(),
        "threads_of_a_rank": os.environ.get(VARIABLE),
    }


def disk_info(directory: Path) -> dict[str, Any]:
    """Size and free space (bytes) of the outputs' file system, and the block devices."""
    place = directory.absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    total: int | None = None
    free: int | None = None
    with suppress(OSError):
        total, _, free = shutil.disk_usage(place)
    return {"total_bytes": total, "free_bytes": free, "block_devices": _block_devices()}


def _block_devices() -> list[dict[str, Any]]:
    devices = []
    for entry in sorted(_BLOCK_DEVICES.glob("*")):
        sectors = _read(entry / "size").strip()
        if entry.name.startswith(("loop", "ram", "zram")) or not sectors.isdecimal():
            continue
        devices.append(
            {
                "name": entry.name,
                "model": _read(entry / "device" / "model").strip() or None,
                "bytes": int(sectors) * 512,  # the kernel counts sectors of 512 bytes
                "rotates": _read(entry / "queue" / "rotational").strip() == "1",
            }
        )
    return devices


def host_info() -> dict[str, Any]:
    """Name, memory (bytes), load average and time zone."""
    memory = {}
    for line in _read(_MEM_INFO).splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            memory[name] = int(rest.split()[0]) * 1024
    return {
        "name": platform.node() or None,
        "memory_bytes": memory.get("MemTotal"),
        "available_bytes": memory.get("MemAvailable"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "time_zone": time.strftime("%z"),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
