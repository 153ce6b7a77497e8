"""What one operation of torch reads from memory and writes to it, in bytes.

An operand is read once from memory, however often the kernel uses it, and a result is written
once. So the count is the least that the kernel has to move. A broadcast operand counts as what is
stored of it. A view moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# They hand out memory, or another shape of it, and launch nothing. Their schemas do not say so.
_NO_KERNEL = frozenset(
    {
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("_unsafe_view", "_reshape_alias", "lift", "lift_fresh", "detach_", "set_", "resize_"),
    }
)
# In place, but what was there before is not read.
_OVERWRITES = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"})
# With beta 0 the first operand is ignored.
_SCALED_BY_BETA = frozenset({"addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_", "addbmm"})
# They read as much of their first operand as they return.
_GATHERS = frozenset({"index", "index_select", "embedding", "gather", "take"})


def operation_name(op: Any) -> str:
    """The name of an operation as `torch.ops.aten` has it, without its overload."""
    return str(op.overloadpacket.__name__)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that lie in memory for a tensor: a broadcast axis counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 or size == 0 else 1
    return min(count * tensor.element_size(), tensor.untyped_storage().nbytes())


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of an argument or a result, those in lists too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def total_bytes(tensors: Iterable[Tensor], device: torch.device | None = None) -> int:
    """Bytes of tensors, one that is given twice counted once; only those on `device`, if given."""
    distinct = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype): t
        for t in tensors
        if device is None or t.device.type == device.type
    }
    return sum(stored_bytes(tensor) for tensor in distinct.values())


def launches(op: Any) -> bool:
    """Whether an operation launches a kernel: views and allocations do not."""
    if operation_name(op) in _NO_KERNEL:
        return False
    aliases = [result.alias_info for result in op._schema.returns]
    is_view = bool(aliases) and all(each is not None and not each.is_write for each in aliases)
    return not is_view


def operands(
    op: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors read, tensors written) by one call of an operation of aten."""
    name = operation_name(op)
    read: list[Tensor] = []
    written: list[Tensor] = []
    for place, argument in enumerate(op._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        found = list(tensors_in(given))
        changes = argument.alias_info is not None and argument.alias_info.is_write
        if changes:
            written += found
        ignored = place == 0 and (
            name in _OVERWRITES or (name in _SCALED_BY_BETA and kwargs.get("beta", 1) == 0)
        )
        if place == 0 and name in _GATHERS:
            found = list(tensors_in(result))
        if not ignored and not (changes and argument.kwarg_only):  # out=…
            read += found
    results = result if isinstance(result, list | tuple) else [result]
    for returned, value in zip(op._schema.returns, results, strict=False):
        if returned.alias_info is None:
            written += tensors_in(value)
    return read, written
