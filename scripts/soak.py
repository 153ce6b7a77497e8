"""Hours of mixed jobs: whether memory, descriptors, threads and results stay as they were.

    python scripts/soak.py --jobs 500 --ranks 2 --every 10 --to docs/benchmarks/soak-ranks
    python scripts/soak.py --jobs 500 --ranks 2 --every 10 --server --to docs/benchmarks/soak-server
    python scripts/soak.py --jobs 100000 --seconds 7200 --ranks 2 --to soak-hours

Without --server every rank is a process that makes one job after another through the Python API
and writes its video. With --server the jobs go through `opensora-sp serve`. Jobs differ in size,
length, steps, clips, references and number of videos. Every second round of them repeats the first,
byte by byte; the rounds between have captions and seeds of their own.

Every process is looked at about once a second, and --every seconds the most that it held since is
a sample: memory (RSS), memory that no other process shares (USS), open files, threads and processes
below it. The most, because what a job needs on its way is given back to the allocator, which at
some moment begins to keep it. The first --warm jobs are left out of the slopes. scripts/trend.py
says how sure a slope is.

Writes TO.json and TO.svg. A series is flat when the upper end of its slope's 95 % interval, over
the time that was looked at, is at most what MOST_GROWTH allows, or when all its samples lie that
close together. Ends with 1 where a series is not
flat, where there are too few samples to tell, or where a request gave other bytes than before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:1] = [str(ROOT), str(ROOT / "tests")]

from ranks import environments  # noqa: E402

from opensora_sp.media.line_plot import Line, Panel, write_plot  # noqa: E402
from scripts.bench_ranks import cpu_name, torch_version  # noqa: E402
from scripts.measure_server import serving  # noqa: E402
from scripts.soak_outputs import LOOKED_AT, look  # noqa: E402
from scripts.trend import trend  # noqa: E402

# What a process may gain over the time that was looked at.
MOST_GROWTH = {"rss_mb": 12.0, "uss_mb": 12.0, "files": 2.0, "threads": 2.0, "children": 1.0}
TITLES = {
    **LOOKED_AT,
    "uss_mb": "memory that is not shared (USS), MB",
    "children": "processes below",
}
# Requests of the Python API. Those of one job are made together.
KINDS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"width": 48, "height": 32, "num_frames": 17, "steps": 2},),
    ({"width": 64, "height": 48, "num_frames": 1, "steps": 3},),
    ({"width": 96, "height": 64, "num_frames": 34, "steps": 2},),
    ({"width": 48, "height": 32, "num_frames": 17, "steps": 2},) * 2,
    ({"width": 48, "height": 32, "num_frames": 34, "steps": 2, "loop": 2},),
    ({"width": 64, "height": 48, "num_frames": 17, "steps": 2, "mask_strategy": "0"},),
    ({"width": 64, "height": 48, "num_frames": 20, "steps": 4, "cfg_scale": 1.0},),
    ({"width": 144, "height": 96, "num_frames": 17, "steps": 2},),
)
# Of the server: size, frames, steps.
SERVED = tuple(
    {"size": size, "num_frames": frames, "num_inference_steps": steps}
    for size, frames, steps in (
        ("48x32", 17, 2), ("64x48", 1, 3), ("96x64", 34, 2), ("48x32", 1, 2),
        ("64x48", 17, 4), ("96x64", 17, 2), ("48x32", 51, 2), ("144x96", 17, 2),
    )
)  # fmt: skip
KEPT_JOBS = 20  # on the server; older ones are deleted, so that a full board is not a slope
ENDS_WITHIN_S = 120.0  # after it was told to stop


@dataclass
class Found:
    """What a soak has found so far.

    warm_until_h, last_h: when the last of the first jobs, and of all jobs, ended. samples: by
    process, rows of hours, jobs done and what `look_closely` gives. digests: of the
    repeated requests, by kind. drift: lines about bytes that changed.
    """

    started: float = field(default_factory=time.monotonic)
    jobs: int = 0
    compared: int = 0
    warm_until_h: float = 0.0
    last_h: float = 0.0
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    drift: list[str] = field(default_factory=list)

    def hours(self) -> float:
        """Since the start."""
        return (time.monotonic() - self.started) / 3600

    def done(self, number: int, digest: str, kinds: int, warm: int) -> None:
        """A job has ended."""
        self.jobs, self.last_h = number + 1, self.hours()
        if self.jobs <= warm:
            self.warm_until_h = self.last_h
        if not repeated(number, kinds):
            return
        first = self.digests.setdefault(number % kinds, digest)
        self.compared += number >= kinds
        if digest != first:
            self.drift.append(f"job {number}, kind {number % kinds}: {digest}, first {first}")


def main() -> int:
    """Run, write the records and the picture, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no job after these")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--server", action="store_true", help="through opensora-sp serve")
    parser.add_argument("--every", type=float, default=60.0, help="seconds of a sample")
    parser.add_argument("--warm", type=int, default=8 * len(KINDS), help="jobs before the slopes")
    parser.add_argument("--to", type=Path, default=Path("soak"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return work(asked.worker, asked.jobs)
    if asked.jobs < 1 or asked.ranks < 1 or asked.every <= 0 or asked.seconds <= 0:
        parser.error("--jobs and --ranks are 1 or more, --every and --seconds above 0")
    # Asked to end, it ends what it started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = Found()
    (through_server if asked.server else on_ranks)(asked, found)
    for rows in found.samples.values():  # what was seen while the processes ended says nothing
        rows[:] = [row for row in rows if row["hours"] <= found.last_h]
    slopes = fitted(found)
    flat = bool(slopes) and all(each["verdict"] == "flat" for each in slopes)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch_version(),
        "ranks": asked.ranks,
        "server": asked.server,
        "jobs": found.jobs,
        "hours": found.hours(),
        "warm_until_h": found.warm_until_h,
        "same_bytes": {"compared": found.compared, "others": found.drift},
        "slopes": slopes,
        "flat": flat,
        "samples": found.samples,
    }
    asked.to.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=None, allow_nan=False)
    asked.to.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    draw(asked.to.with_suffix(".svg"), found, slopes)
    print(f"{found.jobs} jobs in {found.hours():.2f} h; {found.compared} repeated requests, "
          f"{len(found.drift)} with other bytes")  # fmt: skip
    for each in slopes:
        print(f"{each['process']:10} {each['quantity']:9} {said(each)}: {each['verdict']}")
    if not slopes:
        print("too few samples for a slope: more --jobs or --seconds, or a smaller --every")
    for line in found.drift:
        print(f"other bytes: {line}")
    return 0 if flat and not found.drift else 1


