"""Measures of many groups on one Postgres, all on this machine:

    python scripts/measure_groups.py chaos      docs/benchmarks/groups-chaos.json
    python scripts/measure_groups.py throughput docs/benchmarks/groups-throughput.json
    python scripts/measure_groups.py list       docs/benchmarks/groups-list.json
    python scripts/measure_groups.py split      docs/benchmarks/groups-split.json

chaos       3 groups of 2 ranks and 2 gateways make 120 jobs of the embedded model while ranks,
            groups and gateways are killed at random moments and the database is restarted once:
            bytes, outputs of each job, how long until another attempt began
throughput  groups that sleep instead of making a video: jobs per second of 1, 2 and 4 groups, and
            what a job, an idle group and a gateway cost the database
list        generate --queue with 100,000 prompts, a tenth of which stand twice, and a group that
            makes nothing; interrupted twice: memory of the command, jobs that were made twice
split       two groups in network namespaces. The link of the one that makes a job is cut for less
            than the lease, until the other one has the job, and until that one has ended it: bytes,
            outputs of each job, seconds until it was taken over and until it ended. As root

It prints a table and writes OUT.json with the command and the machine. It ends with 1 where what
must hold does not: a lost job, other bytes, a second output. Times are measured, not judged.
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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:1] = [str(ROOT), str(ROOT / "tests")]

from groups import LEASE_SECONDS, Gateway, GroupProcess, Pool  # noqa: E402
from namespaces import Network, network, why_no_network  # noqa: E402
from postgres import Postgres, programs  # noqa: E402

from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec  # noqa: E402
from opensora_sp.server.queue_url import parse_queue_url  # noqa: E402
from opensora_sp.server.shared_link import QueueLost  # noqa: E402
from opensora_sp.server.shared_queue import LEASE_SECONDS as LEASE  # noqa: E402
from opensora_sp.server.shared_queue import SharedQueue  # noqa: E402
from opensora_sp.server.sweeper import Sweeper  # noqa: E402
from scripts.bench_ranks import cpu_name, torch_version  # noqa: E402

# Kinds of jobs, all small: (size, frames, steps, seed).
KINDS = (("48x32", 17, 30, 1), ("64x48", 17, 20, 2), ("96x64", 1, 40, 3), ("48x32", 17, 60, 4))
# Long enough that a group is cut off in the middle of it.
CUT_JOB = {"num_inference_steps": 400, "seed": 5}
VICTIMS = ("rank 0", "rank 1", "group", "gateway")


def main() -> int:
    """Measure, print, write."""
    if sys.argv[1:2] == ["stand-in"]:
        return stand_in(*sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("chaos", "throughput", "list", "split"))
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--jobs",
        type=int,
        help="120 of chaos, 100 for each group of throughput, 100000 of list, 5 of each cut of "
        "split",
    )
    parser.add_argument("--groups", type=int, default=3, help="of chaos")
    parser.add_argument("--ranks", type=int, default=2, help="of each group of chaos")
    parser.add_argument("--every", type=float, default=20, help="mean seconds between two kills")
    parser.add_argument("--most-seconds", type=float, default=3600, help="of chaos")
    parser.add_argument("--most-kills", type=int, default=10_000, help="then nothing is disturbed")
    parser.add_argument("--lease", type=float, default=LEASE_SECONDS, help="of chaos, seconds")
    parser.add_argument("--seed", type=int, default=1, help="of the kills")
    asked = parser.parse_args()
    if programs() is None:
        print("error: no Postgres here: apt-get install postgresql", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # asked to end, it ends what it started
    measures = {"chaos": chaos, "throughput": throughput, "list": a_list, "split": split}
    found = measures[asked.what](asked)
    found = {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch_version(),
    } | found
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"{name:40} {value}")
    return 0 if found.get("holds", True) else 1


@contextmanager
def database() -> Iterator[Postgres]:
    """A Postgres that goes with the block."""
    one = Postgres()
    try:
        yield one.start()
    finally:
        one.remove()


def chaos(asked: argparse.Namespace) -> dict[str, Any]:
    """Kill at random while jobs are made, and compare every output with an undisturbed one."""
    luck, count = random.Random(asked.seed), asked.jobs or 120
    with database() as postgres, tempfile.TemporaryDirectory() as folder:
        save = Path(folder) / "save"
        groups = [
            GroupProcess(
                f"group-{number}", save, postgres.url, ranks=asked.ranks, lease=asked.lease
            )
            for number in range(asked.groups)
        ]
        gateways = [Gateway(f"gateway-{number}", save, postgres.url) for number in range(2)]
        watch = Watch(parse_queue_url(postgres.url))
        kills: list[dict[str, Any]] = []
        disturber = Disturber(luck, groups, gateways, postgres, watch, kills, asked)
        try:
            for gateway in gateways:
                gateway.start()
            for group in groups:
                group.start()
            right = [undisturbed(gateways[0], kind) for kind in KINDS]
            watch.start()
            begun = time.monotonic()
            disturber.start()
            jobs = send(gateways, count, luck)
            ended = watch.until_ended(list(jobs), asked.most_seconds)
            disturber.end()
            seconds = time.monotonic() - begun
            gateway = next(one for one in gateways if alive(one))
            wrong, doubled = [], []
            for job, kind in jobs.items():
                if job not in ended:
                    continue
                video = gateway.wait(job)
                content = gateway.content(job) if video["status"] == "completed" else b""
                if hashlib.sha256(content).hexdigest() != right[kind]:
                    wrong.append({"job": job, "kind": kind, "video": video})
                outputs = [
                    path
                    for path in (save / "jobs" / job / "attempts").rglob("video_0000.*")
                    if path.suffix in (".mp4", ".png")
                ]
                if len(outputs) != 1:
                    doubled.append(job)
            again = watch.takeovers(kills)
        finally:
            disturber.end()  # it would start again what is ended here
            watch.close()
            for group in groups:
                group.kill()
            for gateway in gateways:
                gateway.stop()
    lapses = {
        victim: [kill["takeover_s"] for kill in kills if kill["victim"] == victim and again]
        for victim in VICTIMS
    }
    known = {name: [s for s in all_of if s is not None] for name, all_of in lapses.items()}
    return {
        "groups": asked.groups,
        "ranks of each": asked.ranks,
        "lease, s": asked.lease,
        "kills": kills,
        "number of kills": dict(Counter(kill["victim"] for kill in kills)),
        "jobs": len(jobs),
        "jobs that ended": len(ended),
        "attempts": dict(Counter(watch.attempts.values())),
        "jobs with other bytes": wrong,
        "jobs with other than one output": doubled,
        "seconds": round(seconds, 1),
        **{
            f"until another attempt, killed {name}, median and longest, s": (
                round(statistics.median(some), 2),
                round(max(some), 2),
            )
            for name, some in known.items()
            if some
        },
        "holds": not wrong and not doubled and len(ended) == len(jobs),
    }


def undisturbed(gateway: Gateway, kind: tuple[str, int, int, int]) -> str:
    """The digest of a kind of job that nothing disturbs."""
    job = create(gateway, kind)
    video = gateway.wait(job, 600)
    assert video["status"] == "completed", video
    return hashlib.sha256(gateway.content(job)).hexdigest()


def create(gateway: Gateway, kind: tuple[str, int, int, int]) -> str:
    """Queue a job of a kind; its id."""
    size, frames, steps, seed = kind
    return gateway.create(size=size, num_frames=frames, num_inference_steps=steps, seed=seed)


def alive(gateway: Gateway) -> bool:
    """Whether its process runs."""
    return gateway.process is not None and gateway.process.poll() is None


def send(gateways: Sequence[Gateway], count: int, luck: random.Random) -> dict[str, int]:
    """Queue so many jobs with whichever gateway takes them; the accepted ones and their kinds."""
    jobs: dict[str, int] = {}
    while len(jobs) < count:
        kind = luck.randrange(len(KINDS))
        try:
            jobs[create(luck.choice(gateways), KINDS[kind])] = kind
        except (OSError, AssertionError, ValueError):  # killed, or it has no database
            time.sleep(0.5)
        time.sleep(luck.random() * 0.4)
    return jobs


class Watch:
    """Looks at the queue ten times a second: when each attempt at each job was first seen."""

    def __init__(self, url: str) -> None:
        self._queue = SharedQueue(url, "watch")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.attempts: dict[str, int] = {}
        self.held: dict[str, str] = {}  # the job of each group
        self.ready: set[str] = set()  # groups that take jobs
        self._ended: set[str] = set()
        self._seen: list[tuple[float, str, int]] = []

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(30)
        self._queue.close()

    def until_ended(self, jobs: Sequence[str], seconds: float) -> set[str]:
        """Wait until all have ended, or so long; those that have."""
        end = time.monotonic() + seconds
        while not self._ended.issuperset(jobs) and time.monotonic() < end:
            time.sleep(0.2)
        return self._ended.intersection(jobs)

    def takeovers(self, kills: Sequence[dict[str, Any]]) -> int:
        """Note at each kill when the next attempt at the job began that was being made."""
        for kill in kills:
            later = [
                moment - kill["at"]
                for moment, job, attempt in self._seen
                if job == kill["job"] and attempt > kill["attempt"] and moment > kill["at"]
            ]
            kill["takeover_s"] = round(min(later), 2) if later else None
        return len(kills)

    def _run(self) -> None:
        since: int | None = None
        while not self._end.wait(0.1):
            try:
                rows, since = self._queue.changes(since)
            except QueueLost:
                continue
            now = time.monotonic()
            for row in rows:
                if row.attempt > self.attempts.get(row.id, 0):
                    self.attempts[row.id] = row.attempt
                    self._seen.append((now, row.id, row.attempt))
                if row.state == "taken" and row.group is not None:
                    self.held[row.group] = row.id
                elif self.held.get(row.group or "") == row.id:
                    del self.held[row.group or ""]
                if row.state == "ended":
                    self._ended.add(row.id)
            with suppress(QueueLost):
                groups = self._queue.groups()
                self.ready = {one.name for one in groups if one.alive and one.state == "ready"}


class Disturber:
    """Kills something at random moments, starts it again, and restarts the database once."""

    def __init__(
        self,
        luck: random.Random,
        groups: Sequence[GroupProcess],
        gateways: Sequence[Gateway],
        postgres: Postgres,
        watch: Watch,
        kills: list[dict[str, Any]],
        asked: argparse.Namespace,
    ) -> None:
        self._luck, self._groups, self._gateways = luck, groups, gateways
        self._postgres, self._watch, self._kills, self._asked = postgres, watch, kills, asked
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """No more kills; what was killed is started again first."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._end.wait(self._luck.expovariate(1 / self._asked.every)):
            if len(self._kills) >= self._asked.most_kills:
                break
            number += 1
            if number == 4:
                self._note("database", "")
                self._postgres.stop("immediate")
                time.sleep(self._asked.lease + 2)
                self._postgres.start()
                continue
            victim = self._luck.choice(VICTIMS)
            if victim == "gateway":
                gateway = self._luck.choice(self._gateways)
                self._note(victim, gateway.log.stem)
                assert gateway.process is not None
                gateway.process.kill()
                gateway.process.wait()
                time.sleep(self._luck.random() * 3)
                gateway.start()
                continue
            for each in self._groups:  # one that was killed too often in a row has given up
                if each.process is not None and each.process.poll() is not None:
                    each.start()
            group = self._luck.choice(self._groups)
            ranks = group.ranks_pids()
            if len(ranks) < group.ranks:
                continue  # it is being started
            # While its ranks load it is mostly left alone: else none would ever make a job where a
            # start takes longer than the time between two kills.
            if group.name not in self._watch.ready and self._luck.random() < 0.75:
                continue
            self._note(victim, group.name)
            if victim == "group":
                group.kill()
                self._end.wait(self._luck.random() * 10)
                group.start()
            else:
                os.kill(ranks[int(victim[-1]) % len(ranks)], signal.SIGKILL)

    def _note(self, victim: str, name: str) -> None:
        job = self._watch.held.get(name)
        print(f"{len(self._kills) + 1}: {victim} {name}", file=sys.stderr, flush=True)
        self._kills.append(
            {
                "victim": victim,
                "name": name,
                "at": time.monotonic(),
                "job": job,
                "attempt": self._watch.attempts.get(job or "", 0),
            }
        )


