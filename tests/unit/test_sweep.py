"""Sweeps: a point may fail, finished points are not measured again, nothing is left running."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

import pytest
from reports import draft_of

from opensora_sp.benchmark.report.files import read_report, write_report
from opensora_sp.benchmark.sweep import run_command, run_sweep
from opensora_sp.benchmark.sweep_spec import read_sweep
from opensora_sp.cli.benchmark import main
from opensora_sp.request.settings import parse_command_line

SWEEP = """
resolutions: [64x64, 64x96, 144p]
durations: [image, 17]
meshes: [1x1, 2x1]
point_timeout: 60
"""
BAD = "64x96-17-2x1"


class Machine:
    """In the place of processes: leaves what a benchmark leaves, and fails where it is told to."""

    def __init__(self, folder: Path, failing: dict[str, str]) -> None:
        self.folder, self.failing, self.ran = folder, failing, list[str]()

    def __call__(self, command: list[str], log: Path, limit: float | None) -> int:
        assert limit == 60
        argv = command[command.index("opensora_sp.cli.benchmark") + 1 :]
        pairs = itertools.pairwise(argv)
        place = Path([value for flag, value in pairs if flag == "--benchmark-save-path"][-1])
        self.ran.append(place.stem)
        ranks = 2 if "torch.distributed.run" in command else 1
        assert ("--nproc_per_node" in command) == (ranks == 2)
        way = self.failing.get(place.stem)
        log.write_text("a line\nerror: no room for it\n", encoding="utf-8")
        if way == "nothing":
            return 2
        draft = draft_of(self.folder, *argv, ranks=ranks, scales=(1.0 / ranks,))
        if way == "killed":
            draft.write("running")
            return -9
        if way == "raised":
            draft.fail(RuntimeError("out of memory"), "denoise")
            return 1
        draft.write("ok")
        return 0


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "six.yaml"
    path.write_text(SWEEP, encoding="utf-8")
    return path


def run(sweep_file: Path, machine: Machine, *flags: str) -> int:
    argv = ["--sweep", str(sweep_file), "--prompt", "x", "--dtype", "fp32", *flags]
    argv += ["--benchmark-save-path", str(sweep_file.parent / "out" / "report.json")]
    return run_sweep(parse_command_line(argv), argv, machine)


@pytest.mark.slow
def test_six_points_on_two_meshes(
    sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out" / "six"
    ways = ["nothing", "killed", "raised"]
    reasons = ["no room for it", "killed or stuck (exit code -9)", "out of memory"]
    for way, reason in zip(ways, reasons, strict=True):
        machine = Machine(tmp_path, {BAD: way})
        assert run(sweep_file, machine) == 1
        # All twelve the first time, then only the one that failed.
        assert len(machine.ran) == (12 if way == "nothing" else 1)
        assert BAD in machine.ran
        rows = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        assert [row["status"] for row in rows].count("ok") == 11
        (bad,) = (row for row in rows if row["status"] == "failed")
        assert bad["report"] == f"{BAD}.json"
        assert bad["error"]["message"].startswith(reason)
        assert f"failed: {reason}"[:40] in (folder / "table.md").read_text(encoding="utf-8")
        if way == "killed":
            assert read_report(folder / f"{BAD}.json", "x")["status"] == "failed"
    machine = Machine(tmp_path, {})
    assert run(sweep_file, machine) == 0
    assert machine.ran == [BAD]
    table = (folder / "table.md").read_text(encoding="utf-8")
    # 3.1 s beside four steps of 1 s, or on two ranks of 0.5 s and for the slower one 0.55.
    assert "| 64x96 | 7.10 s, 3.00 GiB | 7.10 s, 3.00 GiB |" in table
    assert "| 144p | 5.30 s, 4.00 GiB (1.34×) | 5.30 s, 4.00 GiB (1.34×) |" in table
    machine = Machine(tmp_path, {})
    assert run(sweep_file, machine) == 0
    assert machine.ran == []
    assert "measured already" in capsys.readouterr().out
    # Another question is not answered with the old reports.
    machine = Machine(tmp_path, {})
    assert run(sweep_file, machine, "--seed", "7") == 0
    assert len(machine.ran) == 12


def measured(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    """(height, width, frames, guidance) that each report of a sweep is of."""
    found = {}
    for place in sorted(folder.glob("*x*.json")):
        report = read_report(place, "x")
        first, mesh = report["request"]["first"], report["run"]["mesh"]
        size = (first["height"], first["width"], first["num_frames"], mesh["guidance"])
        found[place.stem] = size
    return found


@pytest.mark.parametrize("where", ["config", "flags"])
def test_a_point_measures_its_own_size_whatever_else_is_said(
    sweep_file: Path, tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A config with an image_size once won over every point's resolution, in silence."""
    sweep_file.write_text(
        "resolutions: [144p, 240p, 96x64]\ndurations: [17]\nmeshes: [1x1, 2x1]\n"
        "point_timeout: 60\n",
        encoding="utf-8",
    )
    said = {
        "image_size": ["64", "96"],
        "num_frames": ["51"],
        "guidance_parallel": ["1"],
        "sequence_parallel": ["1"],
        "aspect_ratio": ["1:1"],
    }
    if where == "config":
        config = tmp_path / "config.yaml"
        lines = [
            f"{key}: [{', '.join(v)}]" if len(v) > 1 else f"{key}: '{v[0]}'"
            for key, v in said.items()
        ]
        config.write_text("\n".join(lines), encoding="utf-8")
        flags = ["--config", str(config)]
    else:
        flags = [part for k, v in said.items() for part in (f"--{k.replace('_', '-')}", *v)]
    assert run(sweep_file, Machine(tmp_path, {}), *flags) == 0
    assert measured(tmp_path / "out" / "six") == {
        f"{name}-17-{guidance}x1": (height, width, 17, guidance)
        for name, height, width in (("144p", 192, 192), ("240p", 320, 320), ("96x64", 96, 64))
        for guidance in (1, 2)
    }
    assert "--image-size [64, 96] is not used" in caplog.text


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("request", "first", "height"), 72, "height 72 instead of 64"),
        (("request", "first", "num_frames"), 51, "frames 51 instead of 17"),
        (("run", "mesh", "guidance"), 1, "guidance 1 instead of 2"),
        (("run", "ranks"), 1, "ranks 1 instead of 2"),
    ],
)
def test_a_report_of_something_else_never_enters_the_table(
    sweep_file: Path, tmp_path: Path, keys: tuple[str, ...], value: int, said: str
) -> None:
    class Mistaken(Machine):
        def __call__(self, command: list[str], log: Path, limit: float | None) -> int:
            code = super().__call__(command, log, limit)
            if self.ran[-1] == BAD:
                place = tmp_path / "out" / "six" / f"{BAD}.json"
                report = read_report(place, "x")
                inner = report
                for key in keys[:-1]:
                    inner = inner[key]
                inner[keys[-1]] = value
                write_report(place, report)
            return code

    assert run(sweep_file, Mistaken(tmp_path, {})) == 1
    rows = json.loads((tmp_path / "out" / "six" / "table.json").read_text(encoding="utf-8"))
    (bad,) = (row for row in rows if row["status"] != "ok")
    assert bad["report"] == f"{BAD}.json"
    assert bad["seconds"] is None
    assert said in bad["error"]["message"]


