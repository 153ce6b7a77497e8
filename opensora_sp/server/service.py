"""`opensora-sp serve`: the gateway here, the engine as a child, started again when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opensora_sp.base.errors import UserError
from opensora_sp.server.engine_group import BEAT_SECONDS, beat_path, only_one, read_beat
from opensora_sp.server.settings import LOCAL_HOSTS, GroupSettings, ServiceSettings

if TYPE_CHECKING:
    from opensora_sp.server.app import Gateway

# An engine that has ended is started again after this time, doubled each time up to the second.
RESTART_SECONDS, MOST_RESTART_SECONDS = 0.5, 30.0
# Without a sign of life for this long it counts as stuck.
SILENT_SECONDS = 30.0
# After so many ends in a row, each before it was ready or within a minute, it is given up.
MOST_ENDS = 10
END_SECONDS = 60.0
log = logging.getLogger(__name__)


class EngineProcess:
    """The engine's processes, watched by a thread."""

    def __init__(self, settings: GroupSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._failed: str | None = None
        self._thread = threading.Thread(target=self._watch, name="engine", daemon=True)

    def start(self) -> None:
        """Start it, and again whenever it ends."""
        self._thread.start()

    def state(self) -> str:
        """ready, starting, stopped, or "failed: ..." with the reason."""
        if self._failed is not None:
            return f"failed: {self._failed}"
        if self._ending.is_set():
            return "stopped"
        beat = read_beat(self._settings.save_dir)
        if beat is None:
            return "starting"
        if time.time() - beat.at > SILENT_SECONDS:
            return "failed: the engine gives no sign of life"
        return beat.state

    def stop(self) -> None:
        """Let it save what it is making, and end it."""
        self._ending.set()
        if self._process is not None and self._process.poll() is None:
            _signal_group(self._process, signal.SIGTERM)
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                _signal_group(self._process, signal.SIGKILL)
        self._thread.join(5)

    def _watch(self) -> None:
        wait, ends = RESTART_SECONDS, 0
        while not self._ending.is_set():
            started = time.monotonic()
            beat_path(self._settings.save_dir).unlink(missing_ok=True)
            self._process = subprocess.Popen(
                command(self._settings),
                start_new_session=True,
                preexec_fn=_end_with_parent,
                stdin=subprocess.DEVNULL,
            )
            was_ready = False
            while (code := self._process.poll()) is None:
                beat = read_beat(self._settings.save_dir)
                was_ready = was_ready or (beat is not None and beat.state == "ready")
                time.sleep(BEAT_SECONDS / 2)
            if self._ending.is_set():
                return
            lasted = time.monotonic() - started
            ends = 0 if was_ready and lasted > 60 else ends + 1
            wait = RESTART_SECONDS if ends <= 1 else min(MOST_RESTART_SECONDS, wait * 2)
            if (code == 2 and not was_ready) or ends >= MOST_ENDS:
                self._failed = f"the engine ended with exit code {code}; its messages say why"
                log.error("%s", self._failed)
                return
            log.warning(
                "the engine ended with exit code %s; it is started again in %.1f s", code, wait
            )
            self._ending.wait(wait)


def command(settings: GroupSettings) -> list[str]:
    """The engine's command line: torchrun for several ranks, plain python for one."""
    module = ["-m", "opensora_sp.cli.serve_engine", "--settings", settings.to_json()]
    if settings.ranks == 1:
        return [sys.executable, *module]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, "--nproc_per_node", str(settings.ranks), *module]


def _end_with_parent() -> None:
    """In the child: the kernel ends it when the gateway is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def serve(settings: ServiceSettings, say: Callable[[str], None]) -> int:
    """Run the server until it is asked to end. say: told where it answers, once it does."""
    from opensora_sp.server.app import Gateway
    from opensora_sp.server.board import Board
    from opensora_sp.server.checking import Judge
    from opensora_sp.server.durable import JobQueue
    from opensora_sp.server.job_store import JobStore
    from opensora_sp.server.served import facts_path

    group = settings.group
    refusal = f"--save-dir {group.save_dir}: another server uses it; end it or give another one"
    with only_one(group.save_dir / "gateway.lock", refusal):
        store, jobs = JobStore(group.save_dir), JobQueue(group.queue)
        board = Board(store, jobs, group.digest())
        board.load()
        facts_path(group.save_dir).unlink(missing_ok=True)  # another engine may have written it
        engine = EngineProcess(group)
        gateway = Gateway(
            store=store,
            jobs=jobs,
            board=board,
            judge=Judge(group),
            engine_state=engine.state,
            tokens=settings.tokens,
            limits=settings.limits,
            hosts=LOCAL_HOSTS if settings.host in LOCAL_HOSTS else (),
            embedded=not any("ckpt" in word for word in group.arguments),
        )
        with _bound(settings) as listening:
            engine.start()
            try:
                _answer(settings, gateway, listening, say)
            finally:
                engine.stop()
                jobs.close()
    return 0


def _bound(settings: ServiceSettings) -> socket.socket:
    """The socket to listen on. Raises UserError where the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise UserError(
            f"--port {settings.port} on --host {settings.host}: {error.strerror}; give another"
        ) from None


def _answer(
    settings: ServiceSettings,
    gateway: Gateway,
    listening: socket.socket,
    say: Callable[[str], None],
) -> None:
    """Answer until Ctrl-C or SIGTERM comes."""
    import uvicorn

    from opensora_sp.server.app import build_app
    from opensora_sp.server.connections import allow_open_files, protocol_of

    allow_open_files(settings.limits)
    config = uvicorn.Config(
        build_app(gateway),
        http=protocol_of(settings.limits),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    # uvicorn would raise the signal again when it has ended, and the engine would not be stopped.
    setattr(server, "capture_signals", contextlib.nullcontext)  # noqa: B010

    def stop(number: int, _frame: Any) -> None:
        gateway.draining = True
        server.should_exit = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(f"serving on http://{host}:{settings.port} (the API: /openapi.json)")
    server.run(sockets=[listening])
