"""The engine's sign of life: what rank 0 writes every second, and what it says of all ranks.

Rank 0's thread writes it while its main thread is stuck too. So the file also says how long ago all
ranks last met, what rank 0 does, how long that may take, and which rank is silent the longest.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import read_object

if TYPE_CHECKING:
    from opensora_sp.parallel.control import ControlPlane

BEAT_SECONDS = 1.0
# Without a sign of life for this long, or between jobs without a meeting, a rank counts as stuck.
SILENT_SECONDS = 30.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A sign of life. state: starting or ready; at: seconds since 1970.

    idle: no job is made. still_s: seconds since all ranks last met, or since rank 0 began its stage
    or made a step, whichever was later. limit_s: how long that may be, None for no limit. quiet_s:
    seconds since the sign of life of `quiet_rank`, the longest of all peers; None without peers.
    """

    pid: int
    state: str
    at: float
    idle: bool = True
    stage: str = ""
    still_s: float = 0.0
    limit_s: float | None = SILENT_SECONDS
    quiet_rank: int | None = None
    quiet_s: float = 0.0


def stuck(sign: Sign, age: float) -> str | None:
    """Why the engine counts as stuck, in a line; None where it goes on.

    age: seconds since the sign was seen for the first time.
    """
    if age > SILENT_SECONDS:
        return f"rank 0 of the engine gives no sign of life for {age:.0f} s"
    if sign.quiet_rank is not None and sign.quiet_s + age > SILENT_SECONDS:
        return (
            f"rank {sign.quiet_rank} of the engine gives no sign of life for "
            f"{sign.quiet_s + age:.0f} s"
        )
    still = sign.still_s + age
    if sign.limit_s is not None and still > sign.limit_s:
        return (
            f"the engine's ranks have not met for {still:.0f} s ({sign.stage}); "
            f"{sign.limit_s:g} s are allowed there"
        )
    return None


def sign_of(control: ControlPlane, state: str, *, idle: bool) -> Sign:
    """What rank 0 knows of the ranks now."""
    standing = control.standing()
    limit = SILENT_SECONDS if idle and state == "ready" else standing.limit
    return Sign(
        pid=os.getpid(),
        state=state,
        at=time.time(),
        idle=idle,
        stage=standing.stage,
        still_s=round(standing.still, 2),
        limit_s=None if limit == float("inf") else limit,
        quiet_rank=standing.quiet_rank,
        quiet_s=round(standing.quiet, 2),
    )


class Beat:
    """Writes rank 0's sign of life, in a thread, until it is closed."""

    def __init__(self, save_dir: Path, control: ControlPlane) -> None:
        self.state, self.idle = "starting", True
        self._control = control
        self._path, self._end = beat_path(save_dir), threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more signs; the file goes."""
        self._end.set()
        self._thread.join(5)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while True:
            try:
                sign = asdict(sign_of(self._control, self.state, idle=self.idle))
                with atomic_output(self._path) as temporary:
                    temporary.write_text(json.dumps(sign), encoding="ascii")
            except UserError as error:
                log.warning(f"the engine's sign of life is not written: {error}")
            if self._end.wait(BEAT_SECONDS):
                return


def beat_path(save_dir: Path) -> Path:
    """The file of an engine's sign of life."""
    return save_dir / "engine.json"


def drain_path(save_dir: Path) -> Path:
    """A file that is there while the engine is to take no further job."""
    return save_dir / "drain"


def read_beat(save_dir: Path) -> Sign | None:
    """The engine's last sign of life; None where there is none."""
    try:
        found: dict[str, Any] = read_object(beat_path(save_dir), most_bytes=1 << 16)
        return Sign(**found)
    except (UserError, TypeError):
        return None
