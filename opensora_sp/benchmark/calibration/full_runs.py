"""Full runs of a calibration, and runs with steps left out that are compared with them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from opensora_sp.base.atomic import atomic_output, remove_leftovers, reported
from opensora_sp.base.outside_json import read_object
from opensora_sp.benchmark.calibration.comparing import Comparison, frames_written
from opensora_sp.benchmark.calibration.search import Floats
from opensora_sp.benchmark.calibration.trajectory import Trajectory
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.request.request import Request
from opensora_sp.request.step_schedule import StepSchedule
from opensora_sp.request.step_times import times_of


@dataclass(frozen=True)
class FullRuns:
    """The full runs of some requests of one shape, in a folder of the leading rank.

    What is in the folder is not made again. Every rank calls every method.
    """

    pipeline: Pipeline
    requests: Sequence[Request]
    folder: Path

    def _gram_path(self, number: int) -> Path:
        return self.folder / f"gram-{number:03d}.npy"

    def _frames_path(self, number: int) -> Path:
        return self.folder / f"frames-{number:03d}.bin"

    def is_there(self, number: int) -> bool:
        """Whether a run is finished. Collective."""
        control = self.pipeline.session.control
        paths = (self._gram_path(number), self._frames_path(number))
        return control.broadcast_object(all(path.is_file() for path in paths))

    def make(self, number: int) -> float:
        """Make a run, from the step on where it stands; returns its seconds. Collective."""
        session, request = self.pipeline.session, self.requests[number]
        began = time.perf_counter()
        if session.leads:
            with reported(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)  # of a calibration that was killed
        noise = draw_noise([request], 0)
        states = Trajectory(session, self.folder, request.steps, noise.shape)
        with ExitStack() as stack:
            sinks = []
            if session.leads:
                sinks = [stack.enter_context(frames_written(self._frames_path(number)))]
            self.pipeline.generate_to(
                [request], sinks or [Comparison(None)], noise=noise, progress=states
            )
        if session.leads:
            gram = states.inner_products(noise, times_of(request))
            path = self._gram_path(number)
            with atomic_output(path) as temporary, reported(path), temporary.open("wb") as file:
                np.save(file, gram)
            states.remove()
        session.control.barrier()
        return time.perf_counter() - began

    def grams(self) -> list[Floats]:
        """The inner products of every run; on the leading rank."""
        return [np.load(self._gram_path(number)) for number in range(len(self.requests))]

    def compare(self, schedule: StepSchedule) -> list[float]:
        """Decibels of every request's frames, made by a schedule, against its full run. Collective.

        What was compared before is read from the folder.
        """
        session = self.pipeline.session
        path = self.folder / "compared.json"
        name = f"{schedule.fill} {' '.join(map(str, schedule.computed))}"
        known: dict[str, list[float]] = {}
        if session.leads and path.is_file():
            known = read_object(path)
        found: list[float] | None = session.control.broadcast_object(known.get(name))
        if found is not None:
            return found
        values = []
        for number, request in enumerate(self.requests):
            with ExitStack() as stack:
                file = None
                if session.leads:
                    file = stack.enter_context(self._frames_path(number).open("rb"))
                sink = Comparison(file)
                asked = replace(request, step_cache=schedule)
                self.pipeline.generate_to([asked], [sink], keep_latents=False)
                values.append(sink.psnr)
        values = session.control.broadcast_object(values)
        if session.leads:
            text = json.dumps(known | {name: values}, indent=1)
            with atomic_output(path) as temporary, reported(path):
                temporary.write_text(text + "\n", encoding="utf-8")
        return values

    def remove(self) -> None:
        """Remove the folder's files, and the folder where it is empty then; on the leading rank."""
        for number in range(len(self.requests)):
            self._gram_path(number).unlink(missing_ok=True)
            self._frames_path(number).unlink(missing_ok=True)
        (self.folder / "compared.json").unlink(missing_ok=True)
        remove_leftovers(self.folder)
        with suppress(OSError):
            self.folder.rmdir()
