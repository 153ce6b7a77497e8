"""Every flag of the programs, in one table: type, default, meaning, and what delivers it.

The parser, the YAML keys, `--help`, docs/flags.md and the refusals are all read from here.
"""

from collections.abc import Iterator
from typing import Any

from opensora_sp import sizes
from opensora_sp.cli.flags import Flag
from opensora_sp.request import REQUEST_KINDS, SETTINGS_KINDS
from opensora_sp.validate import Kind, boolean, file_stem, integer, number, path, text


def _flag(name: str, kind: Kind, default: Any, help: str, **more: Any) -> Flag:
    return Flag(name=name, kind=kind, default=default, help=help, **more)


def _verbosity() -> Kind:
    """0 to 2; also a boolean, because scripts written for the reference say True."""
    level, truth = SETTINGS_KINDS["verbose"], boolean()

    def read(value: str) -> int:
        return int(value) if value.strip().isdecimal() else int(truth.read(value))

    return Kind("{0,1,2}", "0, 1, 2, true or false", read, level.legal)


def _looked_up(metavar: str, allowed: str) -> Kind:
    """Text that is looked up in the size table later."""
    return Kind(metavar, allowed, str, text(empty=False).legal)


_R, _S = REQUEST_KINDS, SETTINGS_KINDS
_BOOL = boolean()

