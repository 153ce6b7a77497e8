"""How a server is run, without one: restarts, health, logs, retention, tokens, metrics."""

# ruff: noqa: E402 (where a package of the server is missing, its modules cannot be imported)

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for package in ("fastapi", "dbos", "prometheus_client", "httpx2"):
    pytest.importorskip(package)

from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from opensora_sp.base.errors import UserError
from opensora_sp.cli.serve import _settings
from opensora_sp.parallel.control import ControlPlane
from opensora_sp.parallel.watchdog.detector import FailureDetector
from opensora_sp.parallel.watchdog.stages import Limits
from opensora_sp.server import engine_process, health_port, logs, shared_service
from opensora_sp.server.app import build_app
from opensora_sp.server.beat import Sign, beat_path, sign_of, stuck
from opensora_sp.server.board import Board
from opensora_sp.server.durable import QueuedJob
from opensora_sp.server.engine_process import EngineProcess, Health
from opensora_sp.server.gateway import Gateway
from opensora_sp.server.health_port import answering_health, health_socket
from opensora_sp.server.job_store import JobResult, JobSpec, JobStore
from opensora_sp.server.metrics import Metrics
from opensora_sp.server.protocol import BadRequest
from opensora_sp.server.refusals import add_refusals
from opensora_sp.server.restarts import MOST_FRUITLESS, MOST_QUICK, Restarts
from opensora_sp.server.retention import DAY_SECONDS, Kept, Retention
from opensora_sp.server.settings import GroupSettings, Operations, ServiceLabel, read_tokens
from opensora_sp.server.settings import Limits as GatewayLimits
from opensora_sp.server.shared_rows import Claim
from opensora_sp.server.videos import remove

ROOT = Path(__file__).resolve().parents[2]
HOUR = 3600.0


# Restarts and health.


def test_an_engine_that_fails_slowly_for_ever_is_given_up() -> None:
    restarts = Restarts()
    ends = [
        restarts.ended(n * HOUR, code=1, was_ready=True, lasted=HOUR, completed=3)
        for n in range(MOST_FRUITLESS)
    ]
    assert all(isinstance(end, float) for end in ends[:-1])
    assert "20 times without completing a job" in str(ends[-1])
    assert restarts.count == MOST_FRUITLESS - 1


