"""Weights that live in host memory and are lent to the device while they are used.

A loan puts device copies in the place of a module's host weights and takes them out again; the
host weights never change, so nothing is copied back. On devices with streams the copy runs beside
the computation, from pinned memory where the device has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class DeviceCopy:
    """Modules' weights on their way to a device, and there, until they are given back."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, lane: Lane) -> None:
        self._places: list[tuple[dict[str, Any], str, Tensor]] = [
            (weights, name, weight)
            for module in modules
            for part in module.modules()
            for weights in (part._parameters, part._buffers)
            for name, weight in weights.items()
            if weight is not None
        ]
        # A weight with two names is copied once.
        hosts = {id(host): host for _, _, host in self._places}
        self._copies = {key: torch.empty_like(host, device=device) for key, host in hosts.items()}
        self._arrived = lane.copy([(self._copies[key], host) for key, host in hosts.items()])

    def take(self) -> None:
        """Put the copies in place; what is computed from here on waits until they are there."""
        self._arrived()
        for weights, name, host in self._places:
            copy = self._copies[id(host)]
            is_parameter = isinstance(host, nn.Parameter)
            weights[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy

    def give_back(self) -> None:
        """The host weights are in place again; the copies are gone."""
        for weights, name, host in self._places:
            weights[name] = host
        self._copies.clear()


class Lane:
    """Where copies to a device run: a stream of their own, or in line where there are none."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = getattr(torch, device.type, None)
        has_streams = device.type != "cpu" and all(
            hasattr(self._module, name) for name in ("Stream", "current_stream", "stream")
        )
        self._stream: Any = self._module.Stream(device) if has_streams else None  # type: ignore

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Start copying each (to, from); the result makes the computation wait for the end."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return _nothing
        # The targets' memory may still be read by what was launched before it was freed.
        self._stream.wait_stream(self._module.current_stream())
        with self._on_stream():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        stream, module = self._stream, self._module
        done = stream.record_event()

        def arrived() -> None:
            module.current_stream().wait_event(done)

        return arrived

    def _on_stream(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._module.stream(self._stream)
        return context if self._stream is not None else nullcontext()


def _nothing() -> None:
    """In line, a copy has arrived when it was made."""


class LayerOffload:
    """The layers of a model in order, each on the device when it is yielded, the next on its way.

    streamed False: they are there already and are passed on as they are. keep: how many of those
    yielded stay usable; one more than that is on the device, for the next is fetched early.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[nn.Module]],
        device: torch.device,
        *,
        streamed: bool,
        keep: int = 1,
    ) -> None:
        self._layers, self._device, self._keep = layers, device, keep
        self._lane = Lane(device) if streamed else None

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Generator[Sequence[nn.Module], None, None]:
        if self._lane is None:
            yield from self._layers
            return
        held: deque[DeviceCopy] = deque()
        coming: DeviceCopy | None = DeviceCopy(self._layers[0], self._device, self._lane)
        try:
            for number, layer in enumerate(self._layers):
                while len(held) >= self._keep:
                    held.popleft().give_back()
                assert coming is not None
                coming.take()
                held.append(coming)
                more = number + 1 < len(self._layers)
                coming = (
                    DeviceCopy(self._layers[number + 1], self._device, self._lane) if more else None
                )
                yield layer
        finally:
            for loan in held:
                loan.give_back()


class StreamedList(nn.ModuleList):
    """A ModuleList whose owner loops over it: its modules come to the device one by one."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__(modules)
        # A plain attribute: what is in it is in the list already.
        object.__setattr__(
            self, "_passing", LayerOffload([(module,) for module in modules], device, streamed=True)
        )

    def __iter__(self) -> Iterator[nn.Module]:
        passing: LayerOffload = self._passing  # type: ignore[assignment]
        return (module for (module,) in passing)


class ModelOffload:
    """Whole models that take turns on a device; the others wait in host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lane = device, Lane(device)
        self._module: nn.Module | None = None
        self._loan: DeviceCopy | None = None

    def take(self, module: nn.Module | None) -> None:
        """It is `module`'s turn, which stays until another's comes; None sends everybody home."""
        if module is self._module and module is not None:
            return
        if self._loan is not None:
            self._loan.give_back()
        self._module, self._loan = module, None
        release_cached(self._device)
        if module is not None:
            self._loan = DeviceCopy([module], self._device, self._lane)
            self._loan.take()


def release_cached(device: torch.device) -> None:
    """Hand memory that the device's allocator keeps for later back to the device."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "empty_cache"):
        module.empty_cache()  # type: ignore[union-attr]


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor in page-locked memory, from which a device copies beside its computation."""
    if device.type == "cpu":
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError:  # no room for it, or a vendor's build without it: copies wait instead
        return tensor
