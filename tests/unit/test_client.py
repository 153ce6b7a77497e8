"""The client's commands against servers that answer anything: what is said, stored and refused."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.cli import on_queue
from opensora_sp.cli.client import submit
from opensora_sp.cli.client.connection import Refused, connect
from opensora_sp.cli.client.forms import forms_of
from opensora_sp.cli.client.jobs import cut, table
from opensora_sp.cli.client.submit import _wait, progress_text
from opensora_sp.cli.main import main

ID = "video_" + "0" * 24


class Answering:
    """A server that gives one answer to everything, and keeps what it was sent."""

    def __init__(self) -> None:
        self.status, self.kind, self.body, self.length = 200, "application/json", b"{}", -1
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.asked.append((self.command, self.path, headers, body))
                self.send_response(outer.status)
                self.send_header("content-type", outer.kind)
                length = len(outer.body) if outer.length < 0 else outer.length
                self.send_header("content-length", str(length))
                self.send_header("content-disposition", 'attachment; filename="../../evil.sh"')
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: Any) -> None:
                pass

        for method in ("GET", "POST", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.answer)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def says(self, content: Any, status: int = 200) -> None:
        self.status, self.kind, self.body = status, "application/json", json.dumps(content).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    one = Answering()
    monkeypatch.setenv("OPENSORA_SP_SERVER", f"http://127.0.0.1:{one.http.server_port}")
    monkeypatch.delenv("OPENSORA_SP_TOKEN", raising=False)
    yield one
    one.http.shutdown()
    one.http.server_close()


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    ended = main(list(words))
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out, captured.err


def test_a_form_holds_the_flags_and_the_files(
    server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "my secret name.png"
    picture.write_bytes(b"\x89PNG" + bytes(range(256)) * 9000)
    token = tmp_path / "token"
    token.write_text("me:0123456789abcdef\n", encoding="utf-8")
    server.says({"id": ID, "notes": ["not read are '\x1b[31m猫'"]})
    words = ["--image", str(picture), "--image-size", "32", "48", "--cfg-scale", "3"]
    words += ["--config", "144p-2s", "--priority", "2", "--token-file", str(token)]
    ids, notes = said(capsys, "submit", "--prompt", "a ball", "b", *words)
    assert ids.split() == [ID, ID]
    assert notes.count("note: not read are ") == 2
    assert "\x1b" not in notes
    method, path, headers, body = server.asked[0]
    assert (method, path) == ("POST", "/v1/videos")
    assert headers["authorization"] == "Bearer 0123456789abcdef"
    assert picture.read_bytes() in body
    assert b"secret" not in body
    wanted = {"prompt": "a ball", "size": "48x32", "cfg_scale": "3", "num_frames": "2s"}
    for name, value in {**wanted, "resolution": "144p", "priority": "2"}.items():
        assert f'name="{name}"\r\n\r\n{value}\r\n'.encode() in body
    assert b'name="prompt"\r\n\r\nb\r\n' in server.asked[1][3]


def test_prompts_of_a_file_bring_their_own_seed_and_references(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    both = f"{tmp_path}/a.png;{tmp_path}/b.png"
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "one", "seed": 7, "reference_path": both, "mask_strategy": "0;0,1,0,-1,1"},
        {"prompt": "two"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    one, two = forms_of(["--prompt-path", str(prompts), "--seed", "3"], {})
    assert one.fields == {"prompt": "one", "seed": "7", "mask_strategy": "0;0,1,0,-1,1"}
    assert [(name, path.name) for name, path in one.files] == [
        ("reference", "a.png"),
        ("reference", "b.png"),
    ]
    assert (two.fields, list(two.files)) == ({"prompt": "two", "seed": "3"}, [])


def test_what_a_configuration_says_of_the_engine_stays_with_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (form,) = forms_of(["--prompt", "x", "--config", "embedded"], {})
    assert form.fields == {"prompt": "x", "num_frames": "17", "size": "96x64"}
    assert "the server has its own --dtype" in capsys.readouterr().err
    mine = tmp_path / "mine.yaml"
    mine.write_text("memory: small\nckpt_path_dit: weights/dit\nseed: 3\n", encoding="utf-8")
    (form,) = forms_of(["--prompt", "x", "--config", str(mine)], {})
    assert form.fields == {"prompt": "x", "seed": "3"}
    assert "--memory, --ckpt-path-dit" in capsys.readouterr().err
    mine.write_text("save_dir: here\n", encoding="utf-8")
    with pytest.raises(UserError, match="--save-dir does not go with a request"):
        forms_of(["--prompt", "x", "--config", str(mine)], {})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["submit"], "--prompt or --prompt-path is needed"),
        (["submit", "--prompt", "x", "--memory", "small"], "--memory does not go with a request"),
        (["submit", "--prompt", "x", "--image", "none.png"], "'none.png': there is no such file"),
        (["submit", "--prompt", "x", "--image", "http://a/b.png"], "fetches no address"),
        (["submit", "--prompt", "x", "--seed", "-1"], "--seed '-1'"),
        (["submit", "--prompt", "x", "--priority", "0"], "--priority 0"),
        (["submit", "--prompt", "x", "y", "-o", "one.mp4"], "one file for 2 jobs"),
        (["jobs", "--limit", "0"], "--limit 0"),
        (["jobs", "--server", "ftp://x"], "--server 'ftp://x'"),
        (["jobs", "--server", "http://me:secret@x"], "give the address alone"),
        (["jobs", "--server", "http://127.0.0.1:1"], "start one with opensora-sp serve"),
        (["fetch", "../../x"], "'../../x' is not an id"),
        (["cancel"], "ID"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, *words, code=2)
    assert (out, err.count("\n")) == ("", 1)
    assert told in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b'{"error": {"message": "no"}}', "--token-file FILE"),
        (400, b'{"error": {"message": "seed \\u001b[31m is\\nwrong"}}', "seed \\x1b[31m is wrong"),
        (500, b"<html>", "not as opensora-sp serve does (HTTP 500)"),
        (200, b"[]", "not as opensora-sp serve does"),
        (302, b"{}", "HTTP 302"),
        (200, b'{"data": [{"id": "../x"}]}', "not as opensora-sp serve does"),
    ],
)
def test_what_a_server_says_is_one_printable_line(
    status: int, body: bytes, told: str, server: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status, server.body = status, body
    _, err = said(capsys, "jobs", code=2)
    assert told in err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_an_answer_without_an_id_is_of_the_job_that_was_asked_for(
    server: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    server.body = json.dumps({"id": ID, "status": "failed", "error": {"message": "no"}}).encode()
    assert f"{ID}: no" in said(capsys, "submit", "--prompt", "x", "--wait", code=1)[1]
    link = connect(None, None)
    server.body = b'{"status": "completed"}'
    assert _wait(link, [ID], None, None) == 0
    assert capsys.readouterr().out == f"{ID}\n"


def test_a_download_has_our_name_and_appears_whole_or_not_at_all(
    server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.kind, server.body = "video/mp4", b"a video"
    out, _ = said(capsys, "fetch", ID, "-o", str(tmp_path))
    assert out == f"{tmp_path / ID}.mp4\n"
    server.body, server.length = b"half", 8
    _, err = said(capsys, "fetch", ID, "-o", str(tmp_path / "other"), code=2)
    assert "try again" in err or "in the middle" in err
    server.kind, server.length = "text/html", -1
    assert "no video" in said(capsys, "fetch", ID, "-o", str(tmp_path), code=2)[1]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{ID}.mp4"]
    assert (tmp_path / f"{ID}.mp4").read_bytes() == b"a video"


def test_a_table_fits_the_screen() -> None:
    video = {"id": ID, "status": "in_progress", "progress": 40, "eta_s": 7.6}
    lines = table([{**video, "prompt": "红球\x1b[2J" * 30}, {**video, "prompt": "a\nb"}], 80)
    assert "8 s" in lines[1]
    assert lines[1].endswith("…")
    assert lines[2].endswith("  a b")
    assert "\x1b" not in "".join(lines)
    assert cut("红球红球", 5) == "红球…"
    assert cut("ab", 2) == "ab"


def test_the_progress_of_several_jobs_is_one_line() -> None:
    made = {"status": "in_progress", "progress": 40, "stage": "denoising", "step": 12, "steps": 30}
    waiting = {"status": "queued", "queue_position": 3}
    text = progress_text([waiting, {**made, "eta_s": 8.2}], 3)
    assert text == "1 of 3 ended; 40 %, denoising, step 12 of 30, about 8 s left"
    assert progress_text([waiting], 1) == "queued, 3 before it"
    assert "\x1b" not in progress_text([{**made, "stage": "\x1b[2J"}], 1)


def test_waiting_goes_on_for_the_others_where_one_is_deleted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "video_" + "1" * 24

    class Half:
        """A server that knows one of two jobs, and has it ready at the second look."""

        looks = 0

        def call(self, _method: str, path: str) -> dict[str, Any]:
            if path.endswith(ID):
                raise Refused(f"there is no video '{ID}'", 404)
            self.looks += 1
            return {"status": "completed" if self.looks > 1 else "queued"}

    monkeypatch.setattr(submit, "LOOK_SECONDS", 0.0)
    server: Any = Half()
    assert _wait(server, [ID, other], None, None) == 1
    told = capsys.readouterr()
    assert told.out == f"{other}\n"
    assert told.err == f"error: {ID}: there is no video '{ID}'\n"


def test_a_list_on_a_queue_has_the_comments_and_flags_of_a_list(tmp_path: Path) -> None:
    lines = io.StringIO("# a comment\n## a heading\n#\n\n#1 of three cats\n a dog \n")
    assert list(on_queue._texts(lines)) == ["#1 of three cats", "a dog"]
    words = ["--queue", "u", "--save-dir", "s", "--prompt-path", "list.txt"]
    for flag, value in (("--prompt", "a cat"), ("--start-index", "3"), ("--end-index", "5")):
        found, rest = on_queue.parser().parse_known_args([*words, flag, value])
        assert (found.prompt_path, rest) == ("list.txt", [flag, value])
        with pytest.raises(UserError, match=f"{flag} does not go with --queue"):
            on_queue._specs(rest, tmp_path)