def throughput(asked: argparse.Namespace) -> dict[str, Any]:
    """Jobs per second of groups that sleep, and what the database does for it."""
    found: dict[str, Any] = {}
    with database() as postgres:
        url = parse_queue_url(postgres.url)
        queue = SharedQueue(url, "measure")
        queue.prepare()
        cpu = partial(database_cpu, postgres.pid())
        for seconds, each in ((0.2, asked.jobs or 100), (0.0, 10 * (asked.jobs or 100))):
            alone = 0.0
            for groups in (1, 2, 4):
                took, spent, calls = sleepers(queue, cpu, url, groups, each * groups, seconds)
                pace = each * groups / took
                alone = alone or pace
                name = f"{groups} groups, jobs of {seconds:g} s"
                found[f"{name}: jobs/s"] = round(pace, 2)
                found[f"{name}: of {groups} times one group"] = round(pace / alone / groups, 3)
                found[f"{name}: database CPU ms a job"] = round(1000 * spent / each / groups, 2)
                found[f"{name}: transactions a job"] = round(calls / each / groups, 1)
        for groups in (4, 16):
            with running(url, groups, 0.0):
                time.sleep(3)
                spent, calls = cpu(), transactions(queue)
                time.sleep(20)
                spent, calls = cpu() - spent, transactions(queue) - calls
            name = f"{groups} idle groups, each"
            found[f"{name}: database CPU ms a second"] = round(50 * spent / groups, 2)
            found[f"{name}: transactions a second"] = round(calls / 20 / groups, 2)
        found |= looks(queue, cpu)
        queue.close()
    return found


