"""Measures of the server with the embedded model, on an idle machine:

    python scripts/measure_server.py warm    docs/benchmarks/serving-warm.json
    python scripts/measure_server.py kills   docs/benchmarks/serving-kills.json
    python scripts/measure_server.py cancel  docs/benchmarks/serving-cancel.json
    python scripts/measure_server.py clients docs/benchmarks/serving-clients.json
    python scripts/measure_server.py flood   docs/benchmarks/serving-flood.json

warm     a job's time in the server beside `Pipeline.generate` in a loop, on one rank
kills    SIGKILL of rank 0, rank 1, the gateway or all at random moments: bytes, time to ready
cancel   from the request to delete a running job to ranks that rest
clients  100 clients that send, poll, list and delete, and what the engine loses by them
flood    100,000 requests for a video at a queue that is full

Each starts its own server, prints a table and writes OUT.json with the command and the machine.
It ends with 1 where what must hold does not: growth, a lost job, other bytes, a wrong answer.
Times are measured, not judged: they are only worth something where nothing else runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:1] = [str(ROOT), str(ROOT / "tests")]

from serving import Server  # noqa: E402

from scripts.bench_ranks import cpu_name, torch_version  # noqa: E402
from scripts.soak_outputs import look  # noqa: E402

# The reference of `warm`: the same requests through the Python API, in a process of its own.
LOOP = """
import json, sys, time
from opensora_sp import Pipeline, Request, open_session
jobs, width, height, frames, steps = map(int, sys.argv[1:])
with open_session("cpu") as session:
    pipeline = Pipeline.load(session=session, dtype="fp32", show_progress=False)
    took = []
    for job in range(jobs + 1):
        start = time.perf_counter()
        pipeline.generate(Request(prompt=f"a red ball, number {job}", width=width, height=height,
                                  num_frames=frames, steps=steps))
        took.append(time.perf_counter() - start)
print(json.dumps(took[1:]))
"""


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=tuple(MEASURES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, help="jobs, kills, cancels, clients or requests")
    parser.add_argument("--ranks", type=int, help="ranks of the engine")
    parser.add_argument("--seconds", type=float, default=30, help="of a round of clients")
    parser.add_argument("--rounds", type=int, default=3, help="of clients")
    parser.add_argument(
        "--pace", type=float, default=0.5, help="seconds between polls of a client; 0: as told"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    asked = parser.parse_args()
    # Asked to end, it ends its server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    measure, count, ranks = MEASURES[asked.what]
    asked.count, asked.ranks = asked.count or count, asked.ranks or ranks
    found = measure(asked)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch_version(),
        "ranks": asked.ranks,
        **found,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        if not isinstance(value, (list, dict)):
            print(f"{name:45} {value:.4g}" if isinstance(value, float) else f"{name:45} {value}")
    return 0 if found["holds"] else 1


@contextmanager
def serving(ranks: int, *flags: str) -> Iterator[Server]:
    """A server that is ready, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "save", *flags, ranks=ranks)
        try:
            yield server.start()
        finally:
            server.stop()


# --- warm -------------------------------------------------------------------------------------


def warm(asked: argparse.Namespace) -> dict[str, Any]:
    """Jobs one by one, jobs in a row, and the same through the Python API."""
    shape = {"size": "160x96", "num_frames": 51, "num_inference_steps": 10}
    # One thread, as the server of the tests has.
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    loop = [sys.executable, "-c", LOOP, str(asked.count), "160", "96", "51", "10"]
    done = subprocess.run(loop, env=environ, capture_output=True, text=True, check=True)
    in_loop = json.loads(done.stdout.splitlines()[-1])
    with serving(asked.ranks) as server:
        made, whole = [], []
        for number in range(asked.count + 1):
            start = time.perf_counter()
            job = server.create(prompt=f"a red ball, number {number}", **shape)
            made.append(server.wait(job)["inference_time_s"])
            whole.append(time.perf_counter() - start)
        row = [server.create(prompt=f"in a row, {n}", **shape) for n in range(asked.count)]
        for job in row:
            server.wait(job)
        ends = [json.loads(_result(server, job))["finished_at"] for job in row]
    loop_s, job_s = statistics.median(in_loop), statistics.median(made[1:])
    pace = (max(ends) - min(ends)) / max(1, len(ends) - 1)
    return {
        "shape": shape,
        "loop_s": in_loop,
        "job_s": made,
        "first job, s": made[0],
        "Pipeline.generate in a loop, s": loop_s,
        "later jobs, median, s": job_s,
        "more than the loop, s": job_s - loop_s,
        "a job as its client sees it, s": statistics.median(whole[1:]),
        "from job to job in a row, s": pace,
        "within 10 % or 50 ms of the loop": job_s <= max(1.1 * loop_s, loop_s + 0.05),
        "holds": True,
    }


def _result(server: Server, job: str) -> bytes:
    return (server.save_dir / "jobs" / job / "result.json").read_bytes()


