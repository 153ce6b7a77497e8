"""scripts/download_weights.py against a server that answers as a model hub does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opensora_sp.base.hashes import SUMS
from opensora_sp.cli.download import REPOSITORIES, is_mirror
from opensora_sp.verification.weights import MANIFEST, check_directory

ROOT = Path(__file__).resolve().parents[2]
STALLS_AT = 15 << 20  # the library writes what arrives in pieces of 10 MiB
LARGE = (".safetensors", ".bin", ".model")  # kept outside git, named by their sha256


@dataclass
class Hub:
    """What is served and how badly, and what was asked for."""

    folder: Path
    stalls: str = ""  # this file stops on its way, once
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    spoilt: dict[str, int] = field(default_factory=dict)  # so many answers have one wrong byte
    fetched: list[tuple[str, str]] = field(default_factory=list)  # (kind/name, Range header)
    address: str = ""

    def find(self, path: str) -> tuple[str, Path] | None:
        """(kind/name, file) of /OWNER/NAME/resolve/COMMIT/FILE, at the pinned commit only."""
        for kind, repository in REPOSITORIES.items():
            start = f"/{repository.name}/resolve/{repository.commit}/"
            if path.startswith(start):
                file = self.folder / kind / path.removeprefix(start)
                return (f"{kind}/{path.removeprefix(start)}", file) if file.is_file() else None
        return None


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub that a subclass names."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        found = self.hub.find(self.path.partition("?")[0].removeprefix("/cdn"))
        if found is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        name, file = found
        content = file.read_bytes()
        if file.suffix in LARGE and not self.path.startswith("/cdn/"):
            self.send_response(302)  # large files lie elsewhere
            self.send_header("Location", f"{self.hub.address}/cdn{self.path}")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", self.path.split("/resolve/")[1].split("/")[0])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        self.send_header("ETag", f'"{git}"')
        self.send_header("X-Repo-Commit", self.path.split("/resolve/")[1].split("/")[0])
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            self.send(name, content, start)

    def send(self, name: str, content: bytes, start: int) -> None:
        self.hub.fetched.append((name, self.headers.get("Range", "")))
        if self.hub.spoilt.get(name, 0) > 0:
            self.hub.spoilt[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        if name == self.hub.stalls and not self.hub.stalled.is_set():
            self.wfile.write(content[:STALLS_AT])
            self.hub.stalled.set()
            self.hub.released.wait(60)
            self.close_connection = True
            return
        self.wfile.write(content[start:])


@pytest.fixture
def hub(embedded_dir: Path) -> Iterator[Hub]:
    hub = Hub(embedded_dir)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def start(hub: Hub, folder: Path, *flags: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HOME": str(folder / "home"), "NO_PROXY": "*"}
    if "TEST_TOKEN" in environment:
        environment["HF_TOKEN"] = environment["TEST_TOKEN"]
    return subprocess.Popen(
        [sys.executable, "scripts/download_weights.py", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub: Hub, folder: Path, *flags: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = start(hub, folder, *flags)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_only_what_is_needed_whole_and_resumed(
    hub: Hub, embedded_dir: Path, tmp_path: Path
) -> None:
    hub.folder = tmp_path / "published"
    shutil.copytree(embedded_dir, hub.folder)
    hub.stalls, spoilt = "vae3d/model.safetensors", "dit/model.safetensors"
    (hub.folder / hub.stalls).write_bytes(os.urandom(STALLS_AT + 1000))
    hub.spoilt[spoilt] = 1
    out = tmp_path / "weights"

    process = start(hub, tmp_path, str(out))
    assert hub.stalled.wait(100)
    part = out / f"{hub.stalls}.part"
    deadline = time.monotonic() + 60
    while part.stat().st_size == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()  # as a machine that goes down
    process.communicate()
    hub.released.set()
    arrived = part.stat().st_size
    assert arrived > 0
    code, said, errors = run(hub, tmp_path, str(out))
    assert code == 0, errors
    assert said.splitlines() == [f"--ckpt-path-{kind} {out / kind}" for kind in REPOSITORIES]

    needed = {f"{kind}/{name}" for kind, r in REPOSITORIES.items() for name in r.files}
    assert {name for name, _ in hub.fetched} == needed
    for name in needed:
        assert (out / name).read_bytes() == (hub.folder / name).read_bytes(), name
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert there == needed | {SUMS} | {f"{kind}/{SUMS}" for kind in REPOSITORIES}
    asked = [ranges for name, ranges in hub.fetched if name == hub.stalls]
    assert asked[0] == ""
    assert asked[1].startswith(f"bytes={arrived}-"), "it did not go on where it stopped"
    assert [name for name, _ in hub.fetched].count(spoilt) == 2

    count = len(hub.fetched)
    assert run(hub, tmp_path, str(out))[0] == 0
    assert len(hub.fetched) == count, "what is there was fetched again"

    # Offline: the hashes hold until a byte changes. (The shapes are the embedded model's.)
    hashes = [f for kind in REPOSITORIES for f in check_directory(out / kind) if "hash" in f.what]
    assert len(hashes) == 4
    assert all(finding.wrong is None for finding in hashes)
    content = bytearray((out / spoilt).read_bytes())
    content[-1] ^= 1
    (out / spoilt).write_bytes(content)
    (wrong,) = [f.wrong for f in check_directory(out / "dit") if "hash" in f.what]
    assert wrong is not None
    assert "model.safetensors has" in wrong


def test_a_file_that_stays_wrong_is_refused_and_removed(hub: Hub, tmp_path: Path) -> None:
    hub.spoilt["vae2d/vae/config.json"] = 9
    code, said, errors = run(hub, tmp_path, str(tmp_path / "out"), "--only", "vae2d")
    assert code == 2
    last = errors.splitlines()[-1]
    assert last.startswith("error: vae/config.json of PixArt-alpha/")
    assert "hash" in last
    assert not list((tmp_path / "out" / "vae2d" / "vae").iterdir())
    assert said == ""


def write_header_only(directory: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of these weights whose values are a hole in the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(struct.calcsize("b"))
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("kind", ["dit", "t5", "vae3d"])
def test_check_names_what_differs_from_the_published_model(
    kind: str, embedded_dir: Path, tmp_path: Path
) -> None:
    """The published shapes pass; one weight renamed and one of another shape do not."""
    shapes = json.loads(MANIFEST.read_text(encoding="utf-8"))[kind]
    config = (embedded_dir / kind / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    write_header_only(tmp_path, shapes)
    findings = list(check_directory(tmp_path))
    assert [finding.wrong for finding in findings] == [None, None]
    assert "not compared" in findings[1].what

    names = [name for name in shapes if name != "encoder.embed_tokens.weight"]
    shapes[names[0]] = [*shapes[names[0]], 2]
    shapes["another"] = shapes.pop(names[-1])
    write_header_only(tmp_path, shapes)
    wrong = next(check_directory(tmp_path)).wrong
    assert wrong is not None
    for words in (f"missing ({names[-1]})", "unexpected (another)", f"another shape ({names[0]})"):
        assert words in wrong


def test_a_known_hash_wins_over_what_a_mirror_says(hub: Hub, tmp_path: Path) -> None:
    """A mirror that sends another file with that file's own hash is found out."""
    large, small = "vae3d/model.safetensors", "vae2d/vae/config.json"
    wanted = {
        name: hashlib.sha256((hub.folder / name).read_bytes()).hexdigest()
        for name in (large, small)
    }
    hashes = tmp_path / "known.txt"
    hashes.write_text("".join(f"{digest}  {name}\n" for name, digest in wanted.items()))
    flags = ["--only", "vae3d", "vae2d", "--hashes", str(hashes)]
    code, _, errors = run(hub, tmp_path, str(tmp_path / "right"), *flags)
    assert code == 0, errors
    # What nobody knows is said: here the configuration of the video VAE.
    assert "1 of 3 files have no SHA-256" in errors
    assert "(vae3d/config.json)" in errors

    forged = tmp_path / "forged"
    shutil.copytree(hub.folder, forged)
    hub.folder = forged
    for name in (large, small):
        genuine = (forged / name).read_bytes()
        (forged / name).write_bytes(genuine[:-2] + bytes([genuine[-2] ^ 1, genuine[-1]]))
        kind = name.partition("/")[0]
        out = tmp_path / f"wrong-{kind}"
        code, _, errors = run(hub, tmp_path, str(out), "--only", kind, "--hashes", str(hashes))
        assert code == 2
        # Told apart by what the mirror says of the file, or else by what has arrived.
        assert "that is another file" in errors or "without the published hash" in errors
        assert wanted[name][:12] in errors
        assert not (out / name).exists()
        # Without a known hash the mirror is believed, and that is said.
        code, _, errors = run(hub, tmp_path, str(out), "--only", kind)
        assert code == 0
        assert "vouches for them" in errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abc  dit/x\n", "line 1 is not"),
        ("0" * 64 + "\n", "line 1 is not"),
        (None, "cannot be read"),
    ],
)
def test_a_list_of_hashes_that_is_none(
    hub: Hub, tmp_path: Path, text: str | None, said: str
) -> None:
    hashes = tmp_path / "known.txt"
    if text is not None:
        hashes.write_text(text)
    code, _, errors = run(hub, tmp_path, str(tmp_path / "out"), "--hashes", str(hashes))
    assert code == 2
    assert said in errors
    assert not (tmp_path / "out").exists()


