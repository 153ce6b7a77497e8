"""An allocation tracer: the program's own code at its real shapes, on tensors without memory.

Fake tensors have shapes, dtypes and lifetimes but no contents, so the most bytes that a stage ever
holds at one time can be counted for sizes that no machine at hand could compute. Attention counts
as one operation that allocates its output, as every fused kernel does; workspaces of convolution
libraries and an allocator's rounding are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora_sp.parallel import exchange


class PeakBytes(TorchDispatchMode):
    """While active, `peak` is the most bytes that tensors made inside it held at one time.

    Tensors that were there before (weights, inputs) do not count; views share their storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._holders: dict[int, int] = {}  # storage → living tensors on it
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and id(tensor) not in self._seen:
                self._hold(tensor, known)
        return outputs

    def _hold(self, tensor: Tensor, known: set[int]) -> None:
        storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if storage not in self._holders:
            if storage in known:
                return  # a view of something that was there before
            self._holders[storage] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[storage] += 1
        self._seen.add(id(tensor))
        weakref.finalize(tensor, self._release, storage, size, id(tensor))

    def _release(self, storage: int, size: int, identity: int) -> None:
        self._seen.discard(identity)
        self._holders[storage] -= 1
        if self._holders[storage] == 0:
            del self._holders[storage]
            self.live -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _FusedAttention(TorchFunctionMode):
    """Attention as one operation that allocates its output and nothing else."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return torch.empty_like(query) if query.shape == value.shape else _like(query, value)
        return func(*args, **(kwargs or {}))


def _like(query: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query[..., :1]).expand(*query.shape[:-1], value.shape[-1]).clone()


class _Agreeable(TorchDispatchMode):
    """Answers questions about values: what is asked is finite, and masks keep everything."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        if func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _Arrived:
    def wait(self) -> None:
        """An exchange that nobody takes part in is over at once."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Everything made inside has no memory; exchanges allocate their buffers and move nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        transfer = patch.object(
            vars(exchange)["dist"], "all_to_all_single", lambda *a, **k: _Arrived()
        )
        stack.enter_context(transfer)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Agreeable())
        stack.enter_context(_FusedAttention())
        stack.enter_context(torch.no_grad())
        yield


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that `call` held at one time."""
    with torch.no_grad(), PeakBytes() as counter:
        call()
    return counter.peak
