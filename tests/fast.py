"""Which tests are fast: those of tests/unit that start no process and run no model.

That is read from what a test, its helpers and its fixtures name, so nobody has to keep a list. What
takes seconds for another reason is marked `slow` where it is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
UNIT = TESTS / "unit"
# Names of what starts processes, and of what loads or makes a model of more than a few weights.
STARTERS = {"subprocess", "multiprocessing", "run_ranks", "Copies", "fork"}
MODELS = {"Pipeline", "run_job", "VideoVAE", "TextEncoder", "traced_denoising"}
MODELS |= {"traced_decoding", "traced_text"}


def is_fast(item: pytest.Item) -> bool:
    """Whether a collected test gets the marker."""
    if UNIT not in item.path.parents or item.get_closest_marker("slow"):
        return False
    return not (STARTERS | MODELS) & set(names_reached(functions_of(item)))


def functions_of(item: pytest.Item) -> list[Any]:
    """The test's own function and those of its fixtures."""
    own = getattr(item, "obj", None)
    found = [getattr(getattr(own, "hypothesis", None), "inner_test", own)]
    info = getattr(item, "_fixtureinfo", None)
    definitions = {} if info is None else info.name2fixturedefs
    return found + [one.func for same in definitions.values() for one in same]


def names_reached(functions: list[Any]) -> Iterator[str]:
    """Every name in these functions, and in the functions of the tests' files that they name."""
    waiting, seen = [inspect.unwrap(f) for f in functions if callable(f)], set[int]()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        if TESTS not in Path(function.__code__.co_filename).parents:
            continue
        for name in _names(function.__code__):
            yield name
            value = function.__globals__.get(name)
            if callable(value):
                waiting.append(inspect.unwrap(value))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
