"""Checks and files of a conformance suite, and the table of results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import read_object


@dataclass(frozen=True)
class Check:
    """One comparison. It passes when `error` is at most `limit`. error None: skipped, see note."""

    part: str
    case: str
    error: float | None
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check passed. A skipped check has neither passed nor failed."""
        return self.error is not None and self.error <= self.limit  # NaN is never ok

    @property
    def failed(self) -> bool:
        """Whether the check ran and did not pass."""
        return self.error is not None and not self.ok


def skipped(part: str, why: str) -> Check:
    """The check of a part that was not run."""
    return Check(part, "-", None, 0.0, why)


def load_cases(path: Path) -> dict[str, dict[str, Tensor]]:
    """A safetensors file with names CASE.NAME → {case: {name: tensor}}, in sorted order."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from error
    cases: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        case, dot, part = name.rpartition(".")
        cases.setdefault(case if dot else name, {})[part if dot else ""] = tensors[name]
    return cases


def load_json(path: Path) -> Any:
    """The object in a JSON file of the suite. Raises UserError."""
    return read_object(path)


def max_error(actual: Tensor, expected: Tensor) -> float:
    """max|Δ|; infinite for different shapes."""
    if actual.shape != expected.shape:
        return math.inf
    return float((actual.float() - expected.float()).abs().max())


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """‖Δ‖ / ‖expected‖; infinite for different shapes."""
    if actual.shape != expected.shape:
        return math.inf
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def table(checks: Sequence[Check]) -> Iterator[str]:
    """The lines of the table: case, error, limit, result."""
    width = max([len(f"{c.part}/{c.case}") for c in checks] + [4])
    yield f"{'case':<{width}}  {'error':>9}  {'limit':>9}  ok"
    for check in checks:
        name = f"{check.part}/{check.case}"
        if check.error is None:
            yield f"{name:<{width}}  {'-':>9}  {'-':>9}  skipped: {check.note}"
            continue
        verdict = "ok" if check.ok else "FAILED"
        note = f"  ({check.note})" if check.note else ""
        yield f"{name:<{width}}  {check.error:9.2e}  {check.limit:9.2e}  {verdict}{note}"
