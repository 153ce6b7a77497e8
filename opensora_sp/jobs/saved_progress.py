"""Saving and resuming during `generate`.

Every rank of a video has a `SavedProgress`, and the leading rank reads and writes the files. A
state that cannot be saved is a note, and the run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from opensora_sp.base import faults
from opensora_sp.base.errors import Stopped, UserError
from opensora_sp.base.screen import warn_once
from opensora_sp.engine.progress import (
    Gather,
    GatherHeld,
    HeldVelocities,
    Position,
    Progress,
    ResumePoint,
)
from opensora_sp.jobs.saved_latents import SavedStep, StateFiles
from opensora_sp.parallel.exchange import broadcast
from opensora_sp.parallel.session import Session

_log = logging.getLogger(__name__)


class SavedProgress(Progress):
    """The saved state of a batch: one `StateFiles` for each request, all at the same position.

    every: steps between two saves; 0 saves finished clips only. stops: save the last step on Ctrl-C
    or SIGTERM. on_latents: called when the last clip is denoised. on_step: called after every step.
    """

    saves = True

    def __init__(
        self,
        session: Session,
        files: Sequence[StateFiles],
        start: Position,
        *,
        every: int = 0,
        stops: bool = False,
        on_latents: Callable[[], None] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self._session, self._files, self._start = session, files, start
        self._every, self._stops, self._on_latents = every, stops, on_latents
        self._on_step = on_step
        self._asked: list[int] = []  # signals that came during the steps
        self._mask: Tensor | None = None
        self._unsaved: tuple[Position, Gather, GatherHeld | None] | None = None

    def is_finished(self, clip: int) -> bool:
        """Whether a clip's latents are saved, so that it is not denoised again."""
        return clip < self._start.clip

    def latents(self, clip: int) -> Tensor | None:
        """A finished clip's latents [B,4,T,H,W] on the leading rank. Collective."""
        return self._session.control.together(
            lambda: torch.stack([files.load_clip(clip) for files in self._files]),
            leading_only=True,
        )

    def resume_point(self, clip: int) -> ResumePoint | None:
        """The resume point of a clip, on every rank; None at its beginning. Collective."""
        step = self._start.step
        if clip != self._start.clip or step == 0:
            return None
        session = self._session
        saved = session.control.together(
            lambda: [files.load_step() for files in self._files], leading_only=True
        )
        about = None if saved is None else (_masks(saved), _held_steps(saved))
        mask, steps = session.control.broadcast_object(about)
        z = self._handed_out(None if saved is None else torch.stack([one.z for one in saved]))
        if not steps:
            return ResumePoint(step, z, mask)
        velocities = None
        if saved is not None:
            batches = [torch.stack([one.held[i] for one in saved]) for i in steps]
            velocities = torch.stack(batches)
        return ResumePoint(step, z, mask, HeldVelocities(steps, self._handed_out(velocities)))

    def _handed_out(self, whole: Tensor | None) -> Tensor:
        """The leading rank's tensor, in host memory of every rank. Collective."""
        session = self._session
        shape = session.control.broadcast_object(None if whole is None else tuple(whole.shape))
        return broadcast(session.world, whole, shape, torch.float32, session.device).cpu()

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """A block in which steps are made. If a signal stops it, the last step is saved first.

        Saving gathers the latents from all ranks of the video. A single rank saves at once, in the
        middle of a step. Several ranks finish the step, and then exchange the signals they got.
        """
        if not self._stops:
            yield
        elif self._session.world_size == 1:
            try:
                yield
            except (KeyboardInterrupt, Stopped):
                self.save_now()
                raise
        else:
            with self._session.control.signals_noted(self._asked):
                yield

    def watch(
        self,
        clip: int,
        step: int,
        mask: Tensor | None,
        gather: Gather,
        held: GatherHeld | None = None,
    ) -> None:
        """Called after `step` steps of a clip: save the state if it is due. Collective."""
        self._mask, self._unsaved = mask, (Position(clip, step), gather, held)
        if self._on_step is not None:
            self._on_step()
        asked = self._all_asked()
        if asked or (self._every and step % self._every == 0):
            self.save_now()
        self._leave(asked)

    def _all_asked(self) -> list[int]:
        """The signals that any rank of the video has got, the same on all ranks. Collective."""
        session = self._session
        if not self._stops or session.world_size == 1:
            return []
        return [
            number
            for each in session.control.all_gather_object(list(self._asked))
            for number in each
        ]

    def _leave(self, asked: Sequence[int]) -> None:
        if asked:
            self._session.control.barrier()  # the first that leaves ends the one that saves
            raise Stopped(asked[0])

    def save_now(self) -> None:
        """Save the last step, unless it is saved already. Collective."""
        if self._unsaved is None:
            return
        position, gather, gather_held = self._unsaved
        z = gather() if self._files else None
        held = gather_held() if self._files and gather_held is not None else None
        if z is not None:
            faults.reach("save-step")
            rows = [None] * len(z) if self._mask is None else list(self._mask)
            for place, (files, latents, mask) in enumerate(zip(self._files, z, rows, strict=True)):
                saved = SavedStep(latents, mask, _of_sample(held, place))
                self._try(partial(files.save_step, position, saved))
        self._unsaved = None  # set last, so that an interrupted save is repeated

    def finish(self, clip: int, latents: Tensor | None, *, last: bool) -> None:
        """Save a clip's final latents [B,4,T,H,W] on the rank that has them, before decoding."""
        self._unsaved = None
        with self._session.control.stage("save"):
            if latents is not None and self._files:
                faults.reach("save-clip")
                for files, own in zip(self._files, latents, strict=True):
                    self._try(partial(files.save_clip, clip, own))
            if last and self._on_latents is not None:
                self._on_latents()
        self._leave(self._all_asked())

    def _try(self, save: Callable[[], None]) -> None:
        try:
            save()
        except (UserError, OSError) as error:
            # Hours of work do not end because their insurance could not be paid.
            warn_once(
                _log, "state", f"the state is not saved, so it cannot be gone on from: {error}"
            )


def _of_sample(held: HeldVelocities | None, place: int) -> dict[int, Tensor]:
    """The held velocities of one sample of a batch, by step."""
    if held is None:
        return {}
    return {step: own[place] for step, own in zip(held.steps, held.velocities, strict=True)}


def _held_steps(saved: Sequence[SavedStep]) -> list[int]:
    """The steps of which every sample has its velocity, ascending.

    Samples that were left in different batches may have others, where frames joined.
    """
    common = set(saved[0].held).intersection(*(one.held for one in saved))
    return sorted(common)


def _masks(saved: Sequence[SavedStep]) -> Tensor | None:
    """The frame masks [B,T] of a batch; None where no video has conditioning frames."""
    if all(one.mask is None for one in saved):
        return None
    return torch.stack(
        [torch.ones(one.z.shape[1]) if one.mask is None else one.mask for one in saved]
    )
