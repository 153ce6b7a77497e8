"""Reports: valid by their schema in every state, right in their figures, readable as pages."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from reports import draft_of, rank_record, validate

from opensora_sp.base.errors import UserError
from opensora_sp.base.machine import describe_machine, run_tool
from opensora_sp.benchmark.memory_meter import MemoryMeter
from opensora_sp.benchmark.options import check_baseline_request
from opensora_sp.benchmark.report.build import run_record
from opensora_sp.benchmark.report.compare import compare_lines
from opensora_sp.benchmark.report.files import check_baseline, read_report
from opensora_sp.benchmark.report.page import page
from opensora_sp.benchmark.report.stats import imbalance, spread
from opensora_sp.benchmark.report.table import report_lines
from opensora_sp.cli.benchmark import main, with_own_names
from opensora_sp.engine.timing import Clock
from opensora_sp.planner.requests import plan_in_mode
from opensora_sp.request.memory_modes import memory_mode
from opensora_sp.request.settings import build_job, parse_command_line, resolve

VENDOR_KEYS = [
    *("QPS", "model_load_time", "resolution", "aspect_ratio", "batch_size", "dtype", "scheduler"),
    *("fps", "num_frames", "num_sample", "denoising_steps", "seed", "device", "output_path"),
    *("warmup_count", "eval_count", "Avg infer time", "Avg single prompt infer time"),
    "Avg single video save time",
]


def test_a_finished_report(tmp_path: Path) -> None:
    report = draft_of(tmp_path).write("ok")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    validate(report)
    info = report["performance_info"]
    assert list(info) == VENDOR_KEYS
    assert info["QPS"] * info["Avg infer time"] == pytest.approx(17)
    assert info["Avg single video save time"] == pytest.approx(0.5)
    assert info["model_load_time"] == 3.0
    found = report["summary"]
    denoise = found["stages"]["denoise"]
    assert denoise["ranks"] == [0, 1]
    # The slowest rank takes 1.1 times as long; the runs' steps are 1 and 1.2 seconds.
    assert denoise["over_runs"]["max"] == pytest.approx(4 * 1.2 * 1.1)
    assert denoise["over_ranks"] == pytest.approx(spread([4.4, 4.84]))
    assert denoise["imbalance"] == pytest.approx(1.1 / 1.05)
    assert found["stages"]["decode"]["ranks"] == [0]
    step = {name: part["over_runs"]["median"] for name, part in found["steps"].items()}
    assert step["exchange"] == pytest.approx(0.1)
    assert step["compute"] == pytest.approx(step["step"] - 0.15)
    assert found["memory"][1] == {
        "rank": 1,
        "peak_device_bytes": None,
        "peak_host_bytes": 4 * 2**30,
    }
    assert report["flops"]["achieved_per_second"]["denoise"] == pytest.approx(8e9 / 4.84)
    assert report["first_and_warm"]["warm"]["runs"] == 2
    assert report["first_and_warm"]["first"]["step_seconds"] == pytest.approx(3.0)


def test_planned_memory_beside_measured(tmp_path: Path) -> None:
    draft = draft_of(tmp_path)
    draft.plan = plan_in_mode(draft._job, 2, memory_mode("balanced"))
    unknown = draft.write("ok")["plan"]
    stages = {stage.name: stage.total for stage in draft.plan.stages}
    assert unknown["memory_mode"] == "balanced"
    assert [row["predicted_bytes"] for row in unknown["stages"]] == list(stages.values())
    assert {row["measured_bytes"] for row in unknown["stages"]} == {None}
    assert "planned" not in "\n".join(report_lines(draft.write("ok")))
    # The busiest rank of the measured runs counts, whatever a warm-up took.
    draft.runs.clear()
    for kind, most in (("warmup", 99), ("measured", 3), ("measured", 4)):
        peaks: list[dict[str, int] | None] = [{"denoise": most, "decode": 7}, {"denoise": most + 1}]
        ranks = [rank_record(rank, 2, device=peaks[rank]) for rank in (0, 1)]
        draft.runs.append(run_record(kind, 0, ranks, frames=17, videos=1))
    report = draft.write("ok")
    validate(report)
    rows = {row["stage"]: row for row in report["plan"]["stages"]}
    assert rows["denoise"]["measured_bytes"] == 5
    assert rows["denoise"]["measured_over_predicted"] == pytest.approx(5 / stages["denoise"])
    assert rows["decode"]["measured_bytes"] == 7
    assert rows["encode text"]["measured_bytes"] is None
    assert "in decode" in "\n".join(report_lines(report))
    assert "as planned" in page(report)


class _Device:
    """Counts like an accelerator's allocator."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def hold(self, size: int) -> None:
        self.now = size
        self.most = max(self.most, size)

    def max_memory_allocated(self, device: object) -> int:
        return self.most

    def reset_peak_memory_stats(self, device: object) -> None:
        self.most = self.now


