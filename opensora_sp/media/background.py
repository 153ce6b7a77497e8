"""Writing beside the main thread: one thread that does what it is given, in order.

It encodes a video while the next frames are decoded. PyAV leaves the interpreter's lock while
FFmpeg works, and torch while it computes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from opensora_sp.media.sinks import Sink


HELD_CHUNKS = 2  # of every video of a batch, between the decoder and the encoder


class Background:
    """A thread for the outputs of one batch. It starts with the first work.

    limit: bytes that may wait here, those in work included; a single piece may be larger. seconds:
    that the thread has worked.
    """

    def __init__(self, limit: int) -> None:
        self.seconds = 0.0
        self._limit, self._held = limit, 0
        self._work: deque[tuple[Callable[[], None], int]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="write outputs", daemon=True)

    def put(self, work: Callable[[], None], size: int = 0) -> None:
        """Have work done after what was put before; waits until there is room for `size` bytes.

        Raises what earlier work raised. After an error nothing more is done.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._has_room(size))
            if self._error is not None:
                raise self._error
            self._work.append((work, size))
            self._held += size
            self._changed.notify_all()
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """No more will be put: the thread ends when all is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether something that was put has failed."""
        return self._error is not None

    def wait(self) -> None:
        """Close, and return when all is done. Raises what the work raised."""
        self.close()
        self._join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Close, forget what has not begun, and return when the thread has ended."""
        with self._changed:
            self._work.clear()
        self.close()
        self._join()

    def _join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _has_room(self, size: int) -> bool:
        return self._held == 0 or self._held + size <= self._limit

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._work) or self._closed)
                if not self._work:
                    return
                work, size = self._work.popleft()
            started = time.perf_counter()
            try:
                work()
            except BaseException as error:  # it is raised in the main thread
                self._end(error)
                return
            finally:
                self.seconds += time.perf_counter() - started
            del work  # it holds frames
            with self._changed:
                self._held -= size
                self._changed.notify_all()

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._work.clear()
            self._changed.notify_all()


class BackgroundSink:
    """A sink that has its frames written to another sink by a `Background`.

    before: called first, every time.
    """

    def __init__(self, sink: Sink, background: Background, before: Callable[[], None]) -> None:
        self._sink, self._background, self._before = sink, background, before

    def write(self, frames: NDArray[np.uint8]) -> None:
        """uint8 [F,H,W,3]. Copied, for they may be a view of much more, which would stay."""
        self._before()
        own = frames.copy()
        self._background.put(partial(self._sink.write, own), own.nbytes)