def sleepers(
    queue: SharedQueue,
    cpu: Callable[[], float],
    url: str,
    groups: int,
    count: int,
    seconds: float,
) -> tuple[float, float, int]:
    """Seconds until groups that sleep have ended `count` jobs; the database's CPU, transactions."""
    with running(url, groups, seconds):
        while sum(group.alive and group.state == "ready" for group in queue.groups()) < groups:
            time.sleep(0.1)
        time.sleep(1)
        calls = transactions(queue)
        put_many(queue, count)
        begun, spent = time.monotonic(), cpu()
        while count_of(queue, "queued", "taken"):
            time.sleep(0.05)
        took, spent = time.monotonic() - begun, cpu() - spent
        calls = transactions(queue) - calls
        queue.link.run(lambda connection: connection.execute("DELETE FROM opensora_sp.jobs"))
    return took, spent, calls


def put_many(queue: SharedQueue, count: int) -> None:
    """Queue jobs that appear all at once."""
    spec = json.dumps(asdict(JobSpec("", time.time(), ("--prompt=x",))))

    def insert(connection: Any) -> None:
        connection.execute(
            "INSERT INTO opensora_sp.jobs (id, state, priority, created_at, shape, spec, changed,"
            " changed_at) SELECT id, 'queued', 100, clock_timestamp(), '', %s::jsonb ||"
            " jsonb_build_object('id', id), pg_current_xact_id(), clock_timestamp() FROM"
            " (SELECT 'video_' || substr(md5(random()::text), 1, 24) AS id"
            "  FROM generate_series(1, %s)) AS made",
            [spec, count],
        )
        connection.execute("NOTIFY opensora_sp")

    queue.link.run(insert)