# --- kills ------------------------------------------------------------------------------------


def kills(asked: argparse.Namespace) -> dict[str, Any]:
    """A job is disturbed at a random moment of its life, from its acceptance to its end."""
    pick = random.Random(asked.seed)
    victims = ("rank 0", "rank 1", "gateway", "all")[: 4 if asked.ranks > 1 else 1]
    long = {"num_inference_steps": 60, "seed": 5}
    records: list[dict[str, Any]] = []
    wrong = []
    with serving(asked.ranks) as server:
        start = time.monotonic()
        wanted = _digest(server, server.create(**long))
        lasts = time.monotonic() - start
        for number in range(asked.count):
            victim = victims[number % len(victims)]
            job, moment = server.create(**long), pick.random() * lasts
            time.sleep(moment)
            ready = _kill(server, victim)
            right = _digest(server, job) == wanted
            records.append({"victim": victim, "moment_s": moment, "ready_s": ready, "right": right})
            print(f"{number + 1}: {victim} after {moment:.2f} s, ready again in {ready:.1f} s, "
                  f"{'the same bytes' if right else 'OTHER BYTES'}", flush=True)  # fmt: skip
            wrong += [] if right else [job]
        _, listed = server.call("GET", "/v1/videos?limit=100")
        files = [len(list((server.save_dir / "jobs" / job / "outputs").glob("*.mp4")))
                 for job in server.jobs()]  # fmt: skip
    again = [float(record["ready_s"]) for record in records]
    return {
        "kills": records,
        "an undisturbed job, s": lasts,
        "ready again, median, s": statistics.median(again),
        "ready again, longest, s": max(again),
        "jobs with other bytes": len(wrong),
        "jobs that ended": len(listed["data"]),
        "holds": not wrong and files == [1] * (asked.count + 1),
    }


def _digest(server: Server, job: str) -> str:
    video = server.wait(job, 300)
    return hashlib.sha256(server.content(job)).hexdigest() if video["file_name"] else str(video)


def _kill(server: Server, victim: str) -> float:
    """Kill; seconds until /ready says so again, measured from an engine that is not the old one."""
    ranks = server.engine_pids()
    start = time.monotonic()
    assert server.process is not None
    if victim in ("rank 0", "all"):
        os.kill(ranks[0], signal.SIGKILL)
    if victim in ("rank 1", "all"):
        os.kill(ranks[1], signal.SIGKILL)
    if victim in ("gateway", "all"):
        server.process.kill()
        server.process.wait()
        start = time.monotonic()
        server.start()
    while set(server.engine_pids()) & set(ranks) or len(server.engine_pids()) < len(ranks):
        time.sleep(0.05)
    server.wait_ready()
    return time.monotonic() - start


# --- cancel -----------------------------------------------------------------------------------


def cancel(asked: argparse.Namespace) -> dict[str, Any]:
    """How long the ranks' main threads go on computing after a running job is deleted."""
    pick, rests, steps = random.Random(asked.seed), [], []
    with serving(asked.ranks) as server:
        for _ in range(asked.count):
            job = server.create(size="160x96", num_frames=51, num_inference_steps=100_000)
            first = server.until(job, "in_progress", 120)
            start = time.monotonic()
            time.sleep(2 + pick.random())
            later = server.call("GET", f"/v1/videos/{job}")[1]
            steps.append((time.monotonic() - start) / max(1, later["step"] - first["step"]))
            pids = server.engine_pids()
            asked_at = time.monotonic()
            assert server.call("DELETE", f"/v1/videos/{job}")[0] == 200
            rests.append(max(0.0, _rests_at(pids) - asked_at))
            server.gone(job)
    step = statistics.median(steps)
    return {
        "rest_s": rests,
        "step_s": steps,
        "a step, median, s": step,
        "from the request to ranks that rest, median, s": statistics.median(rests),
        "longest, s": max(rests),
        "longest beyond a step, s": max(rests) - step,
        "within a step and 100 ms": max(rests) <= step + 0.1,
        "holds": True,
    }


def _rests_at(pids: list[int]) -> float:
    """When the last of the processes began to rest: under a tenth of a core for 0.2 s."""
    last = time.monotonic()
    before = [_ran(pid) for pid in pids]
    while True:
        time.sleep(0.01)
        now, moment = [_ran(pid) for pid in pids], time.monotonic()
        if any(b - a > 0.001 for a, b in zip(before, now, strict=True)):
            last = moment
        elif moment - last > 0.2:
            return last
        before = now


