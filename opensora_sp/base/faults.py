"""Faults on purpose, for tests: one rank fails in one way at one point of a run.

Set `OPENSORA_SP_FAULT="rank=2 point=exchange way=kill after=5"`: the sixth time that rank 2 comes
to an exchange, it kills itself. Only the first attempt of a run that torchrun restarts is hit.
`OPENSORA_SP_FAULT_LOG=DIR` has every rank leave its process number there, and the moment of the
fault. Without the variable nothing here does anything.
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
# raise an exception; SIGKILL; SIGSTOP; leave with exit code 0; sleep forever; change a value
# that was handed out; be slow (not a fault, and not to be taken for one).
ENDS = ("exception", "kill", "stop", "exit")
WAYS = (*ENDS, "hang", "corrupt", "slow")
SLOW_S = 8.0


@dataclass(frozen=True)
class Point:
    """A place in a run: what the stage is called there, and what can happen to whom.

    leading: only the leading rank comes here. middle: a rank of four, not the leading one, that
    does too. needs: flags without which nobody does. program: whose run it is in.
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
    """One fault: which rank, where, how, and how many times it may pass that place before."""

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
    if plan.way not in POINTS[plan.point].ways:
        raise ValueError(f"{VARIABLE}={text!r}: at {plan.point} only {POINTS[plan.point].ways}")
    return plan


_passed: dict[str, int] = {}


def reach(point: str) -> bool:
    """Come to a point; True when the value at hand is to be corrupted there."""
    plan = _planned(os.environ.get(VARIABLE))
    if plan is None or plan.point != point or plan.rank != os.environ.get("RANK", "0"):
        return False
    _passed[point] = _passed.get(point, -1) + 1
    if _passed[point] != plan.after:
        return False
    _note("fault", str(time.time()))
    return _fail(plan)


def note_process() -> None:
    """Leave this rank's process number for whoever watches."""
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
    return plan.way == "corrupt"


def _note(name: str, text: str) -> None:
    folder = os.environ.get(LOG_VARIABLE)
    if folder:
        (Path(folder) / name).write_text(text, encoding="ascii")