def a_list(asked: argparse.Namespace) -> dict[str, Any]:
    """A long list, sent three times over: twice interrupted, then to its end."""
    count = asked.jobs or 100_000
    with database() as postgres, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        with path.open("w", encoding="utf-8") as file:
            for number in range(count):
                file.write(f"prompt {number}\n" * (2 if number % 10 == 0 else 1))
        url = parse_queue_url(postgres.url)
        queue = SharedQueue(url, "measure")
        queue.prepare()
        command = [sys.executable, "-m", "opensora_sp", "generate", "--queue", url]
        command += ["--save-dir", f"{folder}/shared", "--prompt-path", str(path)]
        rounds = []
        with running(url, 1, 0.0):
            for share in (0.2, 0.6, 1.1):
                rounds.append(sent_list(command, queue, int(count * share), folder))
                print(rounds[-1], file=sys.stderr, flush=True)
        attempts = Counter(row.attempt for row in queue.changes(None)[0])
        queue.close()
    peaks = [one["peak_mb"] for one in rounds if one["peak_mb"]]
    return {
        "prompts": count,
        "lines": count + (count + 9) // 10,
        "rounds": rounds,
        "jobs by how often they were taken": dict(attempts),
        "most memory of the command, MB": max(peaks),
        "holds": dict(attempts) == {1: count} and [one["code"] for one in rounds] == [130, 130, 0],
    }