GROUPS: tuple[tuple[str, tuple[Flag, ...]], ...] = (
    (
        "What to generate",
        (
            _flag(
                "--prompt", _R["prompt"], None, "one or more prompts, one output each", nargs="+"
            ),
            _flag("--prompt-path", path("FILE"), None, "UTF-8 text file with one prompt a line"),
            _flag("--start-index", integer(0), 0, "first line of the file to use, from 0"),
            _flag("--end-index", integer(1), None, "line to stop before", shown_default="the end"),
            _flag("--num-sample", _S["num_sample"], 1, "outputs per prompt, numbered -0, -1, ..."),
            _flag("--seed", _R["seed"], 42, "one seed means one video on any device or rank count"),
        ),
    ),
    (
        "Size and length",
        (
            _flag(
                "--resolution",
                _looked_up("NAME", "a resolution of the size table"),
                "240p",
                "row of the size table",
            ),
            _flag(
                "--aspect-ratio",
                _looked_up("H:W", "an aspect ratio of the size table"),
                "9:16",
                "height:width, so 9:16 is landscape",
            ),
            _flag(
                "--image-size",
                _R["height"],
                None,
                "height and width in pixels; wins over the two flags above",
                nargs=2,
            ),
            _flag(
                "--num-frames",
                _looked_up("N|DURATION", "a number of frames or a duration of the table"),
                51,
                "2s 4s 8s 16s (51 102 204 408 frames), image (1), or a number of frames",
            ),
            _flag("--fps", _R["fps"], 24, "frame rate told to the model; always 120 for one frame"),
            _flag(
                "--save-fps",
                _R["save_fps"],
                24,
                "frame rate of the file",
            ),
            _flag(
                "--frame-interval",
                integer(1, 1000),
                1,
                "accepted; --save-fps alone decides the frame rate of the file",
                note="--frame-interval {value} has no effect: --save-fps decides the file's rate",
            ),
        ),
    ),
    (
        "Sampling",
        (
            _flag("--num-sampling-steps", _R["steps"], 30, "denoising steps"),
            _flag("--cfg-scale", _R["cfg_scale"], 7.0, "guidance scale; 1 is no guidance"),
            _flag(
                "--guidance",
                _S["guidance"],
                "auto",
                "guidance halves on a rank: together (auto), or serial: one by one, less memory",
            ),
        ),
    ),
    (
        "Prompt scores",
        (
            _flag("--aes", _R["aes"], 6.5, "aesthetic score written into the prompt, or none"),
            _flag("--flow", _R["flow"], None, "motion score written into the prompt"),
            _flag("--camera-motion", _R["camera_motion"], None, "such as 'pan left', or none"),
            _flag(
                "--llm-refine",
                _BOOL,
                False,
                "rewrite prompts with a language model at OPENAI_BASE_URL; needs OPENAI_API_KEY",
                feature="llm-refine",
            ),
            _flag(
                "--prompt-generator",
                _S["prompt_generator"],
                None,
                "the language model",
                feature="llm-refine",
                shown_default="OPENAI_MODEL, or gpt-4o-mini",
            ),
        ),
    ),
    (
        "References and loops",
        (
            _flag(
                "--reference-path",
                text(metavar="PATHS"),
                None,
                "images or videos, one entry per prompt, joined by ; within an entry",
                nargs="+",
                feature="references",
            ),
            _flag(
                "--mask-strategy",
                text(metavar="STRATEGY"),
                None,
                "loop,ref,ref_start,target_start,length,edit_ratio, one entry per prompt",
                nargs="+",
                feature="references",
            ),
            _flag(
                "--image",
                path("FILE"),
                None,
                "start from this picture: --image cat.png",
                feature="references",
            ),
            _flag(
                "--last-image",
                path("FILE"),
                None,
                "end near this picture: --image dawn.png --last-image dusk.png",
                feature="references",
            ),
            _flag(
                "--extend",
                path("VIDEO"),
                None,
                "continue this video from its end: --extend waves.mp4",
                feature="references",
            ),
            _flag(
                "--edit",
                path("VIDEO"),
                None,
                "make this video (or picture) anew: --edit waves.mp4 --edit-strength 0.6",
                feature="references",
            ),
            _flag(
                "--edit-strength",
                number(0, 1, metavar="R"),
                0.5,
                "how much of --edit is made anew, 0 nothing to 1 everything",
            ),
            _flag(
                "--reference-fps",
                _R["reference_fps"],
                None,
                "resample reference videos to this rate",
                shown_default="as they are",
            ),
            _flag(
                "--allow-remote",
                _BOOL,
                False,
                "let references be http(s) addresses; bounded in size and time",
                nargs=0,
            ),
            _flag("--align", _R["align"], 5, "latent frames that strategy starts snap to"),
            _flag("--loop", _R["loop"], 1, "clips, each continuing the last", feature="loops"),
            _flag(
                "--condition-frame-length",
                _R["condition_frame_length"],
                5,
                "latent frames a clip takes from the one before, a multiple of 5",
            ),
            _flag(
                "--loop-carry",
                _R["loop_carry"],
                "frames",
                "what a clip takes: the frames, encoded again, or the latents as they are",
            ),
        ),
    ),
    (
        "Output",
        (
            _flag("--save-dir", path("DIR"), "./samples/samples/", "where outputs are written"),
            _flag(
                "--sample-name",
                file_stem(),
                None,
                "start of the file names",
                shown_default="sample",
            ),
            _flag(
                "--prompt-as-path",
                _BOOL,
                False,
                "name files after their prompts, and skip those that exist",
                nargs=0,
            ),
            _flag(
                "--lossless",
                _BOOL,
                False,
                "videos as RGB H.264, every pixel kept; large, and few players show it",
                nargs=0,
            ),
            _flag(
                "--watermark",
                _BOOL,
                False,
                "write 'AI generated' in the bottom right corner of every frame",
                feature="watermark",
            ),
            _flag(
                "--sheet",
                _BOOL,
                False,
                "also write sheet.html: three frames of each output, settings, timings",
                nargs=0,
            ),
            _flag("--verbose", _verbosity(), 1, "0 quiet, 1 progress, 2 everything"),
        ),
    ),
    (
        "Model (none of the four paths: the embedded model)",
        (
            _flag("--ckpt-path-dit", path("DIR"), None, "OpenSora-STDiT-v3"),
            _flag("--ckpt-path-t5", path("DIR"), None, "t5-v1_1-xxl"),
            _flag("--ckpt-path-vae2d", path("DIR"), None, "pixart_sigma_sdxlvae_T5_diffusers"),
            _flag("--ckpt-path-vae3d", path("DIR"), None, "OpenSora-VAE-v1.2"),
            _flag("--dtype", _S["dtype"], "bf16", "number format of the run"),
            _flag(
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
            _flag(
                "--device",
                _S["device"],
                None,
                "where to run",
                shown_default="the first of gcu, cuda, cpu that is there",
            ),
            _flag("--backend", _S["backend"], None, "collectives", shown_default="the device's"),
            _flag(
                "--cpu-threads",
                _S["cpu_threads"],
                None,
                "threads of each rank",
                shown_default="auto: its share of the cores",
            ),
            _flag(
                "--sequence-parallel",
                _S["sequence_parallel"],
                None,
                "ranks that share one sequence",
                feature="mesh",
                shown_default="auto",
            ),
            _flag(
                "--guidance-parallel",
                _S["guidance_parallel"],
                None,
                "2: the guidance halves on different ranks",
                feature="mesh",
                shown_default="auto",
            ),
            _flag(
                "--replicas",
                _S["replicas"],
                None,
                "groups of ranks that make different videos",
                feature="replicas",
                shown_default="auto",
            ),
            _flag(
                "--overlap", _BOOL, True, "exchange while computing; same result", feature="overlap"
            ),
            _flag("--timeout", _S["timeout"], 1800.0, "seconds a collective may take"),
        ),
    ),
    (
        "Memory and speed",
        (
            _flag("--batch-size", _S["batch_size"], 1, "prompts denoised together"),
            _flag("--micro-batch-size", _R["micro_batch_size"], 4, "frames the VAE takes at once"),
            _flag(
                "--micro-frame-size",
                _R["micro_frame_size"],
                sizes.MICRO_FRAME_SIZE,
                "frames of a VAE chunk; another value changes the result",
                note="--micro-frame-size {value} changes the result: the model was trained with 17",
            ),
            _flag("--enable-compile", _BOOL, False, "compile the model", feature="compile"),
            _flag(
                "--flash-attn",
                _BOOL,
                False,
                "accepted; torch picks the attention kernel",
                note="--flash-attn has no effect: torch picks the fastest attention of the device",
            ),
            _flag(
                "--layernorm-kernel",
                _BOOL,
                False,
                "accepted; there is one LayerNorm",
                note="--layernorm-kernel has no effect: there is no other LayerNorm to choose",
            ),
            _flag(
                "--qk-norm",
                _BOOL,
                True,
                "accepted; the checkpoint's config.json decides",
                note="--qk-norm has no effect: the checkpoint's config.json decides it",
            ),
        ),
    ),
    (
        "Benchmark (launch/benchmark.py only)",
        (
            _flag("--warmup-count", integer(0), 1, "runs before measuring", program="benchmark"),
            _flag("--eval-count", integer(1), 1, "measured runs", program="benchmark"),
            _flag(
                "--benchmark-save-path",
                path("FILE"),
                "./benchmark/report-opensora-v1.2.json",
                "the report",
                program="benchmark",
            ),
        ),
    ),
    (
        "This command",
        (
            _flag(
                "--config",
                path("FILE"),
                None,
                "YAML file with the same names as keys; flags win over it",
                control=True,
            ),
            _flag(
                "--print-config",
                _BOOL,
                False,
                "print the resolved YAML and stop",
                nargs=0,
                control=True,
            ),
            _flag("--version", _BOOL, False, "print the version and stop", nargs=0, control=True),
            _flag("--help", _BOOL, False, "print this text and stop", nargs=0, control=True),
        ),
    ),
)


def all_flags() -> Iterator[Flag]:
    """Every flag, in the order of the table."""
    for _, flags in GROUPS:
        yield from flags
