"""In which order the files of tests run: long ones first, so that no worker ends with one alone.

scripts/test.sh gives each worker a file at a time, in this order. A file's tests stay together, so
that a server or a model that they share is made once and not by every worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import pytest

# A server waits half of the time, and ranks wait for nothing: each beside the other.
MIXED = ("server", "distributed")
SLOW = ("device", "conformance")


def long_first(items: Iterable[pytest.Item], tests: Path) -> list[pytest.Item]:
    """The items of server and distributed files by turns, then of what is slow, then of the rest.

    The order within a file stays. tests: the folder of all tests.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    kinds: dict[str, list[Path]] = {kind: [] for kind in (*MIXED, "slow", "rest")}
    for path, own in files.items():
        folder = path.relative_to(tests).parts[0] if tests in path.parents else ""
        if folder in MIXED:
            kinds[folder].append(path)
        elif folder in SLOW or not all(item.get_closest_marker("fast") for item in own):
            kinds["slow"].append(path)
        else:
            kinds["rest"].append(path)
    turns = zip_longest(kinds["server"], kinds["distributed"])
    order = [path for pair in turns for path in pair if path is not None]
    return [item for path in [*order, *kinds["slow"], *kinds["rest"]] for item in files[path]]
