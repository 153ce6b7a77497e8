"""The API against a real server with the embedded model: what clients see, and what is refused."""

from __future__ import annotations

import io
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


SMALL = {"num_frames": "17", "num_inference_steps": "2"}


@pytest.mark.filterwarnings("ignore")
def test_the_openai_client_makes_lists_and_deletes_videos(client: Any) -> None:
    made = client.videos.create_and_poll(
        prompt="a red ball", size="48x32", extra_body=SMALL, poll_interval_ms=100
    )
    assert made.status == "completed"
    assert made.progress == 100
    assert made.error is None
    assert made.size == "48x32"
    assert client.videos.retrieve(made.id).completed_at >= made.created_at
    video = client.videos.download_content(made.id).read()
    assert video[4:8] == b"ftyp"
    for variant in ("thumbnail", "spritesheet"):
        small = client.videos.download_content(made.id, variant=variant).read()
        assert Image.open(io.BytesIO(small)).format == "WEBP"
    others = [
        client.videos.create(prompt=f"ball {n}", size="48x32", extra_body=SMALL) for n in range(3)
    ]
    listed = [one.id for one in client.videos.list(limit=2, order="asc")]  # follows the pages
    assert [one.id for one in (made, *others)] == [
        i for i in listed if i in {made.id, *(o.id for o in others)}
    ]
    for one in others:
        assert client.videos.delete(one.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(others[0].id)


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


def test_a_running_job_is_cancelled_and_the_next_one_is_made(server: Server) -> None:
    slow = server.create(num_inference_steps=100_000)
    end = time.monotonic() + 60
    while server.call("GET", f"/v1/videos/{slow}")[1]["status"] != "in_progress":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert server.call("DELETE", f"/v1/videos/{slow}")[0] == 200
    assert server.call("GET", f"/v1/videos/{slow}")[0] == 404
    assert server.wait(server.create(), 30)["status"] == "completed"
    assert not (server.save_dir / "jobs" / slow).exists()


# What is sent, the status, the field at fault and words of the answer.
BAD: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "no prompt": ({}, 400, "prompt", "prompt is needed"),
    "an empty prompt": ({"prompt": "  "}, 400, "prompt", "prompt is needed"),
    "a prompt that is a number": ({"prompt": 3}, 400, "prompt", "prompt is needed"),
    "a long prompt": ({"prompt": "a" * 30_000}, 400, "prompt", "30000 characters"),
    "a file of the server's": (
        {"prompt": 'x {"reference_path": "/etc/passwd"}'}, 400, None, "/etc/passwd"),
    "an address": (
        {"prompt": 'x {"reference_path": "http://127.0.0.1/x.png"}'}, 400, None, "remote"),
    "an unknown field": ({"prompt": "a", "promt": "b"}, 400, "promt", "is not a field"),
    "the engine's memory": ({"prompt": "a", "memory": "small"}, 400, "memory", "not a field"),
    "a folder": ({"prompt": "a", "save_dir": "/tmp"}, 400, "save_dir", "is not a field"),
    "a path": ({"prompt": "a", "reference_path": "/x"}, 400, "reference_path", "not a field"),
    "another model": ({"prompt": "a", "model": "sora-2"}, 400, "model", "'sora-2' is not here"),
    "seconds in words": ({"prompt": "a", "seconds": "two"}, 400, "seconds", "'two'"),
    "no seconds": ({"prompt": "a", "seconds": "0"}, 400, "seconds", "'0'"),
    "two lengths": (
        {"prompt": "a", "seconds": "2", "num_frames": 17}, 400, "seconds", "give one"),
    "a size in words": ({"prompt": "a", "size": "large"}, 400, "size", "WIDTHxHEIGHT"),
    "a size of one side": ({"prompt": "a", "size": "64x"}, 400, "size", "WIDTHxHEIGHT"),
    "a tiny size": ({"prompt": "a", "size": "8x8"}, 400, "size", "8"),
    "a huge size": ({"prompt": "a", "size": "99999x64"}, 400, "size", "99999"),
    "no such resolution": ({"prompt": "a", "resolution": "9p"}, 400, "resolution", "240p"),
    "no such ratio": ({"prompt": "a", "aspect_ratio": "2:7"}, 400, None, "2:7"),
    "no steps": (
        {"prompt": "a", "num_inference_steps": 0}, 400, "num_inference_steps", "'0'"),
    "steps in words": (
        {"prompt": "a", "num_inference_steps": "x"}, 400, "num_inference_steps", "'x'"),
    "a negative seed": ({"prompt": "a", "seed": -1}, 400, "seed", "'-1'"),
    "guidance that is no number": (
        {"prompt": "a", "guidance_scale": "nan"}, 400, "guidance_scale", "nan"),
    "a list as a value": ({"prompt": "a", "fps": [24]}, 400, "fps", "[24]"),
    "half a frame": ({"prompt": "a", "num_frames": 1.5}, 400, "num_frames", "1.5"),
    "loops of a picture": ({"prompt": "a", "num_frames": 1, "loop": 2}, 400, "loop", "loop 2"),
    "a strategy without files": (
        {"prompt": "a", "mask_strategy": "0,7"}, 400, None, "0,7"),
    "an unknown camera": ({"prompt": "a", "watermark": "maybe"}, 400, "watermark", "maybe"),
    "more than the engine has": (
        {"prompt": "a", "size": "426x240", "num_frames": 408}, 400, "num_frames", "at this size"),
    "a size beyond the engine": (
        {"prompt": "a", "size": "1280x720", "num_frames": 17}, 400, "size", "426x240 at this"),
    "a priority beyond": ({"prompt": "a", "priority": 0}, 400, "priority", "from 1 to 1000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_one_line_that_names_the_field(kind: str, server: Server) -> None:
    fields, status, param, words = BAD[kind]
    before = len(server.jobs())
    got, answer = server.call("POST", "/v1/videos", fields)
    error = answer["error"]
    assert got == status, answer
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert "--" not in error["message"]
    if param is not None:
        assert error["param"] == param
    assert len(server.jobs()) == before


PATHS = (
    ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", 404),
    ("GET", "/v1/videos/video_000000000000000000000000", 404),
    ("GET", "/v1/videos/video_000000000000000000000000/content", 404),
    ("GET", "/v1/videos?limit=0", 400),
    ("GET", "/v1/videos?limit=101", 400),
    ("GET", "/v1/videos?order=up", 400),
    ("GET", "/v1/videos?after=nobody", 400),
    ("PUT", "/v1/videos", 405),
    ("GET", "/static/../app.py", 404),
    ("GET", "/static/%2e%2e/app.py", 404),
    ("GET", "/nothing", 404),
)


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_what_is_not_there_is_said_as_the_api_says_it(
    method: str, path: str, status: int, server: Server
) -> None:
    got, answer = server.call(method, path)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


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


def test_files_that_are_no_pictures_are_refused_and_nothing_stays(server: Server) -> None:
    before = server.jobs()
    for content, words in (
        (b"", "is empty"),
        (b"MZ\x90\x00 program", "no picture or video"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "playlist"),
        (picture()[:40], "input_reference"),
    ):
        status, answer = _upload(server, "input_reference", content)
        assert status == 400, (content, answer)
        assert words in json.dumps(answer), (content, answer)
        assert str(server.save_dir) not in json.dumps(answer)
    assert server.jobs() == before


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


def test_other_sites_and_other_hosts_are_refused(server: Server) -> None:
    body = {"prompt": "a", **SMALL}
    assert server.call("POST", "/v1/videos", body, {"origin": "http://evil.example"})[0] == 403
    assert server.call("GET", "/v1/videos", None, {"host": "evil.example"})[0] == 421


def test_a_body_beyond_the_limit_is_refused_before_it_is_sent(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        line.sendall(
            b"POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"content-length: 999999999999\r\n\r\n"
        )
        assert b" 413 " in line.recv(4096)


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