def test_an_engine_that_completes_jobs_between_its_ends_is_started_again() -> None:
    restarts = Restarts()
    for n in range(5 * MOST_FRUITLESS):
        end = restarts.ended(n * HOUR, code=1, was_ready=True, lasted=HOUR, completed=n // 10)
        assert isinstance(end, float), n


def test_an_engine_that_ends_at_once_is_given_up_sooner_and_one_that_refuses_at_once() -> None:
    restarts = Restarts()
    ends = [
        restarts.ended(float(n), code=1, was_ready=False, lasted=1.0, completed=0)
        for n in range(MOST_QUICK)
    ]
    waits = [end for end in ends if isinstance(end, float)]
    assert len(waits) == MOST_QUICK - 1
    assert waits == sorted(waits)
    assert isinstance(ends[-1], str)
    refused = Restarts().ended(0.0, code=2, was_ready=False, lasted=1.0, completed=0)
    assert isinstance(refused, str)


def sign(**changes: Any) -> Sign:
    return Sign(**{"pid": 1, "state": "ready", "at": 0.0, **changes})


@pytest.mark.parametrize(
    ("one", "age", "words"),
    [
        (sign(), 1.0, None),
        (sign(), 31.0, "rank 0 of the engine gives no sign of life for 31 s"),
        (sign(quiet_rank=3, quiet_s=40.0), 1.0, "rank 3 of the engine gives no sign of life"),
        (sign(still_s=40.0), 1.0, "the engine's ranks have not met for 41 s"),
        # A decode, or a text that takes long to encode, is not stuck: it has a limit of its own.
        (sign(idle=False, stage="decode", still_s=3000.0, limit_s=7200.0), 1.0, None),
        (sign(idle=False, stage="decode", still_s=7300.0, limit_s=7200.0), 1.0, "decode"),
        (sign(idle=False, stage="denoise", still_s=1e6, limit_s=None), 1.0, None),
    ],
)
def test_what_counts_as_stuck(one: Sign, age: float, words: str | None) -> None:
    found = stuck(one, age)
    assert (found is None) if words is None else (found is not None and words in found)


def test_the_sign_says_the_stage_s_own_limit_and_the_rank_that_is_silent() -> None:
    clock = SimpleNamespace(now=100.0)
    peers: Any = [None, None, None]
    limits = Limits(deadlines={"load": 50.0, "decode": 70.0})
    detector = FailureDetector(0, None, peers, limits, now=lambda: clock.now)
    detector._heard[2] = (5, 90.0)
    control = ControlPlane(watchdog=detector)  # type: ignore[arg-type]
    control.met = time.monotonic() - 8.0
    idle = sign_of(control, "ready", idle=True)
    assert (idle.quiet_rank, idle.quiet_s, idle.limit_s) == (2, 10.0, 30.0)
    assert 8 <= idle.still_s < 9
    with detector.stages.enter("decode"):
        assert sign_of(control, "ready", idle=False).limit_s == 70.0
    assert sign_of(control, "ready", idle=False).limit_s == 50.0


@pytest.fixture
def quick_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An `EngineProcess` of any program, started again at once."""
    started: list[EngineProcess] = []
    monkeypatch.setattr(engine_process, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr("opensora_sp.server.restarts.RESTART_SECONDS", 0.01)

    def engine(program: str, **settings: Any) -> EngineProcess:
        monkeypatch.setattr(engine_process, "command", lambda _: [sys.executable, "-c", program])
        started.append(EngineProcess(GroupSettings(tmp_path, "", (), **settings)))
        started[0].start()
        return started[0]

    yield engine
    for one in started:
        one.stop()


def until(state: str, engine: EngineProcess, restarts: int = 0) -> Health:
    end = time.monotonic() + 30
    while (health := engine.health()).state != state or health.restarts < restarts:
        assert time.monotonic() < end, health
        time.sleep(0.02)
    return health


def test_an_engine_that_refuses_is_given_up_with_its_exit_code(quick_engine: Any) -> None:
    health = until("failed", quick_engine("raise SystemExit(2)"))
    assert "exit code 2" in health.reason
    assert health.restarts == 0


def test_an_engine_that_stays_stuck_is_killed_and_started_again(
    quick_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "STUCK_SECONDS", 0.1)
    first = sign(still_s=99.0).__dict__
    program = (
        f"import json, os, pathlib, time; p = pathlib.Path({str(beat_path(tmp_path))!r})\n"
        f"b = {first!r} | {{'pid': os.getpid()}}\n"
        "b['still_s'] = 0.0 if pathlib.Path(f'{p}.again').exists() else 99.0\n"
        "pathlib.Path(f'{p}.again').touch()\n"
        "p.write_text(json.dumps(b)); time.sleep(600)"
    )
    engine = quick_engine(program)
    assert "have not met" in until("failed", engine).reason
    assert until("ready", engine, restarts=1).restarts == 1


def test_a_node_that_does_not_lead_lets_its_ranks_be_ended_by_node_0(
    quick_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_service, "SIGN_SECONDS", 0.0)
    ended = tmp_path / "ended"
    program = f"import pathlib, time; time.sleep(1); pathlib.Path({str(ended)!r}).touch()"
    engine = quick_engine(program, nodes=2, node=1)
    until("ready", engine)
    shared_service._drain(engine, Operations(drain="finish"))
    assert ended.exists()
    assert engine.health().state == "stopped"


def test_the_health_port_answers_on_every_address_and_is_taken_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health_port, "_SECONDS", 60.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--health-port {port} cannot be listened on"):
            health_socket(port)
    now = [Health("ready")]
    with answering_health(health_socket(port), lambda: now[0]):
        hosts = ["127.0.0.1", "[::1]"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
        for host in hosts:
            with urllib.request.urlopen(f"http://{host}:{port}/ready", timeout=10) as answer:
                assert json.load(answer) == {"status": "ready", "restarts": 0}
        now[0] = Health("failed", "it ended")
        for path in ("health", "ready"):
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10)
        # Who connects and asks nothing takes no more than the places that there are.
        before = threading.active_count()
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        with contextlib.ExitStack() as open_ones:
            for one in idle:
                open_ones.enter_context(one)
            idle[-1].settimeout(10)
            assert idle[-1].recv(1) == b""  # hung up on
            assert threading.active_count() - before <= 16
    again = health_socket(port)  # given back
    assert again is not None
    again.close()


# Logs.


def test_json_logs_are_objects_whoever_writes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    stream = logs.JsonStream(out, rank=1)
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.JsonFormatter(rank=1))
    log = logging.Logger("opensora_sp.x")
    log.addHandler(handler)
    with logs.about_job("video_1"):
        log.warning("a\nb")
        stream.write("error: one\npart")
        stream.write("ly\n\r 50%\r 100%\n\n")
    log.info("later", extra={"job": "video_2"})
    try:
        raise ValueError("x")
    except ValueError:
        log.exception("failed")
    lines = [json.loads(one) for one in out.getvalue().splitlines()]
    assert [(one["level"], one["message"], one.get("job")) for one in lines] == [
        ("warning", "a\nb", "video_1"),
        ("error", "error: one", "video_1"),
        ("info", "partly", "video_1"),
        ("info", " 100%", "video_1"),
        ("info", "later", "video_2"),
        ("error", "failed", None),
    ]
    assert all(one["rank"] == 1 and one["time"] and one["logger"] for one in lines)
    assert "ValueError: x" in lines[-1]["exception"]
    again = logs.as_json(out.getvalue().splitlines()[0])
    assert again is not None
    assert json.loads(again) == lines[0]


PROMPT = "A Red Ball  rolls to the right along the long road, in a wood with many green trees"


@pytest.mark.parametrize(
    "quoted",
    [
        PROMPT,
        PROMPT.lower() + ". aesthetic score: 6.5.",
        repr(PROMPT)[:40] + "..." + repr(PROMPT)[-20:],
        " ".join(PROMPT.split()),
    ],
)
def test_no_line_quotes_a_prompt(quoted: str) -> None:
    text = logs.hidden(f"error: the text embedding of {quoted} is not finite", ["", PROMPT])
    assert "text embedding of" in text
    assert "not finite" in text
    assert "(a prompt)" in text
    for words in ("Ball rolls to", "long road", "many green trees"):
        assert words.lower() not in " ".join(text.lower().split())


def test_prompts_in_scripts_without_spaces_and_of_one_word_are_hidden() -> None:
    assert logs.hidden("'一只红色的球…' failed", ["一只红色的球滚动向右"]) == "'(a prompt)…' failed"
    assert logs.hidden("a Tiger, not found", ["tiger"]) == "a (a prompt), not found"


# Retention, tokens and metrics: the gateway with a queue that is none.


class Queue:
    """A queue in memory."""

    def __init__(self) -> None:
        self.jobs: dict[str, QueuedJob] = {}

    def put(self, job_id: str, priority: int) -> None:
        self.jobs[job_id] = QueuedJob(job_id, "queued", priority, 0.0)

    def cancel(self, job_id: str) -> None:
        self.jobs[job_id] = QueuedJob(job_id, "cancelled", 1, 0.0)

    def live(self) -> list[QueuedJob]:
        return [job for job in self.jobs.values() if job.status in ("queued", "in_progress")]

    taken = live

    def find(self, job_ids: Any) -> dict[str, QueuedJob]:
        return {job_id: self.jobs[job_id] for job_id in job_ids if job_id in self.jobs}

    def ended_before(self, moment: float) -> list[str]:
        return [job.id for job in self.jobs.values() if job.status in ("ended", "cancelled")]

    def forget(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)


class Bench:
    """A gateway over a queue in memory, and jobs in any state."""

    def __init__(self, folder: Path, tokens: dict[str, str], origins: tuple[str, ...] = ()) -> None:
        self.store, self.queue = JobStore(folder), Queue()
        queue: Any = self.queue
        self.board = Board(self.store, queue)
        self.health = Health("ready", "", 4)
        self.metrics = Metrics(self.board, lambda: self.health)
        self.board.on_end.append(self.metrics.job_ended)
        judge: Any = SimpleNamespace(close=lambda: None)
        self.gateway = Gateway(
            store=self.store,
            jobs=queue,
            board=self.board,
            judge=judge,
            health=lambda: self.health,
            metrics=self.metrics,
            tokens=tokens,
            origins=origins,
        )
        self.client = TestClient(build_app(self.gateway))
        self._made = 0

    def job(self, owner: str = "", **result: Any) -> str:
        """A job that is queued, or has ended so."""
        self._made += 1
        spec = JobSpec(
            id=f"video_{self._made:024x}",
            created_at=float(self._made),
            arguments=(),
            shown={"prompt": "a secret prompt", "num_frames": 51},
            owner=owner,
        )
        self.store.put_spec(spec)
        self.board.add(spec)
        self.queue.put(spec.id, 1)
        if result:
            (self.store.outputs(spec.id)).mkdir()
            (self.store.outputs(spec.id) / "video.mp4").write_bytes(b"x" * 1000)
            self.queue.jobs[spec.id] = QueuedJob(spec.id, "ended", 1, 0.0)
            self.store.put_result(spec.id, JobResult(**result))
            self.board.look()
        return spec.id

    def call(self, method: str, path: str, token: str = "") -> Any:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return self.client.request(method, path, headers=headers)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, {})


class HeldJudge:
    """Judges nothing until it is let go, and refuses then; counts who is in it."""

    def __init__(self) -> None:
        self.inside, self.most, self.go = 0, 0, threading.Event()

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.go.wait(30)
        self.inside -= 1
        raise BadRequest("it is refused")

    def close(self) -> None:
        """As the gateway's."""


class Agreeing:
    """A judge that agrees to everything."""

    def __call__(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """As the gateway's."""


def test_pictures_pass_the_same_gate_as_videos(bench: Bench) -> None:
    judge: Any = HeldJudge()
    bench.gateway.judge, bench.gateway.limits = judge, GatewayLimits(queued=8)

    def ask(count: int) -> int:
        asked = {"prompt": "a", "n": count}
        return int(bench.client.post("/v1/images/generations", json=asked).status_code)

    with bench.client, ThreadPoolExecutor(7) as pool:
        waiting = [pool.submit(ask, 1) for _ in range(6)]
        end = time.monotonic() + 30
        while judge.inside < 4 or bench.gateway.arriving.total < 6:
            assert time.monotonic() < end
            time.sleep(0.01)
        # Six are on their way: two more are taken, three are not.
        assert ask(3) == 429
        judge.go.set()
        assert [one.result(30) for one in waiting] == [400] * 6
    assert judge.most == 4
    assert (bench.gateway.arriving.total, bench.gateway.arriving.bytes) == (0, 0)


def test_a_picture_of_a_shared_queue_is_made_though_this_gateway_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.board, "others", True, raising=False)
    judge: Any = Agreeing()
    bench.gateway.judge = judge
    asked = {"prompt": "a", "n": 2}
    with bench.client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(bench.client.post, "/v1/images/generations", json=asked)
        end = time.monotonic() + 30
        while len(bench.queue.live()) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        bench.gateway.draining = True
        refused = answer.result(30)
    assert refused.status_code == 503
    ids = [job.id for job in bench.queue.live()]
    assert len(ids) == 2
    assert all(job_id in refused.json()["error"]["message"] for job_id in ids)


ANN, BOB, ADMIN = "a" * 20, "b" * 20, "c" * 20


@pytest.fixture
def shared(tmp_path: Path) -> Bench:
    """A gateway with two owners and an admin."""
    return Bench(tmp_path, {ANN: "ann", BOB: "bob", ADMIN: "admin"})


def test_the_oldest_ended_jobs_go_by_age_and_then_by_size_and_never_live_ones(
    bench: Bench,
) -> None:
    now = 100 * DAY_SECONDS
    old = bench.job(finished_at=now - 31 * DAY_SECONDS, file="video.mp4")
    failed = bench.job(finished_at=now - 30.5 * DAY_SECONDS, error="x", error_code="engine_error")
    third = bench.job(finished_at=now - 3 * DAY_SECONDS, file="video.mp4")
    second = bench.job(finished_at=now - 2 * DAY_SECONDS, file="video.mp4")
    live = [bench.job() for _ in range(3)]
    queue: Any = bench.queue

    def swept(**kept: float) -> list[str]:
        removes: Any = lambda entry: remove(bench.gateway, entry)
        return Retention(bench.store, queue, bench.board, Kept(**kept), removes).sweep(now)

    assert swept() == []
    assert swept(days=40.0, gb=1.0) == []
    assert swept(days=30.0) == [old, failed]
    each = bench.store.size(second)
    assert each > 1000
    queued = sum(bench.store.size(one) for one in live)
    assert swept(gb=(queued + each + 1) / 1e9) == [third]
    assert swept(gb=1e-9) == [second]
    assert [entry.spec.id for entry in bench.board.all()] == live[::-1]
    assert set(bench.queue.jobs) == set(live)
    assert {path.name for path in bench.store.root.iterdir()} == set(live)


def test_folders_and_rows_without_a_job_are_swept_when_nobody_writes_there(bench: Bench) -> None:
    ended, fresh, old = bench.job(finished_at=1.0, file="video.mp4"), "f" * 24, "e" * 24
    for name in (f"video_{fresh}", f"video_{old}", "somebody-elses"):
        (bench.store.root / name / "uploads").mkdir(parents=True)
        (bench.store.root / name / "uploads" / "0.png").touch()
    for path in [
        bench.store.root / f"video_{old}",
        *(bench.store.root / f"video_{old}").rglob("*"),
    ]:
        os.utime(path, (1.0, 1.0))
    bench.queue.cancel(f"video_{old}")
    queue: Any = bench.queue
    Retention(bench.store, queue, bench.board, Kept(), print).sweep_orphans(time.time())
    left = {path.name for path in bench.store.root.iterdir()}
    assert left == {ended, f"video_{fresh}", "somebody-elses"}
    assert set(bench.queue.jobs) == {ended}


def test_a_video_says_when_it_is_removed(bench: Bench) -> None:
    ended, live = bench.job(finished_at=1000.0, file="video.mp4"), bench.job()
    assert bench.call("GET", f"/v1/videos/{ended}").json()["expires_at"] is None
    again = Bench(bench.store.root.parent, {})
    again.queue.jobs = bench.queue.jobs
    again.board.kept_seconds = Kept(days=2).seconds
    again.board.load()
    assert again.call("GET", f"/v1/videos/{ended}").json()["expires_at"] == 1000 + 2 * 86_400
    assert again.call("GET", f"/v1/videos/{live}").json()["expires_at"] is None


def test_an_owner_sees_fetches_and_deletes_his_own_jobs_alone(shared: Bench) -> None:
    done = {"finished_at": 1.0, "file": "video.mp4"}
    ann, bob = shared.job("ann", **done), shared.job("bob", **done)
    mine = shared.job("ann")
    for method, rest in (
        ("GET", ""), ("GET", "/content"), ("GET", "/content?variant=thumbnail"),
        ("GET", "/events"), ("DELETE", ""),
    ):  # fmt: skip
        nobody = f"/v1/videos/video_{'0' * 24}{rest}"
        foreign = shared.call(method, f"/v1/videos/{ann}{rest}", BOB)
        unknown = shared.call(method, nobody, BOB)
        assert foreign.status_code == unknown.status_code == 404, rest
        assert foreign.text.replace(ann, "") == unknown.text.replace(f"video_{'0' * 24}", "")

    def listed(token: str, more: str = "") -> list[str]:
        return [one["id"] for one in shared.call("GET", f"/v1/videos{more}", token).json()["data"]]

    assert listed(BOB) == [bob]
    assert listed(ANN) == [mine, ann]
    assert listed(ANN, "?limit=1") == [mine]
    assert listed(ADMIN) == [mine, bob, ann]
    assert shared.call("GET", f"/v1/videos?after={ann}", BOB).status_code == 400
    assert shared.call("GET", f"/v1/videos/{ann}", ADMIN).status_code == 200
    assert shared.call("GET", f"/v1/videos/{bob}/content", BOB).content == b"x" * 1000
    assert shared.call("DELETE", f"/v1/videos/{bob}", BOB).status_code == 200
    assert shared.call("DELETE", f"/v1/videos/{ann}", ADMIN).status_code == 200
    assert listed(ADMIN) == [mine]
    assert shared.call("GET", "/v1/videos").status_code == 401


def test_the_metrics_count_and_no_label_holds_what_a_client_chose(shared: Bench) -> None:
    stages = {"denoise": 4.0, "decode": 1.0, "odd": 1.0}
    sent = {"patches_to_frames": 1000, "hand_out": 24}
    done = {"finished_at": 1.0, "file": "video.mp4", "seconds": 10.0, "stages": stages, "steps": 8}
    shared.job("ann", **done, steps_made=8, peaks=[5, None, 7], bytes_sent=sent)
    shared.job("ann", **done, steps_made=2)  # it went on from a saved step
    shared.job("ann", finished_at=1.0, error="a secret prompt", error_code="invalid_request")
    shared.job("ann", finished_at=1.0, error="x", error_code="a secret code")
    waits = shared.job("ann")
    shared.call("DELETE", f"/v1/videos/{shared.job('bob')}", BOB)
    shared.call("GET", f"/v1/videos/{waits}", ANN)
    shared.call("GET", "/nowhere/secret", ANN)
    shared.call("GET", "/static/secret", ANN)
    shared.client.request("SECRET", "/v1/videos")
    assert shared.call("GET", "/metrics").status_code == 401
    text = shared.call("GET", "/metrics", BOB).text
    for line in (
        'jobs_ended_total{code="",outcome="completed"} 2.0',
        'jobs_ended_total{code="invalid_request",outcome="failed"} 1.0',
        'jobs_ended_total{code="other",outcome="failed"} 1.0',
        'jobs_ended_total{code="",outcome="cancelled"} 1.0',
        "queue_length 1.0",
        'stage_seconds_sum{stage="denoise"} 8.0',
        'stage_seconds_count{stage="other"} 2.0',
        "step_seconds_sum 2.5",
        "steps_total 10.0",
        "frames_total 102.0",
        "frames_per_second_count 1.0",
        "frames_per_second_sum 5.1",
        'rank_peak_bytes{rank="2"} 7.0',
        'collective_bytes_total{collective="patches_to_frames"} 1000.0',
        "engine_restarts_total 4.0",
        'engine_state{state="ready"} 1.0',
        'engine_state{state="failed"} 0.0',
        'http_requests_total{method="GET",route="/v1/videos/{video_id}",status="200"} 1.0',
        'http_requests_total{method="GET",route="none",status="404"} 1.0',
        'http_requests_total{method="other",route="none",status="401"} 1.0',
    ):
        assert f"opensora_sp_{line}\n" in text, line
    assert 'rank="1"' not in text
    waited = text.partition("\nopensora_sp_oldest_queued_seconds ")[2].split()[0]
    assert float(waited) > 1e9
    assert "secret" not in text.lower()
    assert "video_0" not in text
    assert shared.metrics.completed == 2


def test_health_tells_the_reason_and_the_restarts_and_a_drained_server_is_not_ready(
    bench: Bench,
) -> None:
    health = bench.call("GET", "/health")
    assert (health.status_code, health.json()["restarts"]) == (200, 4)
    assert bench.call("GET", "/ready").status_code == 200
    bench.gateway.draining = True
    assert bench.call("GET", "/ready").json() == {"status": "draining"}
    refused = bench.client.post("/v1/videos", json={"prompt": "a"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    bench.gateway.draining = False
    bench.health = Health("failed", "rank 1 is silent", 4)
    assert bench.call("GET", "/health").status_code == 503
    assert bench.call("GET", "/ready").json() == {"status": "failed: rank 1 is silent"}


def test_tokens_of_one_name_are_one_owner_and_a_file_that_all_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"ann: {ANN}\n# old\nann:{BOB}\n{ADMIN}\n")
    path.chmod(0o600)
    found = read_tokens(path)
    assert found[ANN] == found[BOB] == "ann"
    assert not caplog.records
    # An owner without a name stays the same one when the lines above change.
    path.write_text(f"{ADMIN}\n")
    path.chmod(0o644)
    assert read_tokens(path)[ADMIN] == found[ADMIN]
    assert "chmod 600" in caplog.text
    path.write_text(f":{ANN}\n")
    with pytest.raises(UserError, match="line 1 has no name"):
        read_tokens(path)
    # Or whoever stands last would see what the other has made.
    path.write_text(f"ann:{ANN}\nbob:{ANN}\n")
    with pytest.raises(UserError, match="line 2 is 'ann''s already") as refused:
        read_tokens(path)
    assert ANN not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--log-format", "xml"], "--log-format 'xml' is not one of text, json"),
        (["--log-level", "loud"], "--log-level 'loud' is not one of debug, info, warning"),
        (["--drain", "no"], "--drain 'no' is not one of save, finish"),
        (["--drain-seconds", "-1"], "--drain-seconds '-1' is not a number from 0"),
        (["--keep-days", "nan"], "--keep-days 'nan' is not a number from 0"),
        (["--keep-gb", "much"], "--keep-gb 'much' is not a number from 0"),
    ],
)
def test_a_bad_flag_is_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        _settings(flags)
    assert words in str(refused.value)


