"""A full run, saved step by step: it goes on where it was killed, and gives inner products.

The latents of every step are a file on the leading rank's disk, whole and float32, so they do not
depend on the mesh. What a step moved is the difference of two files. Velocities are what was moved,
over the step's length. The files of a run are removed when its inner products are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.benchmark.calibration.search import Floats
from opensora_sp.engine.progress import Gather, Progress, ResumePoint
from opensora_sp.parallel.exchange import broadcast
from opensora_sp.parallel.session import Session

_AT_ONCE = 1 << 18  # values of each step that are in memory at once, in float64


class Trajectory(Progress):
    """Saves the latents of every step of a run of one video and one clip in a folder.

    shape: of the latents, [1,4,T,H,W].
    """

    def __init__(self, session: Session, folder: Path, steps: int, shape: Sequence[int]) -> None:
        self._session, self._folder, self._steps = session, folder, steps
        self._shape = tuple(shape)
        found = self._saved() if session.leads else 0
        self.first_step: int = session.control.broadcast_object(found)

    def path(self, step: int) -> Path:
        """The latents after `step` steps."""
        return self._folder / f"latents-{step:05d}.npy"

    @property
    def _mask_path(self) -> Path:
        return self._folder / "mask.npy"

    def _saved(self) -> int:
        """After how many steps the latents are there, without a gap."""
        step = 0
        while step < self._steps and self.path(step + 1).is_file():
            step += 1
        return step

    def is_finished(self, clip: int) -> bool:
        """Whether the run has been denoised to its end."""
        return self.first_step == self._steps

    def latents(self, clip: int) -> Tensor | None:
        """The final latents [1,4,T,H,W] on the leading rank, float32."""
        return torch.from_numpy(np.load(self.path(self._steps))) if self._session.leads else None

    def resume_point(self, clip: int) -> ResumePoint | None:
        """The last step that is saved, on every rank; None at the beginning. Collective."""
        if self.first_step == 0:
            return None
        session = self._session
        z, mask = None, None
        if session.leads:
            z = torch.from_numpy(np.load(self.path(self.first_step)))
            mask = self.mask()
        mask = session.control.broadcast_object(mask)
        z = broadcast(session.world, z, self._shape, torch.float32, session.device)
        return ResumePoint(
            self.first_step, z.cpu(), None if mask is None else torch.from_numpy(mask)
        )

    def watch(
        self, clip: int, step: int, mask: Tensor | None, gather: Gather, held: object = None
    ) -> None:
        """Save the latents after `step` steps. Collective."""
        z = gather()
        if z is not None:
            if mask is not None and step == 1:
                _save(self._mask_path, mask.numpy())
            _save(self.path(step), z.float().cpu().numpy())

    def finish(self, clip: int, latents: Tensor | None, *, last: bool) -> None:
        """Save the final latents."""
        if latents is not None:
            _save(self.path(self._steps), latents.float().cpu().numpy())

    def mask(self) -> NDArray[np.float32] | None:
        """The frame mask [1,T] of the run; None where all frames are generated."""
        return np.load(self._mask_path) if self._mask_path.is_file() else None

    def inner_products(self, noise: Tensor, times: Sequence[float]) -> Floats:
        """Inner products [n,n] of the velocities of all steps, over the generated values' number.

        noise [1,4,T,H,W]: what the run began with. Kept frames have velocity zero. On the leading
        rank; a part of the values at a time is in memory.
        """
        start = noise.numpy().copy()
        first = np.load(self.path(1))
        mask = self.mask()
        generated = np.ones(start.shape[2], dtype=bool) if mask is None else mask[0] > 0
        start[:, :, ~generated] = first[:, :, ~generated]
        files = [np.load(self.path(k + 1), mmap_mode="r") for k in range(self._steps)]
        states = [start.reshape(-1), *(file.reshape(-1) for file in files)]
        return gram_of(states, times) / (start[:, :, generated].size or 1)

    def remove(self) -> None:
        """Remove the files."""
        for step in range(1, self._steps + 1):
            self.path(step).unlink(missing_ok=True)
        self._mask_path.unlink(missing_ok=True)


def gram_of(states: Sequence[NDArray[np.float32]], times: Sequence[float]) -> Floats:
    """Inner products [n,n] of the velocities between n + 1 flat states; the run ends at 0."""
    lengths = -np.diff(np.array([*times, 0.0]))
    total = np.zeros((len(times), len(times)))
    for begin in range(0, len(states[0]), _AT_ONCE):
        part = np.stack([state[begin : begin + _AT_ONCE] for state in states]).astype(np.float64)
        velocities = np.diff(part, axis=0) / lengths[:, None]
        total += velocities @ velocities.T
    return total


def _save(path: Path, values: NDArray[np.float32]) -> None:
    with atomic_output(path) as temporary, reported(path), temporary.open("wb") as file:
        np.save(file, values)
