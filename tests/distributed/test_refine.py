"""One rank asks the language model, all ranks get its words, and the file tells both."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from forked import Copies
from ranks import environments, run_ranks
from written import settings_in

from opensora_sp.base.errors import UserError
from opensora_sp.cli.infer import main
from opensora_sp.jobs.refine import refine_batches
from opensora_sp.parallel.session import open_session
from opensora_sp.request.request import Request, Task

KEY = "sk-a-secret-that-nobody-sees"


class Server(ThreadingHTTPServer):
    """Answers each request in other words, so that two that ask cannot agree by chance."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.status = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        text = body["messages"][-1]["content"]
        self.server.asked.append(text)
        content = f"Caption number {len(self.server.asked)} of {text}"
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{listening.server_address[1]}/v1")
        yield listening
        listening.shutdown()
        thread.join()


def on_ranks(rank: int, world: int, init_file: str) -> Any:
    if rank:  # the key may be known on one node only
        del os.environ["OPENAI_API_KEY"], os.environ["OPENAI_BASE_URL"]
    prompts = [["a cat", "a dog"], ["|0|a cat|1|a bird"]]
    batches = [
        [Task(request=Request(prompt=prompt, loop=2), output=Path(prompt)) for prompt in batch]
        for batch in prompts
    ]
    with open_session("cpu") as session:
        try:
            return refine_batches(batches, session, "m")
        except UserError as error:
            return str(error)


def test_rank_0_asks_and_all_ranks_get_the_same(server: Server) -> None:
    first, second = run_ranks(on_ranks, 2)
    assert server.asked == ["a cat", "a dog", "a bird"]
    assert first == second
    assert [[task.request.prompt for task in batch] for batch in first] == [
        ["Caption number 1 of a cat", "Caption number 2 of a dog"],
        ["|0|Caption number 1 of a cat|1|Caption number 3 of a bird"],
    ]


def test_all_ranks_hear_of_a_failure(server: Server) -> None:
    server.status = 404
    first, second = run_ranks(on_ranks, 2)
    assert server.asked == ["a cat"]
    assert "status 404" in first
    assert first == second


FLAGS = ["--prompt", "a cat", "--llm-refine", "true", "--prompt-generator", "m"]
FLAGS += ["--prompt-as-path", "--device", "cpu", "--image-size", "32", "32", "--num-frames", "1"]
FLAGS += ["--num-sampling-steps", "1", "--save-dir"]


def test_the_command_tells_both_prompts_and_never_the_key(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    made = tmp_path / "made"
    codes = Copies([*FLAGS, str(made)], environments(2), out, err).finish(120)
    stdout, stderr = out.read_text(), err.read_text()
    assert codes == [0, 0], stderr
    assert server.asked == ["a cat"]
    picture = made / "a cat.png"  # named after the words of the person
    metadata = settings_in(picture)
    assert metadata["original_prompt"] == "a cat"
    assert metadata["request"]["prompt"] == "Caption number 1 of a cat"
    assert "'a cat' refined: Caption number 1 of a cat\n" in stderr
    assert KEY not in stdout + stderr
    assert KEY.encode() not in picture.read_bytes()
    # What is there already is neither made nor asked for again.
    assert main([*FLAGS, str(made)]) == 0
    assert "is there already, skipped" in capsys.readouterr().err
    assert server.asked == ["a cat"]


def test_a_failing_server_ends_the_run(server: Server, tmp_path: Path) -> None:
    server.status = 403
    said = tmp_path / "said"
    codes = Copies([*FLAGS, str(tmp_path / "out")], environments(2), said).finish(120)
    assert None not in codes
    assert 0 not in codes
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Connection closed" not in said.read_text()  # the other rank ends quietly
    assert "status 403: check what OPENAI_API_KEY" in errors[0]
    assert KEY not in said.read_text()
    assert not list((tmp_path / "out").glob("*.png"))
