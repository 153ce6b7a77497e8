"""The result of a check, and the table of all results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "FAILED", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the table: area and name of the check, its state, and what was found."""

    area: str
    name: str
    state: State
    found: str = ""


def passed(area: str, name: str, found: str = "") -> CheckResult:
    """The result of a check that passed."""
    return CheckResult(area, name, "ok", found)


def failed(area: str, name: str, found: str) -> CheckResult:
    """The result of a check that failed."""
    return CheckResult(area, name, "FAILED", found)


def skipped(area: str, name: str, why: str) -> CheckResult:
    """The result of a check that cannot be made here."""
    return CheckResult(area, name, "skipped", why)


def attempt(area: str, name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """The result of a check. An exception is a failed result, so the doctor goes on."""
    try:
        return check()
    except Exception as error:
        said = " ".join(str(error).split())
        return failed(area, name, f"{type(error).__name__}: {said[:200]}")


def merge(per_rank: Sequence[Sequence[CheckResult]]) -> list[CheckResult]:
    """One list from the results of all ranks. A failed check names the first rank that failed.

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
    """The lines of the table, and a line with the totals."""
    area = max(len(f.area) for f in results)
    name = max(len(f.name) for f in results)
    for f in results:
        yield f"{f.area:<{area}}  {f.name:<{name}}  {f.state:<7}  {f.found}".rstrip()
    counts = [sum(f.state == state for f in results) for state in ("ok", "FAILED", "skipped")]
    yield f"{counts[0]} ok, {counts[1]} failed, {counts[2]} skipped"