def test_an_impossible_point_is_only_refused(sweep_file: Path, tmp_path: Path) -> None:
    machine = Machine(tmp_path, {})
    assert run(sweep_file, machine, "--cfg-scale", "1") == 1  # then guidance 2 has nothing to do
    assert len(machine.ran) == 6
    rows = json.loads((tmp_path / "out" / "six" / "table.json").read_text(encoding="utf-8"))
    assert "--cfg-scale 1" in rows[-1]["error"]["message"]


def test_a_torn_report_is_measured_again(sweep_file: Path, tmp_path: Path) -> None:
    assert run(sweep_file, Machine(tmp_path, {})) == 0
    folder = tmp_path / "out" / "six"
    (folder / f"{BAD}.json").write_text("{", encoding="utf-8")
    other = read_report(folder / "64x64-17-1x1.json", "x")
    write_report(folder / "64x64-17-1x1.json", other | {"status": "running"})
    machine = Machine(tmp_path, {})
    assert run(sweep_file, machine) == 0
    assert machine.ran == ["64x64-17-1x1", BAD]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("durations: [1]\nmeshes: [1x1]", "resolutions needs"),
        (SWEEP.replace("2x1", "3x1"), "3x1"),
        (SWEEP + "ranks: 2", "'ranks' is not a key"),
        (SWEEP.replace("60", "soon"), "point_timeout 'soon'"),
        (SWEEP, "--prompt or --prompt-path is needed"),
        (SWEEP.replace("144p", "../../x"), "'../../x' is not in the size table"),
        (SWEEP.replace("144p", "99999x8"), "99999"),
        (SWEEP.replace("image", "/tmp/x"), "'/tmp/x' is not"),
        (SWEEP.replace("2x1", "2x9999999"), "2x9999999"),
        (SWEEP.replace("[1x1, 2x1]", "[]"), "meshes needs"),
        (SWEEP.replace("[64x64, 64x96, 144p]", "[]"), "resolutions needs"),
        (SWEEP.replace("[image, 17]", "[]"), "durations needs"),
    ],
)
def test_refusals(
    text: str, said: str, sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file.write_text(text, encoding="utf-8")
    assert main(["--sweep", str(sweep_file)]) == 2
    assert said in capsys.readouterr().err


def test_the_sweeps_that_ship_can_be_read() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "sweep"
    sizes = {path.stem: len(list(read_sweep(str(path)).points())) for path in folder.iterdir()}
    assert sizes == {"guide": 80, "embedded": 12}


def test_a_point_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "child"
    child = f"import time, os; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_command([sys.executable, "-c", parent], tmp_path / "log", 1.5) < 0
    until = time.monotonic() + 10
    while alive(int(mark.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(mark.read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return Path("/proc/self").exists() is False and _signalled(pid)
    return state != "Z"


def _signalled(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
