"""Offload: weights wait in host memory and are copied to the device while they are used.

Model offload copies one whole model at a time, layer offload one layer after the other. A copy
takes the place of the host weight in its module and is dropped after use. The host weights never
change, so nothing is copied back. On devices with streams the copy runs beside the computation,
from page-locked memory where the device has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class DeviceCopy:
    """Device copies of modules' weights: started at once, in use from `use` until `free`."""

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

    def use(self) -> None:
        """Put the copies in place. What is computed from here on waits until they have arrived."""
        self._arrived()
        for weights, name, host in self._places:
            copy = self._copies[id(host)]
            is_parameter = isinstance(host, nn.Parameter)
            weights[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy

    def free(self) -> None:
        """Put the host weights in place again and drop the copies."""
        for weights, name, host in self._places:
            weights[name] = host
        self._copies.clear()

    def cancel(self) -> None:
        """Drop copies that were never used. Their memory is not reused before they arrived."""
        self._arrived()
        self._copies.clear()


class Lane:
    """Where copies to a device run: in a stream of their own, or in line without streams."""

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
    """The layers of a model in order. Each is on the device when it is yielded.

    offloaded: the layers wait in host memory; the next one is copied while one computes. False:
    they are on the device already and are yielded as they are. keep: how many of those yielded
    stay usable. One more than that is on the device, because the next is copied early.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[nn.Module]],
        device: torch.device,
        *,
        offloaded: bool,
        keep: int = 1,
    ) -> None:
        self._layers, self._device, self._keep = layers, device, keep
        self._lane = Lane(device) if offloaded else None

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
                    held.popleft().free()
                assert coming is not None
                coming.use()
                held.append(coming)
                coming = None
                if number + 1 < len(self._layers):
                    coming = DeviceCopy(self._layers[number + 1], self._device, self._lane)
                yield layer
        finally:
            if coming is not None:  # the loop was left early
                coming.cancel()
            for copy in held:
                copy.free()


class OffloadedModuleList(nn.ModuleList):
    """A ModuleList with layer offload: looping over it copies its modules one by one."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__(modules)
        # A plain attribute: what is in it is in the list already.
        layers = LayerOffload([(module,) for module in modules], device, offloaded=True)
        object.__setattr__(self, "_layers", layers)

    def __iter__(self) -> Iterator[nn.Module]:
        layers: LayerOffload = self._layers  # type: ignore[assignment]
        return (module for (module,) in layers)


class ModelOffload:
    """Model offload: one whole model is on the device, the others wait in host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lane = device, Lane(device)
        self._module: nn.Module | None = None
        self._copy: DeviceCopy | None = None

    def to_device(self, module: nn.Module | None) -> None:
        """Copy `module` to the device, where it stays until another is; None only frees."""
        if module is self._module and module is not None:
            return
        if self._copy is not None:
            self._copy.free()
        self._module, self._copy = module, None
        release_cached(self._device)
        if module is not None:
            self._copy = DeviceCopy([module], self._device, self._lane)
            self._copy.use()


def release_cached(device: torch.device) -> None:
    """Return memory that the device's allocator keeps for later to the device."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "empty_cache"):
        module.empty_cache()  # type: ignore[union-attr]


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor in page-locked memory: the device copies from there while it computes."""
    if device.type == "cpu":
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError:  # no room for it, or a vendor's build without it: copies wait instead
        return tensor