def test_the_systemd_unit_is_right() -> None:
    path = ROOT / "configs" / "opensora-sp.service"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    command = " ".join(lines).partition("ExecStart=/usr/bin/env opensora-sp serve ")[2]
    words = command.replace("\\", " ").split()
    flags = words[: next(n for n, word in enumerate(words) if word.startswith("Restart="))]
    from opensora_sp.cli.serve import parser

    found, rest = parser().parse_known_args(flags)
    assert rest == []
    assert str(found.save_dir) == "/var/lib/opensora-sp"
    assert "StateDirectory=opensora-sp" in lines
    stop = next(line for line in lines if line.startswith("TimeoutStopSec="))
    assert int(stop.partition("=")[2]) > engine_process.END_SECONDS
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert path.name not in done.stderr, done.stderr


def test_an_allowed_origin_s_page_asks_sends_and_reads_and_no_other(tmp_path: Path) -> None:
    page, other, token = "http://localhost:8080", "http://localhost:8081", "t" * 16
    bench = Bench(tmp_path, {token: "ann"}, (page,))
    video = bench.job("ann")

    def call(method: str, origin: str, **headers: str) -> tuple[int, str | None]:
        answer = bench.client.request(
            method, f"/v1/videos/{video}", headers={"origin": origin, **headers}
        )
        return answer.status_code, answer.headers.get("access-control-allow-origin")

    asking = {
        "access-control-request-method": "DELETE",
        "access-control-request-headers": "authorization, x-stainless-lang",
    }
    own = {"authorization": f"Bearer {token}"}
    with bench.client:
        assert call("OPTIONS", page, **asking) == (200, page)
        assert call("OPTIONS", other, **asking) == (400, None)
        # Why it is refused can be read, but nothing is let in by the origin alone.
        assert call("GET", page) == (401, page)
        assert call("DELETE", page) == (401, page)
        assert call("DELETE", other, **own) == (403, None)
        assert call("GET", other, **own) == (200, None)
        found = bench.client.get(f"/v1/videos/{video}", headers={"origin": page, **own})
        assert "openai-poll-after-ms" in found.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in found.headers
        assert call("DELETE", page, **own) == (200, page)


