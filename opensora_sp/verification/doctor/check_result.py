"""What a check found, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "FAILED", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the table: what was looked at, how it is, what was found there."""

    area: str
    name: str
    state: State
    found: str = ""


def passed(area: str, name: str, found: str = "") -> CheckResult:
    """It is as it should be."""
    return CheckResult(area, name, "ok", found)


def failed(area: str, name: str, found: str) -> CheckResult:
    """It is not."""
    return CheckResult(area, name, "FAILED", found)


def skipped(area: str, name: str, why: str) -> CheckResult:
    """It could not be looked at here."""
    return CheckResult(area, name, "skipped", why)


def attempt(area: str, name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """A check's result; an exception is a failed one, for the doctor never stops half way."""
    try:
        return check()
    except Exception as error:
        said = " ".join(str(error).split())
        return failed(area, name, f"{type(error).__name__}: {said[:200]}")


def merge(per_rank: Sequence[Sequence[CheckResult]]) -> list[CheckResult]:
    """The ranks' results as one list: each once, a failed one with the rank that found it.

    Every rank must have made the same checks in the same order.
    """
    merged = []
    for same in zip(*per_rank, strict=True):
        bad = [(rank, f) for rank, f in enumerate(same) if f.state == "FAILED"]
        if not bad:
            merged.append(same[0])
            continue
        rank, first = bad[0]
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        where = f"rank {rank}{others}: " if len(same) > 1 else ""
        merged.append(failed(first.area, first.name, where + first.found))
    return merged


def table(results: Sequence[CheckResult]) -> Iterator[str]:
    """The lines of the table and the sum below it."""
    area = max(len(f.area) for f in results)
    name = max(len(f.name) for f in results)
    for f in results:
        yield f"{f.area:<{area}}  {f.name:<{name}}  {f.state:<7}  {f.found}".rstrip()
    counts = [sum(f.state == state for f in results) for state in ("ok", "FAILED", "skipped")]
    yield f"{counts[0]} ok, {counts[1]} failed, {counts[2]} skipped"
