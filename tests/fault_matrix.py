"""Every legal pair of a place and a fault, on the leading and on a middle rank, under torchrun.

    python tests/fault_matrix.py [--points exchange,decode] [--ways kill] [--max-restarts 1]

Each cell is a real run of launch/infer.py on four gloo ranks that is made to fail, and is judged
from outside: seconds from the fault until every rank is gone, the rank and the stage that the
program names, processes and files that are left. Ends with 1 if any cell is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from forked import Copies  # noqa: E402
from ranks import environments, free_port  # noqa: E402

from opensora_sp.base.faults import LOG_VARIABLE, POINTS, VARIABLE  # noqa: E402
from opensora_sp.base.processes import Process  # noqa: E402

RANKS = 4
ENDS_WITHIN_S = 10.0
HEARTBEAT_S = 10.0
STEP_DEADLINE_S = 8.0
GIVE_UP_S = 240.0


@dataclass(frozen=True)
class Cell:
    """One fault: where, how, on which rank."""

    point: str
    way: str
    rank: int

    @property
    def limit(self) -> float:
        """Seconds from the fault within which every rank is to be gone."""
        unnoticed = {"stop": HEARTBEAT_S, "hang": STEP_DEADLINE_S}.get(self.way, 0.0)
        return unnoticed + ENDS_WITHIN_S


@dataclass
class Outcome:
    """What was seen of one cell; it is as it should be when `wrong` is empty."""

    seconds: float | None = None
    said: str = ""
    code: int | None = None
    wrong: list[str] = field(default_factory=list)
    log: str = ""


def legal_cells() -> Iterator[Cell]:
    """The whole matrix. `slow` is no fault: whoever is slow is waited for."""
    for name, point in POINTS.items():
        for way in point.ways:
            for rank in (0,) if point.leading else (0, point.middle):
                if way != "slow":
                    yield Cell(name, way, rank)


def run_cell(
    cell: Cell,
    folder: Path,
    *,
    ranks: int = RANKS,
    max_restarts: int = 0,
    forked: bool = False,
) -> Outcome:
    """Run one cell in an empty folder and judge it.

    forked: ranks that are forked from a process with torch in it, in place of torchrun: the same
    program in a fraction of the time, without a launcher that would end the ranks by itself.
    """
    logs, outputs, said = folder / "log", folder / "out", folder / "said"
    logs.mkdir()
    flags = ["--prompt", "one", "two", "--image-size", "32", "48", "--num-frames", "17"]
    flags += ["--num-sampling-steps", "2", "--device", "cpu", "--verbose", "0"]
    flags += ["--text-cache", "off"]  # or the second cell would have no text to encode
    flags += ["--save-dir", str(outputs), "--heartbeat-timeout", str(HEARTBEAT_S)]
    point = POINTS[cell.point]
    flags += [need.format(folder=folder) for need in point.needs]
    if cell.way == "hang":
        flags += ["--deadlines", f"step={STEP_DEADLINE_S}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        VARIABLE: f"rank={cell.rank} point={cell.point} way={cell.way}",
        LOG_VARIABLE: str(logs),
    }
    run: Copies | Torchrun
    if forked:
        own = [{**environment, **each} for each in environments(ranks)]
        run = Copies(flags, own, said, program=point.program)
    else:
        command = [f"launch/{point.program}.py", *flags]
        run = Torchrun(command, environment, said, ranks, max_restarts)
    outcome = Outcome()
    try:
        _watch(run, logs, outcome)
    finally:
        run.kill()
        for pid in rank_pids(logs):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    outcome.log = said.read_text()
    _judge(cell, outcome, outputs, max_restarts)
    return outcome


class Torchrun:
    """The real launcher."""

    def __init__(
        self,
        flags: list[str],
        environment: dict[str, str],
        said: Path,
        ranks: int,
        max_restarts: int,
    ) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        command += ["--max-restarts", str(max_restarts), "--master_port", str(free_port())]
        with said.open("w") as out:
            self._process = subprocess.Popen(
                [*command, *flags],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def codes(self) -> list[int | None]:
        """Its exit code, or None while it runs."""
        return [self._process.poll()]

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _watch(run: Torchrun | Copies, logs: Path, outcome: Outcome) -> None:
    """Wait for the end; note how long the ranks of the attempt that failed took to be gone."""
    end = time.monotonic() + GIVE_UP_S
    failing: dict[int, Process] = {}
    while time.monotonic() < end:
        fault = logs / "fault"
        if fault.exists() and not failing:
            failing = {pid: Process(pid, "", "") for pid in rank_pids(logs)}
        gone = bool(failing) and all(p.state() == "gone" for p in failing.values())
        if gone and outcome.seconds is None:
            outcome.seconds = time.time() - float(fault.read_text())
        codes = run.codes()
        outcome.code = None if None in codes else int(any(codes))
        if outcome.code is not None and (gone or not failing):
            return
        time.sleep(0.05)
    outcome.wrong.append(f"still running after {GIVE_UP_S:g} s")


def rank_pids(logs: Path) -> list[int]:
    return [int(text) for path in logs.glob("rank*.pid") if (text := path.read_text())]


def _judge(cell: Cell, outcome: Outcome, outputs: Path, max_restarts: int) -> None:
    lines = [line for line in outcome.log.splitlines() if line.startswith("error: ")]
    outcome.said = lines[-1] if lines else ""
    expected = f"error: rank {cell.rank}, {POINTS[cell.point].stage}"
    wrong = outcome.wrong
    if not outcome.said.startswith(expected):
        wrong.append(f"said {outcome.said!r}, expected {expected!r}")
    if len(lines) != 1:
        wrong.append(f"{len(lines)} lines of errors")
    if outcome.said and "FAILED" in outcome.log:
        after = outcome.log[outcome.log.index(outcome.said) :].splitlines()[1:]
        if any(line.startswith("rank ") for line in after):
            wrong.append("its line is not the last of the program")
    if outcome.seconds is None or outcome.seconds > cell.limit:
        wrong.append(f"{outcome.seconds} s until all were gone, {cell.limit:g} allowed")
    if (outcome.code == 0) != (max_restarts > 0):
        wrong.append(f"exit code {outcome.code}")
    found = sorted(path.name for path in outputs.iterdir()) if outputs.exists() else []
    wrong += [f"{path.name} is left" for path in outputs.rglob("*.tmp")]
    wrong += [f"{n} does not play" for n in found if n.endswith(".mp4") and not _plays(outputs / n)]
    name = "benchmark" if POINTS[cell.point].program == "benchmark" else "sample"
    if max_restarts and [n for n in found if n.endswith(".mp4")] != [
        f"{name}_0000.mp4",
        f"{name}_0001.mp4",
    ]:
        wrong.append(f"after the restart there is {found}")


def _plays(path: Path) -> bool:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0)) == 17


def main() -> int:
    """Print the matrix, a line a cell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--points", help="only these, joined by commas")
    parser.add_argument("--ways", help="only these, joined by commas")
    parser.add_argument("--max-restarts", type=int, default=0)
    wanted = parser.parse_args()
    bad = 0
    print(f"{'point':<16} {'way':<10} {'rank':<5} {'seconds':>8}  verdict", flush=True)
    for cell in legal_cells():
        if wanted.points and cell.point not in wanted.points.split(","):
            continue
        if wanted.ways and cell.way not in wanted.ways.split(","):
            continue
        with tempfile.TemporaryDirectory() as name:
            outcome = run_cell(cell, Path(name), max_restarts=wanted.max_restarts)
        bad += bool(outcome.wrong)
        seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        verdict = "; ".join(outcome.wrong) or f"ok: {outcome.said.removeprefix('error: ')}"
        print(f"{cell.point:<16} {cell.way:<10} {cell.rank:<5} {seconds:>8}  {verdict}", flush=True)
    print(f"{bad} cells are not as they should be" if bad else "all as they should be")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
