"""One of many gateways, and one of many groups, on a queue that they share.

`serve --queue` runs a gateway and, unless told otherwise, a group beside it; `work` runs a group
alone. Both end in order, and the database tells the others.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.server.engine_process import EngineProcess, Health
from opensora_sp.server.health_port import answering_health, health_socket
from opensora_sp.server.job_store import JobSpec
from opensora_sp.server.queue_url import shown_url
from opensora_sp.server.restarts import REFUSED
from opensora_sp.server.service import answer, bound, gateway_of, tended
from opensora_sp.server.settings import (
    GroupSettings,
    Operations,
    ServiceSettings,
)
from opensora_sp.server.shared_board import GatewayQueue, SharedBoard
from opensora_sp.server.shared_link import QueueLost
from opensora_sp.server.shared_queue import SharedQueue
from opensora_sp.server.shared_store import SharedStore, require_same_folder

LOOK_SECONDS, SIGN_SECONDS = 0.2, 3.0
log = logging.getLogger(__name__)


def serve_shared(
    settings: ServiceSettings, say: Callable[[str], None], *, with_engine: bool
) -> int:
    """Run a gateway of a shared queue until it is asked to end; `with_engine`: a group beside it.

    say: told where it answers, once it does. Raises UserError where the database does not answer or
    the folder is another.
    """
    from opensora_sp.server.checking import Judge, judge
    from opensora_sp.server.metrics import Metrics
    from opensora_sp.server.retention import Retention
    from opensora_sp.server.videos import remove

    group, operations = settings.group, settings.operations
    queue = _open_queue(group, "opensora-sp gateway")
    store = SharedStore(
        group.save_dir,
        lambda job_id: board.attempt_of(job_id),
        lambda job_id: board.result_of(job_id),
    )
    # No group's facts: what none of them can make waits, for another may come.
    no_group = replace(group, own_dir=group.save_dir / "no engine")

    def price(spec: JobSpec) -> Mapping[str, Any] | None:
        try:
            found = judge(no_group, spec.arguments, [], group.save_dir / "jobs", refuse=False)
        except UserError:
            return None  # it fails with that
        cost: Mapping[str, Any] = found["cost"]
        return cost

    board = SharedBoard(store, queue, group.digest(), price)
    board.load()
    metrics = Metrics(board, board.health)
    kept = tended(board, metrics, operations)
    # The board has the queue's one connection from here on; requests have another.
    requests = SharedQueue(group.queue, "opensora-sp requests")
    jobs = GatewayQueue(requests, store)
    board.on_contact.append(jobs.withdraw_unsure)
    gateway = gateway_of(
        settings, store=store, jobs=jobs, board=board, judge=Judge(no_group),
        health=board.health, metrics=metrics,
    )  # fmt: skip
    retention = Retention(store, gateway.jobs, board, kept, partial(remove, gateway))

    def end() -> None:
        _drain(engine, operations)
        gateway.finishing = False  # whoever waits for a picture yet is answered

    with bound(settings) as listening, contextlib.ExitStack() as stack:
        engine = stack.enter_context(_engine(group)) if with_engine else None
        retention.start()
        try:
            answer(settings, gateway, listening, say, end)
        finally:
            retention.close()
            requests.close()
            queue.close()
    return 0


def work(
    group: GroupSettings,
    operations: Operations,
    say: Callable[[str], None],
    *,
    health_port: int = 0,
) -> int:
    """Run a group without a gateway until it is asked to end; returns its exit code.

    health_port: where /health and /ready are answered; 0 for nowhere. On a node that does not lead
    its group only the ranks run. Raises UserError where the port is taken.
    0: it was asked to end; 1: its engine ended too often; 2: its engine refused its flags.
    """
    queue = _open_queue(group, "opensora-sp work")
    queue.close()
    asked = threading.Event()

    def stop(number: int, _frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    listening = health_socket(health_port)  # a port that is taken is refused before an engine
    with _engine(group) as engine, answering_health(listening, engine.health):
        part = f", node {group.node} of {group.nodes}," if group.nodes > 1 else ""
        say(f"group {group.group_name}{part} works for the queue {shown_url(group.queue)}")
        while not asked.wait(LOOK_SECONDS) and engine.given_up is None:
            pass
        _drain(engine, operations)
        if engine.given_up is None:
            return 0
        return REFUSED if f"exit code {REFUSED};" in engine.given_up else 1


def _open_queue(group: GroupSettings, name: str) -> SharedQueue:
    """The queue, when its tables and the folder are right. Raises UserError."""
    queue = SharedQueue(group.queue, name)
    queue.prepare()
    group.save_dir.mkdir(parents=True, exist_ok=True)
    require_same_folder(group.save_dir, queue, group.queue)
    return queue


@contextmanager
def _engine(group: GroupSettings) -> Iterator[EngineProcess]:
    """The engine of a group, running. When it has ended, the queue is told at once."""
    place = Path(tempfile.mkdtemp(prefix="opensora-sp-group-"))
    queue = SharedQueue(group.queue, f"opensora-sp {group.group_name} parent")
    completed = 0

    def count() -> int:
        nonlocal completed
        with contextlib.suppress(QueueLost):
            completed = queue.completed_by(group.group_name)
        return completed

    def ended() -> None:
        if group.node > 0:  # node 0 tells the queue
            return
        # Its ranks are gone: another group need not wait for the end of the lease.
        try:
            if queue.engine_died(group.group_name, group.parent):
                log.warning("the job of this group is given out again")
        except QueueLost as error:
            log.warning("the queue's database does not answer: %s", error)
        queue.close()

    engine = EngineProcess(replace(group, own_dir=place), count, ended)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        queue.close()
        shutil.rmtree(place, ignore_errors=True)


def _drain(engine: EngineProcess | None, operations: Operations) -> None:
    """End the engine; first let it finish its job where that was asked for.

    On a node that does not lead its group: first let its ranks be ended by node 0.
    """
    if engine is None:
        return
    if operations.drain == "finish":
        log.info("stopping: the job that is made may take %g s more", operations.drain_seconds)
        engine.take_no_more()
        begun, before = time.monotonic(), engine.health().restarts
        end = begun + operations.drain_seconds
        # A job may have been taken just now, and the sign of life that says so is on its way.
        while time.monotonic() < end and (
            time.monotonic() < begun + SIGN_SECONDS or engine.makes_a_job()
        ):
            now: Health = engine.health()
            if now.state == "failed" or now.restarts != before:
                break
            time.sleep(LOOK_SECONDS)
    log.info("stopping: the engine saves what it has not finished and ends")
    engine.stop()
