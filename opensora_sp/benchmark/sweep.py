"""A sweep: a benchmark for each size and mesh, in processes of its own, so that one may fail.

A point with a finished report of the same measurement is skipped, so a sweep that was stopped can
continue. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.base.wording import plural
from opensora_sp.benchmark.options import BenchmarkOptions, measurement_digest
from opensora_sp.benchmark.report.files import Report, read_report, write_report
from opensora_sp.benchmark.sweep_spec import Point, read_sweep
from opensora_sp.benchmark.sweep_table import write_tables
from opensora_sp.request.flags.benchmark_settings import DEFAULT_REPORT
from opensora_sp.request.settings import CommandLine, build_job, parse_command_line, resolve

_log = logging.getLogger(__name__)

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_END_SECONDS = 30.0  # between SIGTERM and SIGKILL for a point

Launch = Callable[[list[str], Path, float | None], int]


def run_sweep(command: CommandLine, argv: Sequence[str], launch: Launch | None = None) -> int:
    """Measure every point that has no finished report. Returns 0 if all have one, else 1.

    launch: runs a command with a log and a limit in seconds, and returns its exit code. Raises
    UserError when no point could be started.
    """
    path = str(command.program_control["sweep"])
    base = _without_sweep(argv)
    given = resolve(parse_command_line(base), program="benchmark")
    sweep = read_sweep(path, given["aspect_ratio"])
    for each in _set_aside(given):
        _log.warning(each)
    report = Path(str(command.written.get("benchmark_save_path", DEFAULT_REPORT)))
    folder = report.parent / Path(path).stem
    points = list(sweep.points())
    reports: dict[str, Report] = {}
    refused: list[UserError] = []
    for count, point in enumerate(points, 1):
        head = f"[{count}/{len(points)}] {point.name}"
        place = folder / f"{point.name}.json"
        flags = [*base, *point.flags(), "--benchmark-save-path", str(place)]
        flags += ["--save-dir", str(folder / "outputs" / point.name)]
        try:
            digest = _digest(flags, point.ranks)
            found = _finished(place, digest)
            if found is None:
                print(f"{head}: measuring on {plural(point.ranks, 'rank')}", flush=True)
                found = _measure(point, flags, place, (launch or run_command), sweep.point_timeout)
            else:
                print(f"{head}: measured already", flush=True)
        except UserError as error:
            refused.append(error)
            found = _failure("refused", str(error))
        if found["status"] == "ok" and (wrong := point.differences(found)) is not None:
            found = _failure("another measurement", f"the report is of {wrong}")
        if found["status"] != "ok":
            print(f"{head}: {found['status']}: {found['error']['message']}", flush=True)
        reports[point.name] = found
        if len(refused) < len(points):
            write_tables(folder, sweep, reports)
    if len(refused) == len(points):
        raise refused[0]
    for line in write_tables(folder, sweep, reports).splitlines():
        print(line)
    print(f"reports, table.md and table.json: {folder}", flush=True)
    return 0 if all(report["status"] == "ok" for report in reports.values()) else 1


def _set_aside(given: Mapping[str, Any]) -> Iterator[str]:
    """Notes for settings of the command line that each point of the sweep replaces."""
    keys = ("image_size", "guidance_parallel", "sequence_parallel")
    for key in keys:
        if given[key] is not None:
            flag = key.replace("_", "-")
            yield f"--{flag} {shown(given[key])} is not used: each point of the sweep has its own"


def _without_sweep(argv: Sequence[str]) -> list[str]:
    remaining, skip = [], False
    for token in argv:
        if skip:
            skip = False
        elif token == "--sweep":
            skip = True
        elif not token.startswith("--sweep="):
            remaining.append(token)
    return remaining


def _digest(flags: Sequence[str], ranks: int) -> str:
    """The digest of a point's measurement. Raises UserError for an impossible command line."""
    values = resolve(parse_command_line(flags), program="benchmark")
    options = BenchmarkOptions.from_values(values)
    return measurement_digest(build_job(values, world_size=ranks), options, ranks)


def _finished(place: Path, digest: str) -> Report | None:
    try:
        found = read_report(place, "--sweep")
    except UserError:
        return None
    same = found.get("digest") == digest and found.get("status") == "ok"
    return found if same else None


def _measure(
    point: Point, flags: Sequence[str], place: Path, launch: Launch, limit: float | None
) -> Report:
    """Run one point and read its report. If it left none, a report of the failure is made."""
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    log = place.with_suffix(".log")
    code = launch(_command(point, flags), log, limit)
    try:
        found = read_report(place, "--sweep")
    except UserError:
        return _failure("failed", _last_error(log) or f"exit code {code} and no report")
    if found["status"] == "running":
        # It was killed before it could write the status failed.
        doing = f"killed or stuck (exit code {code}); its log: {log}"
        found |= {"status": "failed", "error": _failure("failed", doing)["error"]}
        write_report(place, found)
    return found


def _failure(kind: str, message: str) -> Report:
    error = {"type": kind, "message": message, "doing": "starting", "stage": None}
    return {"status": "failed", "error": error, "summary": None}


def _last_error(log: Path) -> str | None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.startswith("error: ")]
    return said[-1].removeprefix("error: ") if said else None


def _command(point: Point, flags: Sequence[str]) -> list[str]:
    module = ["-m", "opensora_sp.cli.benchmark", *flags]
    if point.ranks == 1:
        return [sys.executable, *module]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(point.ranks)]
    # The system chooses the port, so that several sweeps may run at the same time.
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return [sys.executable, *launcher, "--local_addr", "127.0.0.1", *module]


def run_command(command: list[str], log: Path, limit: float | None) -> int:
    """Run a command with its output in `log`. Its process group ends with this call."""
    paths = [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            print(f"longer than point_timeout {limit:g} s: stopped", flush=True)
            return -int(signal.SIGTERM)
        finally:
            _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """End what is left of a command's process group: SIGTERM, and SIGKILL if that fails."""
    for number, patience in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
