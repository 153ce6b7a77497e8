#!/usr/bin/env python3
"""How step schedules do on prompts, sizes and guidance scales that they were not made on.

    python scripts/measure_schedules.py WORK [--to docs/benchmarks/step-cache.json] [--quick]

On the embedded model: calibrates three sizes (opensora-sp calibrate), then makes held-out prompts
with all steps, with the lists of the whole curve and with the schedules that come with the model,
from text and from a picture. For each list: PSNR of the frames against all steps (mean and worst
prompt), the judge's scores of both, and the seconds of denoising of both (on the clock and of the
CPU), batch by batch in turns. Then the model's schedules under other guidance scales and on sizes
that they were not made on. WORK keeps what is made: the same command goes on from there. --case
measures some of the cases and writes no JSON, so that several processes share the work. --known
measures and calibrates nothing, and writes what WORK has: of a case that is not finished, the
prompts so far, and of a size that is not calibrated, the schedules that come with the model.
Writes one JSON and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opensora_sp.base.atomic import atomic_output
from opensora_sp.base.machine import describe_machine
from opensora_sp.benchmark.calibration.comparing import MOST_DB
from opensora_sp.benchmark.calibration.selection import LEVELS
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.timing import Clock
from opensora_sp.media.metrics import psnr
from opensora_sp.parallel.session import alone
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.request import Request
from opensora_sp.request.sizes import EMBEDDED_FRAMES, EMBEDDED_LARGEST
from opensora_sp.request.step_choice import OWN_FILE, tokens_of
from opensora_sp.request.step_schedule import StepSchedule, read_schedules
from scripts.train_embedded.captions import describe
from scripts.train_embedded.evaluate import Asked, fixed_prompts
from scripts.train_embedded.judge import as_uint8, look
from scripts.train_embedded.world import DIRECTIONS, draw_scene, render

ROOT = Path(__file__).resolve().parent.parent
Size = tuple[int, int, int]  # height, width, frames
SIZES: tuple[Size, ...] = ((64, 96, 17), (96, 144, 17), (64, 96, 51))
# By classes of the model's schedules: 64 to 255 tokens, 256 to 1023, and the same of images.
UNSEEN: tuple[Size, ...] = (
    (80, 128, 17), (96, 96, 17), (64, 96, 34), (128, 128, 17), (96, 96, 1), (128, 128, 1),
)  # fmt: skip
# Of the classes beyond them, whose videos take long: their schedules alone, at the size that these
# were calibrated at.
LARGEST: tuple[Size, ...] = ((*EMBEDDED_LARGEST, EMBEDDED_FRAMES),)
SCALES = (3.0, 5.0, 10.0)
COUNTS = (24, 20, 18, 16, 15, 14, 12, 11, 10, 9, 8, 7, 6, 5)
JUDGED = ("colour", "shape", "motion")
STEPS, SCALE, BATCH = 30, 7.0, 8


@dataclass(frozen=True)
class Case:
    """Requests of one kind. kind: text or image, what videos are made from. prompts: how many."""

    kind: str
    size: Size
    prompts: int
    scale: float = SCALE

    @property
    def name(self) -> str:
        """For files and tables."""
        height, width, frames = self.size
        return f"{self.kind}-{height}x{width}x{frames}-cfg{self.scale:g}"


@dataclass(frozen=True)
class Listed:
    """A list of computed steps.

    level: the name of the schedule that it became in this measurement's own calibration, if any.
    shipped: the name of the schedule that it is among those that come with the model, if any.
    """

    computed: tuple[int, ...]
    fill: str
    level: str | None = field(default=None, compare=False)
    shipped: str | None = field(default=None, compare=False)

    def schedule(self, *, images: bool) -> StepSchedule:
        """As a request takes it."""
        return StepSchedule(
            name="listed", steps=STEPS, computed=self.computed, fill=self.fill, images=images
        )


def main() -> None:
    """Measure what is not measured yet, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="a folder for what is made on the way")
    parser.add_argument("--to", type=Path, help="the JSON; default: WORK/step-cache.json")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts (default 40)")
    parser.add_argument(
        "--more-prompts", type=int, default=20, metavar="N",
        help="of them for other guidance scales and sizes (default 20)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="4 prompts, one size, three lists")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="only the first so many")
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", help="only cases of these names, and no JSON"
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", default=COUNTS, metavar="N",
        help="numbers of computed steps beside those of the schedules",
    )  # fmt: skip
    parser.add_argument("--known", action="store_true", help="measure nothing: what WORK has")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.quick:
        asked.sizes, asked.counts, asked.prompts = 1, (15, 10, 7), 4
    asked.more_prompts = min(asked.prompts, asked.more_prompts)
    bench = Bench(asked.work)
    rows: list[dict[str, Any]] = []
    to = asked.to or asked.work / "step-cache.json"
    complete = True
    for case in _cases(asked):
        if asked.case and case.name not in asked.case:
            continue
        lists = _lists(asked, case)
        if asked.known:
            known = bench.known(case, lists)
            complete &= not _has_own(case) or _curve(asked.work, case.size).is_file()
            complete &= len(known) == len(lists) and len(known[0]["psnr"]) == case.prompts
            rows += known
            continue
        rows += bench.measure(case, lists)
        if not asked.case:  # what ends early has what was measured until then
            _write(to, asked, bench, rows, complete=False)
    if not asked.case:
        _write(to, asked, bench, rows, complete=complete)
    for line in tables(rows):
        print(line)
    if not asked.case:
        print(f"\n{to}", flush=True)