def test_the_token_goes_to_a_mirror_only_when_asked(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    answer = Handler.answer

    def noted(self: Handler, *, body: bool) -> None:
        seen.append(self.headers.get("Authorization"))
        answer(self, body=body)

    monkeypatch.setattr(Handler, "answer", noted)
    monkeypatch.setenv("TEST_TOKEN", "hf_secret")
    flags = ["--only", "vae2d"]
    token = "Bearer hf_secret"
    for more, expected in (((), {None}), (("--token-to-mirror",), {token, None})):
        seen.clear()
        out = tmp_path / f"out{len(more)}"
        assert run(hub, tmp_path, str(out), *flags, *more)[0] == 0
        assert set(seen) <= expected, more
        assert (token in seen) == bool(more)


def test_what_a_mirror_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint, mirror in (
        ("", False),
        ("https://huggingface.co", False),
        ("https://huggingface.co/", False),
        ("http://huggingface.co", True),
        ("https://huggingface.co:8443", True),
        ("https://huggingface.co.example.org", True),
        ("https://example.org/huggingface.co", True),
    ):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert is_mirror() is mirror, endpoint


@pytest.mark.parametrize(
    "content",
    [b"0" * 64 + b"  ../../etc/passwd\n", b"0" * 64 + b"  /etc/passwd\n", b"\xff\x00\x80", b"x\n"],
)
def test_a_list_of_sums_shows_no_file_from_elsewhere(
    embedded_dir: Path, tmp_path: Path, content: bytes
) -> None:
    folder = tmp_path / "vae2d"
    shutil.copytree(embedded_dir / "vae2d", folder)
    (folder / SUMS).write_bytes(content)
    (wrong,) = [f.wrong for f in check_directory(folder) if "hash" in f.what]
    assert wrong is not None
    assert "\n" not in wrong
    assert "passwd" not in wrong
