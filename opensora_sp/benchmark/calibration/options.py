"""The flags of `opensora-sp calibrate`, and what it cannot calibrate. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown
from opensora_sp.request.conditions import all_groups
from opensora_sp.request.preflight import amount, check_output, check_save_dir
from opensora_sp.request.request import Job, Request
from opensora_sp.request.step_schedule import read_schedules

FEWEST_STEPS = 3
# Where no prompt is given: of the embedded model's drawn world, and of no model in particular.
EMBEDDED_PROMPTS = (
    "a red ball rolls to the left",
    "a green triangle moves up on a gray background",
    "a yellow ring drifts down right",
    "a blue square bounces on a white background",
)
PROMPTS = (
    "a drone flies over a coast where waves break on dark rocks",
    "a woman in a red coat walks through a crowded street at night, neon signs behind her",
    "close view of a cat that turns its head towards the camera",
    "a train crosses a snowy valley in the early morning",
)


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What calibrate does beside the request.

    out: the file of schedules. full_runs: the prompts that full runs are made of.
    """

    out: Path
    full_runs: int

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> CalibrationOptions:
        """From resolved flags, with the files that they name looked at. Raises UserError."""
        if values["out"] is None:
            raise UserError(
                "--out FILE is needed: where schedules are written, such as --out schedules.yaml"
            )
        out = Path(values["out"])
        if out.suffix not in (".yaml", ".yml"):
            raise UserError(f"--out {shown(str(out))}: a name that ends in .yaml is needed")
        check_save_dir(os.path.dirname(out) or ".", "--out")
        check_output(out)
        if access.exists(out):
            read_schedules(out, f"--out {shown(str(out))}")  # what it has for other sizes is kept
        return cls(out=out, full_runs=values["full_runs"])

    @property
    def curve(self) -> Path:
        """The measured curve as JSON, beside the schedules."""
        return self.out.with_suffix(".json")

    @property
    def picture(self) -> Path:
        """The curve as a picture, beside the schedules."""
        return self.out.with_suffix(".svg")


def check_calibration(job: Job, values: Mapping[str, Any]) -> None:
    """Raise UserError for what belongs to generation alone, or has no schedule."""
    for name in ("llm_refine", "sheet", "decode_only"):
        if values[name]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} belongs to generate: calibrate keeps none of its videos")
    for name in ("replicas", "num_sample", "loop"):
        if values[name] not in (None, 1):
            raise UserError(
                f"--{name.replace('_', '-')} {values[name]} belongs to generate: calibrate makes "
                "one clip of one prompt after the other, on all ranks"
            )
    if values["step_cache"] != "off":
        raise UserError(
            f"--step-cache {shown(str(values['step_cache']))} belongs to generate: calibrate finds "
            "out which steps need not be computed, and computes all of them for that"
        )
    request = job.tasks[0].request
    if request.steps < FEWEST_STEPS:
        raise UserError(
            f"--num-sampling-steps {request.steps}: of fewer than {FEWEST_STEPS} steps none can be "
            f"left out: give {FEWEST_STEPS} or more, as many as generate will be given"
        )
    for task in job.tasks:
        _check_strategy(task.request)


def _check_strategy(request: Request) -> None:
    """Frames that join in the middle of a run move by more than their velocities."""
    for group in all_groups(request):
        if 0 < group.edit_ratio < 1:
            raise UserError(
                f"an edit ratio of {group.edit_ratio:g}: calibrate knows frames that are kept or "
                "generated from the first step on: leave --edit or the ratio out, or give 0 or 1"
            )


@dataclass(frozen=True)
class Sizes:
    """Bytes on the leading rank's disk.

    latents: of one step of one video. run: of the full run that is being made. frames: of one video
    as it is compared.
    """

    latents: int
    run: int
    frames: int

    @classmethod
    def of(cls, request: Request) -> Sizes:
        """Of a request's videos."""
        frames, height, width = request.latent_shape
        latents = 4 * 4 * frames * height * width
        down, across = request.decoded_size
        return cls(latents, latents * request.steps, request.num_frames * down * across * 3)

    def check(self, folder: Path, videos: int) -> None:
        """Raise UserError where the disk has no room for the frames and a run of the videos."""
        needed = self.run + videos * self.frames
        place = access.absolute(folder)
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise UserError(
                f"calibrating needs {amount(needed)} of disk in {folder}, where {amount(free)} are "
                "free: give --out elsewhere, or fewer --full-runs"
            )
