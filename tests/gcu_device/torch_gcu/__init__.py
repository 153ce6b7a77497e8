"""A test double of the vendor's plugin: `import torch_gcu` makes a device `gcu` and `eccl`.

Stricter than the real one, so that a run which passes here has kept the rules that the real one
punishes silently. What it finds wrong is raised where it happens.

GCU_TEST_DEVICE: the built extension. GCU_TEST_JOURNAL: a folder for what each process did, as JSON
when it ends, and for the latents of the last video. GCU_TEST_BARE=1: without the functions about
memory, which the vendor's older builds lack.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import sys
import types
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import backend_registration


def _load_extension() -> Any:
    name, path = "gcu_test_device", os.environ["GCU_TEST_DEVICE"]
    loader = ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class RuleBroken(AssertionError):  # noqa: N818 (it reads as a finding of the test)
    """The program did what a real GCU answers with wrong numbers instead of an error."""


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


def _forbid_cuda() -> None:
    """Functions of torch.cuda refuse to be called by the program itself; libraries may ask it."""
    for name, function in vars(torch.cuda).items():
        if isinstance(function, types.FunctionType) and not name.startswith("_"):
            setattr(torch.cuda, name, _guarded(name, function))


def _guarded(name: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        if _in_program(caller):
            raise RuleBroken(f"torch.cuda.{name} on a run on gcu, from {caller}")
        return function(*args, **kwargs)

    return call


def _device_module() -> types.ModuleType:
    """torch.gcu."""
    module = types.ModuleType("torch.gcu")

    def set_device(index: int) -> None:
        journal["set_device"].append(int(index))
        _device.set_device(int(index))

    def properties(device: Any = None) -> Any:
        return types.SimpleNamespace(name="test double", total_memory=1 << 33)

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": _device.device_count,
        "current_device": _device.current_device,
        "set_device": set_device,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "test double",
        "get_device_properties": properties,
        "is_bf16_supported": lambda: True,
        "manual_seed_all": lambda seed: None,
        "_is_in_bad_fork": lambda: False,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    if os.environ.get("GCU_TEST_BARE") != "1":
        figures: dict[str, Any] = {
            "memory_allocated": lambda device=None: _device.allocated(),
            "max_memory_allocated": lambda device=None: _device.peak(),
            "reset_peak_memory_stats": lambda device=None: _device.reset_peak(),
            "mem_get_info": lambda device=None: ((1 << 33) - _device.allocated(), 1 << 33),
            "empty_cache": lambda: None,
        }
        functions |= figures
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def _write_journal(folder: Path) -> None:
    journal["peak bytes"] = _device.peak()
    rank = os.environ.get("RANK", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps(journal), encoding="utf-8")


if dist.is_initialized():
    raise RuleBroken("torch_gcu was imported after the process group was made: eccl is not in it")
_HERE = Path(__file__).parent
journal: dict[str, Any] = {"set_device": [], "wide": {}, "collectives": {}, "groups": []}
_device = _load_extension()
backend_registration.rename_privateuse1_backend("gcu")
torch._register_device_module("gcu", _device_module())
backend_registration.generate_methods_for_privateuse1_backend()
_device.watch(_on_wide_operation)
_forbid_cuda()

from torch_gcu import eccl, latents  # noqa: E402 (eccl needs the journal)

eccl.register()
if "GCU_TEST_JOURNAL" in os.environ:
    atexit.register(_write_journal, Path(os.environ["GCU_TEST_JOURNAL"]))
    latents.keep(Path(os.environ["GCU_TEST_JOURNAL"]))
