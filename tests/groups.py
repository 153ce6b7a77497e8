"""Gateways and groups of a shared queue, as processes, for tests and measurements."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving import READY_SECONDS, ROOT, Server

LEASE_SECONDS = 4
# What a group has to do may take long where other work keeps the machine busy.
PATIENCE_SECONDS = 400.0


class Gateway(Server):
    """`opensora-sp serve --queue URL --no-engine`; ready when it answers, groups or not."""

    def __init__(self, name: str, save_dir: Path, url: str, *flags: str) -> None:
        super().__init__(save_dir, "--queue", url, "--no-engine", *flags)
        self.log = save_dir.parent / f"{name}.log"

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Return when it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
            assert self.process is not None
            if self.process.poll() is not None:
                break
        raise AssertionError(f"the gateway does not answer:\n{self.log.read_text()[-3000:]}")

    def metrics(self) -> bytes:
        """What it tells Prometheus."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return bytes(answer.read())

    def listed(self, status: str, seconds: float = 60.0) -> str:
        """The id of a video of this status, as soon as there is one."""
        end = time.monotonic() + seconds
        while True:
            videos = self.call("GET", "/v1/videos?limit=100")[1]["data"]
            for video in videos:
                if video["status"] == status:
                    return str(video["id"])
            assert time.monotonic() < end, videos
            time.sleep(0.05)


class GroupProcess:
    """`opensora-sp work` as a process.

    inside: words before the command, which run it somewhere else, such as `ip netns exec NAME`.
    """

    def __init__(
        self,
        name: str,
        save_dir: Path,
        url: str,
        *flags: str,
        ranks: int = 1,
        lease: float = LEASE_SECONDS,
        inside: Sequence[str] = (),
    ) -> None:
        self.name, self.save_dir, self.url = name, save_dir, url
        self.flags, self.ranks, self.lease, self.inside = flags, ranks, lease, inside
        self.log = save_dir.parent / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> GroupProcess:
        """Start it; it takes jobs some seconds later."""
        command = [*self.inside, sys.executable, "-m", "opensora_sp", "work", "--queue", self.url]
        command += ["--save-dir", str(self.save_dir), "--nproc", str(self.ranks)]
        command += ["--group-name", self.name, "--lease-seconds", str(self.lease)]
        command += ["--device", "cpu", "--dtype", "fp32", *self.flags]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def pids(self) -> list[int]:
        """All its processes: the command, torchrun and the ranks, rank 0 first among them."""
        return ([] if self.process is None else [self.process.pid]) + self.ranks_pids(every=True)

    def ranks_pids(self, *, every: bool = False) -> list[int]:
        """Processes of its engine, rank 0 first; every: torchrun's too."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environ = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"opensora_sp.cli.serve_engine" not in words:
                continue
            of_mine = f'"group_name": "{self.name}"', f'"save_dir": "{self.save_dir.resolve()}"'
            if any(word.encode() not in b" ".join(words) for word in of_mine):
                continue  # another group, or another run of these tests
            if b"torch.distributed.run" in words and not every:
                continue
            rank = next((e[5:] for e in environ if e.startswith(b"RANK=")), b"-1")
            found.append((int(rank), int(entry.name)))
        return [pid for _, pid in sorted(found)]

    def signal(self, number: signal.Signals) -> None:
        """To all its processes at once."""
        for pid in self.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """As the machine's end: every process, at once."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self) -> int:
        """Ask it to end, as Ctrl-C does; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            return -1


class Pool:
    """Two gateways and two groups, a and b, of one rank on a queue.

    inside: of each group, where it runs (see GroupProcess).
    """

    def __init__(
        self, save_dir: Path, url: str, inside: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.save_dir, self.url = save_dir, url
        self.groups = {
            name: GroupProcess(name, save_dir, url, inside=(inside or {}).get(name, ()))
            for name in ("a", "b")
        }
        self.first = Gateway("one", save_dir, url)
        self.second = Gateway("two", save_dir, url, "--drain", "finish")

    def __enter__(self) -> Pool:
        try:
            for group in self.groups.values():
                group.start()
            self.first.start()
            self.second.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.groups.values():
            group.kill()
        self.first.stop()
        self.second.stop()

    def maker(self, job: str, *, but: str = "") -> str:
        """The group that makes a job now, and is not `but`."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            video = self.second.until(job, "in_progress", PATIENCE_SECONDS)
            if video["group"] and video["group"] != but:
                return str(video["group"])
            assert time.monotonic() < end, video
            time.sleep(0.02)

    def heir(self, job: str, name: str) -> str:
        """The group that has taken a job over from this one; it may have ended it by now."""
        end = time.monotonic() + PATIENCE_SECONDS
        while (group := self.second.call("GET", f"/v1/videos/{job}")[1]["group"]) in (None, name):
            assert time.monotonic() < end, f"{job} stays with {name}"
            time.sleep(0.02)
        return str(group)

    def outputs(self, job: str) -> list[str]:
        """Every video file of a job, of whatever attempt."""
        folder = self.save_dir / "jobs" / job
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.mp4"))

    def digest(self, job: str) -> str:
        """Of the video's bytes, when it is made."""
        video = self.second.wait(job, PATIENCE_SECONDS)
        assert video["status"] == "completed", video
        return hashlib.sha256(self.second.content(job)).hexdigest()
