"""What to generate: one video (`Request`) and a whole run (`Job`).

All frozen, all checked when they are made, none needs torch. How the models run is in
engine_settings.py, what a job does with its outputs in job_settings.py.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from opensora_sp.base import geometry
from opensora_sp.base.redaction import references_without_secrets
from opensora_sp.base.value_types import (
    ValueType,
    boolean,
    choice,
    integer,
    number,
    optional,
    text,
)
from opensora_sp.request import sizes

# The names of a job's parts, which most modules import from here.
from opensora_sp.request.engine_settings import CheckFinite as CheckFinite
from opensora_sp.request.engine_settings import Checkpoints as Checkpoints
from opensora_sp.request.engine_settings import EngineSettings as EngineSettings
from opensora_sp.request.job_settings import JobSettings as JobSettings
from opensora_sp.request.rules import check_fields
from opensora_sp.request.setting import Declared, declared, setting
from opensora_sp.request.step_cache import OFF, check_schedule, step_cache_value
from opensora_sp.request.step_schedule import StepSchedule

IMAGE_FPS = 120  # the frame rate that stands for "one picture" in Open-Sora 1.2

LoopCarry = Literal["frames", "latents"]


def frames_or_duration() -> ValueType:
    """A number of frames or a word of the size table, which is looked up later."""
    return ValueType(
        "N|DURATION",
        "a number of frames or a duration of the table",
        str,
        text(empty=False).legal,
    )


@dataclass(frozen=True, kw_only=True)
class Request(Declared):
    """One video or image of Open-Sora 1.2, and everything that decides its content.

    `prompt` is the person's words, without JSON, scores or cleaning (it may hold `|0|` segments).
    `height` and `width` are the pixels given to the model (a table size, or any other);
    `decoded_size` is what comes out. `prompt_index` and `sample_index` are its place in the list
    it came from: with `seed` they key every random draw, so that one request is one video
    whatever else is generated beside it.

    Raises UserError, naming the field, for a value that is not legal and for values that do not go
    together (`request_rules`), as the flags do. Scalars of numpy are taken as Python's own.
    """

    prompt: str = field(
        metadata=declared(
            "--prompt",
            text(metavar="P"),
            help="one or more prompts, one output each",
            changes="content",
            nargs="+",
        )
    )
    prompt_index: int = setting("", integer(0), 0, changes="content")
    sample_index: int = setting("", integer(0), 0, changes="content")
    # Set by --image-size, or by --resolution and --aspect-ratio.
    height: int = setting("", sizes.SIDE, 240, changes="content")
    width: int = setting("", sizes.SIDE, 426, changes="content")
    num_frames: int = setting(
        "--num-frames",
        integer(1, sizes.MOST_FRAMES),
        51,
        "2s 4s 8s 16s (51 102 204 408 frames), image (1), or a number of frames",
        changes="content",
        flag_kind=frames_or_duration(),
    )
    fps: int = setting(
        "--fps",
        integer(1, 1000),
        24,
        "frame rate told to the model; always 120 for one frame",
        changes="content",
    )
    save_fps: int = setting(
        "--save-fps", integer(1, 1000), 24, "frame rate of the file", changes="file"
    )
    steps: int = setting(
        "--num-sampling-steps", integer(1, 100_000), 30, "denoising steps", changes="content"
    )
    cfg_scale: float = setting(
        "--cfg-scale", number(0), 7.0, "guidance scale; 1 is no guidance", changes="content"
    )
    seed: int = setting(
        "--seed",
        integer(0, 2**63 - 1),
        42,
        "one seed means one video on any device or rank count",
        changes="content",
    )
    timestep_transform: bool = setting("", boolean(), True, changes="content")
    aes: float | None = setting(
        "--aes",
        optional(number(0)),
        6.5,
        "aesthetic score written into the prompt, or none",
        changes="content",
    )
    flow: float | None = setting(
        "--flow",
        optional(number(0)),
        None,
        "motion score written into the prompt",
        changes="content",
    )
    camera_motion: str | None = setting(
        "--camera-motion",
        optional(text(empty=False), word="null"),
        None,
        "such as 'pan left', or none",
        changes="content",
    )
    loop: int = setting(
        "--loop",
        integer(1, 10_000),
        1,
        "clips, each continuing the last",
        changes="content",
    )
    condition_frame_length: int = setting(
        "--condition-frame-length",
        integer(1, 10_000),
        5,
        "latent frames a clip takes from the one before, a multiple of 5",
        changes="content",
    )
    align: int = setting(
        "--align",
        integer(1, 10_000),
        5,
        "latent frames that strategy starts snap to",
        changes="content",
    )
    reference_path: str = setting(
        "--reference-path",
        text(metavar="PATHS"),
        "",
        "images or videos, one entry per prompt, joined by ; within an entry",
        changes="content",
        flag_default=None,
        nargs="+",
    )
    mask_strategy: str = setting(
        "--mask-strategy",
        text(metavar="STRATEGY"),
        "",
        "loop,ref,ref_start,target_start,length,edit_ratio, one entry per prompt; a "
        "ref_start of end keeps the reference's last frames",
        changes="content",
        flag_default=None,
        nargs="+",
    )
    reference_fps: float | None = setting(
        "--reference-fps",
        optional(number(0, above=True), word="null"),
        None,
        "resample reference videos to this rate",
        changes="content",
        shown_default="as they are",
    )
    loop_carry: LoopCarry = setting(
        "--loop-carry",
        choice(*get_args(LoopCarry)),
        "frames",
        "what a clip takes: the frames, encoded again, or the latents as they are",
        changes="content",
    )
    micro_frame_size: int = setting(
        "--micro-frame-size",
        integer(1, 10_000),
        geometry.MICRO_FRAME_SIZE,
        "frames of a VAE chunk; another value changes the result",
        changes="content",
        note="--micro-frame-size {value} changes the result: the model was trained with 17",
    )
    step_cache: str | StepSchedule = setting(
        "--step-cache",
        step_cache_value(schedules=True),
        OFF,
        "leave denoising steps out: near-lossless, fast, or by the schedules of FILE or FILE:NAME; "
        "changes the result",
        changes="content",
        flag_kind=step_cache_value(),
        stored_as="step cache",
    )
    # How a request is computed, not what: a run that ended for want of memory goes on with less.
    micro_batch_size: int = setting(
        "--micro-batch-size",
        integer(1, 10_000),
        4,
        "frames the VAE takes at once",
        changes="nothing",
    )
    model_max_length: int | None = setting(
        "--model-max-length",
        optional(integer(1, 100_000)),
        None,
        "text tokens",
        changes="content",
        shown_default="the model's own; 300 as published",
    )

    def __post_init__(self) -> None:
        if isinstance(self.reference_path, Path):
            object.__setattr__(self, "reference_path", str(self.reference_path))
        self.check_values()
        check_fields(vars(self))
        check_schedule(self.step_cache, steps=self.steps, images=self.is_image)
        # 7 and 7.0 are one request: they must have one digest.
        for name in ("cfg_scale", "aes", "flow"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

    @property
    def is_image(self) -> bool:
        """One frame, written as a picture."""
        return self.num_frames == 1

    @property
    def model_fps(self) -> int:
        """Frame rate given to the model."""
        return IMAGE_FPS if self.is_image else self.fps

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(T, height, width) of one clip's latents, without batch and channels."""
        return geometry.latent_shape(
            self.num_frames, self.height, self.width, self.micro_frame_size
        )

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches (down, across) of one latent frame; S is their product."""
        return geometry.patch_grid(*self.latent_shape[1:])

    @property
    def decoded_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the decoded frames."""
        _, height, width = self.latent_shape
        return height * geometry.SPATIAL_FACTOR, width * geometry.SPATIAL_FACTOR

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON can hold it."""
        return dataclasses.asdict(self)

    def public_dict(self) -> dict[str, Any]:
        """As `to_dict`, to be shown or stored: addresses without user, password and query."""
        return self.to_dict() | {"reference_path": references_without_secrets(self.reference_path)}

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of every field."""
        canonical = json.dumps(
            self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False
        )
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def reference_paths(request: Request) -> list[str]:
    """The files and addresses that a request names as references, by their numbers."""
    return [path.strip() for path in request.reference_path.split(";") if path.strip()]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One request and the file that its video or image is written to.

    `original_prompt`: what a language model made the request's prompt of; None where it did not.
    """

    request: Request
    output: Path
    original_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A whole run: its tasks in order, and what is worth telling before it starts.

    engine: how the models run. settings: what is done with the outputs. failed: the prompts that
    cannot be made, a line each; the run makes the others.
    """

    engine: EngineSettings
    settings: JobSettings
    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def batches(self) -> tuple[tuple[Task, ...], ...]:
        """The tasks in the groups that are denoised together: one sample of several prompts."""
        groups: list[list[Task]] = []
        for task in self.tasks:
            last = groups[-1] if groups else []
            full = len(last) >= self.settings.batch_size
            if last and not full and last[0].request.sample_index == task.request.sample_index:
                last.append(task)
            else:
                groups.append([task])
        return tuple(tuple(group) for group in groups)
