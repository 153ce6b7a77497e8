"""The status store: each rank's stage, who has finished, and the one fault that ends the run.

It is kept in the key-value store that the process groups were made through, on a connection of its
own. It needs no collective, so it works while collectives hang.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from opensora_sp.base.outside_json import parse_json

_TIMEOUT = timedelta(seconds=30)
PATIENCE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What ended the run: the rank that failed first, the stage it was in, what happened.

    code: the exit code that all ranks end with. stopped: a person asked for it. recorded: the
    rank has told its launcher by itself. found_by: the rank that says so.
    """

    rank: int
    stage: str
    what: str
    code: int = 1
    stopped: bool = False
    recorded: bool = False
    found_by: int | None = None

    def __str__(self) -> str:
        if self.stopped:
            return f"stopped by {self.what}: the same command goes on from what is saved"
        return f"error: rank {self.rank}, {self.stage}: {self.what}"


@dataclass(frozen=True)
class Beat:
    """A sign of life: how many it has given, and the stage it is in."""

    count: int
    stage: str


class StatusStore:
    """One rank's view of the store. Any thread may use it; all calls raise when it is gone."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank
        self._lock = threading.Lock()  # a client's calls must not interleave

    @classmethod
    def connect(cls, rank: int) -> StatusStore:
        """A connection of its own to the store of this run."""
        return cls(connect_store("board", _TIMEOUT), rank)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        # A store whose keeper is stopped never answers; that must not stop who knows by other ways.
        if not self._lock.acquire(timeout=PATIENCE_S):
            raise TimeoutError("the store of the run does not answer")
        try:
            yield
        finally:
            self._lock.release()

    def beat(self, beat: Beat) -> None:
        """Show a sign of life."""
        with self._exclusive():
            self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def beats(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """The last sign of life of each of these ranks that has given one."""
        found = {}
        for rank in ranks:
            with self._exclusive():
                if self._store.check([f"beat/{rank}"]):
                    found[rank] = _made(Beat, self._store.get(f"beat/{rank}"))
        return found

    def finish(self) -> None:
        """Say that this rank has done its work and may go."""
        with self._exclusive():
            self._store.set(f"done/{self._rank}", "1")

    def finished(self, rank: int) -> bool:
        """Whether a rank has."""
        with self._exclusive():
            return bool(self._store.check([f"done/{rank}"]))

    def claim(self, fault: Fault) -> Fault:
        """Put the fault up, unless there is one already; the one that stands."""
        text = json.dumps(asdict(fault))
        with self._exclusive():
            return _made(Fault, self._store.compare_set("fault", "", text))

    def fault(self) -> Fault | None:
        """The fault that stands, if any."""
        with self._exclusive():
            if not self._store.check(["fault"]):
                return None
            return _made(Fault, self._store.get("fault"))


_Entry = TypeVar("_Entry", Beat, Fault)
_KINDS = {"rank": int, "stage": str, "what": str, "code": int, "stopped": bool, "recorded": bool}
_MOST_BYTES = 1 << 20


def _made(kind: type[_Entry], raw: bytes) -> _Entry:
    """An entry of the store. Raises ValueError or TypeError for one that no rank wrote.

    Whoever reaches the store's port can write into it, and what it says is printed and exited with.
    """
    found = parse_json(raw, most_bytes=_MOST_BYTES)
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    for name, value in found.items():
        if not isinstance(value, _KINDS.get(name, object)):
            raise ValueError(f"{name} is not {_KINDS[name].__name__}")
    return kind(**found)


def connect_store(page: str, timeout: timedelta) -> Any:
    """A client of the run's store, as the environment names it, on a page that is new for every
    attempt: torchrun may keep one store over its restarts, with the addresses of the dead in it."""
    c10d: Any = dist  # its type stubs leave the stores out
    client = c10d.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return c10d.PrefixStore(f"opensora_sp/{page}/{attempt}", client)


def records_for_launcher() -> bool:
    """Whether torchrun started this process and reads what it leaves."""
    return "TORCHELASTIC_ERROR_FILE" in os.environ


def record_for_launcher(error: BaseException) -> None:
    """Leave the error where torchrun looks for it, so that its own summary names it too."""
    if records_for_launcher():
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with suppress(Exception):
            try:
                raise error  # the handler writes the traceback of what is being handled
            except BaseException as raised:
                get_error_handler().record_exception(raised)
