"""Paths and addresses of references: what is opened, what is fetched and within which bounds."""

import base64
import io
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from PIL import Image
from raw_server import Answer, page, raw_server
from whole_reference import read_reference

from opensora_sp.base.errors import UserError
from opensora_sp.media import fetch
from opensora_sp.media.reader import check_reference, fit_image


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


# --- bounds: time, hops, places ----------------------------------------------------------------


def png() -> bytes:
    data = io.BytesIO()
    picture().save(data, format="PNG")
    return data.getvalue()


def drip(text: bytes) -> Answer:
    """Never ends, and is never silent."""

    def answer(connection: socket.socket, _: bytes) -> None:
        while True:
            for start in range(len(text)):
                connection.sendall(text[start : start + 1])
                time.sleep(0.01)

    return answer


def continues(connection: socket.socket, _: bytes) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.002)


def slow_body(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    drip(b"x")(connection, b"")


def silent(connection: socket.socket, _: bytes) -> None:
    connection.recv(1)


def slow_redirects(connection: socket.socket, head: bytes) -> None:
    time.sleep(0.15)
    number = int(head.split()[1].rpartition(b"/")[2] or 0)
    connection.sendall(page(b"", "302 Found", Location=f"/{number + 1}"))


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"HTTP/1.1 200 OK\r\nX-A: b\r\n" + b"c" * 60_000),
        drip(b"H"),
        continues,
        slow_body,
        silent,
        slow_redirects,
    ],
)
def test_one_deadline_holds_for_all_of_a_fetch(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "MAX_REMOTE_SECONDS", 0.4)
    before = threading.active_count()
    with raw_server(answer) as place, pytest.raises(UserError, match="did not arrive within"):
        read_reference(f"http://{place}/0", 16, 16, allow_remote="private")
    time.sleep(0.1)
    assert threading.active_count() <= before + 2  # the server's own; nothing of the fetch is left


