"""What the tests share: the two model directories that ship with the package, and ranks."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.configuration
import pytest
import ranks
from fast import TESTS, is_fast
from order import long_first

# The same examples in every run, so that a failure elsewhere is a failure here; and no deadline,
# because an example takes as long as the machine's other work lets it.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")

# Whatever a test starts, it must neither read nor write the embeddings in a person's own cache.
_CACHE = tempfile.mkdtemp(prefix="opensora-sp-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
hypothesis.configuration.set_hypothesis_home_dir(_CACHE)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def suite_dir() -> Path:
    """The conformance suite: manifest.json, sizes.json, prompts.json, dit/, t5/, vae2d/, ..."""
    return ROOT / "opensora_sp_conformance"


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """The embedded default model: dit/, t5/, vae2d/, vae3d/."""
    return ROOT / "opensora_sp" / "assets" / "embedded"


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """``ranks.run_ranks``: call a top-level function on several gloo ranks."""
    return ranks.run_ranks


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every `time.sleep` that the test's own thread asks for, which return at once.

    `time` is the whole process's: threads that other tests have left go on sleeping.
    """
    asked: list[float] = []
    sleep, tester = time.sleep, threading.current_thread()

    def noted(seconds: float) -> None:
        if threading.current_thread() is tester:
            asked.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", noted)
    return asked


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is fast, see fast.py, and put long files first, see order.py."""
    for item in items:
        if is_fast(item):
            item.add_marker("fast")
    items[:] = long_first(items, TESTS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show beside the result what the checks found that scripts/test.sh runs beside the tests."""
    for name, status, said in ended_checks(os.environ.get("OPENSORA_SP_CHECKS", "")):
        if status != "0":
            terminalreporter.section(f"{name} failed", red=True)
            terminalreporter.line(said)


def ended_checks(folder: str) -> Iterator[tuple[str, str, str]]:
    """Name, exit status and words of every check, once it has ended or ten minutes are over."""
    end = time.monotonic() + 600
    for file in sorted(Path(folder).iterdir()) if folder else []:
        if file.suffix in (".status", ".new"):
            continue
        status = file.with_name(f"{file.name}.status")
        while not status.exists() and time.monotonic() < end:
            time.sleep(0.1)
        ended = status.read_text() if status.exists() else "still running"
        yield file.name, ended, file.read_text(errors="replace")
