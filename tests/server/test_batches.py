"""Jobs of one shape made together, pictures, and the client's commands, on one server."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from serving import Server

from opensora_sp.cli.main import main

openai = pytest.importorskip("openai")
pytest.importorskip("dbos")
Frames = npt.NDArray[np.int_]
LONG = {"num_inference_steps": 150}
PROMPTS = ("a red ball rolls to the right", "a blue square", "a green ball", "a grey cat")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("batches") / "save", "--batch-jobs", "3").start()
    try:
        yield one
    finally:
        assert one.stop() == 0, one.log.read_text()[-3000:]


@pytest.fixture
def blocked(server: Server) -> Iterator[Server]:
    """The engine is busy with a job of another shape, which goes when the queue is filled."""
    busy = server.create(num_inference_steps=100_000)
    until(lambda: status(server, busy) == "in_progress")
    server.busy = busy  # type: ignore[attr-defined]
    yield server
    server.call("DELETE", f"/v1/videos/{busy}")


def release(server: Server) -> None:
    server.call("DELETE", f"/v1/videos/{server.busy}")  # type: ignore[attr-defined]


def until(what: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def status(server: Server, job: str) -> str:
    return str(server.call("GET", f"/v1/videos/{job}")[1]["status"])


def frames(server: Server, job: str) -> Frames:
    """The pixels [F,H,W,3] of a job's output, which is lossless."""
    video = server.wait(job)
    assert video["status"] == "completed", video
    with av.open(io.BytesIO(server.content(job)), "r") as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(found).astype(int)


def same(one: Frames, other: Frames) -> bool:
    """Equal but for float rounding: a batch goes through other kernels than one video alone."""
    return one.shape == other.shape and int(abs(one - other).max()) <= 1


def alone(server: Server, **fields: Any) -> Frames:
    """What is made of a request that no other stands beside."""
    job = server.create(lossless=True, **fields)
    found = frames(server, job)
    server.call("DELETE", f"/v1/videos/{job}")
    return found


def each_as_alone(server: Server, jobs: list[str], asked: list[dict[str, Any]]) -> None:
    made = [frames(server, job) for job in jobs]
    for found, fields in zip(made, asked, strict=True):
        assert same(found, alone(server, **fields))
    assert not same(made[0], made[1])


def stages(server: Server, job: str) -> Any:
    return server.call("GET", f"/v1/videos/{job}")[1]["stage_durations"]


def test_jobs_of_one_shape_are_made_together_and_as_alone(blocked: Server) -> None:
    server = blocked
    asked: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": seed, "num_inference_steps": 6}
        for seed, prompt in enumerate(PROMPTS)
    ]
    asked[3] |= {"size": "64x32"}
    jobs = [server.create(lossless=True, **one) for one in asked]
    release(server)
    for job in jobs:
        server.wait(job)
    # One clock for the three of one shape, another for the fourth.
    assert stages(server, jobs[0]) == stages(server, jobs[1]) == stages(server, jobs[2])
    assert stages(server, jobs[3]) != stages(server, jobs[0])
    ended = [server.save_dir / "jobs" / job / "result.json" for job in jobs]
    assert [json.loads(path.read_text())["together"] for path in ended] == [3, 3, 3, 1]
    each_as_alone(server, jobs, asked)


def test_one_of_a_batch_is_cancelled_and_the_others_are_made_as_alone(blocked: Server) -> None:
    server = blocked
    asked = [{"prompt": prompt, "seed": 7, **LONG} for prompt in PROMPTS[:3]]
    jobs = [server.create(lossless=True, **one) for one in asked]
    release(server)
    until(lambda: all(status(server, job) == "in_progress" for job in jobs))
    assert server.call("DELETE", f"/v1/videos/{jobs[0]}")[0] == 200
    each_as_alone(server, jobs[1:], asked[1:])
    assert not (server.save_dir / "jobs" / jobs[0]).exists()


