"""The fuzzer itself: what it must notice, and how its record adds up."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import fuzz
import pytest

LIMITS = {"memory_mb": 50, "case_seconds": 1.0, "still_seconds": 2.0, "guided": False}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (b"exception", "IndexError at "),
        (b"long line", "AssertionError at "),
        (b"memory", "memory"),
        (b"much memory", "MemoryError at "),
        (b"hang", "more than 1 s of CPU time"),
        (b"wait", "nothing but waiting for 2 s"),
        (b"crash", "the process ended with -6"),
        (b"other file", "AssertionError at "),
        (b"a fine case", None),
    ],
)
def test_every_kind_of_planted_fault_is_found_at_its_first_case(
    case: bytes, kind: str | None, tmp_path: Path
) -> None:
    (tmp_path / "case").write_bytes(case)
    options = argparse.Namespace(**LIMITS, findings=tmp_path / "findings")
    campaign = fuzz.Campaign("planted", options, seed=0)
    campaign.replay(tmp_path / "case")
    assert len(campaign.findings) == (kind is not None)
    for found, one in campaign.findings.items():
        assert kind is not None
        assert found.startswith(kind)
        assert (options.findings / one["file"]).read_bytes() == case


def test_runs_add_up_in_the_record_and_none_repeats_the_cases_of_another(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = argparse.Namespace(
        **LIMITS, findings=tmp_path / "findings", out=out, seed=0, seconds=1.2, turn=0.6
    )
    first = fuzz.fuzz(options, ["planted"])[0]
    second = fuzz.fuzz(options, ["planted"])[0]
    assert first.children >= 2, "two turns"
    assert second._seed == first.children
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [run["targets"]["planted"]["cases"] for run in record["runs"]] == [
        first.cases,
        second.cases,
    ]
    assert record["cases"] == first.cases + second.cases > 0
    assert record["cpu_seconds"] == pytest.approx(first.cpu_seconds + second.cpu_seconds, abs=0.2)
    assert min(first.cpu_seconds, second.cpu_seconds) > 0.5
    assert not (tmp_path / "record.tmp").exists()
