"""How far one Postgres carries many groups, calculated from what its statements cost:

    python scripts/simulate_groups.py                       # the tables, from measured costs
    python scripts/simulate_groups.py --cores 8 --flush-ms 5
    python scripts/simulate_groups.py --measure             # measure the costs anew: some minutes

The costs are processor milliseconds of the database, one for each call of `SharedQueue`, in
docs/benchmarks/groups-costs.json, times a factor (`read_costs`). How often each is called follows
from the code: its periods are imported. So the load is a sum (`load`). The wait between two jobs of
a group follows from round trips, flushes of the log and the queue for the database's processors,
which is taken as M/M/c (`wait_seconds`, Erlang's formula). Groups that wait make fewer jobs, so
both are solved together (`carried`).

--measure starts a Postgres of its own. Each cost is the least of some rounds, because other work
disturbs. A call that comes after a pause costs more than one of many in a row: both are measured,
and the tables count with the first unless --in-a-row is given. Then groups that sleep run against
it, and what they use is compared with the calculation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:1] = [str(ROOT), str(ROOT / "tests")]

from opensora_sp.server.beat import BEAT_SECONDS  # noqa: E402
from opensora_sp.server.board import LOOK_SECONDS  # noqa: E402
from opensora_sp.server.engine_group import TICK_SECONDS  # noqa: E402
from opensora_sp.server.job_store import JobProgress, JobResult, JobSpec  # noqa: E402
from opensora_sp.server.shared_queue import LEASE_SECONDS  # noqa: E402
from opensora_sp.server.sweeper import SPREAD_SECONDS  # noqa: E402

COSTS = ROOT / "docs" / "benchmarks" / "groups-costs.json"
GROUPS, SECONDS = (1, 10, 100, 1_000), (1.0, 10.0, 100.0, 1_000.0)
# psycopg sends BEGIN, each statement and COMMIT one after the other: the ways there and back of
# publish, sweep and claim, which is all between two jobs. Two of the three write to the log.
ROUND_TRIPS, FLUSHES = 3 + 3 + 5, 2
# Signs of life come every second: so long after a look no group can count as dead that lived then.
SWEEP_PERIOD = LEASE_SECONDS - BEAT_SECONDS + SPREAD_SECONDS / 2
# Each job changes its row so often, and every gateway reads each change.
CHANGES = 3
# Calls that are measured: by so many connections in turn, so many seconds apart.
CONNECTIONS, PAUSE = 16, 0.002
# What groups that are measured tell of a job.
PROGRESS = JobProgress("denoising", 12, 30)
RESULT = JobResult(1.8e9, "video_0000.mp4", seconds=100.0)


@dataclass(frozen=True)
class Costs:
    """Processor milliseconds of the database.

    put, claim, publish: of a job. beat: a sign of life. empty_claim: a claim that finds no job.
    sweep, sweep_row: a look for dead groups, and more for each group. look, look_group,
    look_row: a gateway's look, and more for each group and each changed job. wake: more of a put
    for each connection that listens.
    """

    put: float
    claim: float
    publish: float
    beat: float
    empty_claim: float
    sweep: float
    sweep_row: float
    look: float
    look_group: float
    look_row: float
    wake: float


@dataclass(frozen=True)
class Assumed:
    """What is not measured. cores: processors of the database. flush_ms: of its log, to disk.

    round_trip_ms: between a group and the database. gateways: how many. connections: Postgres's
    max_connections. full: the share of the cores from which on it counts as full. alone: whether
    each job is put by a call of its own, as gateways do; a list puts many at once.
    """

    cores: int = 4
    flush_ms: float = 1.0
    round_trip_ms: float = 0.5
    gateways: int = 2
    connections: int = 100
    full: float = 0.8
    alone: bool = True


@dataclass(frozen=True)
class Carried:
    """What is calculated for one case.

    rate: jobs/s. wait: seconds between a job's end and the next one's begin. parts: cores by cause.
    claims: per second, empty ones too.
    """

    rate: float
    wait: float
    parts: dict[str, float]
    claims: float

    @property
    def cores(self) -> float:
        """Processors of the database in use."""
        return sum(self.parts.values())

    @property
    def most(self) -> str:
        """What uses most."""
        return max(self.parts, key=self.parts.__getitem__)


def load(costs: Costs, assumed: Assumed, busy: int, idle: int, rate: float) -> dict[str, float]:
    """Cores of the database by cause, where busy groups make `rate` jobs/s and others wait.

    Every busy group has one job that is taken. An idle one tries a claim once a tick.
    """
    groups, looks = busy + idle, assumed.gateways / LOOK_SECONDS
    puts = rate if assumed.alone else 0.0
    sweep = costs.sweep + costs.sweep_row * groups
    sweeps = (assumed.gateways + idle) / SWEEP_PERIOD
    sweeps += min(rate, busy / SWEEP_PERIOD)  # before a claim, but no more often
    milliseconds = {
        # A job tells once more that it has begun.
        "jobs": rate * (costs.put + costs.claim + costs.publish + costs.beat),
        "signs of life": groups / BEAT_SECONDS * costs.beat,
        "looks of gateways": looks * (costs.look + costs.look_group * groups)
        + assumed.gateways * CHANGES * rate * costs.look_row,
        "looks for dead groups": sweeps * sweep,
        "waking all groups": puts * groups * costs.wake,
        "claims of nothing": empty_claims(busy, idle, puts) * costs.empty_claim,
    }
    return {name: value / 1000 for name, value in milliseconds.items()}


def empty_claims(busy: int, idle: int, puts: float) -> float:
    """Claims a second that find nothing.

    All groups hear of each job, and all but one claim in vain: idle ones at once, busy ones for
    each word that they have kept, when they are idle. Where none is ever idle, no word is answered.
    """
    return puts * (busy + idle - 1) + idle / TICK_SECONDS if idle else 0.0


def waiting_factor(cores: int, used: float) -> float:
    """How much longer work takes at `used` of `cores`, in the mean: M/M/c by Erlang's formula."""
    if used >= cores:
        return float("inf")
    blocked = 1.0  # Erlang B, by its recursion
    for number in range(1, cores + 1):
        blocked = used * blocked / (number + used * blocked)
    share = used / cores
    waits = blocked / (1 - share + share * blocked)  # Erlang C
    return 1 + waits / (cores - used)