def test_a_batch_goes_on_after_the_engine_is_killed(blocked: Server) -> None:
    server = blocked
    asked = [{"prompt": prompt, "seed": 8, **LONG} for prompt in PROMPTS[:2]]
    jobs = [server.create(lossless=True, **one) for one in asked]
    release(server)
    until(lambda: all(status(server, job) == "in_progress" for job in jobs))
    until(lambda: server.call("GET", f"/v1/videos/{jobs[1]}")[1].get("step", 0) > 20)
    os.kill(server.engine_pids()[0], signal.SIGKILL)
    for job in jobs:
        server.wait(job)
    server.wait_ready()
    assert stages(server, jobs[0]) == stages(server, jobs[1])  # together again
    each_as_alone(server, jobs, asked)


def pixels(picture: bytes) -> Frames:
    return np.asarray(Image.open(io.BytesIO(picture))).astype(int)


def test_the_openai_client_makes_pictures(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    steps = {"num_inference_steps": 3, "seed": 5}
    made = client.images.generate(
        prompt="a red ball", n=2, size="48x32", response_format="b64_json", extra_body=steps
    )
    pictures = [base64.b64decode(one.b64_json) for one in made.data]
    assert all(one.startswith(b"\x89PNG") for one in pictures)
    again = client.images.generate(
        prompt="a red ball", size="48x32", response_format="url", extra_body={**steps, "seed": 6}
    )
    pictures.append(server.content(again.data[0].url.split("/")[-2]))
    first, second, third = map(pixels, pictures)
    assert same(second, third)
    assert not same(first, third)
    for wrong, words in (
        ({"n": 5}, "n 5"),
        ({"size": "large"}, "WIDTHxHEIGHT"),
        ({"prompt": " "}, "prompt is needed"),
        ({"extra_body": {"num_frames": 17}}, "/v1/videos"),
        ({"output_format": "webp"}, "png"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.images.generate(**{"prompt": "a", **wrong})


def test_who_leaves_before_the_picture_is_made_cancels_it(server: Server) -> None:
    before = server.jobs()
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = {"prompt": "a ball", "size": "48x32", "num_inference_steps": 100_000}
    line.request(
        "POST", "/v1/images/generations", json.dumps(body), {"content-type": "application/json"}
    )
    until(lambda: len(server.jobs()) == len(before) + 1)
    line.close()
    until(lambda: server.jobs() == before)
    assert server.wait(server.create())["status"] == "completed"


def test_the_commands_of_a_client(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENSORA_SP_SERVER", server.url)
    small = ["--image-size", "32", "48", "--num-frames", "17", "--num-sampling-steps", "2"]
    Image.new("RGB", (64, 48), "red").save(tmp_path / "cat.png")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,seed\na red ball,5\na blue square,6\n", encoding="utf-8")
    folder = tmp_path / "made"

    def said(*words: str, code: int = 0) -> tuple[list[str], str]:
        ended = main(list(words))
        captured = capsys.readouterr()
        assert ended == code, captured.err
        return captured.out.split(), captured.err

    picture = ["--image", str(tmp_path / "cat.png")]
    one = tmp_path / "one.mp4"
    assert said("submit", "--prompt", "it turns", *picture, *small, "-o", str(one))[0] == [str(one)]
    assert one.read_bytes()[4:8] == b"ftyp"
    paths, _ = said("submit", "--prompt-path", str(prompts), *small, "--wait", "-o", str(folder))
    assert sorted(map(str, folder.iterdir())) == sorted(paths)
    ids = [Path(path).stem for path in paths]
    table, _ = said("jobs", "--limit", "2", "--json")
    listed = json.loads(" ".join(table))
    assert {video["id"] for video in listed} == set(ids)
    assert {video["seed"] for video in listed} == {5, 6}
    fetched, _ = said("fetch", *ids, "-o", str(folder), "--variant", "thumbnail")
    assert [Image.open(path).format for path in fetched] == ["WEBP", "WEBP"]
    assert said("cancel", *ids)[0] == ids
    _, err = said("fetch", ids[0], code=1)
    assert re.fullmatch(rf"error: {ids[0]}: there is no video .*\n", err)
    # The server's words, before anything is queued.
    before = server.jobs()
    _, err = said("submit", "--prompt", 'x {"reference_path": "/etc/passwd"}', *small, code=2)
    assert "/etc/passwd" in err
    assert server.jobs() == before
