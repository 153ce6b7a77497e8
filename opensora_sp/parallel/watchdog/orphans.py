"""Ends this rank when the launcher that started it is gone. Imports no torch.

Once a session is open its watchdog looks after the launcher. Before that a rank loads torch and
waits for its peers, at times for minutes, and a killed torchrun can no longer stop it. So a thread
of this module looks from the start.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from opensora_sp.base.launcher import speaks, under_torchrun
from opensora_sp.parallel.watchdog.signals import leave

POLL_S = 0.25
_LAUNCHERS = ("python", "torchrun", "accelerate", "colossal")


class _Start:
    """This process and its parent when the module was loaded; a forked child has another parent."""

    pid, parent = os.getpid(), os.getppid()
    # Set while a session's own threads look: they also tidy up.
    session_looks = threading.Event()
    watching: list[int] = []  # noqa: RUF012 (the process whose thread runs, if any)


def launcher_process() -> int:
    """The process that started this one, known from the start."""
    return _Start.parent if os.getpid() == _Start.pid else os.getppid()


def watched_by_the_session(looks: bool) -> None:
    """Say that the session's threads look after the launcher from now on, or no longer do."""
    (_Start.session_looks.set if looks else _Start.session_looks.clear)()


def watch_launcher() -> None:
    """Begin to look, under torchrun; ends this process with code 1 when the launcher has gone."""
    if not under_torchrun() or os.getpid() in _Start.watching:
        return
    _Start.watching.append(os.getpid())
    parent = launcher_process()
    if _is_init(parent):
        _leave_orphaned()
    threading.Thread(target=_look, args=(parent,), name="launcher", daemon=True).start()


def _look(parent: int) -> None:
    pause = threading.Event()
    while not pause.wait(POLL_S):
        if os.getppid() != parent and not _Start.session_looks.is_set():
            _leave_orphaned()


def _is_init(parent: int) -> bool:
    """Whether the launcher died before this process could look: init has adopted it then.

    In a container torchrun may be process 1 itself, which its command line tells.
    """
    if parent != 1:
        return False
    try:
        command = Path("/proc/1/cmdline").read_bytes().decode("utf-8", "replace").lower()
    except OSError:
        return False
    return bool(command) and not any(name in command for name in _LAUNCHERS)


def _leave_orphaned() -> None:
    with suppress(Exception):  # where the words went may be gone too
        if speaks():
            sys.stderr.write("error: the launcher that started this run is gone\n")
    leave(1)
