"""Whether memory, open files and threads stay flat over a long list of outputs.

    python scripts/soak_outputs.py --outputs 200 --ranks 2 --to docs/benchmarks/soak

Runs infer with the embedded model and --sheet on gloo ranks of this machine, once for each size,
half of the outputs each, and looks at every rank after every output. Writes TO.json and TO.svg.
Ends with 1 where the second half of a run's outputs holds more than the first: see `growth`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

SIZES = ((64, 96), (96, 144))
FRAMES = 17
STEPS = 2
# What a rank may gain over the second half of a run, in MB: the sheet's pictures, and the noise
# of an allocator. One encoder that stays alive is 6.7 MB for every output at 64x96.
MOST_GROWTH_MB = 12.0
LOOKED_AT = {"rss_mb": "memory, MB", "files": "open files", "threads": "threads"}


def main() -> int:
    """Run, write the records and the picture, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--to", type=Path, default=Path("soak"))
    asked = parser.parse_args()
    if asked.outputs < 2 * 4 or asked.ranks < 1:
        parser.error("--outputs is 8 or more, --ranks 1 or more")
    runs = [_run(size, asked.outputs // len(SIZES), asked.ranks) for size in SIZES]
    found = {"ranks": asked.ranks, "frames": FRAMES, "steps": STEPS, "runs": runs}
    asked.to.parent.mkdir(parents=True, exist_ok=True)
    asked.to.with_suffix(".json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    asked.to.with_suffix(".svg").write_text(_picture(runs), encoding="utf-8")
    flat = True
    for run in runs:
        for rank, seen in enumerate(run["seen"]):
            grown = growth(seen)
            flat &= grown["rss_mb"] <= MOST_GROWTH_MB and grown["files"] == grown["threads"] == 0
            print(f"{run['size']}, rank {rank}: second half against first: {grown}", flush=True)
    return 0 if flat else 1


def growth(seen: list[dict[str, float]]) -> dict[str, float]:
    """By how much the most that was held in the second half is above the most in the first.

    The most, not the median: what an output needs on its way is given back to the allocator, which
    at some moment begins to keep it (glibc raises its limits by what it sees). From then on a flat
    line stands where before there were peaks of the same height.
    """
    half = len(seen) // 2
    return {
        name: round(max(e[name] for e in seen[half:]) - max(e[name] for e in seen[:half]), 2)
        for name in LOOKED_AT
    }


def look(pid: int) -> dict[str, float]:
    """What a process holds now."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "rss_mb": round(int(fields["VmRSS"].split()[0]) / 1000, 2),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def _run(size: tuple[int, int], outputs: int, ranks: int) -> dict[str, Any]:
    """One list of outputs; what every rank held when each of them was done."""
    seen: list[list[dict[str, float]]] = [[] for _ in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("".join(f"a red ball, number {i}\n" for i in range(outputs)))
        command = [sys.executable, str(ROOT / "launch" / "infer.py"), "--prompt-path", str(prompts)]
        command += ["--save-dir", folder, "--image-size", *map(str, size), "--dtype", "fp32"]
        command += ["--num-frames", str(FRAMES), "--num-sampling-steps", str(STEPS), "--sheet"]
        command += ["--device", "cpu", "--verbose", "0"]
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
            )
            for rank, variables in enumerate(_environments(ranks))
        ]
        ends = threading.Timer(3600, _kill, [processes])
        ends.start()
        try:
            assert processes[0].stdout is not None
            for line in processes[0].stdout:
                if line.strip().endswith(".mp4"):
                    for rank, process in enumerate(processes):
                        seen[rank].append(look(process.pid))
            codes = [process.wait() for process in processes]
        finally:
            ends.cancel()
            for process in processes:
                process.kill()
                process.wait()
    if any(codes) or len(seen[0]) != outputs:
        raise SystemExit(f"{size}: exit codes {codes}, {len(seen[0])} of {outputs} outputs")
    return {"size": f"{size[0]}x{size[1]}", "outputs": outputs, "seen": seen}


def _kill(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()


def _environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets, for ranks that are started one by one so that their numbers are known."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    if ranks == 1:
        return [common]
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    common |= {"LOCAL_WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _picture(runs: list[dict[str, Any]]) -> str:
    """A panel for each run and quantity, a line for each rank, from zero up."""
    wide, high, left, top, gap = 300, 150, 60, 40, 60
    width = left + len(LOOKED_AT) * (wide + gap)
    height = top + len(runs) * (high + gap)
    colours = ("#2f6f9f", "#c0562b", "#4b8b3b", "#7a4fa3")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for row, run in enumerate(runs):
        for column, (name, title) in enumerate(LOOKED_AT.items()):
            x, y = left + column * (wide + gap), top + row * (high + gap)
            most = 1.1 * max(each[name] for seen in run["seen"] for each in seen)
            parts.append(f'<text x="{x}" y="{y - 8}">{run["size"]}: {title}</text>')
            parts.append(f'<path d="M{x} {y}v{high}h{wide}" fill="none" stroke="#888888"/>')
            parts.append(f'<text x="{x - 5}" y="{y + 10}" text-anchor="end">{most:.0f}</text>')
            parts.append(f'<text x="{x - 5}" y="{y + high}" text-anchor="end">0</text>')
            parts.append(
                f'<text x="{x + wide}" y="{y + high + 16}" text-anchor="end">'
                f"output {run['outputs']}</text>"
            )
            for rank, seen in enumerate(run["seen"]):
                points = " ".join(
                    f"{x + wide * (i + 1) / len(seen):.1f},{y + high * (1 - each[name] / most):.1f}"
                    for i, each in enumerate(seen)
                )
                colour = colours[rank % len(colours)]
                dash = ' stroke-dasharray="6 4"' if rank else ""
                parts.append(
                    f'<polyline points="{points}" fill="none" stroke="{colour}"{dash}/>'
                    f'<text x="{x + 4 + 60 * rank}" y="{y + high - 6}" fill="{colour}">'
                    f"rank {rank}</text>"
                )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(main())
