"""One row for each backend: its device, and what the rest of the program has to know of them.

Imports no torch: flags, checks and plans read the table too. To add a backend, add a row and a test
double of its device; docs/extending.md shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from opensora_sp.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Collectives `name` on devices of the type `device`: `torch.<device>`.

    plugin: the module that makes device and backend known to torch; None where torch has both.
    package: the distribution that brings the plugin, for reports.
    through_host: it serves every device, by passing the tensors through host memory.
    chunks: parts of T that pay as overlap when one CFG branch is alone on its ranks. On CPUs the
    exchange and the compute share the same cores, so nothing can hide the exchange.
    visible_devices: the environment variable that says which devices a process may see.
    tool: the command that prints the driver's table of the devices. driver_query: the command that
    prints the driver's version alone; without it the version is read in the tool's table.
    driver_packages: what names of the driver's system packages begin with, a regular expression.
    profiler: the name of the device's torch.profiler.ProfilerActivity.
    colossalai: ColossalAI's name of the device; None where ColossalAI does not know it.
    cards: devices that people have, and the memory they are sold with, in units of 10^9 bytes.
    """

    name: str
    device: str
    plugin: str | None = None
    package: str | None = None
    through_host: bool = False
    chunks: int = 1
    visible_devices: str | None = None
    tool: tuple[str, ...] = ()
    driver_query: tuple[str, ...] = ()
    driver_packages: str | None = None
    profiler: str | None = None
    colossalai: str | None = None
    cards: tuple[tuple[str, int], ...] = ()

    def serves(self, device: str) -> bool:
        """Whether tensors of this type of device can be exchanged with it."""
        return self.through_host or device == self.device


_ROWS = (
    Backend(
        name="eccl",
        device="gcu",
        plugin="torch_gcu",
        package="torch_gcu",
        chunks=2,
        visible_devices="TOPS_VISIBLE_DEVICES",
        tool=("efsmi",),
        driver_packages="tops|eccl|efml|enflame|gcu|libtops|libeccl",
        profiler="PrivateUse1",
        cards=(("S60", 48),),
    ),
    Backend(
        name="nccl",
        device="cuda",
        chunks=2,
        visible_devices="CUDA_VISIBLE_DEVICES",
        tool=("nvidia-smi",),
        driver_query=("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        driver_packages="nvidia-(driver|utils|fabric)|cuda-drivers|libnccl",
        profiler="CUDA",
        colossalai="cuda",
        cards=(
            ("L40S", 48),
            ("A6000", 48),
            ("H200", 141),
            ("H100", 80),
            ("A100", 80),
            ("A100-40GB", 40),
            ("RTX 4090", 24),
            ("RTX 3090", 24),
            ("L4", 24),
        ),
    ),
    Backend(name="gloo", device="cpu", through_host=True, colossalai="cpu"),
)

BACKENDS = {row.name: row for row in _ROWS}
DEVICES = tuple(row.device for row in _ROWS)  # in order of preference
PACKAGES = tuple(row.package for row in _ROWS if row.package is not None)
DRIVER_PACKAGES = "|".join(row.driver_packages for row in _ROWS if row.driver_packages)


def for_device(device: str) -> Backend:
    """The row of a type of device. Raises UserError where there is none."""
    for backend in BACKENDS.values():
        if backend.device == device:
            return backend
    raise UserError(f"--device {device}: unknown, choose one of {', '.join(DEVICES)}")
