"""Processes as the kernel knows them, and what a killed one left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from opensora_sp.base.atomic import atomic_output, remove_leftovers, remove_unfinished
from opensora_sp.base.errors import UserError
from opensora_sp.base.processes import Process

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def of(process: subprocess.Popen[bytes]) -> Process:
    """The process as others see it: its number, and when it was started."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return Process(process.pid, fields[19], Process.current().node)


def wait_for(peer: Process, state: str) -> None:
    end = time.monotonic() + 20
    while peer.state() != state:
        assert time.monotonic() < end, peer.state()
        time.sleep(0.01)


def test_running_stopped_killed_and_replaced() -> None:
    assert Process.current().state() == "running"
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        peer = of(process)
        assert peer.state() == "running"
        assert Process(peer.pid, "1", peer.node).state() == "gone"  # an older one of this number
        os.kill(peer.pid, signal.SIGSTOP)
        wait_for(peer, "stopped")
        assert not Process(peer.pid, peer.started, "elsewhere").here
        Process(peer.pid, peer.started, "elsewhere").kill()  # another machine's: not ours to kill
        wait_for(peer, "stopped")
        peer.kill()
        wait_for(peer, "gone")  # a zombie, for nobody has asked for its exit code yet
        assert "killed" in peer.fate()
    finally:
        process.kill()
        process.wait()
    assert peer.state() == "gone"
    assert "without a word" in peer.fate()


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    number = signal.SIGRTMIN + 3
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        peer = of(process)
        os.kill(peer.pid, number)
        wait_for(peer, "gone")
        assert peer.fate() == f"was killed by signal {number:d}"
    finally:
        process.kill()
        process.wait()


def test_files_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from opensora_sp.base.atomic import atomic_output\n"
        f"with atomic_output(Path({str(tmp_path / 'a.mp4')!r})) as path:\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (tmp_path / "mine.tmp").write_text("a person's own")
    with atomic_output(tmp_path / "b.mp4") as path:
        path.write_text("under way")
        assert len(list(tmp_path.iterdir())) == 3
        remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([path, tmp_path / "mine.tmp"])
    with suppress(UserError), atomic_output(tmp_path / "c.mp4") as path:
        path.write_text("half")
        remove_unfinished()  # what a process does that ends without unwinding
        assert not path.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.mp4", "mine.tmp"]
