"""Rows of results, and the files that hold them: complete and valid after every row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from opensora_sp.base.atomic import atomic_output
from opensora_sp.benchmark.report.schema_check import first_problem

NAME, VERSION = "opensora_sp.gpu_day", "1.0"
SCHEMA = Path(__file__).with_name("schema.json")

Status = Literal["ok", "failed", "left out", "running"]
Ended = Literal["running", "ok", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. part and case say what of; reason says why it is not "ok".

    figures: seconds, bytes, ratios by their names in schema.json; what is not known is absent.
    """

    part: str
    case: str
    variant: str = ""
    status: Status = "ok"
    reason: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def failed(part: str, case: str, error: BaseException, variant: str = "") -> Row:
    """The row of what raised an error: its first line."""
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"[:200]
    return Row(part=part, case=case, variant=variant, status="failed", reason=reason)


def left_out(part: str, case: str, reason: str, variant: str = "") -> Row:
    """The row of what was not measured."""
    return Row(part=part, case=case, variant=variant, status="left out", reason=reason)


class Results:
    """The rows of a day in their order, and its three files in one folder.

    head: what holds for all rows: command, date, machine and so on.
    """

    def __init__(self, out: Path, head: Mapping[str, Any]) -> None:
        self.out, self.head = out, head
        self.status: Ended = "running"
        self._rows: dict[tuple[str, str, str], Row] = {}

    @property
    def rows(self) -> list[Row]:
        """All of them; the last one that was given for each measurement."""
        return list(self._rows.values())

    @property
    def report(self) -> dict[str, Any]:
        """Everything, as the JSON file has it."""
        return {
            "schema": {"name": NAME, "version": VERSION},
            "status": self.status,
            **self.head,
            "rows": [asdict(row) for row in self.rows],
        }

    def put(self, row: Row) -> None:
        """Add a row, or replace the one of the same measurement, and write the files."""
        self._rows[row.part, row.case, row.variant] = row
        self.write()

    def finish(self, status: Ended) -> None:
        """Say how the day ended. A measurement that was under way has failed."""
        self.status = status
        for key, row in self._rows.items():
            if row.status == "running":
                self._rows[key] = Row(
                    **{**asdict(row), "status": "failed", "reason": "it was cut off"}
                )
        self.write()

    def write(self) -> None:
        """Write all three files. ValueError where the report is against its own schema."""
        from scripts.gpu_day.page import markdown_of, page_of

        report = self.report
        if (problem := first_problem(report, SCHEMA)) is not None:
            raise ValueError(f"the report is against its schema: {problem}")
        texts = {
            "gpu_day.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
            "gpu_day.md": markdown_of(report),
            "gpu_day.html": page_of(report),
        }
        for name, text in texts.items():
            with atomic_output(self.out / name) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="replace")
