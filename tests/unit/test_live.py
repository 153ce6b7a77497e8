"""The stream of events, and files of earlier jobs: who is told what, and who may use what."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("dbos")

from opensora_sp.server.board import Entry
from opensora_sp.server.earlier import files_of_earlier_jobs
from opensora_sp.server.job_store import JobResult, JobSpec, JobStore
from opensora_sp.server.live import Feed
from opensora_sp.server.owners import sees
from opensora_sp.server.protocol import BadRequest

IDS = [f"video_{n:024x}" for n in range(4)]
TOKENS = {"token-of-anna-long": "anna", "token-of-ben-long": "ben", "token-of-admin": "admin"}


def entry(number: int, owner: str = "anna", status: str = "queued", **shown: Any) -> Entry:
    return Entry(JobSpec(IDS[number], number, (), shown=shown, owner=owner), status)


class FakeBoard:
    others = False

    def __init__(self, *entries: Entry) -> None:
        self.entries = {one.spec.id: one for one in entries}
        self.elsewhere: dict[str, Entry] = {}

    def all(self) -> list[Entry]:
        return list(self.entries.values())

    def get(self, job_id: str) -> Entry | None:
        return self.entries.get(job_id)

    def seek(self, job_id: str) -> Entry | None:
        """As of a shared queue: what another gateway has just queued, or seen end, is found."""
        if job_id in self.elsewhere:
            self.entries[job_id] = self.elsewhere[job_id]
        return self.get(job_id)

    def video(self, one: Entry) -> dict[str, Any]:
        return {"id": one.spec.id, "status": one.status}


def test_a_listener_is_told_of_what_is_live_and_of_every_change_of_its_own_jobs() -> None:
    board: Any = FakeBoard(entry(0), entry(1, status="completed"), entry(2, "ben"))
    state, ending = ["ready"], [False]
    feed = Feed(board, lambda: state[0], lambda: ending[0])
    told: dict[str, list[Any]] = {"anna": [], "admin": []}

    async def listen(owner: str) -> None:
        async for text in feed.stream(sees(TOKENS, owner)):
            name, data = (line.partition(": ")[2] for line in text.strip().splitlines()[-2:])
            found = json.loads(data)
            told[owner].append((name, found if isinstance(found, str) else found["id"]))

    async def scenario() -> None:
        listeners = [asyncio.create_task(listen(owner)) for owner in told]
        await asyncio.sleep(0.1)
        board.entries[IDS[0]] = replace(board.entries[IDS[0]], status="in_progress")
        board.entries[IDS[2]] = replace(board.entries[IDS[2]], status="in_progress")
        state[0] = "starting"
        await asyncio.sleep(0.4)
        del board.entries[IDS[2]], board.entries[IDS[1]]
        await asyncio.sleep(0.4)
        ending[0] = True
        await asyncio.wait_for(asyncio.gather(*listeners), 20)

    asyncio.run(scenario())
    first = [("state", "ready"), ("video", IDS[0])]
    assert told["anna"] == [
        *first,
        ("video", IDS[0]),
        ("state", "starting"),
        ("deleted", IDS[1]),
        ("state", "draining"),
    ]
    assert ("video", IDS[2]) in told["admin"]
    assert ("deleted", IDS[2]) in told["admin"]


def test_files_of_earlier_jobs_become_the_new_jobs_own_and_only_an_owners(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    done = entry(0, status="completed", files=[["image", "0.png"]])
    board: Any = FakeBoard(done, entry(1, "ben", "completed"), entry(2))
    store.put_spec(done.spec)
    for folder, name in (
        (store.outputs(IDS[0]), "video_0000.mp4"),
        (store.uploads(IDS[0]), "0.png"),
    ):
        folder.mkdir()
        (folder / name).write_bytes(name.encode())
    store.put_result(IDS[0], JobResult(1.0, file="video_0000.mp4"))

    def ask(**fields: Any) -> list[tuple[str, str, str]]:
        may = sees(TOKENS, "anna")
        return files_of_earlier_jobs(store, board, may, IDS[3], fields, [("image", "x", "picture")])

    _, (field, path, kind) = ask(extend_video_id=IDS[0])
    assert (field, kind) == ("extend", "video")
    assert Path(path) == store.uploads(IDS[3]) / "1.mp4"
    assert Path(path).read_bytes() == b"video_0000.mp4"
    assert ask(files_of_video_id=IDS[0])[1][::2] == ("image", "picture")
    # Other gateways know of a job, or of its end, a quarter of a second earlier.
    board.others, board.elsewhere = True, {IDS[0]: done}
    for known in ({}, {IDS[0]: replace(done, status="queued")}):
        board.entries = known
        Path(path).unlink()
        assert ask(extend_video_id=IDS[0])[1][::2] == ("extend", "video")
        assert board.entries[IDS[0]] == done
    board.others, board.elsewhere = False, {}
    board.entries = {one.spec.id: one for one in (done, entry(1, "ben", "completed"), entry(2))}
    store.delete(IDS[0])
    assert Path(path).read_bytes() == b"video_0000.mp4"
    for wrong in (IDS[1], IDS[3], "../" + IDS[0], 7, ["x"]):
        with pytest.raises(BadRequest, match="not one of the videos") as refused:
            ask(extend_video_id=wrong)
        assert refused.value.param == "extend_video_id"
    with pytest.raises(BadRequest, match="is queued: it has no video"):
        ask(extend_video_id=IDS[2])


def test_a_job_that_ends_while_a_listener_takes_what_is_there_is_told_of() -> None:
    board: Any = FakeBoard(entry(0), entry(1))
    feed = Feed(board, lambda: "ready")

    async def scenario() -> list[str]:
        stream = feed.stream(lambda _: True)
        told = [await anext(stream), await anext(stream)]
        await asyncio.sleep(0)  # a slow listener: it has taken the state and the first job
        board.entries[IDS[1]] = replace(board.entries[IDS[1]], status="completed")
        while "completed" not in told[-1]:
            told.append(await asyncio.wait_for(anext(stream), 5))
        await stream.aclose()  # type: ignore[attr-defined]
        return told

    assert IDS[1] in asyncio.run(scenario())[-1]


def test_files_of_a_job_that_is_deleted_just_now_are_refused_and_no_fault(tmp_path: Path) -> None:
    done = entry(0, status="completed", files=[["image", "0.png"]])
    board: Any = FakeBoard(done)
    with pytest.raises(BadRequest, match="files_of_video_id: the files of that video are gone"):
        files_of_earlier_jobs(
            JobStore(tmp_path), board, lambda _: True, IDS[3], {"files_of_video_id": IDS[0]}, []
        )
