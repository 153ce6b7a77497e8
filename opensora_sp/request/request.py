"""What to generate: one video (`Request`), how to run (`RunSettings`), a whole run (`Job`).

All frozen, all checked when they are made, none needs torch.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from opensora_sp.base import geometry
from opensora_sp.base.deadlines import (
    DEADLINE_RANGE_S,
    DEADLINES,
    HEARTBEAT_RANGE_S,
    HEARTBEAT_S,
    TIMEOUT_RANGE_S,
    parse_deadlines,
)
from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import references_without_secrets
from opensora_sp.base.value_types import (
    ValueType,
    boolean,
    choice,
    file_stem,
    integer,
    number,
    optional,
    path,
    shown,
    text,
)
from opensora_sp.media.fetch import Remote
from opensora_sp.request import sizes
from opensora_sp.request.memory_modes import MEMORY_MODES
from opensora_sp.request.rules import check_fields

IMAGE_FPS = 120  # the frame rate that stands for "one picture" in Open-Sora 1.2

DEVICES = ("gcu", "cuda", "cpu")
BACKENDS = ("eccl", "nccl", "gloo")
LAUNCHERS = ("torch", "colossalai")
DTYPES = ("fp32", "fp16", "bf16")
GUIDANCE = ("auto", "together", "serial")
MEMORY = ("auto", *MEMORY_MODES)
T5_DEVICE = ("device", "cpu")
T5_WEIGHTS = ("full", "int8")
WEIGHTS_FROM = ("disk", "rank0")
VAE_DECODE = ("auto", "rank0", "shared")
LOOP_CARRY = ("frames", "latents")
CheckFinite = Literal["off", "steps", "blocks"]


def _deadlines_type() -> ValueType:
    def legal(value: Any) -> bool:
        try:
            parse_deadlines(value)
        except (ValueError, AttributeError):
            return False
        return True

    kinds, (low, high) = ", ".join(DEADLINES), DEADLINE_RANGE_S
    allowed = (
        f"a list like step=600,decode=off (seconds from {low:.0f} to {high:.0f}, or off; "
        f"kinds: {kinds})"
    )
    return ValueType("LIST", allowed, str.strip, legal)


# Legal values of the fields below; the flags and YAML keys use the same entries.
REQUEST_TYPES: Mapping[str, ValueType] = {
    "prompt": text(metavar="P"),
    "prompt_index": integer(0),
    "sample_index": integer(0),
    "height": integer(sizes.SMALLEST_SIDE, sizes.LARGEST_SIDE),
    "width": integer(sizes.SMALLEST_SIDE, sizes.LARGEST_SIDE),
    "num_frames": integer(1, sizes.MOST_FRAMES),
    "fps": integer(1, 1000),
    "save_fps": integer(1, 1000),
    "steps": integer(1, 100_000),
    "cfg_scale": number(0),
    "seed": integer(0, 2**63 - 1),
    "timestep_transform": boolean(),
    "aes": optional(number(0)),
    "flow": optional(number(0)),
    "camera_motion": optional(text(empty=False), word="null"),
    "loop": integer(1, 10_000),
    "condition_frame_length": integer(1, 10_000),
    "align": integer(1, 10_000),
    "reference_path": text(),
    "mask_strategy": text(),
    "reference_fps": optional(number(0, above=True), word="null"),
    "loop_carry": choice(*LOOP_CARRY),
    "micro_frame_size": integer(1, 10_000),
    "micro_batch_size": integer(1, 10_000),
    "model_max_length": optional(integer(1, 100_000)),
}
SETTINGS_TYPES: Mapping[str, ValueType] = {
    "device": optional(choice(*DEVICES), word="auto"),
    "backend": optional(choice(*BACKENDS), word="auto"),
    "launcher": choice(*LAUNCHERS),
    "dtype": choice(*DTYPES),
    "save_dir": path("DIR"),
    "sample_name": optional(file_stem(), word="null"),
    "num_sample": integer(1, 10_000),
    "batch_size": integer(1, 10_000),
    "verbose": integer(0, 2),
    "log_dir": optional(path("DIR"), word="null"),
    "cpu_threads": optional(integer(1, 4096), word="auto"),
    "guidance": choice(*GUIDANCE),
    "enable_compile": boolean(),
    "timeout": number(*TIMEOUT_RANGE_S, metavar="SECONDS"),
    "heartbeat_timeout": number(*HEARTBEAT_RANGE_S, metavar="SECONDS"),
    "deadlines": _deadlines_type(),
    "check_finite": choice(*get_args(CheckFinite)),
    "sequence_parallel": optional(integer(1), word="auto"),
    "guidance_parallel": optional(integer(1, 2), word="auto"),
    "replicas": optional(integer(1), word="auto"),
    "overlap": boolean(),
    "vae_decode": choice(*VAE_DECODE),
    "weights_from": choice(*WEIGHTS_FROM),
    "memory": choice(*MEMORY),
    "t5_device": choice(*T5_DEVICE),
    "t5_weights": choice(*T5_WEIGHTS),
    "device_memory": optional(text(empty=False, metavar="SIZE"), word="auto"),
    "no_plan": boolean(),
    "allow_remote": boolean(),
    "allow_private": boolean(),
    "lossless": boolean(),
    "watermark": boolean(),
    "sheet": boolean(),
    "llm_refine": boolean(),
    "prompt_generator": optional(text(empty=False), word="null"),
    "text_cache": path("DIR|off"),
    "save_every": integer(0),
    "resume": boolean(),
    "decode_only": boolean(),
    "keep_state": boolean(),
    "overwrite": boolean(),
}


def _check(instance: Any, kinds: Mapping[str, ValueType]) -> None:
    for name, kind in kinds.items():
        value = _plain(getattr(instance, name))
        is_path = isinstance(value, Path) and kind.metavar == "DIR"
        kind.check(name, str(value) if is_path else value)
        object.__setattr__(instance, name, value)


def _plain(value: Any) -> Any:
    """A scalar of numpy as Python's own, without numpy; anything else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _refuse_unknown(cls: type[Any], arguments: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """UserError for a name that is no field, with the nearest that is one."""
    if arguments:
        raise UserError(
            f"{cls.__name__} {shown(arguments[0])}: values are given by name, as "
            f"{cls.__name__}({next(iter(fields_of(cls)))}=...)"
        )
    for name in given:
        if name not in fields_of(cls):
            close = difflib.get_close_matches(name, list(fields_of(cls)), n=1)
            nearest = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{name} is not a field of {cls.__name__}{nearest}")


