"""Chooses the device and the backend of this process, and loads the plugin that they need.

What a device or a backend is, is a row of `backend_table`. A device's own functions are reached as
`torch.<device>`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
import torch.distributed as dist

from opensora_sp.base.errors import UserError
from opensora_sp.parallel.backend_table import BACKENDS, DEVICES, Backend, for_device


def device_module(device: str) -> Any:
    """`torch.cuda`, `torch.gcu`, … or None where this torch has no such device."""
    return getattr(torch, device, None)


def load_plugin(device: str) -> None:
    """Import what makes `device` known to torch. Must precede the process group.

    Raises UserError naming the module when the device needs one that is not installed.
    """
    backend = for_device(device)
    if backend.plugin is None:
        return
    try:
        importlib.import_module(backend.plugin)
    except ImportError as error:
        raise UserError(
            f"--device {device}: the module {backend.plugin} cannot be imported ({error}); "
            f"install the vendor's wheel, or choose --device {' or '.join(DEVICES[1:])}"
        ) from error


def require_backend(backend: Backend) -> None:
    """Raises UserError where torch itself should bring this backend and was built without it."""
    if backend.plugin is not None:
        return
    ask = getattr(dist, f"is_{backend.name}_available", None)  # older ones do not know of newer
    if not (backend.name in dist.Backend.backend_list if ask is None else ask()):
        raise UserError(
            f"--backend {backend.name}: this torch ({torch.__version__}) was built without it; "
            f"install a torch that is built for {backend.device}, or choose --backend gloo"
        )


def visible_note(device: str) -> str:
    """What the environment says of which devices may be seen, to be put behind a count."""
    variable = for_device(device).visible_devices
    chosen = None if variable is None else os.environ.get(variable)
    return "" if chosen is None else f" ({variable}={chosen!r} in the environment)"


def is_available(device: str) -> bool:
    """Whether a device of this type is here; never raises."""
    backend = for_device(device)
    if backend.plugin is not None and importlib.util.find_spec(backend.plugin) is None:
        return False
    if device == "cpu":
        return True
    try:
        load_plugin(device)
        module = device_module(device)
        return module is not None and bool(module.is_available())
    except Exception:  # a broken driver must not hide the devices behind it
        return False


def pick_device(wanted: str | None) -> str:
    """The device type to use: the wanted one, checked, or the first of the table that is here.

    Raises UserError where the wanted one is unknown, needs a plugin or is not visible.
    """
    if wanted is None:
        return next(device for device in DEVICES if is_available(device))
    load_plugin(wanted)
    if not is_available(wanted):
        found = [device for device in DEVICES if is_available(device)]
        raise UserError(
            f"--device {wanted}: no such device is visible{visible_note(wanted)}; "
            f"found here: {', '.join(found)}"
        )
    return wanted


def pick_backend(wanted: str | None, device: str) -> Backend:
    """The backend to use: the device's own, or the wanted one.

    Raises UserError where the wanted one is unknown or does not serve the device.
    """
    if wanted is None:
        return for_device(device)
    if wanted not in BACKENDS:
        raise UserError(f"--backend {wanted}: unknown, choose one of {', '.join(BACKENDS)}")
    backend = BACKENDS[wanted]
    if not backend.serves(device):
        raise UserError(
            f"--backend {wanted} serves {backend.device} devices, not --device {device}; "
            f"use {for_device(device).name}, or gloo (through host memory)"
        )
    return backend
