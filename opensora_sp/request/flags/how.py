"""The flags that say how to run and where the results go: half of the table in flag_table.py."""

from typing import Any, Literal

from opensora_sp.base import geometry
from opensora_sp.base.deadlines import DEADLINES, HEARTBEAT_S
from opensora_sp.base.value_types import (
    ValueType,
    boolean,
    file_stem,
    integer,
    number,
    optional,
    path,
)
from opensora_sp.request.flags.benchmark_types import BENCHMARK_KINDS, DEFAULT_REPORT
from opensora_sp.request.flags.flag import Flag, Group, flag
from opensora_sp.request.request import REQUEST_TYPES, SETTINGS_TYPES


def _verbosity() -> ValueType:
    """0 to 2; also a boolean, because scripts written for the reference say True."""
    level, truth = SETTINGS_TYPES["verbose"], boolean()

    def read(value: str) -> int:
        return int(value) if value.strip().isdecimal() else int(truth.read(value))

    return ValueType("{0,1,2}", "0, 1, 2, true or false", read, level.legal)


def _benchmark(name: str, default: Any, help: str, nargs: Literal[0] | None = None) -> Flag:
    """A flag of the benchmark whose legal values are those of its options."""
    kind = BENCHMARK_KINDS[name.removeprefix("--").replace("-", "_")]
    return flag(name, kind, default, help, program="benchmark", nargs=nargs)


_R, _S = REQUEST_TYPES, SETTINGS_TYPES
_BOOL = boolean()

