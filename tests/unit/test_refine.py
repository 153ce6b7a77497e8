"""Prompts rewritten by a language model, against a server of this machine that misbehaves."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.cli.infer import main
from opensora_sp.jobs.refine import refine_batches, refine_text
from opensora_sp.parallel.session import alone
from opensora_sp.request import llm_endpoint
from opensora_sp.request.flags.table import all_flags
from opensora_sp.request.llm_endpoint import Endpoint, endpoint_from_environment
from opensora_sp.request.request import Request, Task

KEY = "sk-a-secret-that-nobody-sees"


class Reply(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (never written to)
    drip: float = 0.0  # seconds between the bytes of the body


def chat(content: object) -> Reply:
    return Reply(body=json.dumps({"choices": [{"message": {"content": content}}]}).encode())


class Server(ThreadingHTTPServer):
    """Gives the replies in order, the last one for ever; with none it captions the text."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = KEY
        self.replies: list[Reply] = []
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def texts(self) -> list[str]:
        return [body["messages"][-1]["content"] for _, _, body in self.seen]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        if self.headers["Authorization"] != f"Bearer {self.server.key}":
            said = {"message": f"no: {self.headers['Authorization']}", "code": "invalid_api_key"}
            reply = Reply(401, json.dumps({"error": said}).encode())
        elif not self.server.replies:
            reply = chat(f"A caption of {body['messages'][-1]['content']}.")
        else:
            reply = self.server.replies[0]
            del self.server.replies[: len(self.server.replies) > 1]
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for start in range(0, len(reply.body), 1 if reply.drip else len(reply.body)):
                self.wfile.write(reply.body[start : start + 1] if reply.drip else reply.body)
                time.sleep(reply.drip)
        except OSError:
            pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), {}))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", f"{listening.url}/v1/")
        monkeypatch.delenv("OPENAI_MODEL", raising=False)
        yield listening
        listening.shutdown()
        thread.join()


def endpoint(server: Server, **more: Any) -> Endpoint:
    return Endpoint(server.url, "m", more.pop("key", KEY), backoff_s=0.0, **more)


def task(tmp_path: Any, prompt: str, **more: Any) -> Task:
    return Task(request=Request(prompt=prompt, **more), output=tmp_path / "out")


def test_each_distinct_text_is_asked_for_once_and_the_rest_is_kept(
    server: Server, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "opensora_sp")
    batches = [
        [task(tmp_path, "a cat "), task(tmp_path, "", prompt_index=1)],
        [task(tmp_path, "a cat", sample_index=1)],
        [task(tmp_path, "|0|a cat|2| |5|a dog. motion score: 5.0.|9|never", loop=6)],
        [task(tmp_path, "a cat", num_frames=1)],
        [task(tmp_path, "aesthetic score: 6.5.")],
    ]
    refined = refine_batches(batches, alone("cpu"), "the-model", verbose=True)
    assert [[t.request.prompt for t in batch] for batch in refined] == [
        ["A caption of a cat.", ""],
        ["A caption of a cat."],
        ["|0|A caption of a cat.|2| |5|A caption of a dog.. motion score: 5.0.|9|never"],
        ["A caption of a cat."],
        ["aesthetic score: 6.5."],
    ]
    for before, after in zip(batches, refined, strict=True):
        for old, new in zip(before, after, strict=True):
            assert new.original_prompt == old.request.prompt
            assert new.output == old.output
            kept = {k: v for k, v in new.request.to_dict().items() if k != "prompt"}
            assert kept == {k: v for k, v in old.request.to_dict().items() if k != "prompt"}

    assert server.texts == ["a cat", "a dog.", "a cat"]  # for videos, and again for an image
    told = [body["messages"][0]["content"] for _, _, body in server.seen]
    assert ["one image" in text for text in told] == [False, False, True]
    assert ["one video" in text for text in told] == [True, True, False]
    assert {(path, body["model"]) for path, _, body in server.seen} == {
        ("/v1/chat/completions", "the-model")
    }
    assert caplog.messages[1] == "'a dog.' refined: A caption of a dog.."
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("  A red\r\n\nball.\n", "A red ball."),
        ('"A red ball."', "A red ball."),
        ("<think>a {plan}\n|0|</think>\nA red ball.", "A red ball."),
        ("|0|A ball\x1b[31m {now}\ud800.", "0 A ball [31m now ."),
    ],
)
def test_an_answer_becomes_plain_text(server: Server, content: str, text: str) -> None:
    server.replies = [chat(content)]
    assert refine_text(endpoint(server), "x", image=False) == text


