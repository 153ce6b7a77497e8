"""The marker `fast`: what gets it, and what does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import fast
import forked
import pytest
from order import long_first


def start_a_process() -> None:
    forked.Copies([], [], out=None)  # type: ignore[arg-type]


def helper() -> list[Callable[[], None]]:
    return [lambda: start_a_process()]


@pytest.fixture
def process() -> Any:
    return helper()


def names(*functions: Any) -> set[str]:
    return set(fast.names_reached(list(functions)))


def test_what_a_helper_a_fixture_or_an_inner_function_starts_is_found() -> None:
    def plain() -> int:
        return len(str(3))

    assert "Copies" in names(helper)
    assert "Copies" in names(process)
    assert "len" in names(plain)
    assert not (fast.STARTERS | fast.MODELS) & names(plain)


def test_files_stay_whole_and_the_fast_ones_come_last(request: pytest.FixtureRequest) -> None:
    items = long_first(reversed(request.session.items), fast.TESTS)
    files = [path for path, _ in itertools.groupby(items, key=lambda item: item.path)]
    assert len(files) == len(set(files))
    slow = {item.path for item in items if not item.get_closest_marker("fast")}
    assert [path in slow for path in files] == [True] * len(slow) + [False] * (
        len(files) - len(slow)
    )


def test_most_unit_tests_are_fast_and_nothing_else_is(request: pytest.FixtureRequest) -> None:
    items = request.session.items
    chosen = [item for item in items if item.get_closest_marker("fast")]
    assert request.node in chosen
    for item in chosen:
        assert fast.UNIT in item.path.parents
        assert not item.get_closest_marker("slow")
        assert item.path.name not in ("test_stopping.py", "test_loading_memory.py")
    if len({item.path for item in items}) < 60:
        pytest.skip("only some of the files were collected")
    assert 1200 <= len(chosen) <= 3000
