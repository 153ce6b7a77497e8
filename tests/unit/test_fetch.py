"""Paths and addresses of references: what is opened, what is fetched and within which bounds."""

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from PIL import Image

from opensora_sp import fetch
from opensora_sp.errors import UserError
from opensora_sp.references import check_reference, fit_image, read_reference


def picture() -> Image.Image:
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 16, 16))
    return image


@pytest.mark.parametrize("name", ["", "~nobody-of-that-name/x.png", "a\0b", "x" * 300])
def test_impossible_paths_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="reference"):
        check_reference(name)


class Server(BaseHTTPRequestHandler):
    image = b""

    def do_GET(self) -> None:
        if self.path == "/missing.png":
            self.send_error(404)
            return
        self.send_response(200)
        length = {"/broken.png": len(self.image) + 10, "/empty.png": 0}.get(self.path)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(self.image) if length is None else length))
        self.end_headers()
        if self.path == "/endless":
            try:
                while True:
                    self.wfile.write(b"x" * 100)
                    time.sleep(0.01)
            except OSError:
                return
        elif self.path != "/empty.png":
            self.wfile.write(self.image)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    data = io.BytesIO()
    picture().save(data, format="PNG")
    Server.image = data.getvalue()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def test_addresses_are_refused_unless_allowed(server: str) -> None:
    address = f"{server}/image.png"
    for use in (lambda: check_reference(address), lambda: read_reference(address, 16, 16)):
        with pytest.raises(UserError, match=r"is remote: .*--allow-remote"):
            use()
    check_reference(address, allow_remote="private")
    reference = read_reference(address, 16, 16, allow_remote="private")
    assert torch.equal(reference.video[:, 0], fit_image(picture(), 16, 16))
    for other in ("s3://bucket/a.png", "file:///etc/hostname", "ftp://host/a.png"):
        with pytest.raises(UserError, match="only http:// and https://"):
            check_reference(other, allow_remote=True)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("missing.png", "cannot fetch .*404"),
        ("broken.png", "broke off"),
        ("empty.png", "is empty"),
        ("endless", "did not arrive within 0.3 s"),
    ],
)
def test_bad_answers(server: str, monkeypatch: pytest.MonkeyPatch, page: str, said: str) -> None:
    if page == "endless":
        monkeypatch.setattr(fetch, "MAX_REMOTE_SECONDS", 0.3)
    with pytest.raises(UserError, match=said):
        read_reference(f"{server}/{page}", 16, 16, allow_remote="private")


def test_too_large_an_answer(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_REMOTE_BYTES", 1000)
    with pytest.raises(UserError, match="is larger than"):
        read_reference(f"{server}/endless", 16, 16, allow_remote="private")


def test_nobody_answers(server: str) -> None:
    with pytest.raises(UserError, match="cannot fetch reference"):
        read_reference("http://127.0.0.1:1/image.png", 16, 16, allow_remote="private")