PASSING = (429, 500, 503)


@pytest.mark.parametrize(
    ("reply", "said", "tries"),
    [
        (Reply(400, b'{"error": {"code": "model_not_found"}}'), r"400 \(model_not_found\)", 1),
        (Reply(401, b'{"error": {"code": "no: sk-a***"}}'), "401: check OPENAI_API_KEY", 1),
        (Reply(404, b"x" * 100_000), "404: check OPENAI_BASE_URL", 1),
        (Reply(429, b"[]", {"Retry-After": "0"}), "429: wait", 2),
        (Reply(500), "500: try again", 2),
        (Reply(503, b"null"), "503: try again", 2),
        (Reply(200, b"<html>"), "did not answer with a chat completion", 1),
        (Reply(200, b"\xff\xfe"), "did not answer with a chat completion", 1),
        (Reply(200, b"[" * 60_000), "did not answer with a chat completion", 1),
        (Reply(200, b'{"choices": []}'), "did not answer with a chat completion", 1),
        (Reply(200, b"", {"Content-Length": "9"}), "did not answer with a chat completion", 1),
        (chat(["a cat"]), "did not answer with a chat completion", 1),
        (chat(None), "without a word of English", 1),
        (chat(" \n"), "without a word of English", 1),
        (chat("一只猫。"), "without a word of English", 1),
        (chat("a cat " * 20_000), "more than 64 KiB", 1),
        (chat(f"a cat {KEY}"), "repeats the key", 1),
    ],
)
def test_a_bad_answer_is_one_line_without_the_key(
    server: Server, reply: Reply, said: str, tries: int
) -> None:
    server.replies = [reply]
    with pytest.raises(UserError, match=said) as caught:
        refine_text(endpoint(server), "a cat", image=False)
    line = str(caught.value)
    assert server.url in line
    assert "\n" not in line
    assert len(line) < 200
    assert KEY not in line
    assert len(server.seen) == tries


@pytest.mark.parametrize("status", PASSING)
def test_a_passing_trouble_is_tried_again(server: Server, status: int) -> None:
    server.replies = [Reply(status), chat("A cat.")]
    assert refine_text(endpoint(server), "cat", image=True) == "A cat."
    assert server.texts == ["cat", "cat"]


@pytest.mark.parametrize(
    ("asked", "pause"), [("7", 7.0), ("0", 1.5), ("99999", 20.0), ("soon", 1.5)]
)
def test_the_pause_is_the_servers_within_bounds(
    server: Server, sleeps: list[float], asked: str, pause: float
) -> None:
    server.replies = [Reply(429, headers={"Retry-After": asked}), chat("A cat.")]
    patient = Endpoint(server.url, "m", KEY, backoff_s=1.5)
    refine_text(patient, "cat", image=True)
    assert sleeps == [pause]


def test_a_server_that_never_ends_is_left(server: Server) -> None:
    # Every byte comes well within the limit of one silence; only their sum does not.
    server.replies = [Reply(200, b" " * 100, drip=0.05)]
    with pytest.raises(UserError, match=r"did not answer within 0\.3 s, 2 times"):
        refine_text(endpoint(server, timeout_s=0.3), "cat", image=False)
    assert len(server.seen) == 2
    server.replies = [Reply(200, b" " * 100, drip=0.05), chat("A cat.")]
    assert refine_text(endpoint(server, timeout_s=0.3), "cat", image=False) == "A cat."


def test_a_wrong_key_is_not_repeated(server: Server) -> None:
    wrong = "sk-wrong-but-still-nobody-elses"
    with pytest.raises(UserError, match=r"401 \(invalid_api_key\): check OPENAI_API_KEY") as caught:
        refine_text(endpoint(server, key=wrong), "cat", image=False)
    assert wrong not in str(caught.value)
    assert wrong not in repr(endpoint(server, key=wrong))

    server.key = "looks_like_a_code"
    server.replies = [Reply(400, b'{"error": {"code": "no_looks_like_a_code"}}')]
    with pytest.raises(UserError, match="status 400: does it know the model"):
        refine_text(endpoint(server, key=server.key), "cat", image=False)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server: Server, status: int) -> None:
    with Server() as other:
        threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
        server.replies = [Reply(status, headers={"Location": f"{other.url}/v1/chat/completions"})]
        with pytest.raises(UserError, match=f"{status}: it wants to redirect"):
            refine_text(endpoint(server), "cat", image=False)
        assert other.seen == []
        other.shutdown()