RUN_GROUPS: tuple[Group, ...] = (
    (
        "Output",
        (
            flag("--save-dir", path("DIR"), "./samples/samples/", "where outputs are written"),
            flag(
                "--sample-name",
                file_stem(),
                None,
                "start of the file names",
                shown_default="sample",
            ),
            flag(
                "--prompt-as-path",
                _BOOL,
                False,
                "name files after their prompts, and skip those that exist",
                nargs=0,
            ),
            flag(
                "--lossless",
                _BOOL,
                False,
                "videos as RGB H.264, every pixel kept; large, and few players show it",
                nargs=0,
            ),
            flag(
                "--watermark",
                _BOOL,
                False,
                "write 'AI generated' in the bottom right corner of every frame",
                feature="watermark",
            ),
            flag(
                "--sheet",
                _BOOL,
                False,
                "also write sheet.html: three frames of each output, settings, timings",
                nargs=0,
            ),
            flag(
                "--overwrite",
                _BOOL,
                False,
                "make every output anew; without, finished ones are skipped and others kept",
                nargs=0,
            ),
            flag("--verbose", _verbosity(), 1, "0 quiet, 1 progress, 2 everything"),
            flag("--log-dir", _S["log_dir"], None, "also write what each rank says to rank-N.log"),
        ),
    ),
    (
        "Saving and going on (in .opensora-sp/ of the save directory)",
        (
            flag(
                "--save-every",
                _S["save_every"],
                10,
                "steps between two saves of what is being denoised; 0: finished clips only",
            ),
            flag(
                "--resume",
                _BOOL,
                False,
                "go on where a run was cut off (it does so anyway), and say if nothing was begun",
                nargs=0,
            ),
            flag(
                "--decode-only",
                _BOOL,
                False,
                "turn saved latents into files; refused where a video is not denoised yet",
                nargs=0,
            ),
            flag(
                "--keep-state",
                _BOOL,
                False,
                "keep the latents of finished videos, so that --decode-only can use them again",
                nargs=0,
            ),
            flag(
                "--text-cache",
                _S["text_cache"],
                "auto",
                "where embeddings of prompts are kept, so that one seen before needs no T5",
                shown_default="opensora-sp/text in the user's cache directory",
            ),
        ),
    ),
    (
        "Model (none of the four paths: the embedded model)",
        (
            flag("--ckpt-path-dit", path("DIR"), None, "OpenSora-STDiT-v3"),
            flag("--ckpt-path-t5", path("DIR"), None, "t5-v1_1-xxl"),
            flag("--ckpt-path-vae2d", path("DIR"), None, "pixart_sigma_sdxlvae_T5_diffusers"),
            flag("--ckpt-path-vae3d", path("DIR"), None, "OpenSora-VAE-v1.2"),
            flag(
                "--weights-from",
                _S["weights_from"],
                "disk",
                "rank0: only rank 0 sees the paths; it hands the transformer out and decodes alone",
            ),
            flag("--dtype", _S["dtype"], "bf16", "number format of the run"),
            flag(
                "--model-max-length",
                _R["model_max_length"],
                None,
                "text tokens",
                shown_default="the model's own; 300 as published",
            ),
        ),
    ),
    (
        "Devices and ranks",
        (
            flag(
                "--device",
                _S["device"],
                None,
                "where to run",
                shown_default="the first of gcu, cuda, cpu that is there",
            ),
            flag("--backend", _S["backend"], None, "collectives", shown_default="the device's"),
            flag("--launcher", _S["launcher"], "torch", "who makes the process groups"),
            flag(
                "--cpu-threads",
                _S["cpu_threads"],
                None,
                "threads of each rank",
                shown_default="auto: its share of the cores",
            ),
            flag(
                "--sequence-parallel",
                _S["sequence_parallel"],
                None,
                "ranks that share one sequence",
                feature="mesh",
                shown_default="auto",
            ),
            flag(
                "--guidance-parallel",
                _S["guidance_parallel"],
                None,
                "2: the guidance halves on different ranks",
                feature="mesh",
                shown_default="auto",
            ),
            flag(
                "--replicas",
                _S["replicas"],
                None,
                "groups of ranks that make different videos; their number divides the ranks",
                feature="replicas",
                shown_default="auto: 1, every video on all ranks",
            ),
            flag(
                "--overlap", _BOOL, True, "exchange while computing; same result", feature="overlap"
            ),
            flag(
                "--vae-decode",
                _S["vae_decode"],
                "auto",
                "who decodes: the leading rank, all ranks together, or whichever pays; same frames",
            ),
            flag("--timeout", _S["timeout"], 1800.0, "seconds a collective may take"),
            flag(
                "--heartbeat-timeout",
                _S["heartbeat_timeout"],
                HEARTBEAT_S,
                "seconds without a sign of life before a rank counts as hung",
            ),
            flag(
                "--deadlines",
                _S["deadlines"],
                "",
                "seconds a stage may take before it counts as hung: step=600,decode=off",
                shown_default=", ".join(f"{kind}={limit:g}" for kind, limit in DEADLINES.items()),
            ),
            flag(
                "--check-finite",
                _S["check_finite"],
                "steps",
                "stop at the first NaN: of each step, or of each block (slower, names the block)",
            ),
        ),
    ),
    (
        "Memory and speed",
        (
            flag(
                "--memory",
                _S["memory"],
                "auto",
                "auto: the fastest mode that fits; speed: all models stay on the device; balanced: "
                "they take turns; small: layers pass through it one by one",
            ),
            flag(
                "--device-memory",
                _S["device_memory"],
                None,
                "what a request must fit in, such as 48GB or H100; it is then refused before torch "
                "is loaded",
                shown_default="auto: what the device has left",
            ),
            flag(
                "--no-plan",
                _BOOL,
                False,
                "try a request that the plan says does not fit",
                nargs=0,
            ),
            flag("--t5-device", _S["t5_device"], "device", "where the text encoder runs"),
            flag(
                "--t5-weights",
                _S["t5_weights"],
                "full",
                "int8: the text encoder's matrices take half the memory and a little accuracy",
            ),
            flag("--batch-size", _S["batch_size"], 1, "prompts denoised together"),
            flag("--micro-batch-size", _R["micro_batch_size"], 4, "frames the VAE takes at once"),
            flag(
                "--micro-frame-size",
                _R["micro_frame_size"],
                geometry.MICRO_FRAME_SIZE,
                "frames of a VAE chunk; another value changes the result",
                note="--micro-frame-size {value} changes the result: the model was trained with 17",
            ),
            flag("--enable-compile", _BOOL, False, "compile the model", feature="compile"),
            flag(
                "--flash-attn",
                _BOOL,
                False,
                "accepted; torch picks the attention kernel",
                note="--flash-attn has no effect: torch picks the fastest attention of the device",
            ),
            flag(
                "--layernorm-kernel",
                _BOOL,
                False,
                "accepted; there is one LayerNorm",
                note="--layernorm-kernel has no effect: there is no other LayerNorm to choose",
            ),
            flag(
                "--qk-norm",
                _BOOL,
                True,
                "accepted; the checkpoint's config.json decides",
                note="--qk-norm has no effect: the checkpoint's config.json decides it",
            ),
        ),
    ),
    (
        "Benchmark (opensora-sp benchmark only)",
        (
            _benchmark("--warmup-count", 1, "runs of 5 steps before measuring, not saved"),
            _benchmark("--eval-count", 1, "measured runs, each written as infer does"),
            _benchmark(
                "--benchmark-save-path",
                DEFAULT_REPORT,
                "the report, JSON; a page goes beside it",
            ),
            _benchmark("--baseline", None, "a report of one rank to count efficiency from"),
            _benchmark("--peak-tflops", None, "what one device can do, to say what share was used"),
            _benchmark(
                "--measure-peak", False, "time a large matrix product for that instead", nargs=0
            ),
            _benchmark("--profile", None, "trace one more run of 5 steps, a file per rank"),
            _benchmark("--weight-hashes", True, "SHA-256 of every weight file in the report"),
            flag(
                "--sweep",
                path("FILE"),
                None,
                "measure every size and mesh of a YAML file, each in processes of its own",
                program="benchmark",
                control=True,
            ),
            flag(
                "--compare",
                path("A.json B.json"),
                None,
                "print two reports side by side and stop",
                nargs=2,
                program="benchmark",
                control=True,
            ),
        ),
    ),
    (
        "Plan (opensora-sp plan only)",
        (
            flag("--ranks", integer(1, 64), 1, "plan for so many ranks", program="plan"),
            flag(
                "--table",
                _BOOL,
                False,
                "every trained size on this device: the mode that fits, its peak in GB",
                nargs=0,
                program="plan",
            ),
            flag(
                "--flop-rate",
                optional(number(0, above=True), word="null"),
                None,
                "FLOP/s of one device, as measured, to predict the time from",
                program="plan",
            ),
            flag(
                "--link-rate",
                optional(number(0, above=True), word="null"),
                None,
                "bytes per second that a rank sends, for the same",
                program="plan",
            ),
        ),
    ),
    (
        "This command",
        (
            flag(
                "--config",
                path("FILE|NAME"),
                None,
                "YAML file with the same names as keys, or the name of one that comes along, such "
                "as 720p-16s; flags win over it",
                control=True,
            ),
            flag(
                "--print-config",
                _BOOL,
                False,
                "print the resolved YAML and stop",
                nargs=0,
                control=True,
            ),
            flag("--version", _BOOL, False, "print the version and stop", nargs=0, control=True),
            flag("--help", _BOOL, False, "print this text and stop", nargs=0, control=True),
        ),
    ),
)
