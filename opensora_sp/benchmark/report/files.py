"""Reading and writing of reports. A file appears whole, and a wrong one is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import read_object
from opensora_sp.base.value_types import shown
from opensora_sp.benchmark.report.schema_check import first_problem

SCHEMA_NAME = "opensora_sp.benchmark"
SCHEMA_VERSION = "1.1"
SCHEMA_FILE = Path(__file__).with_name("schema.json")

Report = dict[str, Any]


def read_report(path: Path | str, flag: str) -> Report:
    """Read a report. Raises UserError that names the flag where the file is not a report."""
    what = f"{flag} {shown(str(path))}"
    report = read_object(Path(path), what)
    schema = report.get("schema")
    if not isinstance(schema, dict) or schema.get("name") != SCHEMA_NAME:
        raise UserError(f"{what} is not a benchmark report of this program")
    version = str(schema.get("version"))
    if version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise UserError(
            f"{what} has schema version {version}; this program reads version {SCHEMA_VERSION}"
        )
    if (problem := first_problem(report, SCHEMA_FILE)) is not None:
        raise UserError(f"{what} is damaged or was changed by hand: {problem[:200]}")
    return report


def read_finished(path: Path | str, flag: str) -> Report:
    """As `read_report`, and refuse a run that has not ended well."""
    report = read_report(path, flag)
    if report.get("status") != "ok":
        raise UserError(
            f"{flag} {shown(str(path))} is of a run that is {report.get('status')}: "
            "a finished one is needed"
        )
    return report


def check_baseline(path: Path) -> Report:
    """The report that efficiency is computed from. Raises UserError unless one rank finished it."""
    report = read_finished(path, "--baseline")
    ranks = report["run"]["ranks"]
    if ranks != 1:
        raise UserError(
            f"--baseline {shown(str(path))} was measured on {ranks} ranks: efficiency is counted "
            "from a report of one rank"
        )
    return report


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report, whole or not at all. Raises UserError where that fails."""
    from opensora_sp.base.atomic import atomic_output, reported

    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic_output(path) as temporary, reported(path):
        # A prompt from a command line may hold lone surrogates, which UTF-8 cannot encode.
        temporary.write_text(text + "\n", encoding="utf-8", errors="replace")
