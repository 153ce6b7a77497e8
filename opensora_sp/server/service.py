"""`opensora-sp serve`: the gateway here, the engine as a child, and how both end in order."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from opensora_sp.base.errors import UserError
from opensora_sp.server.engine_group import only_one
from opensora_sp.server.engine_process import EngineProcess
from opensora_sp.server.logs import hidden, hide_in_lines, quieten_libraries
from opensora_sp.server.settings import LOCAL_HOSTS, ServiceSettings

if TYPE_CHECKING:
    from opensora_sp.server.board import Board, Entry
    from opensora_sp.server.gateway import Gateway
    from opensora_sp.server.metrics import Metrics
    from opensora_sp.server.retention import Kept
    from opensora_sp.server.settings import Operations

# Lines about a job may still come for this long after it has ended.
LINES_SECONDS = 60.0
log = logging.getLogger(__name__)


def serve(settings: ServiceSettings, say: Callable[[str], None]) -> int:
    """Run the server until it is asked to end. say: told where it answers, once it does."""
    from opensora_sp.server.board import Board
    from opensora_sp.server.checking import Judge
    from opensora_sp.server.durable import JobQueue
    from opensora_sp.server.job_store import JobStore
    from opensora_sp.server.metrics import Metrics
    from opensora_sp.server.retention import Retention
    from opensora_sp.server.served import facts_path
    from opensora_sp.server.videos import remove

    group, operations = settings.group, settings.operations
    refusal = f"--save-dir {group.save_dir}: another server uses it; end it or give another one"
    with only_one(group.save_dir / "gateway.lock", refusal):
        store, jobs = JobStore(group.save_dir), JobQueue(group.queue)
        board = Board(store, jobs, group.digest())
        board.load()
        facts_path(group.save_dir).unlink(missing_ok=True)  # another engine may have written it
        engine = EngineProcess(group, lambda: metrics.completed)
        metrics = Metrics(board, engine.health)
        kept = tended(board, metrics, operations)
        gateway = gateway_of(
            settings, store=store, jobs=jobs, board=board, judge=Judge(group),
            health=engine.health, metrics=metrics,
        )  # fmt: skip
        retention = Retention(store, jobs, board, kept, partial(remove, gateway))
        with bound(settings) as listening:
            engine.start()
            retention.start()
            try:
                answer(
                    settings, gateway, listening, say, partial(_drain, settings, gateway, engine)
                )
            finally:
                engine.stop()
                jobs.give_back(entry.spec.id for entry in board.all() if entry.live)
                retention.close()
                jobs.close()
    return 0


def tended(board: Board, metrics: Metrics, operations: Operations) -> Kept:
    """What is kept of ended jobs; the board is told, and metrics and logs hear of jobs that end."""
    from opensora_sp.server.retention import Kept

    kept = Kept(operations.keep_days, operations.keep_gb)
    board.kept_seconds = kept.seconds
    board.on_end += [metrics.job_ended, partial(log_end, log_prompts=operations.log_prompts)]
    if not operations.log_prompts:
        hide_in_lines(partial(without_prompts, board))
    return kept


def gateway_of(settings: ServiceSettings, **parts: Any) -> Gateway:
    """The gateway of these settings. parts: the fields of `Gateway` that no setting decides."""
    from opensora_sp.server.gateway import Gateway
    from opensora_sp.server.settings import service_label

    return Gateway(
        tokens=settings.tokens,
        limits=settings.limits,
        hosts=LOCAL_HOSTS if settings.host in LOCAL_HOSTS else (),
        origins=settings.origins,
        embedded=not any("ckpt" in word for word in settings.group.arguments),
        log_prompts=settings.operations.log_prompts,
        label=service_label(settings.group.arguments),
        **parts,
    )


def log_end(entry: Entry, *, log_prompts: bool) -> None:
    """Say how a job ended; why it failed may quote its prompt."""
    job_id, result = entry.spec.id, entry.result
    assert result is not None
    extra = {"job": job_id}
    if entry.status == "completed":
        log.info("%s is completed in %.1f s", job_id, result.seconds, extra=extra)
    else:
        why = f": {result.error}" if log_prompts else ""
        log.info("%s has failed (%s)%s", job_id, result.error_code, why, extra=extra)


def without_prompts(board: Board, text: str) -> str:
    """A line without the prompts of the jobs that it may be about."""
    recent = time.time() - LINES_SECONDS
    prompts = [
        str(entry.spec.shown.get("prompt", ""))
        for entry in board.all()
        if entry.live or (entry.result is not None and entry.result.finished_at > recent)
    ]
    return hidden(text, prompts)


def bound(settings: ServiceSettings) -> socket.socket:
    """The socket to listen on. Raises UserError where the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise UserError(
            f"--port {settings.port} on --host {settings.host}: {error.strerror}; give another"
        ) from None


def answer(
    settings: ServiceSettings,
    gateway: Gateway,
    listening: socket.socket,
    say: Callable[[str], None],
    end_engine: Callable[[], None],
) -> None:
    """Answer until Ctrl-C or SIGTERM comes and `end_engine`, which it calls, has returned."""
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
    if settings.operations.log_format == "json":
        quieten_libraries()  # uvicorn has just set up its own handlers
    server = uvicorn.Server(config)
    # uvicorn would raise the signal again when it has ended, and the engine would not be stopped.
    setattr(server, "capture_signals", contextlib.nullcontext)  # noqa: B010

    def drain() -> None:
        end_engine()
        server.should_exit = True

    def stop(number: int, _frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once
        gateway.finishing = settings.operations.drain == "finish"
        gateway.draining = True
        # Clients are answered meanwhile: what is there can be fetched, and new jobs are refused.
        threading.Thread(target=drain, name="drain", daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(f"serving on http://{host}:{settings.port} (the API: /openapi.json)")
    server.run(sockets=[listening])


def _drain(settings: ServiceSettings, gateway: Gateway, engine: EngineProcess) -> None:
    """Wait for the job that is made, where that was asked for, and end the engine."""
    operations = settings.operations
    if operations.drain == "finish":
        log.info("stopping: the job that is made may take %g s more", operations.drain_seconds)
        engine.take_no_more()
        end = time.monotonic() + operations.drain_seconds
        before = engine.health().restarts
        while time.monotonic() < end and gateway.board.counts()["in_progress"]:
            now = engine.health()
            if now.state == "failed" or now.restarts != before:
                break  # what it was making is saved: the next server goes on with it
            time.sleep(0.05)
        gateway.finishing = False
    log.info("stopping: the engine saves what it has not finished and ends")
    engine.stop()
