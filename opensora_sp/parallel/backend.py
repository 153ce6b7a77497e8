"""The table of collective backends: which device each serves and what it needs.

A new accelerator is a new row. The backend's name is data; nothing else in the program asks
which one is in use.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from opensora_sp.base.errors import UserError
from opensora_sp.parallel.backend_table import BACKENDS, DEVICES, Backend


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


def for_device(device: str) -> Backend:
    """The row that serves a device type."""
    for backend in BACKENDS.values():
        if backend.device == device:
            return backend
    raise UserError(f"--device {device}: unknown, choose one of {', '.join(DEVICES)}")


def pick_device(wanted: str | None) -> str:
    """The device type to use: the wanted one, checked, or the first of gcu, cuda, cpu here."""
    if wanted is None:
        return next(device for device in DEVICES if is_available(device))
    load_plugin(wanted)
    if not is_available(wanted):
        found = [device for device in DEVICES if is_available(device)]
        raise UserError(
            f"--device {wanted}: no such device is visible; found here: {', '.join(found)}"
        )
    return wanted


def pick_backend(wanted: str | None, device: str) -> Backend:
    """The backend to use: the device's own, or the wanted one."""
    if wanted is None:
        return for_device(device)
    if wanted not in BACKENDS:
        raise UserError(f"--backend {wanted}: unknown, choose one of {', '.join(BACKENDS)}")
    backend = BACKENDS[wanted]
    if backend.device not in (device, "cpu"):
        raise UserError(
            f"--backend {wanted} serves {backend.device} devices, not --device {device}; "
            f"use {for_device(device).name}, or gloo (through host memory)"
        )
    return backend