def test_a_name_server_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "MAX_REMOTE_SECONDS", 0.2)
    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: never.wait(60))
    with pytest.raises(UserError, match="did not arrive within"):
        read_reference("http://name.example/a.png", 16, 16, allow_remote=True)
    never.set()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("ftp://127.0.0.1:1/a.png", "only http:// and https://"),
        ("file:///etc/hostname", "only http:// and https://"),
        ("gopher://x/", "only http:// and https://"),
    ],
)
def test_a_redirect_leads_to_http_only(
    target: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    answer = page(b"", "302 Found", Location=target)
    with (
        raw_server(lambda connection, _: connection.sendall(answer)) as place,
        pytest.raises(UserError, match=f"leads on to another address: .*{said}"),
    ):
        read_reference(f"http://{place}/a.png", 16, 16, allow_remote="private")


@pytest.mark.parametrize("hops", [0, 1, 5, 6])
def test_redirects_are_followed_and_counted(hops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")

    def answer(connection: socket.socket, head: bytes) -> None:
        number = int(head.split()[1].rpartition(b"/")[2])
        last = page(png())
        connection.sendall(
            last if number >= hops else page(b"", "307 Go", Location=str(number + 1))
        )

    with raw_server(answer) as place:
        if hops > fetch.MAX_REDIRECTS:
            with pytest.raises(UserError, match="redirected more than 5 times"):
                read_reference(f"http://{place}/0", 16, 16, allow_remote="private")
        else:
            assert read_reference(f"http://{place}/0", 16, 16, allow_remote="private").is_image


PRIVATE = [
    *("127.0.0.1", "127.1", "localhost", "LOCALHOST.", "10.0.0.1", "172.16.3.4", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "0.0.0.0", "[::1]", "[fe80::1]", "[fd00::1]", "224.0.0.1"),
    *("[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
    *("2130706433", "0x7f000001"),
]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    connected: list[Any] = []
    monkeypatch.setattr(socket, "create_connection", lambda *a, **_: connected.append(a))
    with pytest.raises(UserError, match=r"this machine or in a private network.*--allow-private"):
        read_reference(f"http://{host}/a.png", 16, 16, allow_remote=True)
    assert not connected


@pytest.mark.parametrize("host", ["8.8.8.8", "[2606:4700::1111]", "example.org"])
def test_public_addresses_are_not(host: str) -> None:
    check_reference(f"https://{host}/a.png", allow_remote=True)


def test_a_redirect_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host is taken for a public one; the redirect names the same place honestly."""
    monkeypatch.setenv("no_proxy", "*")

    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(page(b"", "302 Found", Location=f"http://{place}/inner"))

    with raw_server(answer) as place:
        port = int(place.rpartition(":")[2])
        public = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: public)
        connected = socket.socket()
        connected.connect(("127.0.0.1", port))
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: connected)
        with pytest.raises(UserError, match=r"leads on to another address: .*private network"):
            read_reference("http://name.example/a.png", 16, 16, allow_remote=True)


def test_what_was_checked_is_what_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers with a public address first and a private one afterwards."""
    monkeypatch.setenv("no_proxy", "*")
    answers = ["93.184.216.34", "127.0.0.1", "127.0.0.1"]
    asked: list[str] = []

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        place = answers[len(asked) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port))]

    connected: list[Any] = []

    def connect(place: Any, *_: Any, **__: Any) -> None:
        connected.append(place)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(UserError, match="Connection refused"):
        read_reference("http://name.example/a.png", 16, 16, allow_remote=True)
    assert (asked, connected) == (["name.example"], [("93.184.216.34", 80)])


# --- secrets -----------------------------------------------------------------------------------


def test_a_login_goes_to_its_own_place_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    heads: dict[str, list[bytes]] = {"first": [], "other": []}

    def other(connection: socket.socket, head: bytes) -> None:
        heads["other"].append(head)
        connection.sendall(page(png()))

    with raw_server(other) as elsewhere:

        def first(connection: socket.socket, head: bytes) -> None:
            heads["first"].append(head)
            target = "/again" if b"/again" not in head else f"http://{elsewhere}/a.png"
            connection.sendall(page(b"", "302 Found", Location=target))

        with raw_server(first) as place:
            address = f"http://me:p%40ss@{place}/a.png?signature=123"
            assert read_reference(address, 16, 16, allow_remote="private").is_image
    basic = base64.b64encode(b"me:p@ss")
    assert [basic in head for head in heads["first"]] == [True, True]
    assert heads["first"][0].startswith(b"GET /a.png?signature=123 HTTP/1.1")
    assert b"me:" not in heads["first"][0]
    assert [b"Authorization" in head for head in heads["other"]] == [False]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 hunter2-in-the-reason\x1b[31m\r\n\r\n",
        b"hunter2 is not HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhunter2\r\n",
        page(b""),
        page(b"", "302 Found", Location="ftp://hunter2:hunter2@x/"),
        page(b"not a picture"),
    ],
)
def test_nothing_secret_is_said(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with raw_server(lambda connection, _: connection.sendall(answer)) as place:
        address = f"http://me:hunter2@{place}/a.png?token=hunter2#hunter2"
        with pytest.raises(UserError) as caught:
            read_reference(address, 16, 16, allow_remote="private")
    said = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in said
    assert f"http://{place}/a.png" in str(caught.value)
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "address", ["http://me:hunter2@host/a.png?t=hunter2", "s3://me:hunter2@b/a.png"]
)
def test_nothing_secret_is_said_before_fetching(address: str) -> None:
    with pytest.raises(UserError) as caught:
        check_reference(address)
    assert "hunter2" not in str(caught.value)


def test_a_proxy_is_used_where_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []

    def proxy(connection: socket.socket, head: bytes) -> None:
        heads.append(head)
        connection.sendall(page(png()))

    with raw_server(proxy) as place:
        monkeypatch.setenv("http_proxy", f"http://user:word@{place}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert read_reference("http://name.invalid/a.png", 16, 16, allow_remote=True).is_image
    assert heads[0].startswith(b"GET http://name.invalid/a.png HTTP/1.1\r\n")
    assert base64.b64encode(b"user:word") in heads[0]
