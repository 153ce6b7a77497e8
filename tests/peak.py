"""Counts the bytes of live tensors, exactly and without the allocator's help."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that `call` held at one time."""
    with torch.no_grad(), PeakBytes() as counter:
        call()
    return counter.peak