def test_peaks_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device()
    meter = MemoryMeter(torch.device("meta"))
    monkeypatch.setattr(meter, "_module", device)
    device.hold(50)
    device.hold(1)
    meter.reset()
    clock = Clock(torch.device("cpu"))
    with clock.record(meter.stage):
        device.hold(8)
        device.hold(2)
        with clock.stage("denoise"):
            device.hold(5)
            device.hold(3)
            with clock.stage("hand out"):
                device.hold(4)
        device.hold(2)
        with clock.stage("decode"):
            device.hold(6)
        with clock.stage("denoise"):
            pass
    assert meter.stages == {"denoise": 6, "hand out": 4, "decode": 6}
    assert meter.peak_device_bytes() == 8
    meter.reset()
    assert meter.stages == {}
    assert meter.peak_device_bytes() == 6


def test_the_schema_bites(tmp_path: Path) -> None:
    good = draft_of(tmp_path).write("ok")
    broken: list[Any] = [copy.deepcopy(good) for _ in range(4)]
    del broken[0]["performance_info"]["QPS"]
    broken[1]["runs"][0]["ranks"][0]["memory"]["peak_host_bytes"] = 0
    broken[2]["unheard_of"] = 1
    broken[3]["summary"] = None  # a finished report has one
    for report in broken:
        with pytest.raises(jsonschema.ValidationError):
            validate(report)


def test_failed_and_unfinished_reports(tmp_path: Path) -> None:
    draft = draft_of(tmp_path)
    validate(draft.write("running"))
    draft.runs.clear()
    draft.facts["run"] = {"ranks": 2}
    draft.facts["model"] = None
    draft.doing = "measured run 0"
    draft.fail(RuntimeError("out of\nmemory"), "decode")
    report = read_report(tmp_path / "report.json", "x")
    validate(report)
    assert report["status"] == "failed"
    assert report["error"] == {
        "type": "RuntimeError",
        "message": "out of memory",
        "doing": "measured run 0",
        "stage": "decode",
    }
    assert report["summary"] is None
    assert "out of memory" in page(report)
    assert "out of memory" in "\n".join(report_lines(report))


def test_the_committed_reports_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
    reports = [read_report(path, "x") for path in sorted(folder.glob("embedded-ranks-*.json"))]
    assert [report["run"]["ranks"] for report in reports] == [1, 2, 4]
    for report in reports:
        validate(report)
        for run in report["runs"]:
            if run["kind"] == "measured":
                assert run["unaccounted_seconds"] <= 0.05 * run["seconds"]


