"""Faults of the machine, not of a rank: disk, memory, launcher, store, clock, a second run.

    python tests/machine_faults.py [--cells full,memory]

Each cell is a real run of two gloo ranks. One of them stands still at a place (`AWAIT` of
base/faults.py) while something is done to the machine. A cell is judged from outside: seconds until
every rank is gone, what was said, what is left, and whether the same command, given again on a
machine that is well, ends with the bytes of an undisturbed run. Ends with 1 if any cell is not as
it should be. Disks are small tmpfs mounts, which need root; the clock needs a C compiler. A
cell whose means are missing is named as not run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fault_matrix import ENDS_WITHIN_S, GIVE_UP_S, Torchrun, rank_pids  # noqa: E402
from forked import Copies  # noqa: E402
from ranks import environments  # noqa: E402

from opensora_sp.base.faults import AWAIT, LOG_VARIABLE, VARIABLE  # noqa: E402
from opensora_sp.base.processes import Process  # noqa: E402
from opensora_sp.parallel.watchdog.store import PATIENCE_S  # noqa: E402

RANKS = 2
HEARTBEAT_S = 5.0
SLOW_DISK_S = 2 * HEARTBEAT_S  # longer than a silent rank may be
DISK = "48m"
FLAGS = ["--prompt", "one", "two", "--image-size", "32", "48", "--num-frames", "17"]
FLAGS += ["--num-sampling-steps", "2", "--device", "cpu", "--dtype", "fp32", "--verbose", "0"]
FLAGS += ["--heartbeat-timeout", str(HEARTBEAT_S)]
LARGE = ["--image-size", "144", "256"]  # so that decoding takes more memory than there is
HEADROOM = 8 << 20  # bytes; for threads and what else is small
NO_ROOM, READ_ONLY = "No space left on device", "Read-only file system"
FILES = ("save-step", "save-clip", "encode-to-file", "record", "report")


@dataclass(frozen=True)
class Cell:
    """One fault: what happens, where in the run, and on which rank where that matters."""

    fault: str
    place: str
    rank: int = 0


@dataclass
class Outcome:
    """What was seen of one cell; it is as it should be when `wrong` is empty."""

    seconds: float | None = None
    said: list[str] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    log: str = ""


class NotHere(Exception):  # noqa: N818 (no error: this machine cannot show the fault)
    """What this machine lacks."""


class Run:
    """The command on its ranks, in a folder with its outputs, its words and its log of faults."""

    def __init__(
        self,
        folder: Path,
        save_dir: Path,
        cell: Cell | None = None,
        more: list[str] | None = None,
        *,
        torchrun: bool = False,
        program: str = "infer",
        preload: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs, self.said, self.save_dir = folder / "log", folder / "said", save_dir
        self.logs.mkdir()
        own = {**os.environ, "OMP_NUM_THREADS": "1", LOG_VARIABLE: str(self.logs)}
        own |= preload or {}
        if cell is not None:
            own[VARIABLE] = f"rank={cell.rank} point={cell.place} way={AWAIT}"
        flags = [*FLAGS, *(more or []), "--save-dir", str(save_dir)]
        flags += ["--text-cache", "off"] if program == "infer" else []
        self.process: Torchrun | Copies
        if torchrun:
            self.process = Torchrun([f"launch/{program}.py", *flags], own, self.said, RANKS, 0)
        else:
            each = [{**own, **ranks} for ranks in _rank_variables()]
            self.process = Copies(flags, each, self.said, program=program)

    def stands(self) -> None:
        """Return when the rank stands at its place."""
        self._until((self.logs / "fault").exists, "did not come to its place")

    def go(self) -> None:
        """Let the rank go on."""
        (self.logs / "go").touch()

    def ends(self) -> list[int | None]:
        """The exit codes, when all have ended."""
        self._until(lambda: None not in self.process.codes(), "has not ended", early=False)
        return self.process.codes()

    def gone(self) -> None:
        """Return when no rank is left. A launcher that is stopped leaves them as zombies."""
        ranks = [Process(pid, "", "") for pid in rank_pids(self.logs)]
        self._until(lambda: all(p.state() == "gone" for p in ranks), "is still there", early=False)

    def kill(self) -> None:
        """End what is left."""
        self.process.kill()
        for pid in rank_pids(self.logs):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _until(self, true: Callable[[], bool], otherwise: str, *, early: bool = True) -> None:
        end = time.monotonic() + GIVE_UP_S
        while not true():
            ended = early and None not in self.process.codes()
            if ended or time.monotonic() > end:
                raise AssertionError(f"a run {otherwise}:\n{self.said.read_text()[-3000:]}")
            time.sleep(0.02)


def _rank_variables() -> list[dict[str, str]]:
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return [{name: each[name] for name in own} for each in environments(RANKS)]


# --- the cells --------------------------------------------------------------------------------


def run_cell(cell: Cell, folder: Path) -> Outcome:
    """Run one cell in an empty folder and judge it. Raises NotHere where that cannot be done."""
    outcome = Outcome()
    try:
        KINDS[cell.fault](cell, folder, outcome)
    except AssertionError as error:
        outcome.wrong.append(str(error))
    return outcome


def disk(cell: Cell, folder: Path, outcome: Outcome) -> None:
    """The disk of the outputs becomes full, read-only or slow while a file is about to be written.

    A disk that stays so loses the video too: one line. A slow one is waited for.
    """
    program = "benchmark" if cell.place == "report" else "infer"
    with small_disk(folder / "disk") as place:
        more = ["--save-every", "1"] if cell.place == "save-step" else []
        if program == "benchmark":
            more = ["--warmup-count", "0", "--benchmark-save-path", str(place / "report.json")]
        save_dir = (folder if program == "benchmark" else place) / "out"
        run = Run(folder / "run", save_dir, cell, more, program=program)
        try:
            run.stands()
            undo = DISKS[cell.fault](place)
            _time(run, outcome, undo)
        finally:
            run.kill()
        if cell.fault == "slow":
            _goes_on(outcome, [0, 0])
            _same(run.save_dir, outcome, program)
            return
        what = NO_ROOM if cell.fault == "full" else READ_ONLY
        _expect(outcome, [2, None], [rf"error: .*{what}.*"])
        _no_leftovers(run.save_dir, outcome)
        undo()
        _again(folder, save_dir, outcome, more, program=program)


def log_full(cell: Cell, folder: Path, outcome: Outcome) -> None:
    """The disk of --log-dir becomes full: a note of each rank, and the run goes on."""
    with small_disk(folder / "disk") as place:
        more = ["--log-dir", str(place)]
        run = Run(folder / "run", folder / "out", cell, more)
        try:
            run.stands()
            fill(place)
            _time(run, outcome)
        finally:
            run.kill()
    _goes_on(outcome, [0, 0])
    _same(run.save_dir, outcome)


def log_read_only(cell: Cell, folder: Path, outcome: Outcome) -> None:
    """--log-dir is on a disk that is read-only from the start: a line before anything is made."""
    with small_disk(folder / "disk") as place:
        undo = read_only(place)
        run = Run(folder / "run", folder / "out", None, ["--log-dir", str(place)])
        try:
            _time(run, outcome, go=False)
        finally:
            run.kill()
        undo()
    lines = [rf"error: {of}--log-dir: cannot write .*{READ_ONLY}.*" for of in ("", "rank 1: ")]
    _expect(outcome, [2, 2], lines)  # each rank of its own file


def memory(cell: Cell, folder: Path, outcome: Outcome) -> None:
    """One rank may take hardly more memory than it has: something that it needs does not fit.

    A tensor that does not fit is an error of torch. Where not even a thread's own data fits, glibc
    ends the process (SIGABRT or code 127), which its peers see.
    """
    more = LARGE if cell.place == "decode" else []
    run = Run(folder / "run", folder / "out", cell, more)
    try:
        run.stands()
        time.sleep(1.0)  # its peers have heard where it stands
        pid = int((run.logs / f"rank{cell.rank}.pid").read_text())
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (HEADROOM if more else 0)
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        _time(run, outcome)
    finally:
        run.kill()
    stage = "decode" if more else "denoise"
    ends = "memory|ended without a word|was killed by SIGABRT|ended with exit code 127"
    what = "memory" if more else f"({ends})"
    _expect(outcome, [None, None], [f"error: rank {cell.rank}, {stage}.*{what}.*"])
    _no_leftovers(run.save_dir, outcome)
    _again(folder, run.save_dir, outcome, more)


def launcher(cell: Cell, folder: Path, outcome: Outcome) -> None:
    """torchrun, which keeps the store, is stopped or killed: the ranks notice and leave."""
    run = Run(folder / "run", folder / "out", cell, torchrun=True)
    try:
        run.stands()
        ranks = rank_pids(run.logs)
        parent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
        stopped = cell.fault == "launcher-stopped"
        if not stopped:
            run.go()  # a rank that stands in a test's loop is no rank of a run
        os.kill(parent, signal.SIGSTOP if stopped else signal.SIGKILL)
        begun = time.monotonic()
        run.gone()
        outcome.seconds = time.monotonic() - begun
    finally:
        run.kill()
    _read(run, outcome)
    expected = "error: rank [01], .*the launcher that started .* is gone.*"
    if stopped:
        expected = "error: rank 0, denoise.*the launcher, which keeps the store.*has not answered.*"
    _expect(outcome, None, [expected], unnoticed=HEARTBEAT_S + PATIENCE_S if stopped else 0.0)
    _no_leftovers(run.save_dir, outcome)
    _again(folder, run.save_dir, outcome)


def keeper(cell: Cell, folder: Path, outcome: Outcome) -> None:
    """Rank 0, which keeps the store where no launcher does, is killed or stopped."""
    run = Run(folder / "run", folder / "out", cell)
    try:
        run.stands()
        time.sleep(1.0)  # its peers have heard where it stands
        first = int((run.logs / "rank0.pid").read_text())
        stopped = cell.fault == "keeper-stopped"
        os.kill(first, signal.SIGSTOP if stopped else signal.SIGKILL)
        _time(run, outcome)
    finally:
        run.kill()
    # Who has been waited for by its parent already leaves no word.
    what = "is stopped" if stopped else "(was killed by SIGKILL|ended without a word)"
    _expect(
        outcome,
        None,
        [f"error: rank 0, denoise.*{what}.*"],
        unnoticed=HEARTBEAT_S if stopped else 0.0,
    )
    _no_leftovers(run.save_dir, outcome)
    _again(folder, run.save_dir, outcome)


def clock(cell: Cell, folder: Path, outcome: Outcome) -> None:
    """The wall clock jumps a day while the run is on its way: nothing happens."""
    folder.mkdir(parents=True, exist_ok=True)
    setting, library = folder / "seconds", folder / "clock_jump.so"
    setting.write_text("0")
    build = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library)]
    build += [str(ROOT / "tests" / "clock_jump.c"), "-ldl"]
    try:
        subprocess.run(build, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise NotHere("a C compiler") from None
    preload = {"LD_PRELOAD": str(library), "CLOCK_JUMP_FILE": str(setting)}
    run = Run(folder / "run", folder / "out", cell, torchrun=True, preload=preload)
    try:
        run.stands()
        setting.write_text("86400" if cell.fault == "clock-ahead" else "-86400")
        time.sleep(HEARTBEAT_S + 1)  # long enough for whoever measured silence by it
        _time(run, outcome)
    finally:
        run.kill()
    _goes_on(outcome, [0])
    _same(run.save_dir, outcome)


def two_runs(cell: Cell, folder: Path, outcome: Outcome) -> None:
    """The same command is given while its first run is on its way, in the same folder."""
    run = Run(folder / "run", folder / "out", cell)
    try:
        run.stands()
        second = Run(folder / "second", run.save_dir)
        try:
            codes = second.ends()
        finally:
            second.kill()
        _read(second, outcome)
        outcome.codes = codes
        expected = r"error: .*sample_0000\.mp4 is being made by process \d+.*"
        _expect(outcome, [2, 2], [expected], timed=False)
        _time(run, outcome)
    finally:
        run.kill()
    _goes_on(outcome, [0, 0])
    _same(run.save_dir, outcome)


KINDS: dict[str, Callable[[Cell, Path, Outcome], None]] = {
    "full": disk,
    "read-only": disk,
    "slow": disk,
    "log-full": log_full,
    "log-read-only": log_read_only,
    "memory": memory,
    "launcher-stopped": launcher,
    "launcher-killed": launcher,
    "keeper-stopped": keeper,
    "keeper-killed": keeper,
    "clock-ahead": clock,
    "clock-back": clock,
    "two-runs": two_runs,
}


def all_cells() -> Iterator[Cell]:
    """The whole list."""
    for fault in ("full", "read-only", "slow"):
        for place in FILES:
            yield Cell(fault, place)
    yield Cell("log-full", "velocity")
    yield Cell("log-read-only", "start")
    for rank in (0, 1):
        yield Cell("memory", "velocity", rank)
    yield Cell("memory", "decode")
    for fault in ("launcher-stopped", "launcher-killed", "clock-ahead", "clock-back"):
        yield Cell(fault, "velocity")
    yield Cell("keeper-stopped", "velocity", 1)
    yield Cell("keeper-killed", "velocity", 1)
    yield Cell("two-runs", "velocity")


# --- what is done to a disk -------------------------------------------------------------------


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of its own at a place."""
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise NotHere("the right to mount a file system") from None
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Callable[[], None]:
    """Leave no room."""
    filler = place / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(64))
    return filler.unlink


