"""An allocation tracer: it runs the program's code on tensors without memory and counts their
bytes.

Fake tensors have shapes, dtypes and lifetimes but no contents. So the peak memory of a stage can be
counted for sizes that the machine could not compute. Attention counts as one operation that
allocates its output, as in a fused kernel. Workspaces of convolution libraries and an allocator's
rounding are not counted.
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
    """A mode that counts the bytes of tensors made inside it. `peak` is the most at one time.

    Tensors that existed before, such as weights and inputs, do not count. Views share their
    storage.
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
    """A mode in which attention allocates its output and nothing else."""

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
    """A mode that answers questions about values: all are finite, and masks keep everything."""

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
        """Return at once, because nothing is exchanged."""


@contextmanager
def without_memory() -> Iterator[None]:
    """A block in which tensors have no memory. Exchanges allocate buffers and send nothing."""
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
    """The most bytes of tensors at one time during a call."""
    with torch.no_grad(), PeakBytes() as counter:
        call()
    return counter.peak