def wait_seconds(costs: Costs, assumed: Assumed, groups: int, used: float) -> float:
    """Seconds from the end of a job to the begin of the group's next one, where one is queued."""
    work = costs.publish + costs.sweep + costs.sweep_row * groups + costs.claim
    fixed = ROUND_TRIPS * assumed.round_trip_ms + FLUSHES * assumed.flush_ms
    return (fixed + work * waiting_factor(assumed.cores, used)) / 1000


def carried(costs: Costs, assumed: Assumed, busy: int, idle: int, seconds: float) -> Carried:
    """What busy groups with jobs of so many seconds get done, with others that are idle.

    rate is 0 where the database has no time left for any job.
    """

    def wait(rate: float) -> float:
        used = sum(load(costs, assumed, busy, idle, rate).values())
        return wait_seconds(costs, assumed, busy + idle, used)

    low, high = 0.0, busy / seconds
    for _ in range(60):  # the rate at which a cycle takes as long as job and wait
        rate = (low + high) / 2
        if rate > 0 and busy / rate < seconds + wait(rate):
            high = rate
        else:
            low = rate
    puts = low if assumed.alone else 0.0
    claims = low + empty_claims(busy, idle, puts)
    return Carried(low, wait(low), load(costs, assumed, busy, idle, low), claims)


