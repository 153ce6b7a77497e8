"""Logins, signed queries and keys: not on the screen, not in a log, not in any file."""

from __future__ import annotations

import io
import json
import socket
import sys
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from raw_server import page, raw_server

from opensora_sp.base.errors import UserError
from opensora_sp.base.rank_log import rank_log
from opensora_sp.base.redaction import redacted, references_without_secrets, without_secrets
from opensora_sp.base.screen import one_line
from opensora_sp.base.value_types import shown
from opensora_sp.benchmark.live_report import LiveReport
from opensora_sp.cli.infer import main
from opensora_sp.jobs.identity import difference, digest, identity_of
from opensora_sp.jobs.records import read_record, record_path, write_record
from opensora_sp.jobs.refine import refine_text
from opensora_sp.request.llm_endpoint import Endpoint
from opensora_sp.request.request import EngineSettings, Job, JobSettings, Request, Task
from opensora_sp.request.settings import parse_command_line, print_config, resolve

SECRET = "hunter2hunter2"
KEY = "sk-a-secret-that-nobody-sees"


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        (f"https://me:{SECRET}@host:8/a/b.png", "https://host:8/a/b.png"),
        (f"https://{SECRET}@host/a.png", "https://host/a.png"),
        (f"https://host/a.png?X-Amz-Signature={SECRET}", "https://host/a.png"),
        (f"https://host/a.png#{SECRET}", "https://host/a.png"),
        (f"https://host?{SECRET}", "https://host"),
        (f"https://me:{SECRET}/{SECRET}?@host/a.png", "https://host/a.png"),
        (f"https://me:a@{SECRET}@host/a.png", "https://host/a.png"),
        (f"S3://me:{SECRET}@bucket/a.png", "S3://bucket/a.png"),
        ("a folder/what?.png", "a folder/what?.png"),
        ("me@home.png", "me@home.png"),
    ],
)
def test_of_an_address_the_place_is_kept(address: str, kept: str) -> None:
    assert without_secrets(address) == kept
    for before in ("error: cannot fetch '", "(", "1", "-9.", "x+"):
        assert SECRET not in redacted(f"{before}{address}', ({address}): try again")
    assert SECRET not in shown(address)
    assert SECRET not in shown([address, "x" * 500])
    assert SECRET not in one_line(UserError(f"reference {address} is bad"))


def test_references_are_cut_one_by_one() -> None:
    paths = f"a.png;http://me:{SECRET}@x/b.png?{SECRET} ; c?.png"
    assert references_without_secrets(paths) == "a.png;http://x/b.png;c?.png"


def test_text_without_addresses_is_left_alone() -> None:
    for text in ("error: 9:16 is not 16:9; see docs/flags.md?", "a://", "x@y.z: no", ""):
        assert redacted(text, {}) == text
    assert redacted("see https://host/docs/a.html.", {}) == "see https://host/docs/a.html."


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_keys_of_the_environment_are_masked(name: str) -> None:
    assert redacted(f"Bearer {KEY}!", {name: KEY}) == "Bearer ***!"
    assert redacted("the EMPTY set", {name: "EMPTY"}) == "the EMPTY set"


# --- files -------------------------------------------------------------------------------------


def remote(tmp_path: Path, address: str) -> Task:
    request = Request(prompt="x", reference_path=f"{address};b.png", mask_strategy="0")
    return Task(request=request, output=tmp_path / "sample_0000.mp4")


MODELS = {"dit": "1"}


def test_a_record_knows_the_request_without_its_secrets(tmp_path: Path) -> None:
    one = remote(tmp_path, f"https://me:{SECRET}@host/a.png?t={SECRET}")
    identity = identity_of(one, EngineSettings(), JobSettings(), MODELS)
    write_record(one.output, identity, "waiting")
    text = record_path(one.output).read_text()
    assert SECRET not in text
    assert "https://host/a.png" in text
    found = read_record(one.output)
    assert found is not None
    assert difference(found.identity, identity) is None
    other = identity_of(
        remote(tmp_path, f"https://me:{SECRET}@host/a.png?t=2"),
        EngineSettings(),
        JobSettings(),
        MODELS,
    )
    said = difference(found.identity, other)
    assert said is not None
    assert SECRET not in said
    plain = identity_of(
        remote(tmp_path, "https://host/a.png"), EngineSettings(), JobSettings(), MODELS
    )
    assert plain["references"][0] == "https://host/a.png"


@pytest.mark.parametrize("same", [True, False])
def test_a_record_of_the_version_before_is_recognised(same: bool, tmp_path: Path) -> None:
    address = f"https://me:{SECRET}@host/a.png?t={SECRET}"
    one = remote(tmp_path, address)
    now = identity_of(one, EngineSettings(), JobSettings(), MODELS)
    old = {**now, "references": [address if same else f"{address}2", "b.png"]}
    write_record(one.output, old, "waiting")
    content = json.loads(record_path(one.output).read_text())
    assert content["digest"] == digest(old)
    found = read_record(one.output)
    assert found is not None
    said = difference(found.identity, now)
    assert (said is None) is same
    assert SECRET not in (said or "")


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(data, format="PNG")
    return data.getvalue()