def test_the_cookie_counts_for_the_server_s_own_origin_alone(tmp_path: Path) -> None:
    # A browser sends a SameSite cookie to every port of a host: an allowed page may have one.
    page, token = "http://testserver:8080", "t" * 16
    bench = Bench(tmp_path, {token: "ann"}, (page,))
    judge: Any = Agreeing()
    bench.gateway.judge = judge
    bench.client.cookies.set("token", token)
    with bench.client:

        def send(**headers: str) -> int:
            answer = bench.client.post("/v1/videos", json={"prompt": "a"}, headers=headers)
            return int(answer.status_code)

        assert send(origin=page) == 401
        assert bench.queue.live() == []
        assert send(origin=page, authorization=f"Bearer {token}") == 200
        assert send(origin="http://testserver") == send() == 200


def test_a_job_is_queued_with_the_service_s_label(bench: Bench) -> None:
    judge: Any = Agreeing()
    bench.gateway.judge, bench.gateway.label = judge, ServiceLabel("cn", "X")
    with bench.client:
        video = bench.client.post("/v1/videos", json={"prompt": "a"}).json()
        assert video["settings"]["label"] == "cn"
        arguments = bench.store.spec(video["id"]).arguments
        outputs = bench.store.outputs(video["id"])
        job = GroupSettings(outputs, "", ("--device=cpu",)).job(arguments, outputs)
        assert (job.settings.label, job.settings.label_producer) == ("cn", "X")


