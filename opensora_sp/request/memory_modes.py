"""The memory modes: one class for each, with everything that it chooses. Imports no torch.

To add a mode, write a subclass of `MemoryMode` and list it in MEMORY_MODES. The flag, the planner,
the models and the tests take it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Which weights wait in host memory and are copied to the device when they are used.

    models: one whole model (T5, the transformer, the VAE) is on the device at a time.
    layers: the transformer's block pairs and T5's layers are copied one by one as they are used;
        the rest of those two models stays on the device.
    """

    models: bool = False
    layers: bool = False

    @property
    def vae_stays(self) -> bool:
        """Whether the VAE stays on the device while the transformer runs."""
        return not self.models

    @property
    def transformer_stays(self) -> bool:
        """Whether the transformer's weights on the device stay there while the VAE runs.

        With layer offload those are the weights outside its blocks.
        """
        return self.layers or not self.models

    @property
    def text_encoder_stays(self) -> bool:
        """Whether T5 is kept for later captions once the first ones are encoded."""
        return not self.models

    @property
    def uses_host_memory(self) -> bool:
        """Whether any weights wait in host memory."""
        return self.models or self.layers


NO_OFFLOAD = Offload()


@dataclass(frozen=True, kw_only=True)
class MemoryMode:
    """What a memory mode chooses: how much device memory a run takes, and at what cost in time.

    name: as --memory takes it. about: what its help says of it. tokens: tokens that a block
    computes at once; None is all of them. serial_guidance: one CFG branch after the other on a
    rank. vae_frames: frames that the spatial VAE takes at once; None is a request's micro batch.
    """

    name: str
    about: str
    offload: Offload = NO_OFFLOAD
    tokens: int | None = None
    serial_guidance: bool = False
    vae_frames: int | None = None

    def __str__(self) -> str:
        return self.name


# Tokens at once: enough to keep matrix units busy, few enough that what a block allocates on its
# way (about 13 values a channel and token) stays small.
@dataclass(frozen=True, kw_only=True)
class Speed(MemoryMode):
    """Every model stays on the device."""

    name: str = "speed"
    about: str = "all models stay on the device"
    tokens: int | None = 65536


@dataclass(frozen=True, kw_only=True)
class Balanced(MemoryMode):
    """One whole model is on the device at a time."""

    name: str = "balanced"
    about: str = "one model is on the device at a time"
    offload: Offload = Offload(models=True)
    tokens: int | None = 32768
    serial_guidance: bool = True


@dataclass(frozen=True, kw_only=True)
class Small(MemoryMode):
    """The layers of the transformer and of T5 are copied to the device one by one."""

    name: str = "small"
    about: str = "layers are copied to it one by one"
    offload: Offload = Offload(models=True, layers=True)
    tokens: int | None = 16384
    serial_guidance: bool = True
    vae_frames: int | None = 1


# From the fastest to the one that needs least: `auto` takes the first that fits.
MEMORY_MODES: Mapping[str, MemoryMode] = MappingProxyType(
    {mode.name: mode for mode in (Speed(), Balanced(), Small())}
)
FASTEST, *_, SMALLEST = MEMORY_MODES.values()


def memory_mode(name: str) -> MemoryMode:
    """The mode that --memory calls `name`. Raises UserError that lists the modes for another."""
    mode = MEMORY_MODES.get(name) if isinstance(name, str) else None
    if mode is None:
        raise UserError(f"memory mode {shown(name)} is not one of {', '.join(MEMORY_MODES)}")
    return mode
