"""The attention kernels: one row each, with what it needs and how it is called.

Imports no torch before a kernel is called, so that --attention can be checked without torch. Every
kernel computes softmax(q·kᵀ·scale)·v on q [N,H,queries,D] and k, v [N,H,keys,D], without a mask.

A kernel may not take every head width: STDiT3's is 72, and kernels are built for widths such as 64,
80, 96 and 128. q, k and v are then padded with zeros. Zeros add nothing to q·k, the padded channels
of the output are cut off, and the scale stays 1/√72.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from opensora_sp.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
DEFAULT = "sdpa"
_HALF = ("fp16", "bf16")

# q, k, v and the scale; None is 1/√D of what it is given.
Call = Callable[..., "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One row of the table.

    about: half a sentence for the docs. devices: the types of device that have it; () is all of
    them. dtypes: the number formats that it takes, by their names in --dtype. module: the Python
    module that it comes from, None where that is torch. multiple: a head width must be a multiple
    of this. also: wider heads that the probe tries too, because the kernel may be faster there.
    probed: whether "auto" may choose it. call: computes it.
    """

    name: str
    about: str
    call: Call
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", *_HALF)
    module: str | None = None
    multiple: int = 1
    also: tuple[int, ...] = ()
    probed: bool = True

    def missing(self) -> str | None:
        """What has to be installed first, or None."""
        if self.module is None or _is_installed(self.module):
            return None
        return f"it needs the Python module {self.module}, which is not installed"

    def objection(self, device: str, dtype: str) -> str | None:
        """Why it cannot run on this type of device in this number format, or None."""
        if self.devices and device not in self.devices:
            return f"it runs on {' and '.join(self.devices)} only, not on {device}"
        if dtype not in self.dtypes:
            return f"it takes {' and '.join(self.dtypes)} only, not {dtype}"
        return self.missing()

    def widths(self, width: int) -> tuple[int, ...]:
        """The head widths that it may be called with for heads of `width`: the narrowest first."""
        narrowest = -(-width // self.multiple) * self.multiple
        return (narrowest, *(wide for wide in self.also if wide > narrowest))


@dataclass(frozen=True, order=True)
class Choice:
    """A kernel by its name, and the head width that it is called with."""

    kernel: str
    width: int

    def described(self, width: int) -> str:
        """As "cudnn", or as "cudnn, heads of 72 padded to 80"."""
        if self.width == width:
            return self.kernel
        return f"{self.kernel}, heads of {width} padded to {self.width}"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _sdpa_by(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """torch's attention by one of its backends; an error where that one does not apply."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not hasattr(SDPBackend, backend):
        raise RuntimeError(f"this torch has no {backend}")
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        return _sdpa(q, k, v, scale)


def _flash_attn(module: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """flash-attn's interface: [N,length,H,D], as views; some versions also return statistics."""
    from importlib import import_module

    kernel: Any = import_module(module).flash_attn_func
    out = kernel(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)
    whole: Tensor = out[0] if isinstance(out, tuple) else out
    return whole.transpose(1, 2)


def _flash_attn_packed(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """flash-attn's interface for sequences one after the other: [N·length,H,D] and their ends."""
    from importlib import import_module

    import torch

    kernel: Any = import_module("flash_attn").flash_attn_varlen_func

    def ends(x: Tensor) -> Tensor:
        # On the CPU, the result moved: 64-bit and index arithmetic is not sound on every device.
        length = x.shape[2]
        return torch.arange(0, (len(x) + 1) * length, length, dtype=torch.int32).to(x.device)

    packed = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v)]
    out = kernel(*packed, ends(q), ends(k), q.shape[2], k.shape[2], softmax_scale=scale)
    whole: Tensor = out[0] if isinstance(out, tuple) else out
    return whole.unflatten(0, (len(q), -1)).transpose(1, 2)


_ROWS = (
    Kernel(name="sdpa", about="torch's own choice", call=_sdpa),
    Kernel(
        name="flash",
        about="torch's FlashAttention-2",
        call=partial(_sdpa_by, "FLASH_ATTENTION"),
        devices=("cuda",),
        dtypes=_HALF,
        multiple=8,
    ),
    Kernel(
        name="cudnn",
        about="cuDNN's, through torch 2.5 or later",
        call=partial(_sdpa_by, "CUDNN_ATTENTION"),
        devices=("cuda",),
        dtypes=_HALF,
        multiple=8,
        also=(80, 96, 128),
    ),
    Kernel(
        name="efficient",
        about="torch's memory-efficient attention",
        call=partial(_sdpa_by, "EFFICIENT_ATTENTION"),
        devices=("cuda",),
        multiple=8,
    ),
    Kernel(
        name="fa2",
        about="the package flash-attn",
        call=partial(_flash_attn, "flash_attn"),
        devices=("cuda",),
        dtypes=_HALF,
        module="flash_attn",
        multiple=8,
    ),
    Kernel(
        name="fa3",
        about="FlashAttention-3 for Hopper, built from its sources",
        call=partial(_flash_attn, "flash_attn_interface"),
        devices=("cuda",),
        dtypes=_HALF,
        module="flash_attn_interface",
        multiple=8,
        also=(96, 128),
    ),
    Kernel(
        name="fa4",
        about="FlashAttention-4, the package flash-attn-4",
        call=partial(_flash_attn, "flash_attn.cute"),
        devices=("cuda",),
        dtypes=_HALF,
        module="flash_attn.cute",
        multiple=16,
        also=(96, 128),
    ),
    Kernel(
        name="fa-gcu",
        about="the vendor's build of flash-attn for GCU",
        call=_flash_attn_packed,
        devices=("gcu",),
        dtypes=_HALF,
        module="flash_attn",
        multiple=8,
    ),
    # It holds every score at once, so it is a yardstick and a last resort.
    Kernel(
        name="math",
        about="the formula, with all scores in memory",
        call=partial(_sdpa_by, "MATH"),
        probed=False,
    ),
)

Table = Mapping[str, Kernel]
KERNELS: Table = MappingProxyType({row.name: row for row in _ROWS})


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    # The package above it is imported for that. One that is not there raises ImportError, and one
    # that was built for another torch or driver raises anything.
    except Exception:
        return False


def usable(device: str, dtype: str, table: Table = KERNELS) -> list[Kernel]:
    """The kernels that nothing speaks against, in the table's order."""
    return [row for row in table.values() if row.objection(device, dtype) is None]


def check_attention(name: str, device: str | None, dtype: str) -> None:
    """Raise UserError where a kernel that was asked for cannot run.

    device None: it is not known yet, so only what does not depend on it is checked.
    """
    if name == AUTO:
        return
    row = KERNELS[name]
    trouble = row.missing() if device is None else row.objection(device, dtype)
    if trouble is not None:
        raise refusal(name, trouble, device, dtype)


def refusal(name: str, trouble: str, device: str | None, dtype: str) -> UserError:
    """The one line that refuses a kernel and names those that can be asked for."""
    installed = [row for row in KERNELS.values() if row.missing() is None]
    rows = installed if device is None else usable(device, dtype)
    others = ", ".join([AUTO, *(row.name for row in rows if row.name != name)])
    return UserError(f"--attention {name}: {trouble}: leave it out, or give one of {others}")


def run(choice: Choice, q: Tensor, k: Tensor, v: Tensor, table: Table = KERNELS) -> Tensor:
    """Attention by a choice: q [N,H,queries,D], k, v [N,H,keys,D] → [N,H,queries,D]."""
    kernel, width = table[choice.kernel], q.shape[-1]
    if choice.width == width:
        return kernel.call(q, k, v)
    import torch.nn.functional as F

    padded = (F.pad(x, (0, choice.width - width)) for x in (q, k, v))
    return kernel.call(*padded, scale=1 / math.sqrt(width))[..., :width]