def test_without_allowed_origins_no_page_of_another_site_is_answered(bench: Bench) -> None:
    asking = {"origin": "http://localhost:8080", "access-control-request-method": "POST"}
    with bench.client:
        for method in ("OPTIONS", "POST", "GET"):
            answer = bench.client.request(method, "/v1/videos", headers=asking)
            assert answer.status_code == (200 if method == "GET" else 403)
            assert "access-control-allow-origin" not in answer.headers


def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_fault_of_the_server() -> None:
    app = FastAPI()
    add_refusals(app)

    @app.post("/")
    async def whole(request: Request) -> None:
        await request.body()

    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400
    assert b"closed before the body was whole" in sent[1]["body"]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("[::1]", True),  # as browsers send it for port 80
        ("evil.example", False),
        ("localhost.evil.example:80", False),
        ("[::1]evil.example", False),
        ("localhost]:80", False),
        ("", False),
    ],
)
def test_a_server_of_this_machine_answers_for_its_names_alone(given: str, taken: bool) -> None:
    from opensora_sp.server.guard import _refused
    from opensora_sp.server.settings import LOCAL_HOSTS

    gateway: Any = SimpleNamespace(hosts=LOCAL_HOSTS, origins=(), tokens={}, limits=GatewayLimits())
    scope = {"method": "GET", "path": "/", "headers": [(b"host", given.encode())]}
    assert (_refused(gateway, scope) is None) is taken


