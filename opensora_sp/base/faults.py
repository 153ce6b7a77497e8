"""Fault injection for tests: one rank fails in one way at one point of a run.

With `OPENSORA_SP_FAULT="rank=2 point=exchange way=kill after=5"` rank 2 kills itself when it
reaches an exchange for the sixth time. A run that torchrun has restarted is not affected. With
`OPENSORA_SP_FAULT_LOG=DIR` every rank writes its process number, and the time of the fault, into
DIR. Without OPENSORA_SP_FAULT this module has no effect.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE, LOG_VARIABLE = "OPENSORA_SP_FAULT", "OPENSORA_SP_FAULT_LOG"
# In this order: raise an exception, SIGKILL, SIGSTOP, exit with code 0. Some points have more ways:
# "hang" sleeps for an hour, "corrupt" changes a value that was broadcast, and "slow" sleeps for
# `SLOW_S`, which is no fault and must not end the run.
ENDS = ("exception", "kill", "stop", "exit")
SLOW_S = 8.0
# At every point: stand until the file `go` is in the log directory, while whoever injects the fault
# does something to the machine, such as fill its disk.
AWAIT = "await"
AWAIT_S = 120.0


@dataclass(frozen=True)
class Point:
    """A place in a run where a fault can be injected.

    stage: the stage's name there. ways: the ways to fail there. leading: only the leading rank
    reaches it. middle: another rank of four that reaches it. needs: flags that a run has to have to
    reach it. program: the program whose runs reach it.
    """

    stage: str
    ways: tuple[str, ...] = ENDS
    leading: bool = False
    middle: int = 2
    needs: tuple[str, ...] = ()
    program: str = "infer"


POINTS: Mapping[str, Point] = {
    "after-init": Point("start"),
    "load": Point("load"),
    "encode": Point("encode text", leading=True),
    "hand-out": Point("hand out", (*ENDS, "corrupt")),
    "exchange": Point("denoise", (*ENDS, "hang")),
    "velocity": Point("denoise"),
    "last-gather": Point("denoise", middle=1),  # ranks 2 and 3 hold the same latents again
    "decode": Point("decode", (*ENDS, "slow"), leading=True),
    "encode-to-file": Point("write", leading=True),
    # Files that are written on the way, by the leading rank.
    "save-step": Point("denoise", ("kill",), leading=True, needs=("--save-every", "1")),
    "save-clip": Point("save", ("kill",), leading=True),
    "record": Point("save", ("kill",), leading=True),
    "between-outputs": Point("between outputs"),
    "replica-work": Point("replica work", needs=("--replicas", "2")),
    "report": Point(
        "report",
        leading=True,
        needs=("--warmup-count", "0", "--benchmark-save-path", "{folder}/report.json"),
        program="benchmark",
    ),
}


class InjectedFault(RuntimeError):  # noqa: N818 (it is not an error of the program)
    """Raised on purpose."""


@dataclass(frozen=True)
class Plan:
    """One fault. after: how many times the rank passes the point before it fails."""

    rank: str
    point: str
    way: str
    after: int


@cache
def _planned(text: str | None) -> Plan | None:
    if not text or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return None
    given = dict(part.split("=", 1) for part in text.split())
    plan = Plan(given["rank"], given["point"], given["way"], int(given.get("after", "0")))
    if plan.way not in (*POINTS[plan.point].ways, AWAIT):
        raise ValueError(f"{VARIABLE}={text!r}: at {plan.point} only {POINTS[plan.point].ways}")
    return plan


_passed: dict[str, int] = {}


def reach(point: str) -> bool:
    """Report that a point is reached. True where the caller has to corrupt its value there."""
    plan = _planned(os.environ.get(VARIABLE))
    if plan is None or plan.point != point or plan.rank != os.environ.get("RANK", "0"):
        return False
    _passed[point] = _passed.get(point, -1) + 1
    if _passed[point] != plan.after:
        return False
    _note("fault", str(time.time()))
    return _fail(plan)


def note_process() -> None:
    """Write this rank's process number into the log directory, if there is one."""
    _note(f"rank{os.environ.get('RANK', '0')}.pid", str(os.getpid()))


def _fail(plan: Plan) -> bool:
    if plan.way == "exception":
        raise InjectedFault(f"made to fail at {plan.point}")
    if plan.way == "exit":
        sys.exit(0)
    if plan.way in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if plan.way == "kill" else signal.SIGSTOP)
    if plan.way == "hang":
        time.sleep(3600)
    if plan.way == "slow":
        time.sleep(SLOW_S)
    if plan.way == AWAIT:
        go, end = Path(os.environ[LOG_VARIABLE]) / "go", time.monotonic() + AWAIT_S
        while not go.exists():
            if time.monotonic() > end:
                raise InjectedFault(f"nobody came within {AWAIT_S:g} s at {plan.point}")
            time.sleep(0.02)
    return plan.way == "corrupt"


def _note(name: str, text: str) -> None:
    folder = os.environ.get(LOG_VARIABLE)
    if folder:
        (Path(folder) / name).write_text(text, encoding="ascii")
