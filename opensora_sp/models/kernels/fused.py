"""The norms of a block, each by one kernel where there is one: the seam between it and plain torch.

A module with fused kernels has the functions `norm_rotary_`, `takes_heads` and `residual_norm_`, as
`triton_norms` has. `fused_kernels` finds the one of a device, and uses it only after it gave the
numbers of plain torch there. A Triton for another device is a row of `_MODULES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from opensora_sp.models.kernels import reference
from opensora_sp.models.kernels.active import active

Rotary = tuple[Tensor, Tensor]

# Type of device → what must be installed, and the module with the kernels.
_MODULES: Mapping[str, tuple[str, str]] = {
    "cuda": ("triton", "opensora_sp.models.kernels.triton_norms"),
}
# Relative RMS errors of a few roundings, with a margin.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def _module() -> ModuleType | None:
    return None if torch.is_grad_enabled() else active().fused


def norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Rotary | None = None
) -> tuple[Tensor, Tensor]:
    """RMS-norm of each head, then the rotary embedding where there is one.

    q, k [B,T,S,H,D], or [F,S,H,D] without rotary; weights [D]; rotary as for `rotate`. Returns q
    and k. They may be the given tensors, overwritten.
    """
    if norm_rotary_in_one_(q, k, q_weight, k_weight, rotary):
        return q, k
    return reference.norm_rotary(q, k, q_weight, k_weight, rotary)


def norm_rotary_in_one_(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotary: Rotary | None = None
) -> bool:
    """`norm_rotary` where q and k lie, if a fused kernel can; False where nothing was done.

    q, k [B,T,S,H,D], or [T,S,H,D] of one sample.
    """
    module = _module()
    if module is None:
        return False
    whole_q, whole_k = (x if x.ndim == 5 else x[None] for x in (q, k))
    if not module.takes_heads(whole_q, whole_k):
        return False
    module.norm_rotary_(whole_q, whole_k, q_weight, k_weight, rotary)
    return True


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As `reference.modulated_norm`: x [B,T,S,C], shift and scale [B,T or 1,1,C] → [B,T,S,C]."""
    module = _module()
    if module is not None:
        out: Tensor = module.residual_norm_(x, shift=shift, scale=scale)
        return out
    return reference.modulated_norm(x, shift, scale)


def residual_norm_(
    x: Tensor,
    *,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """x += added + bias where it lies, then its LayerNorm, modulated where that is given.

    x and added [B,T,S,C], bias [C], shift and scale [B,T or 1,1,C] → [B,T,S,C]. x may be a part of
    a larger tensor. No gradients.
    """
    module = _module()
    compute = reference.residual_norm_ if module is None else module.residual_norm_
    out: Tensor = compute(x, added=added, bias=bias, shift=shift, scale=scale)
    return out


def fused_kernels(
    device: torch.device, dtype: torch.dtype, heads: int, width: int
) -> tuple[ModuleType | None, str]:
    """The module with fused kernels for a device, and why there is none or that it was checked."""
    if device.type not in _MODULES:
        return None, f"plain torch: there are no fused kernels for {device.type}"
    package, name = _MODULES[device.type]
    if find_spec(package) is None:
        return None, f"plain torch: the package {package} is not installed"
    try:
        module = import_module(name)
        error = difference(module, device, dtype, heads, width)
    except Exception as trouble:  # a kernel that does not compile must not end the run
        said = " ".join(str(trouble).split())[:120]
        return None, f"plain torch: {package} failed: {type(trouble).__name__}: {said}"
    if not error <= LIMITS[dtype]:  # NaN neither
        return None, f"plain torch: {package}'s kernels differ from it by {error:.1e}"
    return module, f"{package}, checked"


def difference(
    module: ModuleType, device: torch.device, dtype: torch.dtype, heads: int, width: int
) -> float:
    """The largest relative RMS error of a module's functions against plain torch in float32."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    channels = heads * width
    product, x, added = (
        drawn(2, 3, 5, 3 * channels),
        drawn(2, 3, 5, channels),
        drawn(2, 3, 5, channels),
    )
    q_weight, k_weight, bias = drawn(width), drawn(width), drawn(channels)
    shift, scale = drawn(2, 3, 2, channels).unsqueeze(3).unbind(2)
    angles = drawn(3, width // 2).float()
    rotary = angles.cos(), angles.sin()

    def both(weights: tuple[Tensor, Tensor], whole: Tensor, of: ModuleType | None) -> list[Tensor]:
        q, k, _ = whole.unflatten(-1, (3, heads, width)).unbind(-3)
        if of is None:
            return list(reference.norm_rotary(q, k, *weights, rotary))
        return list(of.norm_rotary_(q, k, *weights, rotary))

    wide = (q_weight.float(), k_weight.float())
    pairs = list(
        zip(
            both((q_weight, k_weight), product.clone(), module),
            both(wide, product.float(), None),
            strict=True,
        )
    )
    # A part of a larger tensor, as tiles are.
    whole, expected = x.clone(), x.float()
    tile, given = (
        whole[:, :, 1:4],
        {"added": added[:, :, 1:4], "bias": bias, "shift": shift, "scale": scale},
    )
    found = module.residual_norm_(tile, **given)
    wanted = reference.residual_norm_(
        expected[:, :, 1:4], **{name: value.float() for name, value in given.items()}
    )
    pairs += [(found, wanted), (whole, expected)]
    return max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
