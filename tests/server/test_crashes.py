"""The server killed where it stands: every accepted job ends once, with the right bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server

pytest.importorskip("dbos")
STEPS = 120


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path / "save", ranks=2)
    try:
        yield one
    finally:
        one.stop()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def begun(server: Server, video_id: str) -> int:
    """Wait until some steps are made; how many."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        _, video = server.call("GET", f"/v1/videos/{video_id}")
        if video["status"] == "in_progress" and video["step"] > 0:
            return int(video["step"])
        assert video["status"] in ("queued", "in_progress"), video
        time.sleep(0.02)
    raise AssertionError(f"{video_id} is not begun")


def test_jobs_survive_kills_of_ranks_of_the_gateway_and_of_all(server: Server) -> None:
    server.start()
    undisturbed = server.create(num_inference_steps=STEPS, seed=5)
    assert server.wait(undisturbed)["status"] == "completed"
    wanted = digest(server.content(undisturbed))
    jobs = [server.create(num_inference_steps=STEPS, seed=5) for _ in range(4)]
    pick = random.Random(7)
    for victim, job in zip(("rank 0", "rank 1", "gateway", "all"), jobs, strict=True):
        begun(server, job)
        time.sleep(pick.random() * 0.2)
        ranks = server.engine_pids()
        assert server.process is not None
        if victim in ("rank 0", "all"):
            os.kill(ranks[0], signal.SIGKILL)
        if victim in ("rank 1", "all"):
            os.kill(ranks[1], signal.SIGKILL)
        if victim in ("gateway", "all"):
            server.process.kill()
            server.process.wait()
            server.start()
        server.wait_ready()
        video = server.wait(job)
        assert video["status"] == "completed", video
        assert digest(server.content(job)) == wanted, victim
    _, listed = server.call("GET", "/v1/videos?limit=100")
    assert len(listed["data"]) == 5
    for job in jobs:
        outputs = list((server.save_dir / "jobs" / job / "outputs").glob("*.mp4"))
        assert [path.name for path in outputs] == ["video_0000.mp4"]


def test_a_stopped_server_goes_on_with_the_job_it_was_making(server: Server) -> None:
    server.start()
    job = server.create(num_inference_steps=2 * STEPS)
    waiting = server.create(num_inference_steps=2)
    begun(server, job)
    assert server.stop() == 0
    assert not server.engine_pids()
    server.start()
    video = server.wait(job)
    assert video["status"] == "completed", video
    assert server.wait(waiting)["status"] == "completed"