def _ran(pid: int) -> float:
    """Seconds that a process's main thread has run on a core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


# --- clients ----------------------------------------------------------------------------------


def clients(asked: argparse.Namespace) -> dict[str, Any]:
    """The engine makes one long job; rounds with and without clients take turns.

    The CPU time of the clients themselves is told apart: on a machine of few cores they take from
    the engine what in use they take elsewhere. With --pace 0 clients ask again when the server says
    so, as the openai client does.
    """
    quiet, busy, cpu, walls = [], [], [], []
    took: dict[str, list[float]] = {}
    wrong: dict[str, int] = {}
    with serving(asked.ranks) as server:
        assert server.process is not None
        long = server.create(size="160x96", num_frames=51, num_inference_steps=100_000, priority=1)
        server.until(long, "in_progress")
        for number in range(asked.rounds):
            quiet.append(_rate(server, long, lambda: time.sleep(asked.seconds)))
            gateway, judge = server.process.pid, _judge(server.process.pid)
            before = {"gateway": _cpu(gateway), "judge": _cpu(judge)}
            seen: dict[str, Any] = {}
            load = ["--clients", str(asked.count), "--seconds", str(asked.seconds)]
            load += ["--pace", str(asked.pace)]
            busy.append(_rate(server, long, lambda: seen.update(_load(server, *load))))  # noqa: B023
            after = {"gateway": _cpu(gateway), "judge": _cpu(judge)}
            took_s = {who: after[who] - before[who] for who in after} | {"clients": seen["cpu_s"]}
            cpu.append({who: seconds / seen["wall_s"] for who, seconds in took_s.items()})
            walls.append(seen["wall_s"])
            for kind, each in seen["ms"].items():
                took.setdefault(kind, []).extend(each)
            wrong |= seen["wrong"]
            said = f"{quiet[-1]:.3f} steps/s, with clients {busy[-1]:.3f}"
            print(f"round {number + 1}: {said}", flush=True)
        server.call("DELETE", f"/v1/videos/{long}")
        server.gone(long)
        left = server.jobs()
    found: dict[str, Any] = {"quiet": quiet, "busy": busy, "cpu": cpu, "wrong": wrong}
    for kind, each in took.items():
        found[f"{kind}, calls"] = len(each)
        found |= {f"{kind}, p{p}, ms": _percentile(each, p) for p in (50, 99)}
    lost = 1 - statistics.median(busy) / statistics.median(quiet)
    found |= {f"cores, {who}": statistics.median(c[who] for c in cpu) for who in cpu[0]}
    found["calls a second"] = sum(map(len, took.values())) / sum(walls)
    return {**found, "the engine loses, %": 100 * lost, "holds": not wrong and not left}


def _rate(server: Server, job: str, meanwhile: Callable[[], object]) -> float:
    """Steps a second while something happens."""
    first, start = _step(server, job)
    meanwhile()
    last, end = _step(server, job)
    return (last - first) / (end - start)


def _step(server: Server, job: str) -> tuple[int, float]:
    """The job's step, and when it was written."""
    path = server.save_dir / "jobs" / job / "progress.json"
    return json.loads(path.read_bytes())["step"], path.stat().st_mtime


def _load(server: Server, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "scripts" / "server_load.py"), server.url, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def _cpu(pid: int) -> float:
    """CPU seconds of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _judge(gateway: int) -> int:
    """The gateway's process that judges requests; there once a first one was judged."""
    for task in Path(f"/proc/{gateway}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    raise AssertionError("nothing was judged yet")


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# --- flood ------------------------------------------------------------------------------------


def flood(asked: argparse.Namespace) -> dict[str, Any]:
    """Requests at a queue of 20; then those that were taken are deleted and one video is made."""
    with serving(asked.ranks, "--limit", "queued=20") as server:
        assert server.process is not None
        long = server.create(num_inference_steps=100_000)
        server.until(long, "in_progress")
        before = look(server.process.pid)
        seen = _load(server, "--flood", str(asked.count))
        after = look(server.process.pid)
        jobs = set(server.jobs())
        for job in jobs:
            server.call("DELETE", f"/v1/videos/{job}")
        server.gone(long)
        made = server.wait(server.create())["status"]
        left = len(server.jobs())
    statuses = {int(status): count for status, count in seen["statuses"].items()}
    sizes = {name: after[name] - before[name] for name in before}
    return {
        "statuses": statuses,
        "requests": sum(statuses.values()),
        "accepted": statuses.get(200, 0),
        "refused with 429": statuses.get(429, 0),
        "a second": sum(statuses.values()) / seen["wall_s"],
        "the gateway grew by": str(sizes),
        "folders": len(jobs),
        "a video afterwards": made,
        "holds": statuses.get(200) == 20
        and statuses.get(429) == asked.count - 20
        and len(jobs) == 21
        and (made, left) == ("completed", 1),
    }


# What is measured: the function, how often it is done, ranks.
MEASURES: dict[str, tuple[Callable[[argparse.Namespace], dict[str, Any]], int, int]] = {
    "warm": (warm, 20, 1),
    "kills": (kills, 20, 2),
    "cancel": (cancel, 10, 2),
    "clients": (clients, 100, 2),
    "flood": (flood, 100_000, 1),
}

if __name__ == "__main__":
    sys.exit(main())
