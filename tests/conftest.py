"""What the tests share: the two model directories that ship with the package, and ranks."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
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

ASSETS = Path(__file__).resolve().parent.parent / "opensora_sp" / "assets"


@pytest.fixture(scope="session")
def suite_dir() -> Path:
    """The conformance suite: manifest.json, sizes.json, prompts.json, dit/, t5/, vae2d/, ..."""
    return ASSETS / "conformance"


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """The embedded default model: dit/, t5/, vae2d/, vae3d/."""
    return ASSETS / "embedded"


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """``ranks.run_ranks``: call a top-level function on several gloo ranks."""
    return ranks.run_ranks


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is fast, see fast.py, and put long files first, see order.py."""
    for item in items:
        if is_fast(item):
            item.add_marker("fast")
    items[:] = long_first(items, TESTS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Repeat beside the result what scripts/test.sh found before pytest started."""
    if failed := os.environ.get("OPENSORA_SP_LINT_FAILED"):
        terminalreporter.section("before the tests", red=True)
        terminalreporter.line(f"failed, see the top of this output: {failed}", red=True)
