"""The state of other processes on this machine: running, stopped or gone, and how they ended.

On Linux /proc tells at once that a process was killed or stopped, which the process itself cannot
report. On other systems only "gone" is known.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
# Indices in /proc/PID/stat, counted from the state, the first field after the program's name.
_STATE, _STARTED, _EXIT_CODE = 0, 19, 49


@dataclass(frozen=True)
class Process:
    """One process. The start time tells it from a later process with the same number.

    started: the kernel's start time in clock ticks; "" where it is not known.
    node: the machine and its process namespace, which a container has of its own.
    """

    pid: int
    started: str
    node: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        pid = os.getpid()
        fields = _stat(pid)
        return cls(pid, fields[_STARTED] if fields else "", this_node())

    @property
    def here(self) -> bool:
        """Whether the process runs on this machine. The other methods need that."""
        return self.node == this_node()

    def state(self) -> str:
        """ "running", "stopped" (by SIGSTOP or a debugger) or "gone"."""
        fields = _stat(self.pid)
        if fields is None:
            if _PROC.joinpath("self", "stat").exists():
                return "gone"
            return "running" if _answers(self.pid) else "gone"
        if (self.started and fields[_STARTED] != self.started) or fields[_STATE] in "ZXx":
            return "gone"
        return "stopped" if fields[_STATE] in "Tt" else "running"

    def fate(self) -> str:
        """How the process ended, as far as the kernel tells before the parent has waited for it."""
        fields = _stat(self.pid)
        if fields is None or fields[_STARTED] != self.started or len(fields) <= _EXIT_CODE:
            return "ended without a word (killed from outside? the system's log tells)"
        status = int(fields[_EXIT_CODE])
        if status == 0:
            return "ended without a word, or with exit code 0 before its work was done"
        if not os.WIFSIGNALED(status):
            return f"ended with exit code {os.WEXITSTATUS(status)}"
        number = os.WTERMSIG(status)
        hint = " (the kernel does that when memory runs out)" if number == signal.SIGKILL else ""
        return f"was killed by {signal_name(number)}{hint}"

    def kill(self) -> None:
        """Send SIGKILL, if the process still exists."""
        if self.here and self.state() != "gone":
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def signal_name(number: int) -> str:
    """A signal's name, such as SIGTERM; "signal 42" of a real-time signal, which has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def this_node() -> str:
    """A short name of this machine and process namespace, the same for all who share them."""
    try:
        boot = _PROC.joinpath("sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink(_PROC / "self/ns/pid")
    except OSError:
        boot, space = socket.gethostname(), ""
    return hashlib.sha256(f"{boot}{space}".encode()).hexdigest()[:8]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name. The name may hold spaces and parentheses."""
    try:
        text = _PROC.joinpath(str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