def test_nobody_answers_or_not_in_http(server: Server) -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:1 cannot be reached \(.*refused"):
        refine_text(Endpoint("http://127.0.0.1:1", "m", KEY), "cat", image=False)

    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:  # quotes the request back

        def echo() -> None:
            connection, _ = listening.accept()
            with connection:
                headers = connection.recv(4096)
                connection.sendall(headers.replace(b"\r\n", b" ") + b"\r\n\r\n")

        thread = threading.Thread(target=echo)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError, match="does not answer in HTTP") as caught:
            refine_text(Endpoint(url, "m", KEY), "cat", image=False)
        assert KEY not in str(caught.value)
        thread.join()


def test_the_environment_describes_the_endpoint() -> None:
    key = {"OPENAI_API_KEY": f" {KEY}\n"}
    plain = endpoint_from_environment("m", key)
    assert plain == Endpoint("https://api.openai.com/v1", "m", KEY)
    assert (plain.timeout_s, plain.backoff_s) == (60.0, 2.0)
    local = {**key, "OPENAI_BASE_URL": "http://[::1]:8000/v1/", "OPENAI_MODEL": "own"}
    assert endpoint_from_environment(None, local) == Endpoint("http://[::1]:8000/v1", "own", KEY)
    assert endpoint_from_environment("flag", local).model == "flag"
    shown = {flag.key: flag.shown_default for flag in all_flags()}["prompt_generator"]
    assert shown == "OPENAI_MODEL"


def test_a_model_has_to_be_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for model in ("", "  "):
        monkeypatch.setenv("OPENAI_MODEL", model)
        argv = ["--prompt", "x", "--llm-refine", "true", "--save-dir", str(tmp_path / "out")]
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert "--prompt-generator MODEL, such as --prompt-generator " in err
        assert "OPENAI_MODEL" in err
        assert err.count("\n") == 1
    monkeypatch.setenv("OPENAI_MODEL", "own")
    llm_endpoint.check_endpoint()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "needs OPENAI_API_KEY"),
        ({"OPENAI_API_KEY": "k"}, "--prompt-generator MODEL"),
        ({"OPENAI_API_KEY": " "}, "needs OPENAI_API_KEY"),
        ({"OPENAI_API_KEY": "secret one"}, "OPENAI_API_KEY .*a space"),
        ({"OPENAI_API_KEY": "secret\r\nX-Header: y"}, "OPENAI_API_KEY .*line break"),
        ({"OPENAI_API_KEY": "secretü"}, "OPENAI_API_KEY .*not ASCII"),
        *(
            ({"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": url}, "OPENAI_BASE_URL.*http")
            for url in (
                "localhost:8000",
                "file:///etc/passwd",
                "http://",
                "http://x:port",
                "http:/x",
            )
        ),
        *(
            ({"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": url}, "OPENAI_BASE_URL.*http")
            for url in ("http://[::1", "http://x/v1?a=b", "http://x/v 1", "http://ü/v1")
        ),
        ({"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://me:secret@x"}, "OPENAI_BASE_URL .*@"),
    ],
)
def test_an_unusable_environment_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        endpoint_from_environment(None, environ)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_rank_0_needs_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    place = {
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    for name, value in {"RANK": "1", **place}.items():
        monkeypatch.setenv(name, value)
    llm_endpoint.check_endpoint()
    monkeypatch.setenv("RANK", "0")
    argv = ["--prompt", "x", "--llm-refine", "true", "--save-dir", str(tmp_path / "out")]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "OPENAI_API_KEY" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "address",
    [
        "http://host/key-0123456789abcdef v1",
        "http://host/v1?api-key=key-0123456789abcdef",
        "http://host/v1#key-0123456789abcdef",
        "key-0123456789abcdef",
        "http://me:key-0123456789abcdef@host/v1",
    ],
)
def test_a_key_in_the_address_is_not_shown(address: str) -> None:
    with pytest.raises(UserError, match="OPENAI_BASE_URL") as caught:
        endpoint_from_environment(None, {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": address})
    assert "0123456789" not in str(caught.value)


def test_a_key_in_the_path_is_not_shown_when_the_server_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    endpoint = Endpoint("http://127.0.0.1:1/key-0123456789abcdef/v1", "m", "k", 1.0, 0.0)
    with pytest.raises(UserError, match=r"m' at http://127\.0\.0\.1:1 cannot be reached") as caught:
        refine_text(endpoint, "a ball", image=True)
    said = "".join(traceback.format_exception(caught.value))
    assert "0123456789" not in str(caught.value)
    assert "During handling" not in said
