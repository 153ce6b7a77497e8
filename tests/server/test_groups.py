"""Many gateways and groups on one Postgres: killed, suspended, cut off; each output comes once."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
import numpy.typing as npt
import pytest
from groups import LEASE_SECONDS, PATIENCE_SECONDS, GroupProcess, Pool
from postgres import PASSWORD, Postgres, programs

from opensora_sp.base.errors import UserError
from opensora_sp.cli import on_queue
from opensora_sp.cli.main import main
from opensora_sp.server import shared_store
from opensora_sp.server.board import Entry
from opensora_sp.server.group_worker import GroupStore, GroupWorker
from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec
from opensora_sp.server.queue_url import parse_queue_url
from opensora_sp.server.settings import GroupSettings
from opensora_sp.server.shared_board import GatewayQueue, SharedBoard
from opensora_sp.server.shared_link import QueueLost
from opensora_sp.server.shared_queue import SharedQueue
from opensora_sp.server.shared_store import TOKEN_FILE, SharedStore, require_same_folder

pytest.importorskip("dbos")
pytest.importorskip("psycopg")
pytestmark = pytest.mark.skipif(
    programs() is None, reason="no Postgres here: apt-get install postgresql"
)
LONG = {"num_inference_steps": 200, "seed": 5}


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    one = Postgres()
    try:
        yield one.start()
    finally:
        one.remove()


@pytest.fixture(scope="module")
def pool(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(tmp_path_factory.mktemp("groups") / "save", database.url) as one:
        yield one


class Video(NamedTuple):
    """A video that nothing disturbed."""

    digest: str
    content: bytes


@pytest.fixture(scope="module")
def wanted(pool: Pool) -> Video:
    job = pool.first.create(**LONG)
    return Video(pool.digest(job), pool.second.content(job))


def frames(content: bytes) -> npt.NDArray[np.int_]:
    """Pixels [F,H,W,3]."""
    with av.open(io.BytesIO(content), "r") as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(found).astype(int)


def test_a_suspended_group_publishes_nothing_of_what_another_has_taken_over(
    pool: Pool, wanted: Video
) -> None:
    job = pool.first.create(**LONG)
    name = pool.maker(job)
    asleep = pool.groups[name]
    asleep.signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        other = pool.maker(job, but=name)
        print(f"takeover from a suspended group: {time.monotonic() - stopped:.1f} s")
        assert pool.digest(job) == wanted.digest
    finally:
        asleep.signal(signal.SIGCONT)
    made = pool.save_dir / "jobs" / job / pool.outputs(job)[0]
    before = made.stat()
    end = time.monotonic() + 30
    while "another attempt has the job or will get it" not in asleep.log.read_text():
        assert time.monotonic() < end, asleep.log.read_text()[-2000:]
        time.sleep(0.1)
    after = made.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert pool.outputs(job) == ["attempts/0002/video_0000.mp4"]
    assert [path.name for path in (pool.save_dir / "jobs" / job / "attempts").iterdir()] == ["0002"]
    # The one that came back takes new work: the other one has a job already.
    jobs = [pool.first.create(**LONG) for _ in range(2)]
    assert {pool.maker(one) for one in jobs} == {name, other}
    # Both gateways show it, and either ends it.
    _, listed = pool.first.call("GET", "/v1/videos?limit=2")
    assert {video["id"] for video in listed["data"]} == set(jobs)
    assert pool.second.call("DELETE", f"/v1/videos/{jobs[0]}")[0] == 200
    pool.first.gone(jobs[0])
    assert pool.digest(jobs[1]) == wanted.digest
    assert pool.first.call("GET", f"/v1/videos/{jobs[0]}")[0] == 404
    assert b'opensora_sp_groups{state="ready"} 2.0' in pool.first.metrics()


def test_groups_go_on_when_the_database_was_away(
    pool: Pool, database: Postgres, wanted: Video
) -> None:
    job = pool.first.create(**LONG)
    pool.maker(job)
    database.stop("immediate")
    time.sleep(LEASE_SECONDS + 1)
    status, answer = pool.first.call("POST", "/v1/videos", {"prompt": "it turns"})
    assert (status, answer["error"]["message"]) == (
        503,
        "the queue does not answer just now: try again later",
    )
    assert pool.first.call("DELETE", f"/v1/videos/{job}")[0] == 503  # the job is made all the same
    assert pool.first.call("GET", "/ready")[0] == 503
    assert pool.first.call("GET", "/health")[0] == 200
    database.start()
    assert pool.digest(job) == wanted.digest
    assert pool.outputs(job) == ["attempts/0001/video_0000.mp4"]
    assert sorted(path.name for path in pool.save_dir.iterdir()) == ["jobs", "queue-token"]
    logs = [pool.first.log, pool.second.log, *(group.log for group in pool.groups.values())]
    assert not any(PASSWORD in log.read_text() for log in logs)


def test_a_killed_groups_job_goes_on_with_another_on_two_ranks(pool: Pool) -> None:
    # With a step cache, whose level has to mean the same for the one that goes on.
    asked = LONG | {"step_cache": "fast"}
    undisturbed = pool.first.create(**asked)
    pool.digest(undisturbed)
    job = pool.first.create(**asked)
    name = pool.maker(job)
    while pool.second.call("GET", f"/v1/videos/{job}")[1].get("step", 0) < 20:
        time.sleep(0.02)
    pool.groups[name].signal(signal.SIGSTOP)  # so that it makes no more of it until it is killed
    other = pool.groups[next(group for group in pool.groups if group != name)]
    assert other.stop() == 0
    pool.groups[name].kill()
    pair = pool.groups["pair"] = GroupProcess("pair", pool.save_dir, pool.url, ranks=2).start()
    video = pool.second.wait(job)
    assert video["status"] == "completed", video
    assert f"{job} goes on after clip 0, step" in pair.log.read_text()
    # The file says on how many ranks it was made; the frames are the same.
    wanted = frames(pool.first.content(undisturbed))
    assert np.array_equal(frames(pool.first.content(job)), wanted)
    assert len(pool.outputs(job)) == 1
    # The database has ended this gateway's connection, and nobody notices.
    assert pool.second.call("DELETE", f"/v1/videos/{undisturbed}")[0] == 200
    pool.first.gone(undisturbed)
    # Whoever waits for a picture at a gateway that is stopped gets its id, and it is made.
    with ThreadPoolExecutor(1) as threads:
        picture = {"prompt": "a cat", "size": "96x64", "num_inference_steps": 200}
        answer = threads.submit(pool.second.call, "POST", "/v1/images/generations", picture, None)
        found = pool.second.listed("in_progress", 30)
        assert pool.second.process is not None
        pool.second.process.send_signal(signal.SIGTERM)
        status, refused = answer.result(60)
        assert (status, refused["error"]["code"]) == (503, "stopping")
        assert found in refused["error"]["message"]
        assert pool.second.process.wait(60) == 0
    assert pool.first.wait(found)["status"] == "completed"


def a_job(number: int, shape: str = "small", **more: Any) -> JobSpec:
    spec = JobSpec(f"video_{number:024x}", time.time(), ("--prompt=x",), {"cost": {"shape": shape}})
    return replace(spec, **more)


@pytest.fixture
def queue(database: Postgres) -> Iterator[SharedQueue]:
    """A queue with nothing in it, in a database of its own."""
    import psycopg

    name = f"q{time.monotonic_ns()}"
    url = parse_queue_url(database.url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    one = SharedQueue(url.replace("/postgres", f"/{name}"), listens=True)
    one.prepare()
    yield one
    one.close()


def test_a_later_attempt_owns_the_output(queue: SharedQueue) -> None:
    # The lease is over for every group, and for this process's own contact.
    take = lambda name, epoch: queue.claim(name, epoch, [], lambda *_: True)
    old, new = (queue.register(name, name, {}, 0.0) for name in ("old", "new"))
    assert old is not None
    assert new is not None
    queue.put(a_job(1))
    stale = take("old", old)
    assert stale is not None
    assert take("new", new) is None
    assert queue.give_out_again()[0] == [(stale.id, "old")]
    claim = take("new", new)
    assert claim is not None
    assert (stale.attempt, claim.attempt) == (1, 2)
    assert queue.publish(stale, JobResult(1.0, "stale.mp4")) == "taken"
    assert queue.beat("old", old, state="ready", claim=stale) is False
    assert queue.publish(claim, JobResult(2.0, "right.mp4")) == "ended"
    assert queue.publish(stale, JobResult(1.0, "stale.mp4")) == "ended elsewhere"
    assert queue.publish(claim, JobResult(2.0, "right.mp4")) == "ended"  # an answer that was lost
    row = queue.row(claim.id)
    assert row is not None
    assert row.result is not None
    assert (row.result.file, row.attempt, row.group) == ("right.mp4", 2, "new")
    # An engine that begins anew under a name ends what the one before it had.
    queue.put(a_job(2))
    again = take("new", new)
    assert queue.register("new", "new", {}, 60.0) is not None
    assert queue.register("new", "another", {}, 60.0) is None
    assert take("new", new) is None
    assert queue.beat("new", new, state="ready", claim=again) is None
    row = queue.row(a_job(2).id)
    assert row is not None
    assert row.state == "queued"


def test_a_call_is_made_once_whenever_its_connection_was_lost(queue: SharedQueue) -> None:
    import psycopg

    def end_connection(connection: Any) -> None:
        calls.append(connection.info.backend_pid)
        connection.execute("UPDATE opensora_sp.folder SET token = 'not to be written'")
        connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    calls: list[int] = []
    queue.put(a_job(1))
    contact = queue.link.contact
    # Lost while nobody used it: nobody is told.
    with psycopg.connect(queue.url, autocommit=True) as other:
        others = (
            "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        other.execute(f"SELECT pg_terminate_backend(pid) {others}")
        end = time.monotonic() + PATIENCE_SECONDS
        while other.execute(f"SELECT pid {others}").fetchone() is not None:
            assert time.monotonic() < end, "a connection does not end"
            time.sleep(0.05)
    queue.put(a_job(2))
    assert queue.link.contact == contact + 1
    # Lost in the middle: it may have been done, and is not done again.
    with pytest.raises(QueueLost):
        queue.link.run(end_connection)
    assert len(calls) == 1
    assert queue.folder_token("another") == "another"
    assert {row.id for row in queue.changes(None)[0]} == {a_job(1).id, a_job(2).id}


def test_calls_whose_answer_was_lost_leave_nothing_behind(
    queue: SharedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SharedStore(tmp_path, lambda _: 0, lambda _: None)
    jobs = GatewayQueue(queue, store)
    spec = a_job(1)

    def loses(call: Callable[[Any], None], *, done: bool) -> Callable[[Any], None]:
        def lost(what: Any) -> None:
            if done:
                call(what)
            raise QueueLost("it is gone")

        return lost

    for done in (False, True):
        store.put_spec(spec)
        with monkeypatch.context() as patch:
            patch.setattr(queue, "put", loses(queue.put, done=done))
            with pytest.raises(QueueLost):
                jobs.put(spec.id, 100)
        jobs.withdraw_unsure()
        assert queue.row(spec.id) is None
    for done in (False, True):
        store.put_spec(spec)
        jobs.put(spec.id, 100)
        with monkeypatch.context() as patch:
            patch.setattr(queue, "remove", loses(queue.remove, done=done))
            with pytest.raises(QueueLost):
                jobs.cancel(spec.id)
            assert store.folder(spec.id).exists()
        writes = store.folder(spec.id) / "attempts"  # as a group that makes it now
        writes.mkdir(exist_ok=True)
        jobs.withdraw_unsure()
        assert (store.folder(spec.id) / "job.json").exists() is not done
        assert writes.exists()
        assert (queue.row(spec.id) is None) is done


def test_the_moment_is_known_from_which_on_a_group_counts_as_dead(queue: SharedQueue) -> None:
    for name, lease in (("long", 60.0), ("short", 20.0)):
        assert queue.register(name, name, {}, lease) is not None
    given, seconds = queue.give_out_again()
    assert (given, 10 < seconds <= 20) == ([], True)
    # A clock that is set back: what it says of later is not believed.
    move = "UPDATE opensora_sp.groups SET beat_at = beat_at + %s * interval '1 second'"
    queue.link.run(lambda connection: connection.execute(move, [3600]))
    assert queue.give_out_again() == ([], 20)
    # Dead with a job, and this process may not give it out yet; dead without a job.
    queue.put(a_job(1))
    epoch = queue.register("short", "short", {}, 20.0)
    assert epoch is not None
    claim = queue.claim("short", epoch, [], lambda *_: True)
    assert claim is not None
    queue.link.run(lambda connection: connection.execute(move, [-3610]))
    assert queue.give_out_again() == ([], 0)
    assert queue.publish(claim, JobResult(1.0, "v.mp4")) == "ended"
    given, seconds = queue.give_out_again()
    assert (given, 40 < seconds <= 50) == ([], True)


def test_a_command_whose_name_is_in_use_gives_back_nothing_of_the_one_that_has_it(
    queue: SharedQueue,
) -> None:
    take = lambda epoch: queue.claim("g", epoch, [], lambda *_: True)
    state = lambda: (row := queue.row(a_job(1).id)) and row.state
    old = queue.register("g", "old", {}, 0.0)
    new = queue.register("g", "new", {}, 60.0)
    assert old is not None
    assert new is not None
    queue.put(a_job(1))
    claim = take(new)
    assert claim is not None
    # One was refused and has ended; the one that was replaced ends in order, or is unsure.
    assert queue.register("g", "refused", {}, 60.0) is None
    assert queue.engine_died("g", "refused") == queue.engine_died("g", "old") == 0
    assert queue.give_back("g", old) == 0
    queue.leave("g", old)
    assert queue.let_go("g", old, claim) == "taken"
    assert state() == "taken"
    # What it stopped making is not held any longer, though it lives.
    assert queue.let_go("g", new, claim) == "queued"
    assert take(new) is not None
    assert queue.let_go("g", new, claim) == "taken"  # a later attempt has it
    assert queue.engine_died("g", "new") == 1
    assert state() == "queued"


def test_a_gateway_shows_what_was_made_again_and_what_was_sent_again(
    queue: SharedQueue, tmp_path: Path
) -> None:
    board = SharedBoard(SharedStore(tmp_path, lambda _: 0, lambda _: None), queue)
    board.load()
    told: list[str] = []

    def tell(entry: Entry) -> None:
        told.append(entry.spec.id)
        if len(told) == 1:
            raise OSError("a full disk")

    board.on_end.append(tell)
    epoch = queue.register("g", "g", {}, 60.0)
    assert epoch is not None
    one, two = a_job(1).id, a_job(2).id

    def make(error: str | None) -> None:
        claim = queue.claim("g", epoch, [], lambda *_: True)
        assert claim is not None
        queue.publish(claim, JobResult(time.time(), "v.mp4", error=error))

    def status(job_id: str) -> str | None:
        entry = board.get(job_id)
        return None if entry is None else entry.status

    queue.put(a_job(1))
    queue.put(a_job(2))
    board.look()
    make("it is bad")
    make("it is bad")
    with pytest.raises(OSError, match="full disk"):
        board.look()
    board.look()
    assert (status(one), status(two)) == ("failed", "failed")
    assert set(told) == {one, two}
    # Made again: seen while it waits, and seen when it has ended since the last look.
    queue.make_again([one])
    board.look()
    assert status(one) == "queued"
    queue.make_again([two])
    for _ in range(2):
        make(None)
    board.look()
    assert (status(one), status(two)) == ("completed", "completed")
    assert (board.attempt_of(one), board.attempt_of(two)) == (2, 2)
    assert told.count(one) == told.count(two) == 2
    # Deleted here, and sent again at once; deleted and sent again elsewhere between two looks.
    for _ in range(2):
        before = queue.row(one)
        assert before is not None
        queue.remove(one)
        board.remove(one)
        board._take_in(before, begins=False)  # by a look that had begun before
        assert status(one) is None
        board.look()
        queue.put(a_job(1))
        board.look()
        assert status(one) == "queued"
    queue.remove(one)
    queue.put(a_job(1))
    board.look()
    assert [entry.spec.id for entry in board.all()] == [one, two]
    assert board.remove(one)
    assert board.remove(two)
    assert board.all() == []


def test_a_group_leaves_no_job_behind_that_it_was_told_wrongly_to_leave(
    queue: SharedQueue, tmp_path: Path
) -> None:
    import torch

    (tmp_path / TOKEN_FILE).write_text("token\n")
    settings = GroupSettings(tmp_path, queue.url, (), group_name="g", parent="g", lease_s=60.0)
    store = GroupStore(settings)
    control: Any = None
    worker = GroupWorker(settings, store, control, torch.device("cpu"), None)
    worker._epoch, worker._fit = queue.register("g", "g", {}, 60.0) or 0, {"small"}
    job = a_job(1).id

    def state() -> tuple[str, int] | None:
        row = queue.row(job)
        return None if row is None else (row.state, row.attempt)

    try:
        queue.put(a_job(1))
        assert worker.next(10) == job
        assert not store.cancel_asked(job)
        store.lost = store.claim
        assert store.cancel_asked(job)
        assert worker.done()
        assert state() == ("queued", 1)
        # The word of the last claim says nothing of the next.
        assert worker.next(10) == job
        assert not store.cancel_asked(job)
        # Deleted, and sent again before the group has left it.
        queue.remove(job)
        worker._beat()
        assert store.cancel_asked(job)
        queue.put(a_job(1))
        assert worker.done()
        assert state() == ("queued", 2)
        assert (store.folder(job) / "job.json").exists()
        # Deleted while it was made.
        assert worker.next(10) == job
        queue.remove(job)
        assert worker.done()
        assert state() is None
        assert not store.folder(job).exists()
    finally:
        worker.close()


def test_groups_that_take_at_once_get_each_job_once_and_in_order(queue: SharedQueue) -> None:
    for number in range(60):
        queue.put(a_job(number, priority=1 if number >= 50 else 100))

    together = threading.Barrier(4, timeout=60)

    def take_all(name: str) -> list[str]:
        own = SharedQueue(queue.url)
        epoch = own.register(name, name, {}, 60.0)
        assert epoch is not None
        taken = []
        together.wait()
        while (claim := own.claim(name, epoch, [], lambda *_: True)) is not None:
            taken.append(claim.id)
            assert own.publish(claim, JobResult(1.0, "video.mp4")) == "ended"
        own.close()
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(take_all, "abcd"))
    assert sorted(job for one in taken for job in one) == [a_job(number).id for number in range(60)]
    order = [*range(50, 60), *range(50)]
    for one in taken:  # each in the order of the queue
        places = [order.index(int(job.removeprefix("video_"), 16)) for job in one]
        assert places == sorted(places)


def test_words_that_came_while_a_job_was_made_end_no_wait_later_on(queue: SharedQueue) -> None:
    own = SharedQueue(queue.url, listens=True)
    epoch = own.register("own", "own", {}, 60.0)
    assert epoch is not None
    assert not own.link.wait(0)  # listens from here on
    for number in range(5):
        queue.put(a_job(number))
        own.beat("own", epoch, state="ready")  # receives what has come
    assert own.link.wait(10)
    assert not own.link.wait(0.1)
    queue.put(a_job(5))
    while own.claim("own", epoch, [], lambda *_: True) is not None:
        pass
    assert not own.link.wait(0.1)
    own.close()


def test_a_job_whose_group_died_five_times_is_given_up(queue: SharedQueue) -> None:
    epoch = queue.register("g", "g", {}, 60.0)
    assert epoch is not None
    queue.put(a_job(1))
    for died in (True, True, False, True, True, True):  # one was stopped in order
        assert queue.claim("g", epoch, [], lambda *_: True) is not None
        assert (queue.engine_died("g", "g") if died else queue.give_back("g", epoch)) == 1
    row = queue.row(a_job(1).id)
    assert row is not None
    assert row.result is not None
    assert (row.state, row.attempt, row.result.error_code) == ("ended", 6, "engine_ended")


def test_a_group_takes_what_fits_it_and_what_fits_none_waits_with_the_reason(
    queue: SharedQueue, tmp_path: Path
) -> None:
    store = SharedStore(tmp_path, lambda _: 0, lambda _: None)
    board = SharedBoard(store, queue)
    board.load()
    queue.put(a_job(1, "large", priority=1))
    queue.put(a_job(2, "small"))
    assert queue.link.wait(5)  # an idle group is woken
    board.look()

    def waits(number: int) -> Any:
        entry = board.get(a_job(number).id)
        assert entry is not None
        return board.video(entry).get("waiting_for")

    assert waits(1) == waits(2) == "no group is there to make it"
    epoch = queue.register("g", "g", {"ranks": 1}, 60.0)
    assert epoch is not None
    unfit: dict[str, str] = {}

    def fits(shape: str, spec: JobSpec) -> bool:
        if shape == "large":
            unfit[shape] = "it is too large"
        return shape != "large"

    assert queue.claim("g", epoch, unfit, fits) is None
    claim = queue.claim("g", epoch, unfit, fits)
    assert claim is not None
    assert claim.id == a_job(2).id
    queue.beat(
        "g", epoch, state="ready", claim=claim, unfit=unfit, progress=JobProgress("denoising", 3, 4)
    )
    board.look()
    assert waits(1) == "no group that is there can make it: it is too large"
    assert waits(2) is None
    entry = board.get(claim.id)
    assert entry is not None
    assert (entry.status, entry.group, entry.progress) == (
        "in_progress", "g", JobProgress("denoising", 3, 4),
    )  # fmt: skip
    assert board.group_counts() == {"ready": 1, "starting": 0, "draining": 0, "dead": 0}
    # A group that can make it joins, and the reason goes.
    assert queue.register("h", "h", {}, 60.0) is not None
    board._whole_look = 0.0
    board.look()
    assert waits(1) is None
    # What another gateway deletes goes here too.
    queue.remove(claim.id)
    board.look()
    assert board.get(claim.id) is None


class StandIn(threading.Thread):
    """A group that makes nothing, and says so at once.

    signals: what this process gets after so many jobs.
    """

    def __init__(self, url: str, signals: Mapping[int, signal.Signals]) -> None:
        super().__init__(daemon=True)
        self._queue, self._signals = SharedQueue(url), signals
        self.made: Counter[str] = Counter()
        self.most_queued, self.fails = 0, True
        self.end = threading.Event()

    def run(self) -> None:
        epoch = self._queue.register("stand-in", "stand-in", {}, 60.0)
        assert epoch is not None
        while not self.end.is_set():
            claim = self._queue.claim("stand-in", epoch, [], lambda *_: True)
            if claim is None:
                time.sleep(0.01)
                continue
            prompt = claim.spec.shown["prompt"]
            self.made[prompt] += 1
            bad = self.fails and prompt.endswith("00")
            self._queue.publish(claim, JobResult(1.0, "v.mp4", error="it is bad" if bad else None))
            if (number := self._signals.get(sum(self.made.values()))) is not None:
                self.most_queued = max(self.most_queued, self.queued())
                os.kill(os.getpid(), number)

    def queued(self) -> int:
        rows, _ = self._queue.changes(None)
        return sum(row.state == "queued" for row in rows)


def test_a_list_that_is_sent_and_interrupted_again_is_made_once(
    queue: SharedQueue,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(on_queue, "LOOK_SECONDS", 0.1)
    prompts = [f"prompt {number}" for number in range(600)]
    lines = ["# a comment", *prompts[:300], "", *prompts[:50], *prompts[300:]]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    group = StandIn(queue.url, {120: signal.SIGINT, 330: signal.SIGTERM})
    group.start()

    def sent(path: str, *more: str) -> tuple[int, str]:
        words = ["generate", "--queue", queue.url, "--save-dir", "shared", "--num-frames", "17"]
        code = main([*words, "--prompt-path", path, "--queued", "50", *more])
        return code, capsys.readouterr().err

    try:
        code, said = sent("list.txt")
        assert (code, "stopped: what is queued is made all the same" in said) == (130, True)
        assert sent("list.txt")[0] == 143
        code, said = sent("list.txt")
        assert code == 1
        assert "failed: prompt 100: it is bad" in said
        assert "650 prompts, " in said
        assert " 5 failed: list.txt.failed.txt lists them" in said
        assert group.made == Counter(prompts)
        assert 0 < group.most_queued <= 50
        # All of it once more makes nothing; what failed is made again where that is asked for.
        assert sent("list.txt")[0] == 1
        assert group.made == Counter(prompts)
        group.fails = False
        code, said = sent("list.txt.failed.txt", "--retry-failed")
        assert (code, said.splitlines()[-1]) == (
            0,
            "5 prompts, 5 made, 0 were there or stand twice, 0 failed",
        )
        assert sum(group.made.values()) == 605
    finally:
        group.end.set()
        group.join(10)
    # What a job costs is for gateways to say, who know the model.
    asked_for: list[JobSpec] = []

    def price(spec: JobSpec) -> dict[str, Any]:
        asked_for.append(spec)
        return {"engine": "e", "shape": "priced", "steps": 7}

    board = SharedBoard(SharedStore(tmp_path, lambda _: 0, lambda _: None), queue, "e", price)
    board.load()
    assert [entry.spec.shown["cost"]["shape"] for entry in board.all()] == ["priced"] * 600
    assert len(asked_for) == 1
    # A file of schedules, a flag of the groups, and a file that is not there, are refused.
    assert sent("list.txt", "--step-cache", "x.yaml") == (
        2,
        "error: --step-cache 'x.yaml' is a file, which a queue does not take: give off, "
        "near-lossless, fast, and put schedules into step_cache.yaml beside the weights of the "
        "groups\n",
    )
    assert sent("list.txt", "--dtype", "fp32")[0] == 2
    assert sent("nothing.txt")[1].startswith("error: --prompt-path 'nothing.txt': No such file")


class GoneQueue:
    """A database that has just gone away."""

    def folder_token(self, proposed: str) -> str:
        raise QueueLost("it is gone")


@pytest.mark.parametrize("place", ["serve", "work"])
def test_another_folder_or_a_database_that_does_not_answer_is_refused(
    place: str,
    database: Postgres,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pool: Pool,
) -> None:
    monkeypatch.setattr(shared_store, "SEEN_SECONDS", 0.2)
    words = [place, "--queue", database.url, "--save-dir", str(tmp_path), "--device", "cpu"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: --save-dir {tmp_path} is not the folder of the queue "
        f"postgresql://127.0.0.1:{database.port}/postgres: it has no file queue-token; give "
        "the folder that all other machines of this queue share, or another database\n"
    )
    (tmp_path / "queue-token").write_text("of another queue\n")
    assert main(words) == 2
    assert "it has another token in its file queue-token" in capsys.readouterr().err
    for port, url in (
        ("1", database.url.replace(f":{database.port}", ":1")),
        (str(database.port), database.url.replace("tester:", "tester:x")),
    ):
        assert main([place, "--queue", url, "--save-dir", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        where = f"error: --queue postgresql://127.0.0.1:{port}/postgres: the database does"
        assert said.startswith(where)
        assert said.count("\n") == 1
        assert PASSWORD not in said
        assert "cr%2Fet" not in said
    # It may go away between two statements.
    with pytest.raises(UserError, match="the database does not answer: it is gone; try again"):
        require_same_folder(tmp_path, cast(SharedQueue, GoneQueue()), "postgresql://db/v")
    # libpq quotes what it cannot read.
    assert main([*words[:2], database.url.replace("cr%2F", "cr%zz"), *words[3:]]) == 2
    said = capsys.readouterr().err
    assert "se%3Acr" not in said
    assert said.count("\n") == 1
