"""What an engine notes in the store about a job that it makes: how far it is, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base.screen import one_line
from opensora_sp.request.computed_steps import computed_before
from opensora_sp.request.request import Job, Task
from opensora_sp.server.checking import without_paths
from opensora_sp.server.job_store import JobProgress, JobResult, JobStore

if TYPE_CHECKING:
    from opensora_sp.engine.progress import Position

# The least time between two notes of a job's progress: a note is a small file.
NOTE_SECONDS = 0.3


class JobReporter:
    """What the store is told of one job, by rank 0 alone; on the others it does nothing."""

    def __init__(self, store: JobStore, job_id: str, leads: bool) -> None:
        self._store, self._id, self._leads = store, job_id, leads
        self._started, self._noted, self._steps, self._done = time.time(), 0.0, 0, 0
        self._first: float | None = None
        self._before, self._preview, self._together = 0, 0, 1
        self._computed: Sequence[int] = (0, 1)

    @property
    def preview_file(self) -> Path:
        """Where its preview is written."""
        return self._store.preview(self._id)

    def begin(self, job: Job, start: Position | None, together: int = 1) -> None:
        """The job is made from here on: from where it was saved. None: its output is there.

        together: so many are made in one batch with it, itself too.
        """
        self._together = together
        request = job.tasks[0].request
        self._steps = request.steps * request.loop
        self._done = 0 if start is None else start.clip * request.steps + start.step
        self._before, self._first = self._done, None
        # Before each step: those left out take no time. Jobs with references are made alone.
        self._computed = computed_before([request])
        self._note("text", force=True)

    def on_step_end(self, step: int, t: float, latents: Any) -> bool:
        """After every step: note how far it is; True where the job is to be stopped.

        latents is None: the engine gathers them for previews alone, and only when one is due.
        """
        if not self._leads:
            return False
        self._done += 1
        if self._first is None:
            self._first = time.time()
        last = self._done >= self._steps
        self._note("decoding" if last else "denoising", force=last)
        return self._store.cancel_asked(self._id)

    def previewed(self) -> None:
        """A preview of the last step is there."""
        self._preview = self._done
        self._note("decoding" if self._done >= self._steps else "denoising", force=True)

    def failed(self, reason: str, code: str = "invalid_request") -> None:
        """It cannot be made, for a reason in one line."""
        if self._leads:
            self._store.put_result(
                self._id,
                JobResult(
                    finished_at=time.time(),
                    error=one_line(without_paths(reason, self._store.outputs(self._id))),
                    error_code=code,
                    seconds=time.time() - self._started,
                ),
            )

    def completed(
        self,
        task: Task,
        engine: Any,
        peaks: Sequence[int | None] = (),
        bytes_sent: Mapping[str, int] | None = None,
        together: int = 1,
    ) -> None:
        """Its output is there. peaks, bytes_sent, together: as for `JobResult`."""
        if not self._leads:
            return
        clock = engine.pipeline.models.clock
        stages = {name: round(seconds, 4) for name, seconds in clock.seconds.items()}
        self._store.put_result(
            self._id,
            JobResult(
                finished_at=time.time(),
                file=task.output.name,
                seconds=time.time() - self._started,
                stages=stages,
                peak_bytes=peaks[0] if peaks and engine.whole.device.type != "cpu" else None,
                peaks=peaks,
                bytes_sent=dict(bytes_sent or {}),
                steps=self._steps,
                steps_made=self._done - self._before,
                together=together,
            ),
        )

    def _note(self, stage: str, *, force: bool = False) -> None:
        moment = time.time()
        if not self._leads or (not force and moment - self._noted < NOTE_SECONDS):
            return
        self._noted = moment
        eta = None
        if self._first is not None:
            # The clock runs since the first step of this run has ended.
            made = self._computed[self._done] - self._computed[self._before + 1]
            left = self._computed[-1] - self._computed[self._done]
            if made > 0:
                eta = round((moment - self._first) / made * left, 1)
        self._store.put_progress(
            self._id,
            JobProgress(
                stage,
                self._done,
                self._steps,
                eta,
                self._started,
                self._preview,
                self._together,
            ),
        )