class _Resources(HTMLParser):
    """Everything that a browser would fetch, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    report = draft_of(tmp_path).write("ok")
    html = page(report)
    parser = _Resources()
    parser.feed(html)
    assert not parser.fetched
    assert not parser.tags & {"script", "link", "img", "iframe"}
    assert "url(" not in html
    assert "@import" not in html
    assert "a &lt;b&gt; &amp; c" in html
    assert "<b> &" not in html
    # Every colour that a mark uses is defined, in the light and in the dark scheme.
    style, body = html.split("</style>")
    for name in set(re.findall(r"var\(--([\w-]+)\)", body)):
        assert style.count(f"--{name}:") == 2, name
    assert body.count("class=step") == 2 * 4  # ranks × steps on the timeline


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for ranks, scales in ((1, (2.0,)), (2, (1.0,))):
        folder = tmp_path / str(ranks)
        draft_of(folder, ranks=ranks, scales=scales).write("ok")
        paths.append(str(folder / "report.json"))
    reports = [read_report(path, "x") for path in paths]
    lines = list(compare_lines(reports[0], reports[1], ("one", "two")))
    rows = {line.split("  ")[0].strip() or line: line for line in lines}
    whole = (3.1 + 4.4) / (3.1 + 8.0)
    assert rows["whole run, median"].endswith(f"{whole:.2f}×")
    assert lines[2].startswith("differ in: ranks 1 / 2; mesh ")
    assert main(["--compare", *paths]) == 0
    assert "whole run, median" in capsys.readouterr().out
    draft_of(tmp_path / "2").fail(RuntimeError("x"), None)
    assert main(["--compare", *paths]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "a finished one is needed" in said.err


def test_baseline(tmp_path: Path) -> None:
    draft_of(tmp_path / "one", ranks=1, scales=(2.0,)).write("ok")
    one = tmp_path / "one" / "report.json"
    draft = draft_of(tmp_path, "--baseline", str(one), scales=(1.0,))
    check_baseline_request(draft._job, draft._options)
    report = draft.write("ok")
    validate(report)
    gain = report["efficiency"]
    assert gain["speedup"]["denoise"] == pytest.approx(8.0 / 4.4)
    assert gain["efficiency"]["denoise"] == pytest.approx(8.0 / 4.4 / 2)
    with pytest.raises(UserError, match="measured on 2 ranks"):
        check_baseline(tmp_path / "report.json")
    other = draft_of(tmp_path, "--baseline", str(one), "--seed", "1", "--dtype", "fp32")
    with pytest.raises(UserError, match=r"another request.*seed, dtype"):
        check_baseline_request(other._job, other._options)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sheet"], "--sheet belongs to generate"),
        (["--measure-peak", "--peak-tflops", "100"], "choose one"),
        (["--benchmark-save-path", "report.txt"], "ends in .json"),
        (["--baseline", "nowhere.json"], "--baseline 'nowhere.json' cannot be read"),
        (["--eval-count", "0"], "--eval-count '0' is not a whole number from 1"),
    ],
)
def test_refusals(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt", "x", *flags]) == 2
    assert said in capsys.readouterr().err


def test_figures() -> None:
    assert spread([5.0, 1.0, 3.0]) == {"min": 1.0, "median": 3.0, "p90": 5.0, "max": 5.0}
    assert spread([float(i) for i in range(1, 11)])["p90"] == 9.0
    assert imbalance([1.0, 3.0]) == 1.5


def test_tools_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's tool is run without a shell and believed only when it answers in time."""
    import torch

    from opensora_sp.base import machine

    tool = tmp_path / "efsmi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_tool(("efsmi",)) is None
    tool.write_text("#!/bin/sh\necho Driver Ver: 1.2.3 '$(touch x)' $#\n", encoding="utf-8")
    tool.chmod(0o755)
    assert run_tool(("efsmi", "; echo no")) == "Driver Ver: 1.2.3 $(touch x) 1\n"
    assert machine.driver_version(("efsmi",), ()) == "1.2.3"
    tool.write_text("#!/bin/sh\nwhile :; do :; done\n", encoding="utf-8")
    monkeypatch.setattr(machine, "TOOL_SECONDS", 0.3)
    assert run_tool(("efsmi",)) is None
    described = describe_machine(torch.device("cpu"), tmp_path / "not" / "there")
    assert described["device"]["tool_output"] is None
    assert described["driver_packages"] is None  # no dpkg on this PATH
    assert described["disk"]["free_bytes"] > 0
    assert "torch" in described["python_packages"]


def test_a_benchmark_does_not_replace_what_infer_made(tmp_path: Path) -> None:
    """Its outputs are made anew each time, so they have names of their own."""

    def names(*flags: str) -> list[str]:
        argv = ["--prompt", "a", "b", "--save-dir", str(tmp_path), *flags]
        values = resolve(parse_command_line(argv), program="benchmark")
        return [task.output.name for task in with_own_names(build_job(values)).tasks]

    assert names() == ["benchmark_0000.mp4", "benchmark_0001.mp4"]
    assert names("--num-sample", "2", "--num-frames", "image")[0] == "benchmark_0000-0.png"
    assert names("--sample-name", "mine") == ["mine_0000.mp4", "mine_0001.mp4"]
    assert names("--prompt-as-path") == ["a.mp4", "b.mp4"]