def read_only(place: Path) -> Callable[[], None]:
    """Let nothing be written. Another rank may be writing at this moment: it is tried again."""

    def remount(how: str) -> None:
        command = ["mount", "-o", f"remount,{how}", str(place)]
        for _ in range(100):
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"the disk cannot be made {how}: a file is open for writing")

    remount("ro")
    return lambda: remount("rw")


def slow(place: Path) -> Callable[[], None]:
    """Whoever writes waits."""
    time.sleep(SLOW_DISK_S)
    return lambda: None


DISKS = {"full": fill, "read-only": read_only, "slow": slow}


# --- judging ----------------------------------------------------------------------------------


def _time(
    run: Run, outcome: Outcome, undo: Callable[[], None] | None = None, *, go: bool = True
) -> None:
    """Let the run go on, and see how long it takes to end."""
    begun = time.monotonic()
    if go:
        run.go()
    outcome.codes = run.ends()
    outcome.seconds = time.monotonic() - begun
    _read(run, outcome)


def _read(run: Run, outcome: Outcome) -> None:
    outcome.log = run.said.read_text()
    outcome.said = [line for line in outcome.log.splitlines() if line.startswith("error: ")]


def _expect(
    outcome: Outcome,
    codes: list[int | None] | None,
    lines: list[str],
    unnoticed: float = 0.0,
    *,
    timed: bool = True,
) -> None:
    """Hold an outcome against the codes (None: any but 0) and the lines of errors expected."""
    wrong = outcome.wrong
    limit = unnoticed + ENDS_WITHIN_S
    if timed and (outcome.seconds is None or outcome.seconds > limit):
        wrong.append(f"{outcome.seconds} s until all were gone, {limit:g} allowed")
    matched = [re.fullmatch(want, said) for want, said in zip(lines, outcome.said, strict=False)]
    if len(outcome.said) != len(lines) or not all(matched):
        wrong.append(f"said {outcome.said}, expected {lines}")
    if "Traceback" in outcome.log and "opensora_sp/" in outcome.log and not lines:
        wrong.append("a traceback is printed")
    if codes is not None and (
        len(codes) != len(outcome.codes)
        or any(
            (got == 0) if want is None else got != want
            for want, got in zip(codes, outcome.codes, strict=True)
        )
    ):
        wrong.append(f"exit codes {outcome.codes}, expected {codes}")


