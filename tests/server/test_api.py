"""The API against a real server with the embedded model: what clients see, and what is refused."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from serving import Server

openai = pytest.importorskip("openai")
pytest.importorskip("dbos")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Little memory, so that what does not fit is not large.
    flags = ("--device-memory", "1200MB", "--warmup", "embedded")
    one = Server(tmp_path_factory.mktemp("api") / "save", *flags).start()
    try:
        yield one
    finally:
        assert one.stop() == 0, one.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def picture(colour: str = "red", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def typed(video: Any) -> Any:
    """The video, of the client's type in every field.

    The client's type of `size` has Sora's four sizes alone; the client itself does not check it.
    """
    type(video).model_validate(
        {**video.model_dump(warnings=False), "size": "1280x720"}, strict=True
    )
    return video


SMALL = {"num_frames": "17", "num_inference_steps": "2"}


@pytest.mark.filterwarnings("ignore")
def test_the_openai_client_makes_lists_and_deletes_videos(client: Any) -> None:
    made = client.videos.create_and_poll(
        prompt="a red ball", size="48x32", extra_body=SMALL, poll_interval_ms=100
    )
    assert typed(made).status == "completed"
    assert made.progress == 100
    assert made.error is None
    assert made.size == "48x32"
    assert typed(client.videos.retrieve(made.id)).completed_at >= made.created_at
    video = client.videos.download_content(made.id).read()
    assert video[4:8] == b"ftyp"
    for variant in ("thumbnail", "spritesheet"):
        small = client.videos.download_content(made.id, variant=variant).read()
        assert Image.open(io.BytesIO(small)).format == "WEBP"
    others = [
        typed(client.videos.create(prompt=f"ball {n}", size="48x32", extra_body=SMALL))
        for n in range(3)
    ]
    listed = [
        typed(one).id for one in client.videos.list(limit=2, order="asc")
    ]  # follows the pages
    assert [one.id for one in (made, *others)] == [
        i for i in listed if i in {made.id, *(o.id for o in others)}
    ]
    for one in others:
        assert client.videos.delete(one.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(others[0].id)


def test_answers_are_what_the_description_says(server: Server) -> None:
    status, description = server.call("GET", "/openapi.json")
    assert status == 200

    def asked(method: str, path: str, route: str, body: Any = None) -> Any:
        status, answer = server.call(method, path, body)
        operation = description["paths"][route][method.lower()]
        assert ("requestBody" in operation) is (method == "POST")
        found = operation["responses"].get(str(status), operation["responses"]["4XX"])
        schema = found["content"]["application/json"]["schema"]
        assert schema["$ref"].startswith("#/components/schemas/")
        jsonschema.validate(answer, {**description, **schema})
        return answer

    one = "/v1/videos/{video_id}"
    fields = {"prompt": "a red ball", "size": "48x32", "num_frames": 17, "num_inference_steps": 2}
    assert asked("POST", "/v1/videos/estimate", "/v1/videos/estimate", fields)["fits"]
    slow = asked("POST", "/v1/videos", "/v1/videos", fields | {"num_inference_steps": 100_000})
    queued = asked("POST", "/v1/videos", "/v1/videos", fields)
    server.until(slow["id"], "in_progress")
    waits, runs = (asked("GET", f"/v1/videos/{each['id']}", one) for each in (queued, slow))
    assert asked("DELETE", f"/v1/videos/{slow['id']}", one)["deleted"]
    assert ("queue_position" in waits, runs["steps"]) == (True, 100_000)
    server.wait(queued["id"])
    assert asked("GET", f"/v1/videos/{queued['id']}", one)["completed_at"]
    assert asked("GET", "/v1/videos?limit=1", "/v1/videos")["data"]
    pictures = {"prompt": "a red ball", "size": "48x32", "num_inference_steps": 2, "n": 2}
    images = "/v1/images/generations"
    assert len(asked("POST", images, images, pictures)["data"]) == 2
    assert asked("POST", images, images, pictures | {"response_format": "url"})["data"]
    assert asked("GET", "/v1/models", "/v1/models")["data"]
    for method, path, route, body in (
        ("POST", "/v1/videos", "/v1/videos", {}),
        ("POST", images, images, {"prompt": 1}),
        ("GET", "/v1/videos?limit=x", "/v1/videos", None),
        ("GET", "/v1/videos/video_0", one, None),
    ):
        assert "error" in asked(method, path, route, body)


def test_a_picture_starts_the_video_and_a_seed_decides_it(server: Server, client: Any) -> None:
    made = [
        client.videos.create_and_poll(
            prompt="a ball",
            size="48x32",
            input_reference=("../../x.png", picture(), "image/png"),
            extra_body={**SMALL, "seed": seed},
            poll_interval_ms=100,
        )
        for seed in ("1", "1", "2")
    ]
    assert [one.status for one in made] == ["completed"] * 3
    first, again, other = (server.content(one.id) for one in made)
    assert first != other
    assert _frames(first) == _frames(again)
    assert not list(server.save_dir.glob("**/x.png"))


def _frames(video: bytes) -> list[bytes]:
    import av

    with av.open(io.BytesIO(video), "r") as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def test_a_running_job_is_cancelled_and_the_next_one_is_made(server: Server, client: Any) -> None:
    slow = server.create(num_inference_steps=100_000)
    server.until(slow, "in_progress")
    assert typed(client.videos.retrieve(slow)).status == "in_progress"
    assert client.videos.delete(slow).deleted
    assert server.call("GET", f"/v1/videos/{slow}")[0] == 404
    assert server.wait(server.create(), 30)["status"] == "completed"
    server.gone(slow)
    said = server.log.read_text()  # in a line, without a traceback of the queue's
    assert f"{slow} is deleted before it ended" in said
    assert "Traceback" not in said
    assert "outcome was not recorded" not in said


def test_an_estimate_says_what_a_job_needs_and_queues_nothing(server: Server) -> None:
    fields = {"prompt": "a", "size": "48x32", **SMALL}
    assert server.wait(server.create())["status"] == "completed"
    before = server.jobs()
    status, known = server.call("POST", "/v1/videos/estimate", fields)
    assert status == 200
    assert known["fits"]
    assert (known["size"], known["num_frames"], known["seconds"]) == ("48x32", 17, "0.708333")
    assert 10 < known["peak_memory_mb"] < 50
    assert known["tflop"] > 0
    assert known["estimated_s"] > 0
    assert known["queue_s"] == 0
    _, longer = server.call("POST", "/v1/videos/estimate", fields | {"num_inference_steps": 2000})
    assert longer["estimated_s"] > known["estimated_s"]
    assert longer["tflop"] > 10 * known["tflop"]
    _, large = server.call("POST", "/v1/videos/estimate", fields | {"size": "1280x720"})
    assert not large["fits"]
    assert large["reason"].startswith("size 1280x720 with num_frames 17 does not fit: ")
    for wrong in ({}, {"prompt": "a", "size": "large"}, {"prompt": "a", "promt": "b"}):
        for_a_job = server.call("POST", "/v1/videos", wrong)
        assert server.call("POST", "/v1/videos/estimate", wrong) == for_a_job
    status, with_file = _upload(server, "input_reference", picture(), "/v1/videos/estimate")
    assert status == 200
    assert with_file["fits"]
    assert server.jobs() == before


def test_words_that_the_model_does_not_read_are_told_with_the_job(server: Server) -> None:
    _, plain = server.call("POST", "/v1/videos/estimate", {"prompt": "a red ball", **SMALL})
    assert plain["notes"] == []
    prompt = "a ball, 一个红球向右滚动 👍"
    _, known = server.call("POST", "/v1/videos/estimate", {"prompt": prompt, **SMALL})
    dropped, unknown = known["notes"]
    assert "not read are '一个红球向右滚动', which caption cleaning drops" in dropped
    assert "the text encoder has no letters for '👍'" in unknown
    assert "--" not in dropped + unknown, "a flag is of no use to a client"
    job_id = server.create(prompt=prompt)
    assert server.wait(job_id)["notes"] == known["notes"]


@pytest.mark.parametrize(
    ("size", "frames", "param", "words"),
    [("426x240", 408, "num_frames", "at this size"), ("1280x720", 17, "size", "426x240 at this")],
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(
    size: str, frames: int, param: str, words: str, server: Server
) -> None:
    before = server.jobs()
    asked = {"prompt": "a", "size": size, "num_frames": frames}
    status, answer = server.call("POST", "/v1/videos", asked)
    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]
    assert server.jobs() == before


def test_a_queued_video_says_when_it_is_done(server: Server) -> None:
    assert server.wait(server.create())["status"] == "completed"
    slow, waiting = server.create(num_inference_steps=100_000), server.create()
    end = time.monotonic() + 60
    while (video := server.call("GET", f"/v1/videos/{waiting}")[1])["eta_s"] is None:
        assert time.monotonic() < end
        assert video["status"] == "queued"
        time.sleep(0.1)
    fields = {"prompt": "a", "size": "48x32", **SMALL}
    assert server.call("POST", "/v1/videos/estimate", fields)[1]["queue_s"] > 10
    for one in (slow, waiting):
        assert server.call("DELETE", f"/v1/videos/{one}")[0] == 200


def _upload(
    server: Server, field: str, content: bytes, path: str = "/v1/videos"
) -> tuple[int, Any]:
    parts = [("prompt", None, b"a ball"), ("size", None, b"48x32"), (field, "../x", content)]
    body = b""
    for name, file, value in parts:
        more = f'; filename="{file}"' if file else ""
        head = f'--edge\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'
        body += head.encode() + value + b"\r\n"
    request = urllib.request.Request(
        server.url + path,
        data=body + b"--edge--\r\n",
        headers={"content-type": "multipart/form-data; boundary=edge"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/?lang=zh", timeout=10) as answer:
        policy, text = answer.headers["content-security-policy"], answer.read().decode()
    assert "default-src 'none'" in policy
    assert '<html lang="zh">' in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_the_server_has_one_save_directory_to_itself(server: Server, tmp_path: Path) -> None:
    second = Server(server.save_dir)
    with pytest.raises(AssertionError, match="another server uses it"):
        second.start()
    assert second.stop() == 2
