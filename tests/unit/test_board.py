"""The board of the gateway: order, pages and counts, and how much of the queue a look reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("fastapi")

from opensora_sp.server.board import Board
from opensora_sp.server.durable import JobQueue, QueuedJob
from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec, JobStore


class Queue:
    """The queue's reading side, in memory; it counts what is asked."""

    def __init__(self) -> None:
        self.jobs: dict[str, QueuedJob] = {}
        self.whole_looks = 0

    def set(self, job_id: str, status: str) -> None:
        self.jobs[job_id] = QueuedJob(job_id, status, 100, float(len(self.jobs)))

    def live(self) -> list[QueuedJob]:
        self.whole_looks += 1
        jobs = [job for job in self.jobs.values() if job.status in ("queued", "in_progress")]
        return sorted(jobs, key=lambda job: (job.status == "queued", job.created_at))

    def taken(self) -> list[QueuedJob]:
        return [job for job in self.jobs.values() if job.status == "in_progress"]

    def find(self, job_ids: Iterable[str]) -> dict[str, QueuedJob]:
        return {job_id: self.jobs[job_id] for job_id in job_ids if job_id in self.jobs}


@pytest.fixture
def house(tmp_path: Path) -> tuple[Board, Queue, JobStore]:
    store, queue = JobStore(tmp_path), Queue()
    return Board(store, cast("JobQueue", queue)), queue, store


def fill(house: tuple[Board, Queue, JobStore], count: int) -> list[str]:
    board, queue, store = house
    ids = [f"video_{number:024x}" for number in range(count)]
    for number, job_id in enumerate(ids):
        spec = JobSpec(job_id, 1000.0 + number, (), owner="even" if number % 2 == 0 else "odd")
        store.put_spec(spec)
        board.add(spec)
        queue.set(job_id, "queued")
    board.look()
    return ids


def pages(board: Board, limit: int, **asked: Any) -> list[str]:
    """All pages one after the other."""
    found: list[str] = []
    last, more = None, True
    while more:
        page, more = board.page(last, limit, **asked)
        found += [entry.spec.id for entry in page]
        last = page[-1] if page else None
    return found


def test_pages_follow_each_other_in_both_orders_and_over_deleted_jobs(house: Any) -> None:
    ids = fill(house, 11)
    board = house[0]
    assert pages(board, 3, newest_first=False) == ids
    assert pages(board, 3) == ids[::-1]
    odd = pages(board, 2, shows=lambda entry: entry.spec.owner == "odd")
    assert odd == ids[1::2][::-1]
    gone = board.get(ids[5])
    board.remove(ids[5])
    assert [e.spec.id for e in board.page(gone, 2)[0]] == [ids[4], ids[3]]
    assert [e.spec.id for e in board.page(gone, 2, newest_first=False)[0]] == [ids[6], ids[7]]
    assert board.counts()["queued"] == 10
    assert (board.queued_of("even"), board.queued_of("odd")) == (6, 4)


def test_a_look_reads_the_whole_queue_only_when_something_changed(house: Any) -> None:
    board, queue, store = house
    ids = fill(house, 50)
    queue.set(ids[0], "in_progress")
    store.put_progress(ids[0], JobProgress("denoising", 1, 100))
    board.look()
    before = queue.whole_looks
    for step in range(2, 20):
        store.put_progress(ids[0], JobProgress("denoising", step, 100))
        board.look()
        assert board.get(ids[0]).progress.step == step
    assert queue.whole_looks - before <= 1  # one may be due by the clock
    assert board.get(ids[49]).place == 49


def test_a_job_that_ended_between_two_looks_is_seen_and_the_others_move_up(house: Any) -> None:
    board, queue, store = house
    ids = fill(house, 3)
    queue.set(ids[0], "in_progress")
    store.put_progress(ids[0], JobProgress("denoising", 1, 2))
    board.look()
    store.put_result(ids[0], JobResult(2000.0, file="video_0000.mp4"))
    queue.set(ids[0], "ended")
    queue.set(ids[1], "in_progress")
    board.look()
    assert board.get(ids[0]).status == "completed"
    assert (board.get(ids[1]).place, board.get(ids[2]).place) == (0, 1)
    assert board.counts() == {"queued": 2, "in_progress": 0, "completed": 1, "failed": 0}


def test_what_a_poll_gets_is_made_once_and_anew_when_the_job_changes(house: Any) -> None:
    board, queue, store = house
    ids = fill(house, 1)
    body = board.body(board.get(ids[0]))
    assert board.body(board.get(ids[0])) is body
    assert b'"status":"queued"' in body
    queue.set(ids[0], "in_progress")
    store.put_progress(ids[0], JobProgress("denoising", 1, 2))
    board.look()
    assert b'"status":"in_progress"' in board.body(board.get(ids[0]))