def repeated(number: int, kinds: int) -> bool:
    """Whether a job is one of the requests that come again and again."""
    return number // kinds % 2 == 0


def words(number: int, kinds: int) -> dict[str, Any]:
    """Caption and seed of a job."""
    if repeated(number, kinds):
        return {"prompt": "a red ball rolls to the right", "seed": 42}
    return {"prompt": f"a red ball, number {number}", "seed": number}


# --- samples ----------------------------------------------------------------------------------


def look_closely(pid: int, parents: dict[int, int]) -> dict[str, float]:
    """What a process holds now. parents: of every process of the machine."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace")
    own = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    below, level = 0, {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        below += len(level)
    return {**look(pid), "uss_mb": round(own * 1024 / 1e6, 2), "children": below}


def parents_of_all() -> dict[int, int]:
    """The parent of every process that there is."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                stat = (entry / "stat").read_text(encoding="ascii", errors="replace")
                found[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    return found


class Sampler(threading.Thread):
    """Looks at processes until it is told to stop."""

    def __init__(self, found: Found, pids: dict[str, int], every: float) -> None:
        super().__init__(daemon=True)
        self._found, self._pids, self._every = found, pids, every
        self._stop_asked = threading.Event()
        for name in pids:
            found.samples[name] = []

    def run(self) -> None:
        """Until `stop`. A part of an interval at the end is no sample."""
        most: dict[str, dict[str, float]] = {name: {} for name in self._pids}
        due = time.monotonic() + self._every
        while not self._stop_asked.wait(min(1.0, self._every / 5)):
            parents = parents_of_all()
            for name, pid in self._pids.items():
                with suppress(OSError, KeyError):  # it has ended; who waits for it says so
                    seen = look_closely(pid, parents)
                    most[name] = {k: max(v, most[name].get(k, v)) for k, v in seen.items()}
            if time.monotonic() >= due:
                due += self._every
                for name, each in most.items():
                    if each:
                        when = {"hours": round(self._found.hours(), 5), "jobs": self._found.jobs}
                        self._found.samples[name].append({**when, **each})
                most = {name: {} for name in self._pids}

    def stop(self) -> None:
        """Return when it looks no more."""
        self._stop_asked.set()
        self.join()


# --- ranks ------------------------------------------------------------------------------------


def on_ranks(asked: argparse.Namespace, found: Found) -> None:
    """Every rank is a process of its own, started here so that its number is known."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", folder]
        command += ["--jobs", str(asked.jobs)]
        own = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        processes = [
            subprocess.Popen(
                command,
                env={**variables, **own},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
            )
            for rank, variables in enumerate(environments(asked.ranks))
        ]
        sampler = Sampler(
            found, {f"rank {n}": each.pid for n, each in enumerate(processes)}, asked.every
        )
        stopping = [
            threading.Timer(asked.seconds, (Path(folder) / "stop").touch),
            threading.Timer(asked.seconds + ENDS_WITHIN_S, _kill, [processes]),
        ]
        for timer in stopping:
            timer.daemon = True
            if math.isfinite(asked.seconds):
                timer.start()
        sampler.start()
        try:
            assert processes[0].stdout is not None
            for line in processes[0].stdout:
                if line.startswith("{"):
                    told = json.loads(line)
                    found.done(told["job"], told["digest"], len(KINDS), asked.warm)
            sampler.stop()
            codes = [process.wait() for process in processes]
        finally:
            for timer in stopping:
                timer.cancel()
            _kill(processes)
    if any(codes):
        raise SystemExit(f"after {found.jobs} jobs: exit codes of the ranks {codes}")


def _kill(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def work(folder: Path, jobs: int) -> int:
    """One rank: make jobs until they are done or the file `stop` is there; say each."""
    from PIL import Image

    from opensora_sp import Pipeline, Request, open_session
    from opensora_sp.media.writer import VideoWriter

    with open_session("cpu") as session:
        picture = folder / "reference.png"
        if session.leads:
            Image.linear_gradient("L").convert("RGB").save(picture)
        pipeline = Pipeline.load(session=session, dtype="fp32", show_progress=False)
        for number in range(jobs):
            if session.control.meet((folder / "stop").exists() if session.leads else None):
                break
            requests = [
                Request(
                    **words(number, len(KINDS)),
                    **kind,
                    sample_index=place,
                    reference_path=str(picture) if "mask_strategy" in kind else "",
                )
                for place, kind in enumerate(KINDS[number % len(KINDS)])
            ]
            digest = hashlib.sha256()
            for frames in pipeline.generate(requests).videos:
                if frames is None:
                    continue
                path = folder / "made.mp4"
                with VideoWriter(
                    path, fps=24, height=frames.shape[1], width=frames.shape[2], metadata={}
                ) as writer:
                    writer.write(frames)
                digest.update(path.read_bytes())
            if session.leads:
                print(json.dumps({"job": number, "digest": digest.hexdigest()}), flush=True)
    return 0


# --- the server -------------------------------------------------------------------------------


def through_server(asked: argparse.Namespace, found: Found) -> None:
    """A client that sends a job, polls, fetches the video and its picture, lists and deletes."""
    with serving(asked.ranks) as server:
        assert server.process is not None
        pids = {"gateway": server.process.pid}
        pids |= {f"rank {n}": pid for n, pid in enumerate(server.engine_pids())}
        sampler = Sampler(found, pids, asked.every)
        found.started = time.monotonic()
        sampler.start()
        kept: list[str] = []
        for number in range(asked.jobs):
            if found.hours() * 3600 > asked.seconds:
                break
            job = server.create(**SERVED[number % len(SERVED)], **words(number, len(SERVED)))
            video = server.wait(job, 600)
            if video["status"] != "completed":
                raise SystemExit(f"job {number} failed: {video}")
            digest = hashlib.sha256(server.content(job)).hexdigest()
            server.content(job, "thumbnail")
            found.done(number, digest, len(SERVED), asked.warm)
            kept.append(job)
            if len(kept) > KEPT_JOBS:
                server.call("GET", "/v1/videos?limit=100")
                server.call("DELETE", f"/v1/videos/{kept.pop(0)}")
        sampler.stop()
        if server.engine_pids() != [pid for name, pid in pids.items() if name != "gateway"]:
            raise SystemExit(f"the engine was started again within {found.jobs} jobs")


# --- slopes -----------------------------------------------------------------------------------


def fitted(found: Found) -> list[dict[str, Any]]:
    """The slope of every series after the first jobs, with its interval and what it means."""
    slopes = []
    for name, quantity, x, y in _series(found):
        if len(x) < 3:
            continue
        line, span = trend(x, y), x[-1] - x[0]
        gain = line.slope * span
        most = None if line.high is None else line.high * span
        if max(y) - min(y) <= MOST_GROWTH[quantity]:
            verdict = "flat"  # whatever its shape: steps too have neighbours that are alike
        elif most is not None and most <= MOST_GROWTH[quantity]:
            verdict = "flat"
        elif line.low is not None and line.low > 0 and gain > MOST_GROWTH[quantity]:
            verdict = "GROWS"
        else:
            verdict = "not told: too few samples, or too alike"
        slopes.append(
            {"process": name, "quantity": quantity, "samples": len(x), "span_h": span,
             "gain": gain, "gain_at_most": most, **asdict(line), "verdict": verdict}
        )  # fmt: skip
    return slopes


def _series(found: Found) -> Iterator[tuple[str, str, list[float], list[float]]]:
    for name, rows in found.samples.items():
        warm = [row for row in rows if row["hours"] > found.warm_until_h]
        for quantity in MOST_GROWTH:
            yield name, quantity, [r["hours"] for r in warm], [r[quantity] for r in warm]


def said(each: dict[str, Any]) -> str:
    """A slope in words."""
    if each["low"] is None:
        return f"{each['slope']:+.3g} an hour, interval not known"
    return f"{each['slope']:+.3g} an hour, 95 % from {each['low']:+.3g} to {each['high']:+.3g}"


def draw(path: Path, found: Found, slopes: list[dict[str, Any]]) -> None:
    """A panel for each quantity: the samples of every process, and their lines dashed."""
    # The plot's axis has whole numbers, so it is in minutes.
    minutes: Callable[[float], float] = lambda hours: 60 * hours
    panels = []
    for quantity in MOST_GROWTH:
        lines = []
        for colour, (name, rows) in enumerate(found.samples.items()):
            points = [(minutes(row["hours"]), row[quantity]) for row in rows]
            fits = [s for s in slopes if (s["process"], s["quantity"]) == (name, quantity)]
            note = f"{name}: {said(fits[0])}" if fits else name
            lines.append(Line(note, points, colour))
            for fit in fits:
                ends = (rows[-1]["hours"] - fit["span_h"], rows[-1]["hours"])
                lines.append(
                    Line(
                        "",
                        [(minutes(x), fit["at_zero"] + fit["slope"] * x) for x in ends],
                        colour,
                        dashed=True,
                    )
                )
        panels.append(Panel(TITLES[quantity], lines))
    title = f"{found.jobs} jobs; {found.compared} repeated, {len(found.drift)} with other bytes"
    write_plot(path, panels, title=title, x_title="minutes")


if __name__ == "__main__":
    sys.exit(main())