def _goes_on(outcome: Outcome, codes: list[int | None]) -> None:
    """What is no fault of the run may take as long as the work that is left."""
    _expect(outcome, codes, [], timed=False)


def _no_leftovers(save_dir: Path, outcome: Outcome) -> None:
    outcome.wrong += [f"{path.name} is left" for path in save_dir.rglob("*.tmp")]


def _again(
    folder: Path,
    save_dir: Path,
    outcome: Outcome,
    more: list[str] | None = None,
    *,
    program: str = "infer",
) -> None:
    """Give the same command again; it has to end with the bytes of an undisturbed run."""
    if program == "benchmark":
        more = [*(more or []), "--overwrite"]
    run = Run(folder / "again", save_dir, None, more, program=program)
    try:
        codes = run.ends()
    finally:
        run.kill()
    if any(codes):
        outcome.wrong.append(f"given again: exit codes {codes}:\n{run.said.read_text()[-2000:]}")
    _same(save_dir, outcome, program, large=bool(more and more[:3] == LARGE))
    _no_leftovers(save_dir, outcome)


def _same(save_dir: Path, outcome: Outcome, program: str = "infer", *, large: bool = False) -> None:
    found, wanted = digests(save_dir), undisturbed(program, large)
    if found != wanted:
        outcome.wrong.append(f"other files or bytes: {sorted(found)}, wanted {sorted(wanted)}")


