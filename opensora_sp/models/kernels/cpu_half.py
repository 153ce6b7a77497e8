"""Half precision on CPUs that have no instructions for it.

There bf16 is emulated number by number: on AVX-512 without its bf16 extension a Linear runs at 6
GFLOP/s a core instead of 60 in float32. So on such a CPU half precision is how weights and
activations are stored, and the heavy operations compute in float32 and round once at their end:
what hardware with bf16 does inside a multiplication too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPUINFO = Path("/proc/cpuinfo")
# Flags of x86 and Arm processors that multiply in the format by themselves.
_NATIVE = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "fphp", "asimdhp"},
}
_HEAVY = frozenset(
    {
        F.linear,
        F.conv2d,
        F.conv3d,
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.addmm_,
    }
)


_active = threading.local()  # how many of these contexts this thread is in


class Float32Arithmetic(TorchFunctionMode):
    """While active, heavy operations on half-precision CPU tensors compute in float32."""

    def __enter__(self) -> Float32Arithmetic:
        _active.depth = getattr(_active, "depth", 0) + 1
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        _active.depth -= 1
        super().__exit__(*raised)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, widened where that is faster; the result keeps the input's dtype."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func not in _HEAVY or not isinstance(first, Tensor) or not _is_half(first):
            return func(*args, **kwargs)
        wide = [_widen(value) for value in args]
        named = {name: _widen(value) for name, value in kwargs.items()}
        made = func(*wide, **named)
        # What adds into its first argument added into the widened copy of it.
        return first.copy_(made) if func is Tensor.addmm_ else made.to(first.dtype)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NATIVE and value.device.type == "cpu"


def _widen(value: Any) -> Any:
    return value.float() if _is_half(value) else value


@cache
def computes_natively(dtype: torch.dtype, cpuinfo: Path = _CPUINFO) -> bool:
    """Whether this machine's CPU multiplies in `dtype`; unknown processors are taken to do so."""
    if dtype not in _NATIVE:
        return True
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not flags or bool(_NATIVE[dtype] & set(flags.partition(":")[2].split()))


def wide(x: Tensor) -> Tensor:
    """x in float32 if it is half precision under `Float32Arithmetic`, else x.

    For operations that follow one another: what lies between them is not rounded and widened again.
    """
    return x.float() if getattr(_active, "depth", 0) and _is_half(x) else x


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The context to run models in on this device: nothing special, except on such a CPU."""
    if device.type == "cpu" and not computes_natively(dtype):
        return Float32Arithmetic()
    return nullcontext()
