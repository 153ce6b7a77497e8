"""Completion of a batch's outputs while the next batch is made; on the leading rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from opensora_sp.engine.timing import Clock
from opensora_sp.media.background import Background

# Beside the stages, not one of them: the run did not stand still for it.
BESIDE = "encode, beside the rest"


class Finishing:
    """At most one batch whose outputs a thread completes.

    clock: gets the thread's seconds, beside the stages, and is in the stage "write" in `begin` and
    `check`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._batch: tuple[Background, ExitStack] | None = None

    def begin(self, background: Background, files: ExitStack, done: Callable[[], None]) -> None:
        """Have the files completed after what `background` has to do, then call done.

        Nothing may be put into `background` afterwards. Raises what failed by now.
        """

        def complete() -> None:
            files.close()
            done()

        with self._clock.stage("write"):
            self.settle()
            try:
                background.put(complete)
            except BaseException:
                background.abandon()
                with files:
                    raise
            background.close()
        self._batch = background, files

    def check(self) -> None:
        """Raise what has failed by now; does not wait."""
        if self._batch is not None and self._batch[0].failed:
            with self._clock.stage("write"):
                self.settle()

    def settle(self) -> None:
        """Return when the batch is complete. Raises what failed; its file then does not appear."""
        if self._batch is None:
            return
        (background, files), self._batch = self._batch, None
        try:
            with files:
                try:
                    background.wait()
                except BaseException:
                    background.abandon()  # files are closed here only when the thread has ended
                    raise
        finally:
            self._clock.note_beside(BESIDE, background.seconds)
