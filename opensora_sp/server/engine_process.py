"""The engine as a child of the gateway: started, watched, started again, ended."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from opensora_sp.base.deadlines import HEARTBEAT_S
from opensora_sp.server.beat import (
    BEAT_SECONDS,
    SILENT_SECONDS,
    Sign,
    beat_path,
    drain_path,
    read_beat,
    stuck,
)
from opensora_sp.server.logs import relay
from opensora_sp.server.restarts import Restarts
from opensora_sp.server.settings import GroupSettings

LOOK_SECONDS = BEAT_SECONDS / 2
# The engine's own watchdog ends one that is stuck. What it does not end within its silence limit
# and this time more is ended here.
STUCK_SECONDS = HEARTBEAT_S + SILENT_SECONDS
END_SECONDS = 60.0
NOT_STARTED = 1  # in place of an exit code
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """state: ready, starting, stopped or failed. reason: of a failure, in a line."""

    state: str
    reason: str = ""
    restarts: int = 0

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


class EngineProcess:
    """The engine's processes, watched by a thread.

    completed: how many jobs were completed since the server was started. on_end: called whenever
    the engine has ended, whatever ended it.
    """

    def __init__(
        self,
        settings: GroupSettings,
        completed: Callable[[], int] = lambda: 0,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings, self._completed, self._on_end = settings, completed, on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._restarts = Restarts()
        self._given_up: str | None = None
        # The last sign of life, and when it was first seen, on a clock that stands while the
        # machine sleeps.
        self._seen: tuple[Sign | None, float] = (None, 0.0)
        self._thread = threading.Thread(target=self._watch, name="engine", daemon=True)

    def start(self) -> None:
        """Start it, and again whenever it ends."""
        self._thread.start()

    def health(self) -> Health:
        """How it is now. Any thread may ask; costs nothing."""
        restarts = self._restarts.count
        if self._given_up is not None:
            return Health("failed", self._given_up, restarts)
        if self._ending.is_set():
            return Health("stopped", "", restarts)
        if self._settings.node > 0:
            # Signs of life are rank 0's, which is on another node.
            return Health("ready" if self._runs() else "starting", "", restarts)
        sign, seen = self._seen
        if sign is None:
            return Health("starting", "", restarts)
        reason = stuck(sign, time.monotonic() - seen)
        return Health("failed" if reason else sign.state, reason or "", restarts)

    @property
    def given_up(self) -> str | None:
        """Why it is not started again, in a line; None where it is."""
        return self._given_up

    def _runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def makes_a_job(self) -> bool:
        """Whether a job is made now, as far as the last sign of life says.

        A node that does not lead has no sign of life: there, whether its ranks run, which node 0
        ends when the job has ended.
        """
        if self._settings.node > 0:
            return self._runs()
        sign = self._seen[0]
        return sign is not None and not sign.idle

    def take_no_more(self) -> None:
        """Let it finish the job that it makes, and begin no other."""
        drain_path(self._settings.place).touch()

    def stop(self) -> None:
        """Let it save what it is making, and end it. A second call changes nothing."""
        self._ending.set()
        if self._process is not None and self._process.poll() is None:
            _signal_group(self._process, signal.SIGTERM)
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
        if self._thread.is_alive():
            self._thread.join(5)

    def _watch(self) -> None:
        while not self._ending.is_set():
            started = time.monotonic()
            try:
                self._start()
            except OSError as error:  # such as no memory for another process
                log.error("the engine cannot be started: %s", error)
                code, was_ready = NOT_STARTED, False
            else:
                code, was_ready = self._until_it_ends()
            self._on_end()
            if self._ending.is_set():
                return
            now = time.monotonic()
            wait = self._restarts.ended(
                now,
                code=code,
                was_ready=was_ready,
                lasted=now - started,
                completed=self._completed(),
            )
            if isinstance(wait, str):
                self._given_up = wait
                log.error("%s", wait)
                return
            log.warning(
                "the engine ended with exit code %s; it is started again in %.1f s", code, wait
            )
            self._ending.wait(wait)

    def _start(self) -> None:
        for left in (beat_path, drain_path):
            left(self._settings.place).unlink(missing_ok=True)
        self._seen = (None, time.monotonic())
        as_json = self._settings.log_format == "json"
        self._process = subprocess.Popen(
            command(self._settings),
            start_new_session=True,
            preexec_fn=_end_with_parent,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self._settings.environ()},
            stderr=subprocess.PIPE if as_json else None,
        )
        if self._process.stderr is not None:
            pipe = self._process.stderr
            threading.Thread(target=relay, args=(pipe,), name="engine log", daemon=True).start()

    def _until_it_ends(self) -> tuple[int, bool]:
        """Look at it until it has ended: its exit code, and whether it ever was ready."""
        assert self._process is not None
        was_ready, looks = self._settings.node > 0, 0
        while (code := self._process.poll()) is None:
            sign = read_beat(self._settings.place)
            if sign is not None and sign != self._seen[0]:
                self._seen = (sign, time.monotonic())
            was_ready = was_ready or (sign is not None and sign.state == "ready")
            # Looks are counted, not seconds: none are made while this process stands still.
            is_stuck = not self._ending.is_set() and self.health().state == "failed"
            looks = looks + 1 if is_stuck else 0
            if looks * LOOK_SECONDS > STUCK_SECONDS:
                log.error("%s: it is killed", self.health().reason)
                self._kill()
                looks = 0
            time.sleep(LOOK_SECONDS)
        return code, was_ready

    def _kill(self) -> None:
        """End it at once; rank 0 too, which torchrun may have put into a session of its own."""
        assert self._process is not None
        _signal_group(self._process, signal.SIGKILL)
        sign = self._seen[0]
        if sign is not None and sign.pid != os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(sign.pid, signal.SIGKILL)


def command(settings: GroupSettings) -> list[str]:
    """The engine's command line on this node: torchrun for several ranks, plain python for one."""
    module = ["-m", "opensora_sp.cli.serve_engine", "--settings", settings.to_json()]
    if settings.ranks == 1:
        return [sys.executable, *module]
    run = [sys.executable, "-m", "torch.distributed.run"]
    if settings.nodes == 1:
        run.append("--standalone")
    else:
        # Static: the elastic rendezvous numbers nodes as they come, but node 0 must have rank 0,
        # whose signs of life and files are looked at there.
        host, _, port = settings.master.rpartition(":")
        run += ["--nnodes", str(settings.nodes), "--node_rank", str(settings.node)]
        run += ["--master_addr", host.strip("[]"), "--master_port", port]
    return [*run, "--nproc_per_node", str(settings.ranks // settings.nodes), *module]


def _end_with_parent() -> None:
    """In the child: the kernel ends it when the gateway is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
