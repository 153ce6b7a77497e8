"""A real server for tests: started as people start it, on a free port, with the embedded model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
READY_SECONDS = 120.0


class Server:
    """`opensora-sp serve` as a process; `url` is where it answers."""

    def __init__(self, save_dir: Path, *flags: str, ranks: int = 1) -> None:
        self.save_dir, self.flags, self.ranks = save_dir, flags, ranks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        # Sent with every call, such as a token.
        self.headers: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.log = save_dir.parent / f"{save_dir.name}.log"

    def start(self, seconds: float = READY_SECONDS) -> Server:
        """Start it and wait until it takes jobs, so long at most."""
        command = [sys.executable, "-m", "opensora_sp", "serve", "--port", str(self.port)]
        command += ["--save-dir", str(self.save_dir), "--nproc", str(self.ranks)]
        command += ["--device", "cpu", "--dtype", "fp32", *self.flags]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        self.wait_ready(seconds)
        return self

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Return when /ready says so; fails with the log where it does not in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            assert self.process is not None
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"the server is not ready:\n{self.log.read_text()[-3000:]}")

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of a call; body is sent as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path,
            data=data,
            method=method,
            headers={"content-type": "application/json", **self.headers, **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def create(self, **fields: Any) -> str:
        """Queue a small video; its id."""
        small = {"prompt": "a red ball rolls to the right", "size": "48x32", "num_frames": 17}
        status, video = self.call(
            "POST", "/v1/videos", {**small, "num_inference_steps": 2, **fields}
        )
        assert status == 200, video
        return str(video["id"])

    def wait(self, video_id: str, seconds: float = 120.0) -> dict[str, Any]:
        """The video once it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status, video = self.call("GET", f"/v1/videos/{video_id}")
            assert status == 200, video
            if video["status"] in ("completed", "failed"):
                return dict(video)
            time.sleep(0.1)
        raise AssertionError(f"{video_id} has not ended:\n{self.log.read_text()[-3000:]}")

    def content(self, video_id: str, variant: str = "video") -> bytes:
        """The bytes of an output."""
        path = f"{self.url}/v1/videos/{video_id}/content?variant={variant}"
        request = urllib.request.Request(path, headers=self.headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def until(self, video_id: str, status: str, seconds: float = 60.0) -> dict[str, Any]:
        """The video once it has a status and, where it is being made, has made a step."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            _, video = self.call("GET", f"/v1/videos/{video_id}")
            if video["status"] == status and video.get("step", 1) > 0:
                return dict(video)
            assert video["status"] in ("queued", "in_progress"), video
            time.sleep(0.02)
        raise AssertionError(f"{video_id} is not {status}:\n{self.log.read_text()[-3000:]}")

    def gone(self, video_id: str, seconds: float = 30.0) -> None:
        """Return when nothing is left of a deleted job."""
        end = time.monotonic() + seconds
        while (self.save_dir / "jobs" / video_id).exists():
            assert time.monotonic() < end, f"{video_id} stays:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def engine_pids(self) -> list[int]:
        """Processes of the engine, rank 0 first as far as the system tells."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"opensora_sp.cli.serve_engine" not in words or b"torch.distributed.run" in words:
                continue
            if str(self.save_dir).encode() not in b" ".join(words):
                continue
            rank = next((e[5:] for e in environ if e.startswith(b"RANK=")), b"0")
            found.append((int(rank), int(entry.name)))
        return [pid for _, pid in sorted(found)]

    def jobs(self) -> list[str]:
        """Names of the folders of jobs."""
        folder = self.save_dir / "jobs"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def stop(self) -> int:
        """Ask it to end, as Ctrl-C does; its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()
