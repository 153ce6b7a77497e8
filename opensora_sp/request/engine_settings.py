"""How the models of a run are loaded and computed: what stays as long as they are warm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from opensora_sp.base.access import Remote
from opensora_sp.base.deadlines import (
    DEADLINE_RANGE_S,
    DEADLINES,
    HEARTBEAT_RANGE_S,
    HEARTBEAT_S,
    TIMEOUT_RANGE_S,
    parse_deadlines,
)
from opensora_sp.base.value_types import (
    ValueType,
    boolean,
    choice,
    integer,
    number,
    optional,
    path,
    text,
)
from opensora_sp.models.kernels.attention import AUTO, KERNELS
from opensora_sp.parallel.backend_table import BACKENDS, DEVICES
from opensora_sp.request.memory_modes import MEMORY_MODES
from opensora_sp.request.setting import Declared, a_path, field_names, setting, settings_of

LAUNCHERS = ("torch", "colossalai")
DTYPES = ("fp32", "fp16", "bf16")
CheckFinite = Literal["off", "steps", "blocks"]
FusedKernels = Literal["auto", "off"]
Guidance = Literal["auto", "together", "serial"]
T5Device = Literal["device", "cpu"]
T5Weights = Literal["full", "int8"]
StepKernels = Literal["auto", "plain", "folded"]
VaeDecode = Literal["auto", "rank0", "shared"]
WeightsFrom = Literal["disk", "rank0"]


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


@dataclass(frozen=True, kw_only=True)
class Checkpoints(Declared):
    """The four checkpoint directories, as they are published; text is taken as a path.

    Raises UserError, naming the field, for what is no path.
    """

    dit: Path
    t5: Path
    vae2d: Path
    vae3d: Path

    def __post_init__(self) -> None:
        for name in field_names(type(self)):
            object.__setattr__(self, name, a_path(name, getattr(self, name)))


# The short names of the four models, as in --ckpt-path-dit.
MODELS = field_names(Checkpoints)
_CHECKPOINTS = ValueType(
    "DIRS", "a Checkpoints", str, lambda value: value is None or isinstance(value, Checkpoints)
)


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Declared):
    """What stays while the models are warm: devices, ranks, weights, number formats, memory.

    `device` and `backend` None: the first device that is there, and its own backend.
    `checkpoints` None: the embedded model. `cpu_threads` None: the cores this process may use,
    shared among the ranks of the node. `timeout` and `heartbeat_timeout` are in seconds;
    `deadlines` as for `opensora_sp.base.deadlines.parse_deadlines`. `text_cache` is a directory,
    "auto" or "off".

    Raises UserError, naming the field, for a value that is not legal.
    """

    device: str | None = setting(
        "--device",
        optional(choice(*DEVICES), word="auto"),
        None,
        "where to run",
        changes="nothing",
        shown_default=f"the first of {', '.join(DEVICES)} that is there",
    )
    backend: str | None = setting(
        "--backend",
        optional(choice(*BACKENDS), word="auto"),
        None,
        "collectives",
        changes="nothing",
        shown_default="the device's",
    )
    launcher: str = setting(
        "--launcher", choice(*LAUNCHERS), "torch", "who makes the process groups", changes="nothing"
    )
    dtype: str = setting(
        "--dtype", choice(*DTYPES), "bf16", "number format of the run", changes="content"
    )
    # Set by --ckpt-path-dit and its three siblings.
    checkpoints: Checkpoints | None = setting("", _CHECKPOINTS, None, changes="content")
    log_dir: str | None = setting(
        "--log-dir",
        optional(path("DIR"), word="null"),
        None,
        "also write what each rank says to rank-N.log",
        changes="nothing",
    )
    cpu_threads: int | None = setting(
        "--cpu-threads",
        optional(integer(1, 4096), word="auto"),
        None,
        "threads of each rank",
        changes="nothing",
        shown_default="auto: its share of the cores",
    )
    guidance: Guidance = setting(
        "--guidance",
        choice(*get_args(Guidance)),
        "auto",
        "CFG branches on a rank: together (auto), or serial: one by one, less memory",
        changes="nothing",
    )
    enable_compile: bool = setting(
        "--enable-compile",
        boolean(),
        False,
        "compile the transformer's blocks before the first step",
        changes="content",
        stored_as="compiled",
    )
    attention: str = setting(
        "--attention",
        choice(AUTO, *KERNELS),
        AUTO,
        "attention kernel; auto: on accelerators the fastest that is right, measured before the "
        "first step",
        changes="content",
    )
    fused_kernels: FusedKernels = setting(
        "--fused-kernels",
        choice(*get_args(FusedKernels)),
        "auto",
        "auto: norms in one kernel each where Triton is there and gives plain torch's numbers",
        changes="content",
    )
    timeout: float = setting(
        "--timeout",
        number(*TIMEOUT_RANGE_S, metavar="SECONDS"),
        1800.0,
        "seconds a collective may take",
        changes="nothing",
    )
    heartbeat_timeout: float = setting(
        "--heartbeat-timeout",
        number(*HEARTBEAT_RANGE_S, metavar="SECONDS"),
        HEARTBEAT_S,
        "seconds without a sign of life before a rank counts as hung",
        changes="nothing",
    )
    deadlines: str = setting(
        "--deadlines",
        _deadlines_type(),
        "",
        "seconds a stage may take before it counts as hung: step=600,decode=off",
        changes="nothing",
        shown_default=", ".join(f"{kind}={limit:g}" for kind, limit in DEADLINES.items()),
    )
    check_finite: CheckFinite = setting(
        "--check-finite",
        choice(*get_args(CheckFinite)),
        "steps",
        "stop at the first NaN: of each step, or of each block (slower, names the block)",
        changes="nothing",
    )
    sequence_parallel: int | None = setting(
        "--sequence-parallel",
        optional(integer(1), word="auto"),
        None,
        "ranks that share one sequence",
        changes="nothing",
        shown_default="auto",
    )
    guidance_parallel: int | None = setting(
        "--guidance-parallel",
        optional(integer(1, 2), word="auto"),
        None,
        "2: the two CFG branches on different ranks",
        changes="nothing",
        shown_default="auto",
    )
    replicas: int | None = setting(
        "--replicas",
        optional(integer(1), word="auto"),
        None,
        "groups of ranks that make different videos; their number divides the ranks",
        changes="nothing",
        shown_default="auto: 1, every video on all ranks",
    )
    overlap: bool = setting(
        "--overlap",
        boolean(),
        True,
        "exchange while computing; same result",
        changes="nothing",
    )
    vae_decode: VaeDecode = setting(
        "--vae-decode",
        choice(*get_args(VaeDecode)),
        "auto",
        "who decodes: the leading rank, all ranks together, or whichever pays; same frames",
        changes="nothing",
    )
    weights_from: WeightsFrom = setting(
        "--weights-from",
        choice(*get_args(WeightsFrom)),
        "disk",
        "rank0: only rank 0 sees the paths; it hands the transformer out and decodes alone",
        changes="nothing",
    )
    memory: str = setting(
        "--memory",
        choice("auto", *MEMORY_MODES),
        "auto",
        "; ".join(
            [
                "auto: the fastest mode that fits",
                *(f"{mode}: {mode.about}" for mode in MEMORY_MODES.values()),
            ]
        ),
        changes="nothing",
    )
    t5_device: T5Device = setting(
        "--t5-device",
        choice(*get_args(T5Device)),
        "device",
        "where the text encoder runs",
        changes="nothing",
    )
    t5_weights: T5Weights = setting(
        "--t5-weights",
        choice(*get_args(T5Weights)),
        "full",
        "int8: the text encoder's matrices take half the memory and a little accuracy",
        changes="content",
        stored_as="text weights",
    )
    step_kernels: StepKernels = setting(
        "--step-kernels",
        choice(*get_args(StepKernels)),
        "auto",
        "folded: a step's modulation is in its weights, which saves memory traffic on all but "
        "small videos (auto)",
        changes="content",
        stored_as="step kernels",
    )
    device_memory: str | None = setting(
        "--device-memory",
        optional(text(empty=False, metavar="SIZE"), word="auto"),
        None,
        "what a request must fit in, such as 48GB or H100; it is then refused before torch "
        "is loaded",
        changes="nothing",
        shown_default="auto: what the device has left",
    )
    no_plan: bool = setting(
        "--no-plan",
        boolean(),
        False,
        "try a request that the plan says does not fit",
        changes="nothing",
        nargs=0,
    )
    allow_remote: bool = setting(
        "--allow-remote",
        boolean(),
        False,
        "let references be http(s) addresses; bounded in size and time",
        changes="nothing",
        nargs=0,
    )
    allow_private: bool = setting(
        "--allow-private",
        boolean(),
        False,
        "with --allow-remote: also addresses of this machine and of private networks",
        changes="nothing",
        nargs=0,
    )
    text_cache: str = setting(
        "--text-cache",
        path("DIR|off"),
        "auto",
        "where embeddings of prompts are kept, so that one seen before needs no T5",
        changes="nothing",
        shown_default="opensora-sp/text in the user's cache directory",
    )

    def __post_init__(self) -> None:
        self.check_values()

    @property
    def remote(self) -> Remote:
        """Which addresses references may be fetched from."""
        return remote_of(self.allow_remote, self.allow_private)


def remote_of(allow_remote: bool, allow_private: bool) -> Remote:
    """Which addresses --allow-remote and --allow-private let references be fetched from."""
    return "private" if allow_remote and allow_private else allow_remote


def engine_keys() -> frozenset[str]:
    """Keys of the flags that say how an engine runs, and where its four models are."""
    own = {one.key for one in settings_of(EngineSettings).values() if one.name}
    return frozenset(own | {f"ckpt_path_{kind}" for kind in MODELS})
