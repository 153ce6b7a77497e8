"""The API against a real server with the embedded model: what clients see, and what is refused."""

from __future__ import annotations

import io
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
    one = Server(tmp_path_factory.mktemp("api") / "save").start()
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
