"""The stage that a rank is in, and whether it has been there for too long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from opensora_sp.base.deadlines import DEADLINES, HEARTBEAT_S, kind_of_stage


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds: of silence before a peer counts as hung, and per kind of stage (`deadlines`)."""

    heartbeat: float = HEARTBEAT_S
    deadlines: Mapping[str, float] = field(default_factory=lambda: dict(DEADLINES))


@dataclass(frozen=True)
class Late:
    """A stage beyond its deadline: its kind, the limit and the seconds over it."""

    kind: str
    limit: float
    over: float


@dataclass
class _Stage:
    name: str
    since: float
    detail: str = ""

    def __str__(self) -> str:
        return self.name + (f", {self.detail}" if self.detail else "")


class Stages:
    """A stack of nested stages, written by the main thread and read by the watching ones.

    failed: the innermost stage that an exception has left, if any. now: seconds on a clock that
    never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._stack: list[_Stage] = []
        self.failed: str | None = None

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Be in a stage for a `with` block."""
        self._stack.append(_Stage(name, self._now()))
        try:
            yield
        except BaseException:
            self.failed = self.failed or self.where
            raise
        finally:
            self._stack.pop()
            if self._stack:
                self._stack[-1].since = self._now()

    def progress(self, detail: str) -> None:
        """The innermost stage has come this far; its time starts anew."""
        for stage in self._stack[-1:]:
            stage.detail, stage.since = detail, self._now()

    def restart(self) -> None:
        """Every stage's time starts anew: this process itself stood still."""
        for stage in list(self._stack):
            stage.since = self._now()

    @property
    def where(self) -> str:
        """The innermost stage, as a person reads it."""
        return next((str(stage) for stage in self._stack[-1:]), "between stages")

    def now(self) -> tuple[float | None, str | None]:
        """When the innermost stage began or last came further, and its kind of deadline, if any."""
        for stage in self._stack[-1:]:
            return stage.since, kind_of_stage(stage.name)
        return None, None

    def late(self, deadlines: Mapping[str, float]) -> Late | None:
        """The innermost stage, if it has taken longer than its kind may."""
        for stage in self._stack[-1:]:
            kind = kind_of_stage(stage.name)
            if kind is not None and (over := self._now() - stage.since - deadlines[kind]) > 0:
                return Late(kind, deadlines[kind], over)
        return None
