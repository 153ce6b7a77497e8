"""Measures what a second rank brings: scripts/bench_ranks.py OUT.json [--rounds 5]

One guided denoising step of a random transformer, one thread a rank, on three meshes: one rank,
two guidance groups, one sequence group of two. The meshes take turns within a round, so that a
machine whose speed drifts slows all of them alike, and the median over rounds is what counts.
The last line printed is the result as JSON; the same goes into OUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESHES = {"one rank": (1, 1), "guidance 2": (2, 1), "sequence 2": (1, 2)}


def main() -> int:
    """Run every mesh in turn and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--frames", type=int, default=15, help="latent frames")
    parser.add_argument("--size", type=int, nargs=2, default=(18, 32), help="latent sides")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return measure(arguments)
    steps: dict[str, list[float]] = {name: [] for name in MESHES}
    for _ in range(arguments.rounds):
        for name, mesh in MESHES.items():
            steps[name].append(launch(mesh, arguments))
    medians = {name: statistics.median(seconds) for name, seconds in steps.items()}
    shape = f"hidden {arguments.hidden}, depth {arguments.depth}, {arguments.frames} frames"
    result = {
        "what": f"seconds of one guided step, float32, one thread a rank; {shape} of "
        f"{arguments.size[0]}x{arguments.size[1]} latent cells",
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "torch": torch_version()},
        "rounds": steps,
        "median": medians,
        "speedup": {name: medians["one rank"] / medians[name] for name in list(MESHES)[1:]},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"median": medians, "speedup": result["speedup"]}))
    return 0


def launch(mesh: tuple[int, int], arguments: argparse.Namespace) -> float:
    """The step time of one mesh, from fresh processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    command += [str(mesh[0] * mesh[1]), "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1"]
    command += [str(Path(__file__).resolve()), str(arguments.out)]
    command += ["--hidden", str(arguments.hidden), "--depth", str(arguments.depth)]
    command += ["--frames", str(arguments.frames), "--size", *map(str, arguments.size)]
    done = subprocess.run(
        [*command, "--worker", *map(str, mesh)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def measure(arguments: argparse.Namespace) -> int:
    """On each rank: one warm-up, then the median of three steps of the slowest rank."""
    import torch

    from opensora_sp.engine.guidance import Conditions
    from opensora_sp.engine.parallelize import parallelize
    from opensora_sp.models.stdit3 import STDiT3, STDiT3Config
    from opensora_sp.parallel.layout import Layout
    from opensora_sp.parallel.mesh import Mesh
    from opensora_sp.parallel.session import open_session

    torch.manual_seed(0)
    config = STDiT3Config(
        hidden_size=arguments.hidden, depth=arguments.depth, num_heads=8, caption_channels=256
    )
    model = STDiT3(config).eval()
    guidance, sequence = arguments.worker
    size = (arguments.size[0], arguments.size[1])
    conditions = Conditions(
        tokens=[torch.randn(60, config.caption_channels)],
        masks=(torch.arange(300) < 60).long()[None],
        height=size[0] * 8,
        width=size[1] * 8,
        fps=24,
        cfg_scale=7.0,
    )
    with open_session("cpu") as session, torch.no_grad():
        comms = session.build(Mesh(guidance=guidance, sequence=sequence))
        layout = Layout(frames=arguments.frames, size=size, ranks=sequence)
        denoiser = parallelize(model, comms, layout)
        z = denoiser.shard(torch.randn(1, 4, arguments.frames, *size))
        velocity = denoiser.prepare(conditions)
        seconds = []
        for _ in range(4):
            session.control.barrier()
            started = time.perf_counter()
            velocity(z, 500.0)
            seconds.append(max(session.control.all_gather_object(time.perf_counter() - started)))
        if session.leads:
            print(statistics.median(seconds[1:]), flush=True)
    return 0


def cpu_name() -> str:
    """The processor, as Linux names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def torch_version() -> str:
    """Of the torch that measures."""
    from importlib.metadata import version

    return version("torch")


if __name__ == "__main__":
    sys.exit(main())