def _write(
    to: Path, asked: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]], *, complete: bool
) -> None:
    content = {
        "command": " ".join(["python scripts/measure_schedules.py", *sys.argv[1:]]),
        "complete": complete,
        "steps": STEPS,
        "prompts": asked.prompts,
        "levels": {name: vars(level) for name, level in LEVELS.items()},
        "machine": describe_machine(bench.pipeline.session.device, asked.work),
        "rows": rows,
    }
    with atomic_output(to) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cases(asked: argparse.Namespace) -> Iterator[Case]:
    """What is measured, in order."""
    for size in SIZES[: asked.sizes]:
        yield Case("text", size, asked.prompts)
        yield Case("image", size, asked.prompts)
    for scale in SCALES[:1] if asked.quick else SCALES:
        yield Case("text", SIZES[0], asked.more_prompts, scale)
    for size in UNSEEN[:1] if asked.quick else (*UNSEEN, *LARGEST):
        yield Case("text", size, asked.more_prompts)


def _lists(asked: argparse.Namespace, case: Case) -> list[Listed]:
    """The lists of a case: of its own calibration where there is one, and the model's."""
    lists = shipped(case.size)
    if _has_own(case) and (not asked.known or _curve(asked.work, case.size).is_file()):
        known = {one: one.shipped for one in lists}
        own = lists_of(calibrated(asked.work, case.size), asked.counts)
        lists = [replace(one, shipped=known.pop(one, None)) for one in own] + list(known)
    return sorted(lists, key=lambda one: (-len(one.computed), one.fill))


def _has_own(case: Case) -> bool:
    return case.size in SIZES and case.scale == SCALE


def _curve(work: Path, size: Size) -> Path:
    height, width, frames = size
    return work / f"schedules-{height}x{width}x{frames}.json"


def shipped(size: Size) -> list[Listed]:
    """The schedules that come with the model for a size, whatever the guidance scale."""
    height, width, frames = size
    request = Request(prompt="any", height=height, width=width, num_frames=frames, steps=STEPS)
    return [
        Listed(one.computed, one.fill, shipped=one.name)
        for one in read_schedules(embedded_checkpoints().dit / OWN_FILE)
        if one.steps == STEPS
        and one.images == request.is_image
        and one.tokens[0] <= tokens_of(request) < one.tokens[1]
    ]


