"""scripts/gpu_day.sh: a whole day at a reduced size, and the full sizes without memory."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.verification.tracing import without_memory
from scripts.gpu_day import __main__ as gpu_day
from scripts.gpu_day import attention, memory, shards, sizes, stages, steps
from scripts.gpu_day.day import Day, Task
from scripts.gpu_day.page import PARTS
from scripts.gpu_day.rows import SCHEMA, Results, Row, left_out
from scripts.gpu_day.timing import Budget
from scripts.gpu_day.variants import ORACLE, Scene

pytestmark = pytest.mark.slow

DAY = Day(
    sizes=replace(sizes.reduced(), rounds=1, steps=[sizes.reduced().largest] * 2),
    device=torch.device("cpu"),
    dtype=torch.float32,
    links=[1e9, 1e10],
    call_seconds=1e-3,
)
# One warm-up of everything, and no more.
FULL = replace(DAY, sizes=replace(sizes.full(), rounds=0), dtype=torch.bfloat16)
SHALLOW = replace(  # blocks are alike, and so are the tiles of longer videos
    FULL.sizes,
    transformer=replace(STDiT3Config(), depth=1),
    largest=sizes.published("720p", "2s"),
    ranks=(4,),
    decode=[21],
)


def run_main(monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[int, dict[str, Any]]:
    """A whole day of the reduced sizes on the CPU: the exit code and the report."""
    monkeypatch.setitem(sizes.SIZES, "reduced", lambda: DAY.sizes)
    words = ["--reduced", "--device", "cpu", "--link-gbps", "1,10", "--out", str(out)]
    code = gpu_day.main(words)
    report: dict[str, Any] = json.loads((out / "gpu_day.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    return code, report


def test_a_whole_day_has_every_part_and_the_oracle_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, report = run_main(monkeypatch, tmp_path)
    assert (code, report["status"]) == (0, "ok")
    rows = report["rows"]
    assert {row["part"] for row in rows if row["status"] == "ok"} == set(PARTS)
    assert all(row["reason"] for row in rows if row["status"] != "ok")
    found = {row["variant"]: row["figures"] for row in rows if row["part"] == "step"}
    assert 0 < found[ORACLE]["difference"] < 2e-5
    assert found["plain"]["of_plain"] == 1
    projected = {row["variant"]: row["figures"] for row in rows if row["part"] == "projection"}
    shard = next(row["figures"] for row in rows if row["variant"].startswith("N = 4 (2 guidance"))
    slow = projected["N = 4 over 1 GB/s"]
    assert slow["sending"] == pytest.approx(shard["calls"] * 20e-6 + shard["sent_bytes"] / 1e9)
    assert slow["exposed"] == pytest.approx(shard["seconds"] + slow["sending"])
    for name in ("gpu_day.md", "gpu_day.html"):
        text = html.unescape((tmp_path / name).read_text())
        assert all(title in text for title in PARTS.values())


def test_a_task_that_fails_says_why_and_the_day_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    def missing(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(Scene, "of", out_of_memory)
    monkeypatch.setattr(stages, "random_vae", missing)
    code, report = run_main(monkeypatch, tmp_path)
    assert (code, report["status"]) == (1, "ok")
    said = {row["part"]: (row["status"], row["reason"]) for row in report["rows"]}
    reason = "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert said["step"] == said["memory"] == said["shard"] == ("failed", reason)
    assert said["decode"] == ("left out", "the Python package diffusers is not installed")
    assert said["attention"][0] == said["text"][0] == "ok"


def head() -> dict[str, Any]:
    """What a report has beside its rows."""
    device = dict.fromkeys(("type", "name", "driver", "clocks"), "x") | {"total_memory_bytes": None}
    machine = {"device": device, "os": {"python": "3"}, "cpu": {}, "torch": "2"}
    words = {"command": "x", "created": "2026-01-01T00:00", "commit": None, "machine": machine}
    return {**words, "sizes": "full", "dtype": "bf16", "budget": 1.0, "call_seconds": 0.0}


def test_the_files_are_valid_after_every_row(tmp_path: Path) -> None:
    results = Results(tmp_path, head())
    results.put(Row(part="step", case="a", variant="plain", status="running"))
    results.put(left_out("text", "b", "no | time"))
    report = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["running", "left out"]
    assert report["status"] == "running"
    assert r"no \| time" in (tmp_path / "gpu_day.md").read_text()
    results.finish("interrupted")
    report = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["failed", "left out"]
    with pytest.raises(ValueError, match="seconds is missing"):
        results.put(Row(part="decode", case="c", figures={"frames": 3, "peak_bytes": None}))


def test_without_time_everything_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = Results(tmp_path, head())
    gpu_day.run(DAY, results, seconds=0)
    assert {row.status for row in results.rows} == {"left out"}
    assert {row.reason for row in results.rows} == {"0 s were left"}


@pytest.mark.parametrize(
    "words", [["--link-gbps", "0"], ["--link-gbps", "fast"], ["--budget", "1"], ["--call-us", "-1"]]
)
def test_mistakes_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_day.main(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("case", FULL.sizes.steps, ids=lambda case: case.name)
def test_a_step_of_the_full_size_on_tensors_without_contents(case: sizes.Case) -> None:
    day = replace(FULL, device=torch.device("meta"), sizes=SHALLOW)
    rows = list(steps.measure(day, Budget.of(1e6), case))
    assert [row for row in rows if row.status == "failed"] == []
    computed = {row.variant for row in rows if "warm_up" in row.figures}
    assert {"plain", ORACLE} <= computed


def full_tasks() -> Iterator[Task]:
    """The tasks beside the steps and the rates."""
    day = replace(FULL, sizes=SHALLOW)
    return (task for task in gpu_day.tasks(day) if task.part not in ("step", "device"))


@pytest.mark.parametrize("task", full_tasks(), ids=lambda task: task.part)
def test_the_other_tasks_of_the_full_size_on_tensors_without_memory(task: Task) -> None:
    assert task.part in (
        memory.PART,
        shards.PART,
        attention.PART,
        stages.DECODE,
        stages.TEXT,
    )
    if task.part == stages.TEXT and "fake_device" in FakeTensor.__annotations__:
        pytest.skip("accelerate cannot build a model of this torch's tensors without memory")
    with without_memory():
        rows = list(task.measure(replace(FULL, sizes=SHALLOW), Budget.of(1e6)))
    assert rows
    assert [row for row in rows if row.status != "ok"] == []