def digests(folder: Path) -> dict[str, str]:
    """The hash of every video in a folder, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.mp4")}


@cache
def undisturbed(program: str, large: bool) -> dict[str, str]:
    """What the command makes when nothing happens to it."""
    with tempfile.TemporaryDirectory() as name:
        more = ["--warmup-count", "0"] if program == "benchmark" else LARGE if large else []
        run = Run(Path(name) / "run", Path(name) / "out", None, more, program=program)
        try:
            codes = run.ends()
        finally:
            run.kill()
        found = digests(Path(name) / "out")
        assert not any(codes), run.said.read_text()
        assert len(found) == 2, found
        return found


def main() -> int:
    """Print a line a cell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cells", help="only these faults, joined by commas")
    parser.add_argument("--places", help="only these places, joined by commas")
    parser.add_argument("--log", action="store_true", help="print what a bad cell said")
    wanted = parser.parse_args()
    bad = 0
    print(f"{'fault':<16} {'place':<15} {'rank':<5} {'seconds':>8}  verdict", flush=True)
    for cell in all_cells():
        if wanted.cells and cell.fault not in wanted.cells.split(","):
            continue
        if wanted.places and cell.place not in wanted.places.split(","):
            continue
        head = f"{cell.fault:<16} {cell.place:<15} {cell.rank:<5}"
        with tempfile.TemporaryDirectory() as name:
            try:
                outcome = run_cell(cell, Path(name))
            except NotHere as lacks:
                print(f"{head} {'-':>8}  not run: {lacks} is missing here", flush=True)
                continue
        bad += bool(outcome.wrong)
        seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.1f}"
        said = "; ".join(line.removeprefix("error: ") for line in outcome.said) or "it went on"
        print(f"{head} {seconds:>8}  {'; '.join(outcome.wrong) or f'ok: {said}'}", flush=True)
        if outcome.wrong and wanted.log:
            print(outcome.log[-3000:], flush=True)
    print(f"{bad} cells are not as they should be" if bad else "all as they should be")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
