"""Flags that are no field of a dataclass: what they say is worked into the fields, or steers.

changes: what another value changes in the outputs, by way of the fields that are made of it.
"""

from __future__ import annotations

from typing import Any

from opensora_sp.base.value_types import ValueType, boolean, integer, number, optional, path, text
from opensora_sp.request import sizes
from opensora_sp.request.setting import Changes, Setting


def _flag(
    name: str, kind: ValueType, default: Any, help: str, *, changes: Changes, **more: Any
) -> Setting:
    return Setting(name=name, kind=kind, default=default, help=help, changes=changes, **more)


def _looked_up(metavar: str, allowed: str) -> ValueType:
    """Text that is looked up in the size table later."""
    return ValueType(metavar, allowed, str, text(empty=False).legal)


def _switch(name: str, help: str, **more: Any) -> Setting:
    return _flag(name, boolean(), False, help, changes="nothing", nargs=0, **more)


_RATE = optional(number(0, above=True), word="null")

PROMPTS = (
    _flag(
        "--prompt-path",
        path("FILE"),
        None,
        "one prompt a line; or .csv, .json, .jsonl",
        changes="content",
    ),
    _flag(
        "--start-index", integer(0), 0, "first line or entry of the file, from 0", changes="nothing"
    ),
    _flag(
        "--end-index",
        integer(1),
        None,
        "line to stop before",
        changes="nothing",
        shown_default="the end",
    ),
)

# They become the fields height, width and fps.
SIZE = (
    _flag(
        "--resolution",
        _looked_up("NAME", "a resolution of the size table"),
        "240p",
        "row of the size table",
        changes="content",
    ),
    _flag(
        "--aspect-ratio",
        _looked_up("H:W", "an aspect ratio of the size table"),
        "9:16",
        "height:width, so 9:16 is landscape",
        changes="content",
    ),
    _flag(
        "--image-size",
        sizes.SIDE,
        None,
        "height and width in pixels; wins over the two flags above",
        changes="content",
        nargs=2,
    ),
    _flag(
        "--frame-interval",
        integer(1, 1000),
        1,
        "accepted; --save-fps alone decides the frame rate of the file",
        changes="nothing",
        note="--frame-interval {value} has no effect: --save-fps decides the file's rate",
    ),
)

# They become the fields reference_path and mask_strategy; see shortcuts.py.
REFERENCES = (
    _flag(
        "--image",
        path("FILE"),
        None,
        "start from this picture: --image cat.png",
        changes="content",
    ),
    _flag(
        "--last-image",
        path("FILE"),
        None,
        "end near this picture: --image dawn.png --last-image dusk.png",
        changes="content",
    ),
    _flag(
        "--extend",
        path("VIDEO"),
        None,
        "continue this video from its end: --extend waves.mp4",
        changes="content",
    ),
    _flag(
        "--edit",
        path("VIDEO"),
        None,
        "make this video (or picture) anew: --edit waves.mp4 --edit-strength 0.6",
        changes="content",
    ),
    _flag(
        "--edit-strength",
        number(0, 1, metavar="R"),
        0.5,
        "how much of --edit is made anew, 0 nothing to 1 everything",
        changes="content",
    ),
)

# They become the field checkpoints.
CHECKPOINTS = tuple(
    _flag(f"--ckpt-path-{name}", path("DIR"), None, published, changes="content")
    for name, published in (
        ("dit", "OpenSora-STDiT-v3"),
        ("t5", "t5-v1_1-xxl"),
        ("vae2d", "pixart_sigma_sdxlvae_T5_diffusers"),
        ("vae3d", "OpenSora-VAE-v1.2"),
    )
)

# Flags of the reference that are taken and have nothing to switch here.
ACCEPTED = (
    _flag(
        "--flash-attn",
        boolean(),
        False,
        "accepted; see --attention",
        changes="nothing",
        note="--flash-attn has no effect: --attention chooses the kernel",
    ),
    _flag(
        "--layernorm-kernel",
        boolean(),
        False,
        "accepted; there is one LayerNorm",
        changes="nothing",
        note="--layernorm-kernel has no effect: there is no other LayerNorm to choose",
    ),
    _flag(
        "--qk-norm",
        boolean(),
        True,
        "accepted; the checkpoint's config.json decides",
        changes="nothing",
        note="--qk-norm has no effect: the checkpoint's config.json decides it",
    ),
)

BENCHMARK = (
    _flag(
        "--sweep",
        path("FILE"),
        None,
        "measure every size and mesh of a YAML file, each in processes of its own",
        changes="nothing",
        program="benchmark",
        control=True,
    ),
    _flag(
        "--compare",
        path("A.json B.json"),
        None,
        "print two reports side by side and stop",
        changes="nothing",
        nargs=2,
        program="benchmark",
        control=True,
    ),
    _switch(
        "--count",
        "count kernels and memory traffic of one step of this size, without a device, and stop",
        program="benchmark",
        control=True,
    ),
    _flag(
        "--count-ranks",
        integer(1, 64),
        1,
        "with --count: of the first of so many ranks, and what it sends to the others",
        changes="nothing",
        program="benchmark",
    ),
    _switch("--markdown", "print --count as Markdown tables", program="benchmark", control=True),
)

PLAN = (
    _flag(
        "--ranks",
        integer(1, 64),
        1,
        "plan for so many ranks",
        changes="nothing",
        program="plan",
    ),
    _switch(
        "--table",
        "every trained size on this device: the mode that fits, its peak in GB",
        program="plan",
    ),
    _flag(
        "--flop-rate",
        _RATE,
        None,
        "FLOP/s of one device, as measured, to predict the time from",
        changes="nothing",
        program="plan",
    ),
    _flag(
        "--link-rate",
        _RATE,
        None,
        "bytes per second that a rank sends, for the same",
        changes="nothing",
        program="plan",
    ),
)

CALIBRATE = (
    _flag(
        "--out",
        path("FILE"),
        None,
        "the file of schedules, .yaml; what it has for other sizes stays",
        changes="nothing",
        program="calibrate",
    ),
    _flag(
        "--full-runs",
        integer(1, 1000),
        4,
        "prompts to make full runs of, the first of those given",
        changes="nothing",
        program="calibrate",
    ),
)

CONTROL = (
    _flag(
        "--config",
        path("FILE|NAME"),
        None,
        "YAML file with the same names as keys, or the name of one that comes along, such "
        "as 720p-16s; flags win over it",
        changes="nothing",
        control=True,
    ),
    _switch("--print-config", "print the resolved YAML and stop", control=True),
    _switch("--version", "print the version and stop", control=True),
    _switch("--help", "print this text and stop", control=True),
)

OTHERS = (
    *PROMPTS,
    *SIZE,
    *REFERENCES,
    *CHECKPOINTS,
    *ACCEPTED,
    *BENCHMARK,
    *PLAN,
    *CALIBRATE,
    *CONTROL,
)