@pytest.mark.parametrize("frames", ["17", "1"])
@pytest.mark.slow
def test_a_whole_run_shows_and_stores_nothing_secret(
    frames: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    heads: list[bytes] = []

    def answer(connection: socket.socket, head: bytes) -> None:
        heads.append(head)
        connection.sendall(page(png()))

    out = tmp_path / "out"
    with raw_server(answer) as place:
        address = f"http://me:{SECRET}@{place}/a.png?sig={SECRET}"
        argv = ["--prompt", "x", "--reference-path", f"{address};{address}", "--mask-strategy", "0"]
        argv += ["--allow-remote", "--allow-private", "--image-size", "32", "48", "--sheet"]
        argv += ["--num-frames", frames, "--num-sampling-steps", "1", "--device", "cpu"]
        argv += ["--save-dir", str(out), "--log-dir", str(tmp_path / "logs"), "--keep-state"]
        monkeypatch.setattr(sys, "argv", ["infer.py", *argv])
        assert main(argv) == 0
        assert main(argv) == 0  # the same request: nothing is made again
    assert any(f"sig={SECRET}".encode() in head for head in heads)
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert f"http://{place}/a.png is not used" in said.err
    assert "is there already, skipped" in said.err
    output = out / ("sample_0000.mp4" if frames == "17" else "sample_0000.png")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".json", ".log", ".html", output.suffix} <= {path.suffix for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    if frames == "17":
        with av.open(str(output)) as container:
            comment = container.metadata["comment"]
    else:
        comment = str(Image.open(output).info)
    assert f"http://{place}/a.png" in comment


def test_the_printed_configuration_leaves_logins_out_and_says_so() -> None:
    address = f"http://me:{SECRET}@host/a.png?{SECRET}"
    prompt = f'x {{"reference_path": "{address}"}}'
    for argv in (
        ["--prompt", "x", "--reference-path", f"b.png;{address}"],
        ["--prompt", "x", "--image", address],
        ["--prompt", prompt],
    ):
        text = print_config(resolve(parse_command_line(argv)))
        assert SECRET not in text
        assert "http://host/a.png" in text
        assert "put them in again" in text
    plain = print_config(resolve(parse_command_line(["--prompt", "see http://a/b?c"])))
    assert "http://a/b?c" in plain
    assert "put them in again" not in plain


def test_a_benchmarks_report_holds_nothing_secret(tmp_path: Path) -> None:
    draft = LiveReport.__new__(LiveReport)
    task = remote(tmp_path, f"http://me:{SECRET}@host/a.png?{SECRET}")
    draft._job = Job(engine=EngineSettings(), settings=JobSettings(), tasks=(task,))
    text = json.dumps(draft._request())
    assert "http://host/a.png" in text
    assert SECRET not in text


# --- logs --------------------------------------------------------------------------------------


def test_the_log_of_a_rank_is_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)
    address = f"http://me:{SECRET}@host/a.png?{SECRET}"
    monkeypatch.setattr(sys, "argv", ["infer.py", "--image", address])

    def fail() -> None:
        try:
            raise ValueError(f"the server said {KEY} at {address}")
        except ValueError as error:
            raise RuntimeError("in the middle") from error

    with rank_log(str(tmp_path)):
        print(f"fetching {address}\rwith {KEY}", file=sys.stderr)
    with pytest.raises(RuntimeError), rank_log(str(tmp_path)):
        fail()
    log = (tmp_path / "rank-0.log").read_text()
    assert "in the middle" in log
    assert "http://host/a.png" in log
    assert SECRET not in log
    assert KEY not in log


@pytest.mark.parametrize(
    "echo",
    [
        lambda head: head,
        lambda head: b"HTTP/1.1 " + head.replace(b"\r\n", b" "),
        lambda head: page(head, "401 " + head.decode().replace("\r\n", " ")),
        lambda head: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + head,
    ],
)
def test_a_server_that_repeats_the_key_does_not_get_it_into_a_log(
    echo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the variable, so that it is not the log that masks it."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with raw_server(lambda connection, head: connection.sendall(echo(head))) as place:
        endpoint = Endpoint(f"http://{place}/v1", "m", KEY, 2.0, 0.0)
        with pytest.raises(UserError) as caught, rank_log(str(tmp_path)):
            refine_text(endpoint, "a ball", image=True)
    assert KEY not in str(caught.value)
    assert KEY not in (tmp_path / "rank-0.log").read_text()
