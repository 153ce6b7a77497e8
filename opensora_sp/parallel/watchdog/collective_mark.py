"""Whether this rank is inside a collective, as the code that calls one says.

The watchdog needs it twice. A rank that is late inside a collective waits for somebody else. An
error that a collective raised is the consequence of a peer's failure, not its cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CollectiveMark:
    """One for each process. The main thread sets it; the watching threads read it.

    kind: the collective that the main thread is inside of, None outside of any.
    """

    def __init__(self) -> None:
        self.kind: str | None = None

    @contextmanager
    def inside(self, kind: str) -> Iterator[None]:
        """Be inside a collective for a `with` block; a RuntimeError that leaves it is marked."""
        before, self.kind = self.kind, kind
        try:
            yield
        except RuntimeError as error:  # what torch raises for a broken connection or a timeout
            error.collective = kind  # type: ignore[attr-defined]
            raise
        finally:
            self.kind = before


def raised_in_collective(error: BaseException) -> bool:
    """Whether a collective raised it: then some peer has failed before."""
    return getattr(error, "collective", None) is not None
