"""A checkpoint's weights where the disk is not shared: read by the leading rank, handed to all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from opensora_sp.models.checkpoint import Shape, WeightFiles
from opensora_sp.parallel.exchange import broadcast
from opensora_sp.parallel.session import Session


class HandedOut(WeightFiles):
    """`WeightFiles` of which the leading rank alone has the files.

    Every rank asks for the same weights in the same order, as loading one module does; each is
    one broadcast, so no rank holds more than the weight that is on its way.
    """

    def __init__(self, session: Session, files: WeightFiles | None) -> None:
        known = (files.shapes, {name: files.file_of(name) for name in files.shapes}) if files else 0
        shared = session.control.broadcast_object(known)
        assert isinstance(shared, tuple)
        self.shapes: dict[str, Shape] = shared[0]
        self._homes_by_name: Mapping[str, Path] = shared[1]
        self._session, self._leading = session, files

    @property
    def files(self) -> tuple[Path, ...]:
        """The leading rank's files."""
        return tuple(dict.fromkeys(self._homes_by_name.values()))

    def file_of(self, name: str) -> Path:
        """The leading rank's file that holds the weight."""
        return self._homes_by_name[name]

    def get(self, name: str) -> Tensor:
        """The weight on the session's device, in its stored dtype. Collective."""
        session = self._session
        stored = None if self._leading is None else self._leading.get(name)
        dtype = session.control.broadcast_object(None if stored is None else str(stored.dtype))
        assert dtype is not None
        wanted: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
        return broadcast(session.world, stored, self.shapes[name], wanted, session.device)

    def release(self) -> None:
        """Drop the leading rank's mappings."""
        if self._leading is not None:
            self._leading.release()
