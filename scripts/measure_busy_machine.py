"""Measures how a run fares beside other programs: scripts/measure_busy_machine.py OUT.json

Four jobs: the embedded model on one process and on two ranks, and one guided step of a full-width
pair of blocks (hidden 1152) likewise. Each is timed on an idle machine and beside one busy loop
a core, once as the program runs by itself and once with spinning threads and all cores, as torch
runs by default. All of them take turns within a round, so that a machine whose speed drifts slows
all alike; the median over rounds counts. The last line is the result as JSON, as in OUT.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from opensora_sp.base.cpu_threads import busy_elsewhere, fair_share  # noqa: E402
from scripts.bench_ranks import cpu_name, torch_version  # noqa: E402

# How torch runs where nobody decides: libgomp spins about so long, and takes every core.
TORCH_DEFAULT = {"GOMP_SPINCOUNT": "300000"}
STEPS = 10
SPIN = "while True: pass"


def main() -> int:
    """Run every job in turn and write the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one job at most")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    jobs = list(itertools.product(("embedded", "full width"), (1, 2), (True, False), (False, True)))
    rounds: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        for what, ranks, ours, busy in jobs:
            name = f"{what}, {ranks} rank(s), {'program' if ours else 'torch'}, "
            name += "busy" if busy else "idle"
            with busy_loops(cores if busy else 0):
                seconds = run(what, ranks, ours, cores, arguments.timeout)
            rounds.setdefault(name, []).append(seconds)
            print(f"round {number + 1}: {name}: {seconds:.2f} s", flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    result = {
        "what": "seconds of the denoising (embedded) or of a guided step (one full-width pair of "
        "blocks, float32), and how many times longer beside a busy loop on every core",
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": cores,
        "torch": torch_version(),
        "rounds": rounds,
        "median": medians,
        "busy over idle": {
            name.removesuffix(", busy"): seconds / medians[name.replace(", busy", ", idle")]
            for name, seconds in medians.items()
            if name.endswith(", busy")
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("median", "busy over idle")}))
    return 0


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that each want a core for themselves."""
    loops = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(what: str, ranks: int, ours: bool, cores: int, timeout: float) -> float:
    """Seconds that one job says it took, from fresh processes."""
    environ = {k: v for k, v in os.environ.items() if not re.match("OMP_|GOMP_|KMP_", k)}
    environ["PYTHONPATH"] = str(ROOT)
    threads = max(1, cores // ranks)
    if ours:  # as --cpu-threads auto chooses for a wide transformer
        threads = max(1, fair_share(cores, busy_elsewhere()) // ranks)
    if not ours:
        environ |= TORCH_DEFAULT
    with tempfile.TemporaryDirectory() as folder:
        if what == "embedded":
            job = ["launch/infer.py", "--config", "configs/embedded.yaml", "--device", "cpu"]
            job += ["--prompt", "a red ball rolls to the right", "--save-dir", folder]
            job += ["--num-sampling-steps", str(STEPS)]
            job += [] if ours else ["--cpu-threads", str(threads)]
        else:
            environ["OMP_NUM_THREADS"] = str(threads)
            out = str(Path(folder) / "out.json")
            job = ["scripts/bench_ranks.py", out, "--hidden", "1152", "--depth", "1"]
            job += ["--frames", "5", "--size", "18", "32", "--worker", str(ranks), "1"]
        done = subprocess.run(
            [*launcher(ranks), *job],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise SystemExit(
                f"{' '.join(job)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
            )
        if what == "embedded":
            return whole_run(done.stderr)
        return float(done.stdout.split()[-1])


def launcher(ranks: int) -> list[str]:
    """Plain python, or torchrun on this machine's own address."""
    if ranks == 1:
        return [sys.executable]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return [*command, "--local_addr", "127.0.0.1"]


def whole_run(said: str) -> float:
    """Seconds of the run of the command line, as it says: "done in 1.3 s"."""
    found = re.findall(r"done in ([\d.]+) s", said)
    if not found:
        raise SystemExit(f"the run did not say how long it took:\n{said[-2000:]}")
    return float(found[-1])


if __name__ == "__main__":
    sys.exit(main())
