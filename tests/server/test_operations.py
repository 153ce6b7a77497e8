"""A server as an operator sees it: tokens, metrics, JSON logs, a stuck rank, an orderly end."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Server

pytest.importorskip("dbos")
pytest.importorskip("prometheus_client")
ANN, BOB = ({"authorization": f"Bearer {letter * 20}"} for letter in "ab")
PROMPT = "a red ball rolls to the right"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("operations")
    tokens = folder / "tokens"
    tokens.write_text(f"ann:{'a' * 20}\nbob:{'b' * 20}\n")
    flags = ["--token-file", str(tokens), "--heartbeat-timeout", "3", "--log-format", "json"]
    flags += ["--log-level", "debug", "--drain", "finish", "--keep-days", "1"]
    one = Server(folder / "save", *flags, ranks=2).start()
    try:
        yield one
    finally:
        one.stop()


def create(server: Server, steps: int, headers: dict[str, str]) -> str:
    fields = {"prompt": PROMPT, "size": "48x32", "num_frames": 17, "num_inference_steps": steps}
    status, video = server.call("POST", "/v1/videos", fields, headers)
    assert status == 200, video
    return str(video["id"])


def until(server: Server, video_id: str, *statuses: str) -> dict[str, Any]:
    end = time.monotonic() + 120
    while True:
        status, video = server.call("GET", f"/v1/videos/{video_id}", None, ANN)
        assert status == 200, video
        if video["status"] in statuses:
            return dict(video)
        assert time.monotonic() < end, server.log.read_text()[-3000:]
        time.sleep(0.05)


def metrics(server: Server) -> dict[str, float]:
    request = urllib.request.Request(f"{server.url}/metrics", headers=ANN)
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("opensora_sp_"): float(value) for name, _, value in lines}


def test_the_engine_s_numbers_come_from_all_ranks(server: Server) -> None:
    video = until(server, create(server, 3, ANN), "completed", "failed")
    assert video["status"] == "completed", video
    assert video["expires_at"] == video["completed_at"] + 86_400
    end = time.monotonic() + 10
    while not (found := metrics(server)).get("steps_total"):  # counted right after it was shown
        assert time.monotonic() < end
    assert found['jobs_ended_total{code="",outcome="completed"}'] == 1
    assert found["steps_total"] == 3
    assert found["step_seconds_count"] == found["frames_per_second_count"] == 1
    for rank in (0, 1):
        assert found[f'rank_peak_bytes{{rank="{rank}"}}'] > 50e6
    # Two ranks share guidance: each sends its velocity at every step.
    assert found['collective_bytes_total{collective="velocity"}'] > 0
    assert found['stage_seconds_sum{stage="decode"}'] > 0
    assert found['engine_state{state="ready"}'] == 1
    assert found['http_requests_total{method="POST",route="/v1/videos",status="200"}'] == 1
    assert server.call("GET", f"/v1/videos/{video['id']}", None, BOB)[0] == 404
    assert server.call("GET", "/metrics")[0] == 401


def test_a_stopped_rank_is_noticed_and_the_job_goes_on_with_a_new_engine(server: Server) -> None:
    before = server.call("GET", "/health")[1]
    assert before["restarts"] == 0
    job = create(server, 150, ANN)
    while not until(server, job, "in_progress", "completed").get("step"):
        time.sleep(0.05)
    os.kill(server.engine_pids()[1], signal.SIGSTOP)
    video = until(server, job, "completed", "failed")
    assert video["status"] == "completed", video
    assert server.call("GET", "/health")[1]["restarts"] == 1
    assert metrics(server)["engine_restarts_total"] == 1
    server.wait_ready()


def test_a_stopped_server_finishes_its_job_refuses_others_and_logs_no_prompt(
    server: Server, tmp_path: Path
) -> None:
    # A picture, whose client waits for it.
    picture = {"prompt": PROMPT, "size": "48x32", "num_inference_steps": 300}
    clients = ThreadPoolExecutor(1)
    asked = clients.submit(server.call, "POST", "/v1/images/generations", picture, ANN)
    end = time.monotonic() + 60
    while not (live := server.call("GET", "/v1/videos?limit=1", None, ANN)[1]["data"]) or (
        live[0]["status"] != "in_progress"
    ):
        assert time.monotonic() < end
        time.sleep(0.02)
    job, waiting = live[0]["id"], create(server, 2, BOB)
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + 10
    while server.call("GET", "/ready") != (503, {"status": "draining"}):
        assert time.monotonic() < end
    fields = {"prompt": PROMPT, "size": "48x32"}
    assert server.call("POST", "/v1/videos", fields, ANN)[0] == 503
    status, made = asked.result(90)
    assert (status, made["data"][0]["id"]) == (200, job)
    assert server.process.wait(90) == 0, server.log.read_text()[-3000:]
    folder = server.save_dir / "jobs"
    assert json.loads((folder / job / "result.json").read_text())["error"] is None
    assert not (folder / waiting / "result.json").exists()
    assert not server.engine_pids()
    text = server.log.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    others = [line for line in text.splitlines() if not line.startswith("{")]
    assert all(line.startswith(str(folder)) for line in others), others  # standard output's
    assert all(one.keys() >= {"time", "level", "logger", "message"} for one in lines)
    ends = [one["job"] for one in lines if "is completed in" in one["message"]]
    assert ends[-1] == job
    ready = [one for one in lines if one["message"].startswith("the engine is ready")]
    assert {one["rank"] for one in ready} == {0}
    assert any(one["logger"] == "opensora_sp.server.access" for one in lines)
    assert "red ball" not in text.lower()
    assert "a" * 20 not in text