def fields_of(cls: type[Any]) -> tuple[str, ...]:
    """Names of a dataclass's fields."""
    return tuple(cls.__dataclass_fields__)


def a_path(name: str, value: Any) -> Path:
    """A path given as text or as a path. Raises UserError naming `name`."""
    whole = str(value) if isinstance(value, Path) else value
    path("DIR").check(name, whole)
    return Path(path("DIR").read(whole)) if isinstance(value, str) else Path(whole)


class _Named:
    """Refuses unknown names in one line, where a dataclass alone would raise a TypeError."""

    def __new__(cls, *arguments: Any, **given: Any) -> Any:
        _refuse_unknown(cls, arguments, given)
        return super().__new__(cls)


@dataclass(frozen=True, kw_only=True)
class Request(_Named):
    """One video or image of Open-Sora 1.2, and everything that decides its content.

    `prompt` is the person's words, without JSON, scores or cleaning (it may hold `|0|` segments).
    `height` and `width` are the pixels given to the model (a table size, or any other);
    `decoded_size` is what comes out. `prompt_index` and `sample_index` are its place in the list
    it came from: with `seed` they key every random draw, so that one request is one video
    whatever else is generated beside it.

    Raises UserError, naming the field, for a value that is not legal and for values that do not go
    together (`request_rules`), as the flags do. Scalars of numpy are taken as Python's own.
    """

    prompt: str
    prompt_index: int = 0
    sample_index: int = 0
    height: int = 240
    width: int = 426
    num_frames: int = 51
    fps: int = 24
    save_fps: int = 24
    steps: int = 30
    cfg_scale: float = 7.0
    seed: int = 42
    timestep_transform: bool = True
    aes: float | None = 6.5
    flow: float | None = None
    camera_motion: str | None = None
    loop: int = 1
    condition_frame_length: int = 5
    align: int = 5
    reference_path: str = ""
    mask_strategy: str = ""
    reference_fps: float | None = None
    loop_carry: Literal["frames", "latents"] = "frames"
    micro_frame_size: int = geometry.MICRO_FRAME_SIZE
    micro_batch_size: int = 4
    model_max_length: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.reference_path, Path):
            object.__setattr__(self, "reference_path", str(self.reference_path))
        _check(self, REQUEST_TYPES)
        check_fields(vars(self))
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
class Checkpoints(_Named):
    """The four checkpoint directories, as they are published; text is taken as a path.

    Raises UserError, naming the field, for what is no path.
    """

    dit: Path
    t5: Path
    vae2d: Path
    vae3d: Path

    def __post_init__(self) -> None:
        for name in fields_of(type(self)):
            object.__setattr__(self, name, a_path(name, getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class RunSettings(_Named):
    """How a run is done; nothing here changes what is generated, except `dtype`.

    `device` and `backend` None: the first device that is there, and its own backend.
    `checkpoints` None: the embedded model. `cpu_threads` None: the cores this process may use,
    shared among the ranks of the node. `sample_name` None: "sample", or nothing before the prompt
    with `prompt_as_path`. `timeout` and `heartbeat_timeout` are in seconds; `deadlines` as for
    `opensora_sp.base.deadlines.parse_deadlines`.
    `text_cache` is a directory, "auto" or "off". `save_every` counts denoising steps; 0 saves
    finished clips only.

    Raises UserError, naming the field, for a value that is not legal.
    """

    device: str | None = None
    backend: str | None = None
    launcher: str = "torch"
    dtype: str = "bf16"
    checkpoints: Checkpoints | None = None
    save_dir: Path = Path("samples/samples")
    sample_name: str | None = None
    prompt_as_path: bool = False
    num_sample: int = 1
    batch_size: int = 1
    verbose: int = 1
    log_dir: str | None = None
    cpu_threads: int | None = None
    guidance: Literal["auto", "together", "serial"] = "auto"
    enable_compile: bool = False
    timeout: float = 1800.0
    heartbeat_timeout: float = HEARTBEAT_S
    deadlines: str = ""
    check_finite: CheckFinite = "steps"
    sequence_parallel: int | None = None
    guidance_parallel: int | None = None
    replicas: int | None = None
    overlap: bool = True
    vae_decode: Literal["auto", "rank0", "shared"] = "auto"
    weights_from: Literal["disk", "rank0"] = "disk"
    memory: str = "auto"
    t5_device: Literal["device", "cpu"] = "device"
    t5_weights: Literal["full", "int8"] = "full"
    device_memory: str | None = None
    no_plan: bool = False
    allow_remote: bool = False
    allow_private: bool = False
    lossless: bool = False
    watermark: bool = False
    sheet: bool = False
    llm_refine: bool = False
    prompt_generator: str | None = None
    text_cache: str = "auto"
    save_every: int = 10
    resume: bool = False
    decode_only: bool = False
    keep_state: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _check(self, SETTINGS_TYPES)
        object.__setattr__(self, "save_dir", a_path("save_dir", self.save_dir))

    @property
    def default_names(self) -> bool:
        """Whether nobody named the outputs: another request then gets a name that is free."""
        return self.sample_name is None and not self.prompt_as_path

    @property
    def remote(self) -> Remote:
        """Which addresses references may be fetched from."""
        return "private" if self.allow_remote and self.allow_private else self.allow_remote

    @property
    def skip_existing(self) -> bool:
        """Whether an output that is there already is left alone, whatever it shows."""
        return self.prompt_as_path

    @property
    def sheet_path(self) -> Path:
        """Where the contact sheet of the run goes, if one is wanted."""
        start = "" if self.sample_name is None else f"{self.sample_name}-"
        return self.save_dir / f"{start}sheet.html"


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
    """A whole run: settings, its tasks in order, and what is worth telling before it starts.

    failed: the prompts that cannot be made, a line each; the run makes the others.
    """

    settings: RunSettings
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