def calibrated(work: Path, size: Size) -> Path:
    """The curve of a size, by opensora-sp calibrate with its own prompts, unless it is there."""
    height, width, frames = size
    curve = _curve(work, size)
    if not curve.is_file():
        command = [sys.executable, "-m", "opensora_sp", "calibrate"]
        command += ["--out", str(curve.with_suffix(".yaml"))]
        command += ["--image-size", str(height), str(width), "--num-frames", str(frames)]
        command += ["--num-sampling-steps", str(STEPS), "--dtype", "fp32"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    return curve


def lists_of(curve: Path, counts: Sequence[int]) -> list[Listed]:
    """The curve's schedules, and its best lists of these numbers of computed steps."""
    content = json.loads(curve.read_text(encoding="utf-8"))
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, one in content["schedules"].items():
        names.setdefault((one["fill"], tuple(one["computed"])), name)
    found: dict[Listed, None] = {}
    seen: set[int] = set()
    for row in content["curve"]:
        key = (row["fill"], tuple(row["steps"]))
        # The first row of a number is the best by prediction.
        if key in names or (row["computed"] in counts and row["computed"] not in seen):
            found[Listed(key[1], key[0], names.get(key))] = None
        seen.add(row["computed"])
    return list(found)


class CpuClock(Clock):
    """A clock of stages that also adds up this process's CPU seconds, for a busy machine."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.cpu: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Be in a stage."""
        began = time.process_time()
        with super().stage(name):
            yield
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - began


class Bench:
    """Makes the videos of cases and keeps what was found in a folder."""

    def __init__(self, work: Path) -> None:
        session = alone()
        self.clock = CpuClock(session.device, session.control.stage)
        self.pipeline = Pipeline.load(session=session, dtype="fp32", clock=self.clock)
        self.work = work

    def measure(self, case: Case, lists: Sequence[Listed]) -> list[dict[str, Any]]:
        """A row for each list. What the folder has is not measured again."""
        path = self._path("measured", case)
        known = _read(path)
        left = [one for one in lists if not any(_is_of(row, one) for row in known)]
        if left:
            known += self._measure(case, left)
            with atomic_output(path) as temporary:
                temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        return _named(known, lists)

    def known(self, case: Case, lists: Sequence[Listed]) -> list[dict[str, Any]]:
        """What the folder has, also of a case that is not finished."""
        if known := _read(self._path("measured", case)):
            return _named(known, lists)
        found = Found.read(self._path("begun", case))
        return _named([into.row(case, one) for one, into in found.items()], lists)

    def _path(self, what: str, case: Case) -> Path:
        return self.work / f"{what}-{case.prompts}-{case.name}.json"

    def _measure(self, case: Case, lists: Sequence[Listed]) -> list[dict[str, Any]]:
        wanted, requests = asked_of(case, self.work)
        begun = self._path("begun", case)
        known = Found.read(begun)
        goes_on = set(known) == set(lists)
        found = [known[one] if goes_on else Found() for one in lists]
        for start in range(len(found[0].psnr), len(requests), BATCH):
            batch = requests[start : start + BATCH]
            words = wanted[start : start + BATCH]
            full, spent = self._make(batch)
            right = [judged(video, a) for video, a in zip(full, words, strict=True)]
            for one, into in zip(lists, found, strict=True):
                schedule = one.schedule(images=batch[0].is_image)
                made, cost = self._make([replace(r, step_cache=schedule) for r in batch])
                into.psnr += [min(MOST_DB, psnr(v, f)) for v, f in zip(made, full, strict=True)]
                into.full_seconds += np.array(spent)
                into.seconds += np.array(cost)
                into.right_full += right
                into.right += [judged(v, a) for v, a in zip(made, words, strict=True)]
            Found.write(begun, lists, found)
            done = min(len(requests), start + BATCH)
            print(f"{case.name}: {done} of {len(requests)} prompts", file=sys.stderr, flush=True)
        return [into.row(case, one) for one, into in zip(lists, found, strict=True)]

    def _make(
        self, requests: Sequence[Request]
    ) -> tuple[list[NDArray[np.uint8]], tuple[float, float]]:
        """The videos, and seconds of denoising: on the clock, and of this process's CPU."""
        before = self.clock.cpu.get("denoise", 0.0)
        result = self.pipeline.generate(requests)
        videos = [video for video in result.videos if video is not None]
        return videos, (result.seconds["denoise"], self.clock.cpu["denoise"] - before)


class Found:
    """What was found of a list, over all batches."""

    def __init__(self) -> None:
        self.psnr: list[float] = []
        self.right: list[tuple[bool, ...]] = []
        self.right_full: list[tuple[bool, ...]] = []
        self.seconds, self.full_seconds = np.zeros(2), np.zeros(2)

    @staticmethod
    def read(path: Path) -> dict[Listed, Found]:
        """What a file has, by list; nothing where it is not there."""
        found = {}
        for read in _read(path):
            into = found[Listed(tuple(read["steps"]), read["fill"])] = Found()
            into.psnr = read["psnr"]
            into.right, into.right_full = read["right"], read["right_full"]
            into.seconds, into.full_seconds = map(np.array, read["seconds"])
        return found

    @staticmethod
    def write(path: Path, lists: Sequence[Listed], found: Sequence[Found]) -> None:
        """Write what `read` reads."""
        content = [
            {
                "fill": one.fill,
                "steps": one.computed,
                "psnr": of.psnr,
                "right": of.right,
                "right_full": of.right_full,
                "seconds": [of.seconds.tolist(), of.full_seconds.tolist()],
            }
            for one, of in zip(lists, found, strict=True)
        ]
        with atomic_output(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def row(self, case: Case, one: Listed) -> dict[str, Any]:
        """As JSON holds it."""
        height, width, frames = case.size
        scores = (np.mean(self.right_full, 0), np.mean(self.right, 0))
        return {
            "kind": case.kind,
            "height": height,
            "width": width,
            "num_frames": frames,
            "cfg_scale": case.scale,
            "computed": len(one.computed),
            "fill": one.fill,
            "steps": list(one.computed),
            "mean": round(fmean(self.psnr), 2),
            "worst": round(min(self.psnr), 2),
            "psnr": [round(value, 2) for value in self.psnr],
            "judge_full": dict(zip(JUDGED, map(float, scores[0]), strict=True)),
            "judge": dict(zip(JUDGED, map(float, scores[1]), strict=True)),
            "denoise_seconds_full": round(float(self.full_seconds[0]), 3),
            "denoise_seconds": round(float(self.seconds[0]), 3),
            "cpu_seconds_full": round(float(self.full_seconds[1]), 3),
            "cpu_seconds": round(float(self.seconds[1]), 3),
        }


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _named(rows: Sequence[dict[str, Any]], lists: Sequence[Listed]) -> list[dict[str, Any]]:
    """The rows of these lists, each with the names of the schedules that it is."""
    return [
        row | {"level": one.level, "shipped": one.shipped}
        for one in lists
        for row in rows
        if _is_of(row, one)
    ]


def _is_of(row: Mapping[str, Any], one: Listed) -> bool:
    return row["fill"] == one.fill and tuple(row["steps"]) == one.computed


def asked_of(case: Case, work: Path) -> tuple[list[Asked], list[Request]]:
    """What the videos should show, and their requests. Pictures are written into the folder."""
    height, width, frames = case.size
    shared: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "steps": STEPS,
        "cfg_scale": case.scale,
        "seed": 7,
    }
    if case.kind == "text":
        chosen = fixed_prompts()[: case.prompts]
        return chosen, [
            Request(prompt=a.prompt, prompt_index=i, **shared) for i, a in enumerate(chosen)
        ]
    wanted, requests = [], []
    for index, (asked, picture) in enumerate(pictures((height, width), frames, case.prompts)):
        path = work / f"picture-{height}x{width}-{index:03d}.png"
        picture_to(path, picture)
        wanted.append(asked)
        requests.append(
            Request(
                prompt=asked.prompt,
                prompt_index=index,
                reference_path=str(path),
                mask_strategy="0",
                **shared,
            )
        )
    return wanted, requests


def pictures(
    size: tuple[int, int], frames: int, count: int
) -> Iterator[tuple[Asked, NDArray[np.uint8]]]:
    """Scenes of one moving object: what is told, and the first frame."""
    rng = np.random.default_rng(3)
    while count:
        scene = draw_scene(rng, size, frames, things=1)
        thing = scene.things[0]
        if thing.motion in DIRECTIONS:
            asked = Asked(describe(scene, rng), thing.colour, thing.shape, thing.motion)
            yield asked, as_uint8(render(scene, [0]))[0]
            count -= 1


def picture_to(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture."""
    from PIL import Image

    Image.fromarray(picture).save(path)


def judged(video: NDArray[np.uint8], asked: Asked) -> tuple[bool, ...]:
    """Whether the largest object has the colour, the shape and the motion that were asked for."""
    seen = look(video)
    return tuple(bool(seen) and getattr(seen[0], n) == getattr(asked, n) for n in JUDGED)


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A Markdown table for each case."""
    before = None
    for row in rows:
        case = tuple(row[key] for key in ("kind", "height", "width", "num_frames", "cfg_scale"))
        if case != before:
            kind, height, width, frames, scale = case
            yield (
                f"\nfrom {kind}, {height}×{width}, {frames} frames, guidance {scale:g}, "
                f"{len(row['psnr'])} prompts:\n"
            )
            yield (
                "| computed | fewer | fill | PSNR, mean | worst | judge, all steps | judge | "
                "time, clock | time, CPU | calibrated here | with the model |"
            )
            yield "| " + " | ".join(["---"] * 11) + " |"
            before = case
        full, own = (
            " ".join(f"{100 * row[key][name]:.0f}" for name in JUDGED)
            for key in ("judge_full", "judge")
        )
        clock = row["denoise_seconds_full"] / row["denoise_seconds"]
        cpu = row["cpu_seconds_full"] / row["cpu_seconds"]
        yield (
            f"| {row['computed']} | {STEPS / row['computed']:.2f}× | {row['fill']} | "
            f"{row['mean']:.1f} | {row['worst']:.1f} | {full} | {own} | {clock:.2f}× | "
            f"{cpu:.2f}× | {row['level'] or ''} | {row['shipped'] or ''} |"
        )


if __name__ == "__main__":
    main()
