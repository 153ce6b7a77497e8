"""The Python side of a device double: `torch.<device>`, its backend, and what is forbidden on it.

Stricter than a real device, so that a run which passes here has kept the rules that a real one
punishes silently. What it finds wrong is raised where it happens.

DEVICE_DOUBLE: the built extension. DEVICE_DOUBLE_JOURNAL: a folder for what each process did, as
JSON when it ends, and for the latents of the last video. DEVICE_DOUBLE_BARE=1: without the
functions about memory, which older builds of plugins lack.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import backend_registration

from device_doubles import latents
from device_doubles.collectives import collectives_of
from device_doubles.rules import RuleBroken, journal
from opensora_sp.parallel.backend_table import DEVICES, Backend, for_device

_HERE = Path(__file__).parent


def install(device: str, make_known: Callable[[Backend, dict[str, Any]], None]) -> None:
    """Load the extension and make the device and its backend known to torch, as their row says.

    make_known: gives torch the backend and the functions of `torch.<device>`.
    """
    row = for_device(device)
    if dist.is_initialized():
        raise RuleBroken(f"{device} came after the process group was made: {row.name} is not in it")
    os.environ["DEVICE_DOUBLE_VISIBLE"] = row.visible_devices or ""
    extension = _load_extension()
    make_known(row, _functions(extension))
    extension.watch(_on_wide_operation)
    _forbid_other_devices(device)
    if "DEVICE_DOUBLE_JOURNAL" in os.environ:
        folder = Path(os.environ["DEVICE_DOUBLE_JOURNAL"])
        atexit.register(_write_journal, folder, extension)
        latents.keep(folder)


def as_plugin(row: Backend, functions: dict[str, Any]) -> None:
    """Give torch a device and a backend that it does not have by itself."""
    module = types.ModuleType(f"torch.{row.device}")
    vars(module).update(functions)
    backend_registration.rename_privateuse1_backend(row.device)
    torch._register_device_module(row.device, module)
    backend_registration.generate_methods_for_privateuse1_backend()
    dist.Backend.register_backend(row.name, collectives_of(row), devices=[row.device])


def _load_extension() -> Any:
    path = os.environ["DEVICE_DOUBLE"]
    name = Path(path).stem
    loader = ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _calling_file(depth: int) -> str:
    """The first file on the stack that is neither torch's nor this package's."""
    frame = sys._getframe(depth)
    while frame is not None:
        file = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in file and not file.startswith(str(_HERE)):
            return file
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _in_program(file: str) -> bool:
    return f"{os.sep}opensora_sp{os.sep}" in file


def _on_wide_operation(operation: str, dtype: str) -> None:
    """Called by the device for every operation on int64 or float64 tensors that live on it."""
    caller = _calling_file(2)
    if _in_program(caller):
        raise RuleBroken(f"{operation} on {dtype} on the device, from {caller}")
    library = next((name for name in ("transformers", "diffusers") if name in caller), caller)
    journal["wide"][f"{library}: {operation}"] = dtype


def _forbid_other_devices(device: str) -> None:
    """Functions of other devices refuse to be called by the program; libraries may ask them."""
    for other in set(DEVICES) - {device, "cpu"}:
        module = getattr(torch, other, None)
        for name, function in list(vars(module).items()) if module is not None else []:
            if isinstance(function, types.FunctionType) and not name.startswith("_"):
                what = f"torch.{other}.{name} on a run on {device}"
                setattr(module, name, _guarded(what, function))


def _guarded(what: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        if _in_program(caller):
            raise RuleBroken(f"{what}, from {caller}")
        return function(*args, **kwargs)

    return call


def _functions(extension: Any) -> dict[str, Any]:
    """What `torch.<device>` has."""

    def set_device(index: int) -> None:
        journal["set_device"].append(int(index))
        extension.set_device(int(index))

    def properties(device: Any = None) -> Any:
        return types.SimpleNamespace(name="test double", total_memory=1 << 33)

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": extension.device_count,
        "current_device": extension.current_device,
        "set_device": set_device,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "test double",
        "get_device_properties": properties,
        "is_bf16_supported": lambda: True,
        "manual_seed_all": lambda seed: None,
        "_is_in_bad_fork": lambda: False,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    if os.environ.get("DEVICE_DOUBLE_BARE") == "1":
        return functions
    figures: dict[str, Any] = {
        "memory_allocated": lambda device=None: extension.allocated(),
        "max_memory_allocated": lambda device=None: extension.peak(),
        "reset_peak_memory_stats": lambda device=None: extension.reset_peak(),
        "mem_get_info": lambda device=None: ((1 << 33) - extension.allocated(), 1 << 33),
        "empty_cache": lambda: None,
    }
    return functions | figures


def _write_journal(folder: Path, extension: Any) -> None:
    journal["peak bytes"] = extension.peak()
    rank = os.environ.get("RANK", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps(journal), encoding="utf-8")