def sent_list(command: list[str], queue: SharedQueue, until: int, folder: str) -> dict[str, Any]:
    """Send a list until so many jobs have ended, then interrupt it; its code, memory, seconds."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun, memory = time.monotonic(), []
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=nothing)
        interrupted = False
        while process.poll() is None:
            time.sleep(0.5)
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            resident = next((line for line in text.splitlines() if "VmRSS" in line), "")
            if resident:
                memory.append(round(int(resident.split()[1]) / 1000, 1))
            if not interrupted and count_of(queue, "ended") >= until:
                interrupted = True
                process.send_signal(signal.SIGINT)
    return {
        "code": process.wait(),
        "seconds": round(time.monotonic() - begun, 1),
        "jobs_ended": count_of(queue, "ended"),
        "peak_mb": max(memory, default=0.0),
        "mb_at_tenths": memory[:: max(1, len(memory) // 10)],
    }


def split(asked: argparse.Namespace) -> dict[str, Any]:
    """Cut a group off that makes a job, and mend the link, at three moments."""
    if (reason := why_no_network()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    found: dict[str, Any] = {"lease, s": LEASE_SECONDS}
    holds = True
    with network(2) as net, tempfile.TemporaryDirectory() as folder:
        postgres = Postgres(net.address)
        inside = {name: net.inside(number, Path(folder)) for number, name in enumerate("ab")}
        try:
            postgres.start()
            with Pool(Path(folder) / "save", postgres.url, inside) as pool:
                right = pool.digest(pool.first.create(**CUT_JOB))  # groups were started meanwhile
                begun = time.monotonic()
                pool.digest(pool.first.create(**CUT_JOB))
                found["seconds, undisturbed"] = round(time.monotonic() - begun, 1)
                for until in ("half a lease", "taken over", "ended"):
                    rounds = [
                        cut_off(pool, net, right, until, found["lease, s"])
                        for _ in range(asked.jobs or 5)
                    ]
                    found[f"cut until {until}"] = rounds
                    holds = holds and all(one["bytes equal"] for one in rounds)
                    holds = holds and all(one["outputs"] == 1 for one in rounds)
                    for name in ("taken over, s", "ended, s"):
                        known = [one[name] for one in rounds if one[name] is not None]
                        if known:
                            middle = statistics.median(known), max(known)
                            found[f"cut until {until}: {name}: median, longest"] = middle
        finally:
            postgres.remove()
    return found | {"holds": holds}


def cut_off(pool: Pool, net: Network, right: str, until: str, lease: float) -> dict[str, Any]:
    """One job, with the link of its group cut; seconds count from the cut."""
    job = pool.first.create(**CUT_JOB)
    name = pool.maker(job)
    net.cut("ab".index(name))
    cut, taken = time.monotonic(), None
    if until == "half a lease":
        time.sleep(lease / 2)
    else:
        pool.heir(job, name)
        taken = round(time.monotonic() - cut, 1)
    if until == "ended":
        pool.digest(job)
    else:
        net.mend("ab".index(name))
    same = pool.digest(job) == right
    ended = round(time.monotonic() - cut, 1)
    net.mend("ab".index(name))
    # Until both are there again, and what the one that was cut off left is removed.
    end = time.monotonic() + 120
    attempts = pool.save_dir / "jobs" / job / "attempts"
    while len(list(attempts.iterdir())) > 1 or b'{state="ready"} 2.0' not in pool.first.metrics():
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return {
        "taken over, s": taken,
        "ended, s": ended,
        "bytes equal": same,
        "outputs": len(pool.outputs(job)),
        "attempt of the output": max(int(path.name) for path in attempts.iterdir()),
    }


def looks(queue: SharedQueue, cpu: Callable[[], float]) -> dict[str, Any]:
    """What a look of a gateway costs with so many jobs in the list."""
    found = {}
    for size in (100, 10_000):
        put_many(queue, size - count_of(queue, "queued"))
        _, since = queue.changes(None)
        begun, spent = time.perf_counter(), cpu()
        for _ in range(400):
            _, since = queue.changes(since)
            queue.groups()
        took, spent = time.perf_counter() - begun, cpu() - spent
        found[f"a gateway's look at {size} jobs, ms"] = round(1000 * took / 400, 2)
        found[f"a gateway's look at {size} jobs, database CPU ms"] = round(1000 * spent / 400, 2)
    return found


def count_of(queue: SharedQueue, *states: str) -> int:
    """How many jobs are in one of these states."""
    return int(
        queue.link.run(
            lambda connection: connection.execute(
                "SELECT count(*) FROM opensora_sp.jobs WHERE state = ANY(%s)", [list(states)]
            ).fetchone()
        )[0]
    )


def transactions(queue: SharedQueue) -> int:
    """Transactions of the database since it was started; it counts its own sessions' with delay."""
    time.sleep(1.1)

    def read(connection: Any) -> int:
        connection.execute("SELECT pg_stat_clear_snapshot()")
        found = connection.execute("SELECT sum(xact_commit) FROM pg_stat_database").fetchone()
        return int(found[0])

    return queue.link.run(read)