def test_an_engine_that_cannot_be_started_is_given_up_like_one_that_ends(
    quick_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_memory)
    monkeypatch.setattr("opensora_sp.server.restarts.MOST_RESTART_SECONDS", 0.01)
    health = until("failed", quick_engine(""))
    assert f"It ended {MOST_QUICK} times in a row" in health.reason


class LongQueue:
    """A shared queue as a group asks it for a job: these shapes are queued, in this order."""

    def __init__(self, shapes: list[str]) -> None:
        self.shapes, self.asked = shapes, 0
        self.link = SimpleNamespace(wait=lambda _: False)

    def claim(self, _name: str, _epoch: int, unfit: Any, fits: Any) -> Claim | None:
        self.asked += 1
        assert self.asked < 20 * len(self.shapes), "the group asks for ever"
        for shape in self.shapes:
            if shape not in unfit:
                spec = JobSpec(f"video_{self.shapes.index(shape):024x}", 0.0, ())
                return Claim(spec.id, 1, spec) if fits(shape, spec) else None
        return None

    def give_out_again(self) -> tuple[list[Any], float]:
        return [], 60.0


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group that can make jobs of the shape "small" alone. Its queue is given to it."""
    from opensora_sp.server import group_worker
    from opensora_sp.server.sweeper import Sweeper

    monkeypatch.setattr(group_worker, "card_of", lambda _: "")
    monkeypatch.setattr(group_worker, "holds_token", lambda *_: True)
    monkeypatch.setattr(group_worker, "WAIT_SECONDS", 0.01)
    settings = GroupSettings(tmp_path, "postgresql://nowhere/queue", ())
    store = group_worker.GroupStore(settings)
    device, control = SimpleNamespace(type="cpu"), ControlPlane()
    worker = group_worker.GroupWorker(settings, store, control, device, None)
    monkeypatch.setattr(GroupSettings, "job", lambda *_: None)

    def with_queue(shapes: list[str]) -> Any:
        worker._queue = LongQueue(shapes)  # type: ignore[assignment]
        worker._sweeper = Sweeper(worker._queue)
        judged = worker._fits

        def fits(shape: str, spec: JobSpec) -> bool:
            small = None if shape == "small" else "it is too large"
            monkeypatch.setattr(group_worker, "why_not", lambda *_: small)
            return judged(shape, spec)

        worker._fits = fits  # type: ignore[method-assign]
        return worker

    return with_queue


def test_a_group_finds_its_job_behind_any_number_of_shapes_that_are_too_large(group: Any) -> None:
    worker = group([*(f"large {number}" for number in range(300)), "small"])
    assert worker.next(30.0) == f"video_{300:024x}"


def test_a_group_that_can_make_nothing_comes_back_in_time_to_meet_its_ranks(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opensora_sp.server import group_worker

    monkeypatch.setattr(group_worker, "MOST_UNFIT", 5, raising=False)
    worker = group([f"large {number}" for number in range(3000)])
    assert worker.next(0.05) is None
    assert len(worker._unfit) <= 5
