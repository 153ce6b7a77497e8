"""Makes process groups and the mesh by ColossalAI, for --launcher colossalai.

Only its launch and its ProcessGroupMesh are used: they need nothing but psutil beside torch.
Imported when `--launcher colossalai` asks for it and never before, for the import alone sets
CUDA_DEVICE_MAX_CONNECTIONS=1.
"""

from __future__ import annotations

from typing import Any

import torch

from opensora_sp.base.errors import UserError
from opensora_sp.parallel.backend import device_module
from opensora_sp.parallel.backend_table import Backend
from opensora_sp.parallel.launchers import COLOSSALAI_RECIPE, check_launcher
from opensora_sp.parallel.mesh import Mesh


class Colossal:
    """ColossalAI's way to process groups, on one device and backend."""

    def __init__(self, device: torch.device, backend: Backend) -> None:
        """Import it and tell it of the device. Raises UserError where that does not work."""
        check_launcher("colossalai")
        try:
            import colossalai.accelerator
            import colossalai.cluster
        except Exception as error:  # its pins and what is installed may clash anywhere
            raise UserError(
                f"--launcher colossalai: cannot be imported beside torch {torch.__version__} "
                f"({type(error).__name__}: {error}); {COLOSSALAI_RECIPE}"
            ) from error
        self._colossalai = colossalai
        # Its accelerator chooses the backend: cpu stands for gloo, whatever the device is.
        accelerator = backend.colossalai or _accelerator(device, backend)
        colossalai.accelerator.set_accelerator(accelerator)

    def launch(self) -> None:
        """Join the process group that torchrun's environment describes.

        It takes no time limit: collectives have torch's own.
        """
        self._colossalai.launch_from_torch(verbose=False)

    def groups(self, mesh: Mesh) -> dict[tuple[int, ...], Any]:
        """This rank's groups of more than one rank, by their ranks. All ranks call it alike."""
        made = self._colossalai.cluster.ProcessGroupMesh(
            mesh.replicas, mesh.guidance, mesh.sequence
        )
        axes = [axis for axis in (1, 2) if made.size(axis) > 1]
        groups = [made.create_group_along_axis(axis) for axis in axes]
        return {tuple(made.get_ranks_in_group(group)): group for group in groups}


def _accelerator(device: torch.device, backend: Backend) -> Any:
    """ColossalAI's view of a device that it does not know: its name, backend, and torch module.

    Everything else that its base class asks for answers with what torch.<device> has of it.
    """
    from colossalai.accelerator.base_accelerator import BaseAccelerator

    module = device_module(device.type)

    def forward(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, name)(*args, **kwargs)

        return call

    methods: dict[str, Any] = {name: forward(name) for name in BaseAccelerator.__abstractmethods__}
    methods["get_version"] = lambda self: ""
    methods["get_current_device"] = lambda self: torch.device(device.type, module.current_device())
    kind = type(f"{device.type.capitalize()}Accelerator", (BaseAccelerator,), methods)
    return kind(device.type, backend.name, False)