def database_cpu(pid: int) -> float:
    """CPU seconds of a Postgres with this first process, ended sessions' too."""
    ticks, own = os.sysconf("SC_CLK_TCK"), 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            # Fields: state, parent, ...; user and system time of itself and of ended children.
            if int(entry.name) == pid or int(fields[1]) == pid:
                own += sum(map(int, fields[11:15]))
    return own / ticks


@contextmanager
def running(url: str, groups: int, seconds: float) -> Iterator[None]:
    """Groups that sleep, as processes, while the block runs."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MEASURED_QUEUE": url}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "stand-in", f"sleeper-{number}", str(seconds)], env=environ
        )
        for number in range(groups)
    ]
    try:
        yield
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


def stand_in(name: str, seconds: str) -> int:
    """A group that sleeps instead of making a video, with the calls of a real one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    queue = SharedQueue(os.environ["MEASURED_QUEUE"], name, listens=True)
    epoch = queue.register(name, name, {"ranks": 1}, LEASE)
    assert epoch is not None
    sweeper, beaten = Sweeper(queue), 0.0

    def beat(claim: Any) -> None:
        nonlocal beaten
        if time.monotonic() - beaten > 1:
            beaten = time.monotonic()
            told = None if claim is None else JobProgress("denoising", 1, 2)
            queue.beat(name, epoch, state="ready", claim=claim, progress=told)

    takes: Callable[[str, JobSpec], bool] = lambda *_: True
    while True:
        beat(None)
        sweeper.sweep()
        claim = queue.claim(name, epoch, (), takes)
        if claim is None:
            end = time.monotonic() + 1
            while time.monotonic() < end and not queue.link.wait(0.2):
                beat(None)
            continue
        end = time.monotonic() + float(seconds)
        while (left := end - time.monotonic()) > 0:
            beat(claim)
            time.sleep(min(left, 0.5))
        queue.publish(claim, JobResult(time.time(), "video_0000.mp4", seconds=float(seconds)))


if __name__ == "__main__":
    sys.exit(main())
