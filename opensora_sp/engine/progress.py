"""What `generate` reports on its way: where a video is resumed from, and what is saved of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

# gather() → the whole latents [B,4,T,H,W] on the leading rank, None elsewhere.
Gather = Callable[[], Tensor | None]


@dataclass(frozen=True)
class HeldVelocities:
    """What a step cache fills steps with: velocities [k,B,4,T,H,W] of k computed steps, ascending.

    Latents' velocities, whole and float32, so that they do not depend on the mesh.
    """

    steps: Sequence[int]
    velocities: Tensor


# gather() → what a step cache holds, on the leading rank, None elsewhere.
GatherHeld = Callable[[], HeldVelocities | None]


@dataclass(frozen=True)
class ResumePoint:
    """Where a clip goes on: latents z [B,4,T,H,W] and frame mask [B,T] after `step` steps.

    held: of a step cache; None without one.
    """

    step: int
    z: Tensor
    mask: Tensor | None
    held: HeldVelocities | None = None


@dataclass(frozen=True, order=True)
class Position:
    """Where a video stands: `clip` clips are finished, and `step` steps of the next one."""

    clip: int = 0
    step: int = 0


class Progress:
    """Starts at the beginning and saves nothing; `jobs.saved_progress.SavedProgress` does both.

    Every rank of a video calls every method at the same point, with the same arguments.
    saves: whether latents are saved, for a later run to go on from.
    """

    saves = False

    def is_finished(self, clip: int) -> bool:
        """Whether a clip's latents are there, so that it is not denoised again."""
        return False

    def latents(self, clip: int) -> Tensor | None:
        """A finished clip's latents [B,4,T,H,W] on the leading rank. Collective."""
        raise LookupError(f"no latents of clip {clip} are saved")

    def resume_point(self, clip: int) -> ResumePoint | None:
        """Where a clip goes on, on every rank; None at its beginning. Collective."""
        return None

    def stoppable(self) -> AbstractContextManager[None]:
        """The block in which steps are made: a person may stop the run there."""
        return nullcontext()

    def watch(
        self,
        clip: int,
        step: int,
        mask: Tensor | None,
        gather: Gather,
        held: GatherHeld | None = None,
    ) -> None:
        """Look at the state after `step` steps of a clip. Collective.

        held: of a step cache; None without one.
        """

    def finish(self, clip: int, latents: Tensor | None, *, last: bool) -> None:
        """Look at a clip's final latents [B,4,T,H,W], where they are, before they are decoded."""
