"""One row for each collective backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """One row: collectives `name` on devices of type `device`, from the module `plugin`.

    chunks: parts of T that pay as overlap when one guidance half is alone on its ranks; on CPUs
        the exchange and the compute share the same cores, so there is nothing to hide it behind.
    """

    name: str
    device: str
    plugin: str | None = None
    chunks: int = 1


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("eccl", "gcu", plugin="torch_gcu", chunks=2),
        Backend("nccl", "cuda", chunks=2),
        Backend("gloo", "cpu"),
    )
}


DEVICES = tuple(backend.device for backend in BACKENDS.values())  # in order of preference