def most_groups(costs: Costs, assumed: Assumed, seconds: float, idle_share: float) -> int:
    """From how many groups on the database is full, with the share of them that is idle.

    Counted as if no job waited for the database.
    """

    def full(groups: int) -> bool:
        idle = round(groups * idle_share)
        busy = groups - idle
        parts = load(costs, assumed, busy, idle, busy / seconds)
        return sum(parts.values()) >= assumed.full * assumed.cores

    high = 1
    while not full(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if full(middle) else (middle, high)
    return high


def tables(costs: Costs, assumed: Assumed) -> str:
    """The tables, as Markdown."""
    there = assumed.connections - 2 * assumed.gateways
    return "\n\n".join(
        (
            "All groups busy:",
            table(costs, assumed, GROUPS, 0.0),
            "Half of the groups busy, the others idle:",
            table(costs, assumed, GROUPS[2:], 0.5),
            f"{assumed.full:.0%} of {assumed.cores} cores are in use from so many groups on:",
            limits(costs, assumed),
            f"With max_connections = {assumed.connections}, connections are enough for {there:,} "
            f"groups at most. Jobs put one by one: at most {1000 / assumed.flush_ms:,.0f} a second,"
            " because a transaction that notifies holds a lock until its flush.",
        )
    )


def table(costs: Costs, assumed: Assumed, numbers: Sequence[int], idle_share: float) -> str:
    """One row for each number of groups and length of jobs.

    A rate "A of B": the database allows A, the groups alone would make B.
    """
    lines = [
        "| groups | job, s | jobs/s | claims/s | database cores | wait, ms | most of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for groups in numbers:
        idle = int(groups * idle_share)
        for seconds in SECONDS:
            one = carried(costs, assumed, groups - idle, idle, seconds)
            wanted = (groups - idle) / seconds
            less = f" of {short(wanted)}" if one.rate < 0.9 * wanted else ""
            lines.append(
                f"| {groups:,} | {seconds:,.0f} | {short(one.rate)}{less} | {short(one.claims)}"
                f" | {short(one.cores)} | {1000 * one.wait:,.0f}"
                f" | {one.most}, {100 * one.parts[one.most] / one.cores:.0f} % |"
            )
    return "\n".join(lines)


def limits(costs: Costs, assumed: Assumed) -> str:
    """From how many groups on the database is full, by length of jobs."""
    lines = [
        "| job, s | groups, all busy | what uses most | groups, half idle | what uses most"
        " | half idle, jobs put by lists |",
        "|---|---|---|---|---|---|",
    ]
    for seconds in SECONDS:
        cells = []
        for idle_share in (0.0, 0.5):
            groups = most_groups(costs, assumed, seconds, idle_share)
            idle = round(groups * idle_share)
            busy = groups - idle
            parts = load(costs, assumed, busy, idle, busy / seconds)
            cells += [f"{groups:,}", max(parts, key=parts.__getitem__)]
        listed = replace(assumed, alone=False)
        cells.append(f"{most_groups(costs, listed, seconds, 0.5):,}")
        lines.append(f"| {seconds:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short(value: float) -> str:
    """A number with two or three digits that count."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


# Measuring.


def measure(rounds: int) -> dict[str, Any]:
    """Measure the costs on a Postgres of its own, and compare groups that sleep with them."""
    from postgres import Postgres, programs

    from scripts.bench_ranks import cpu_name

    if programs() is None:
        print("error: no Postgres here: apt-get install postgresql", file=sys.stderr)
        sys.exit(2)
    postgres = Postgres()
    try:
        postgres.start()
        meter = Meter(postgres)
        # In the first round the connections read the tables' definitions and prepare statements.
        meter.costs(0.0)
        in_a_row = meter.costs(0.0)
        found = [meter.costs(PAUSE) for _ in range(rounds)]
        least = {name: min(one[name] for one in found) for name in found[0]}
        costs = {field.name: least.pop(field.name) for field in fields(Costs)}
        more = {name: meter.server(name) for name in ("server_version", "fsync")}
        checks = [meter.check(Costs(**costs), busy, idle) for busy, idle in ((32, 0), (16, 16))]
        meter.close()
    finally:
        postgres.remove()
    return {
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "postgres": more,
        "rounds": rounds,
        "costs_ms": costs,
        "costs_in_a_row_ms": {name: in_a_row[name] for name in costs},
        "largest_ms": {name: max(one[name] for one in found) for name in costs},
        **least,
        "groups_that_sleep": checks,
    }


class Meter:
    """Calls of the queue, and what they cost the database's processes."""

    def __init__(self, postgres: Any) -> None:
        import psycopg

        from opensora_sp.server.queue_url import parse_queue_url
        from opensora_sp.server.shared_queue import SharedQueue

        self._pid = postgres.pid()
        self._url = parse_queue_url(postgres.url)
        self._queue = SharedQueue(self._url, "measure")
        self._queue.prepare()
        # Many connections take turns, with pauses: a call costs more than one of many in a row.
        self._all = [SharedQueue(self._url, f"measure-{number}") for number in range(CONNECTIONS)]
        self._turns = itertools.cycle(self._all)
        # VACUUM cannot be in a transaction. It stays open: a process is counted while it lives.
        self._vacuum = psycopg.connect(self._url, autocommit=True)
        self._number, self._pause = 0, 0.0

    def close(self) -> None:
        """Give the connections back."""
        self._vacuum.close()
        for each in (self._queue, *self._all):
            each.close()

    def server(self, name: str) -> str:
        """A setting of the database."""
        return str(self._sql(f"SHOW {name}")[0][0])

    def costs(self, pause: float) -> dict[str, float]:
        """One round: every cost, and a gateway's own time for its look.

        pause: seconds between two calls. Without any the database's processes stay in the
        processor's caches, as where it is full.
        """
        self._pause = pause
        queue, turn, count = self._queue, self._turns.__next__, 480
        found: dict[str, float] = {}
        self._clear()
        self._groups(1)
        found["look"] = self._cost(self._look, 240)
        found["sweep"] = self._cost(lambda: turn().give_out_again(), 240)
        self._groups(1000)
        found["look_group"] = max(0.0, (self._cost(self._look, 80) - found["look"]) / 999)
        beats, group = itertools.count(), itertools.count()

        def beat() -> None:
            number = next(beats) % 1000
            turn().beat(f"g{number}", number, state="ready", claim=claims[0], progress=PROGRESS)

        found["put"] = self._cost(lambda: turn().put(self._spec()), count, vacuum="jobs")
        claims: list[Any] = []

        def claim() -> None:
            number = next(group)
            claims.append(turn().claim(f"g{number}", number, (), lambda *_: True))

        _, since = queue.changes(None)
        found["claim"] = self._cost(claim, count)
        assert len(claims) == count
        assert all(claims)
        spent = self.cpu()
        rows, _ = queue.changes(since)
        assert len(rows) == count
        found["look_row"] = 1000 * (self.cpu() - spent) / count
        taken = self._cost(lambda: turn().give_out_again(), 160)
        found["sweep_row"] = max(0.0, (taken - found["sweep"]) / 999)
        found["beat"] = self._cost(beat, 960, vacuum="groups")
        found["empty_claim"] = self._cost(lambda: turn().claim("g1", 1, (), lambda *_: True), count)
        ended = iter(claims)
        found["publish"] = self._cost(
            lambda: turn().publish(next(ended), RESULT), count, vacuum="jobs"
        )
        found |= self._wakes(32, 200)
        busy = time.process_time()
        for _ in range(20):
            self._look()
        found["gateway_look_1000_groups_own_ms"] = 1000 * (time.process_time() - busy) / 20
        return {name: round(value, 5) for name, value in found.items()}

    def check(self, costs: Costs, busy: int, idle: int) -> dict[str, Any]:
        """Groups that sleep, as threads, for some seconds: cores measured and calculated.

        With idle ones, jobs are put one by one, as fast as the busy ones make them.
        """
        self._clear()
        seconds, end, assumed = 1.0, threading.Event(), Assumed(alone=idle > 0)
        done, nothing = [0], [0]
        threads = [
            threading.Thread(target=_sleeper, args=(self._url, number, seconds, end, done, nothing))
            for number in range(busy + idle)
        ]
        threads += [
            threading.Thread(target=_gateway, args=(self._url, end))
            for _ in range(assumed.gateways)
        ]
        if not idle:
            self._queue.put_many([self._spec() for _ in range(40 * busy)])
        for thread in threads:
            thread.start()
        if idle:
            putter = threading.Thread(
                target=_putter, args=(self._queue, self._spec, busy / seconds, end)
            )
            putter.start()
            threads.append(putter)
        time.sleep(14)  # each has made enough jobs for its statements to be prepared
        begun, spent, first, empty = time.monotonic(), self.cpu(), done[0], nothing[0]
        time.sleep(12)
        took, spent, jobs = time.monotonic() - begun, self.cpu() - spent, done[0] - first
        empty = nothing[0] - empty
        end.set()
        for thread in threads:
            thread.join()
        parts = load(costs, assumed, busy, idle, jobs / took)
        return {
            "busy": busy,
            "idle": idle,
            "job_s": seconds,
            "jobs_per_s": round(jobs / took, 2),
            "empty_claims_per_s": round(empty / took, 1),
            "calculated_empty_claims_per_s": round(
                empty_claims(busy, idle, jobs / took if assumed.alone else 0.0), 1
            ),
            "database_cores": round(spent / took, 4),
            "calculated_cores": round(sum(parts.values()), 4),
            "parts": {name: round(value, 4) for name, value in parts.items()},
        }

    def cpu(self) -> float:
        """Processor seconds of the database's living processes."""
        total = 0
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                parent = (entry / "stat").read_text().rpartition(") ")[2].split()[1]
                if self._pid in (int(entry.name), int(parent)):
                    total += int((entry / "schedstat").read_text().split()[0])
            except OSError:
                continue
        return total / 1e9

    def _cost(self, call: Callable[[], Any], times: int, vacuum: str = "") -> float:
        """Milliseconds of a call, with what cleaning its table up afterwards costs."""
        spent = self.cpu()
        for _ in range(times):
            call()
            time.sleep(self._pause)
        if vacuum:
            self._vacuum.execute(f"VACUUM opensora_sp.{vacuum}")
        time.sleep(0.25)  # what writes the log works a little later
        return 1000 * (self.cpu() - spent) / times

    def _wakes(self, listeners: int, times: int) -> dict[str, float]:
        """What a put costs more for each connection that listens and whose client is busy."""
        import psycopg

        from opensora_sp.server.shared_link import CHANNEL
        from opensora_sp.server.shared_queue import SharedQueue

        def tell() -> None:
            self._sql(f"NOTIFY {CHANNEL}")

        self._pause = max(self._pause, 0.002)  # so that each is a wake of its own
        alone = self._cost(tell, times)
        there = [psycopg.connect(self._url, autocommit=True) for _ in range(listeners)]
        for one in there:
            one.execute(f"LISTEN {CHANNEL}")
        time.sleep(0.3)
        memory = self._memory([one.info.backend_pid for one in there])
        found = {"wake": max(0.0, (self._cost(tell, times) - alone) / listeners)}
        for one in there:
            one.close()
        # A group that is busy hears of new jobs with each sign of life, and later looks for each.
        group = SharedQueue(self._url, "stale", listens=True)
        group.beat("g1", 1, state="ready")
        for _ in range(50):
            tell()
            group.beat("g1", 1, state="ready")
        found["stale_wakes_of_50"] = sum(group.link.wait(0.01) for _ in range(60))
        group.close()
        return found | {"connection_mb": memory}

    def _memory(self, pids: Sequence[int]) -> float:
        """Memory of a connection's process, MB, shared pages divided among those that share."""
        found = []
        for pid in pids:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            found.append(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")))
        return sum(found) / len(found) / 1000

    def _look(self) -> None:
        """What a gateway asks four times a second, where nothing has changed."""
        queue = next(self._turns)
        queue.changes(2**62)
        queue.groups()

    def _groups(self, count: int) -> None:
        """So many groups, all alive, with what a real one says of itself."""
        about = json.dumps(
            {"ranks": 8, "device": "gcu", "card": "S60", "host": "node-1", "serves": ["480p-4s"]}
        )
        self._sql("DELETE FROM opensora_sp.groups")
        self._sql(
            "INSERT INTO opensora_sp.groups (name, epoch, parent, about, state, lease_s, beat_at,"
            f" progress, unfit) SELECT 'g' || n, n, 'p', '{about}', 'ready', 600, clock_timestamp()"
            f", '{json.dumps(asdict(PROGRESS))}', '{{}}' FROM generate_series(0, {count - 1}) AS n"
        )

    def _clear(self) -> None:
        self._sql("TRUNCATE opensora_sp.jobs, opensora_sp.groups")

    def _spec(self) -> Any:
        self._number += 1
        words: tuple[str, ...] = (
            "--prompt=a red boat on a quiet lake at dawn, seen from above",
            "--num-frames=51",
        )
        words += ("--resolution=480p", "--aspect-ratio=9:16", "--num-steps=30", "--seed=42")
        return JobSpec(f"video_{self._number:024d}", time.time(), words)

    def _sql(self, text: str) -> list[Any]:
        """Run a statement; its rows."""

        def run(connection: Any) -> list[Any]:
            done = connection.execute(text)
            return list(done.fetchall()) if done.description else []

        return self._queue.link.run(run)


def _sleeper(
    url: str,
    number: int,
    seconds: float,
    end: threading.Event,
    done: list[int],
    nothing: list[int],
) -> None:
    """A group that sleeps, with the calls of a real one."""
    from opensora_sp.server.shared_queue import SharedQueue
    from opensora_sp.server.sweeper import Sweeper

    name, queue = f"sleeper-{number}", SharedQueue(url, f"sleeper-{number}", listens=True)
    sweeper, beaten = Sweeper(queue), 0.0
    epoch = queue.register(name, name, {"ranks": 1}, LEASE_SECONDS)
    assert epoch is not None

    def beat(claim: Any, *, now: bool = False) -> None:
        nonlocal beaten
        if now or time.monotonic() - beaten > BEAT_SECONDS:
            beaten = time.monotonic()
            told = None if claim is None else PROGRESS
            queue.beat(name, epoch, state="ready", claim=claim, progress=told)

    end.wait(number % 20 / 10)  # not all at the same moment
    while not end.is_set():
        beat(None)
        sweeper.sweep()
        claim = queue.claim(name, epoch, (), lambda *_: True)
        if claim is None:
            nothing[0] += 1
            until = time.monotonic() + TICK_SECONDS
            while time.monotonic() < until and not end.is_set() and not queue.link.wait(0.2):
                beat(None)
            continue
        beat(claim, now=True)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not end.is_set():
            beat(claim)
            end.wait(min(left, 0.5))
        queue.publish(claim, RESULT)
        done[0] += 1
    queue.close()


def _gateway(url: str, end: threading.Event) -> None:
    """What a gateway asks the database."""
    from opensora_sp.server.shared_queue import SharedQueue
    from opensora_sp.server.sweeper import Sweeper

    queue = SharedQueue(url, "gateway")
    sweeper = Sweeper(queue)
    _, since = queue.changes(None)
    while not end.wait(LOOK_SECONDS):
        _, since = queue.changes(since)
        queue.groups()
        sweeper.sweep()
    queue.close()


def _putter(queue: Any, spec: Callable[[], Any], rate: float, end: threading.Event) -> None:
    """Puts so many jobs a second, one by one."""
    while not end.wait(1 / rate):
        queue.put(spec())


def read_costs(path: Path, *, in_a_row: bool = False) -> Costs:
    """The measured costs of a file that --measure wrote, of calls after pauses or in a row.

    Those after pauses are multiplied by one number where groups that slept used more than was
    calculated.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if in_a_row:
        return Costs(**found["costs_in_a_row_ms"])
    used = (one["database_cores"] / one["calculated_cores"] for one in found["groups_that_sleep"])
    return scaled(Costs(**found["costs_ms"]), max(1.0, *used))


def scaled(costs: Costs, factor: float) -> Costs:
    """All costs times a factor."""
    return Costs(**{name: value * factor for name, value in asdict(costs).items()})


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables, or measure first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--costs", type=Path, default=COSTS, help="a file that --measure wrote")
    parser.add_argument("--measure", action="store_true", help="write --costs anew first")
    parser.add_argument(
        "--in-a-row", action="store_true", help="count with the costs of calls without pauses"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of --measure (default 1)")
    for field in fields(Assumed):
        if field.name != "alone":
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=type(field.default), default=field.default)
    asked = parser.parse_args(words)
    if asked.measure:
        text = json.dumps(measure(asked.rounds), indent=1) + "\n"
        asked.costs.write_text(text, encoding="utf-8")
    assumed = {f.name: getattr(asked, f.name) for f in fields(Assumed) if f.name != "alone"}
    print(tables(read_costs(asked.costs, in_a_row=asked.in_a_row), Assumed(**assumed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
