"""The video API on the wire: fields of a request as flags, a job as a Video, errors.

It is the video API of SGLang and vLLM-Omni, which the `openai` client speaks. A request's fields
become flags of the command line, so its values are checked by the same declarations and refused in
the same words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.base.value_types import shown
from opensora_sp.request.flags.table import all_flags
from opensora_sp.request.setting import Setting
from opensora_sp.request.step_cache import LEVELS, OFF
from opensora_sp.server.job_store import DEFAULT_PRIORITY, JobProgress, JobResult, JobSpec

MODEL = "open-sora-1.2"
# The API's names for flags; every other field has its flag's name with _ for -.
ALIASES: Mapping[str, str] = {
    "num_inference_steps": "num_sampling_steps",
    "guidance_scale": "cfg_scale",
    "motion_score": "flow",
    "aesthetic_score": "aes",
}
# What a client may decide: what is generated, and what its file is. Never a path or an address of
# the server's, and never how the engine runs.
REQUEST_FIELDS = (
    "num_frames",
    "fps",
    "save_fps",
    "seed",
    "num_sampling_steps",
    "step_cache",
    "cfg_scale",
    "aspect_ratio",
    "resolution",
    "loop",
    "condition_frame_length",
    "loop_carry",
    "align",
    "aes",
    "flow",
    "camera_motion",
    "mask_strategy",
    "reference_fps",
    "edit_strength",
    "lossless",
    "watermark",
    "watermark_text",
    "watermark_size",
    "watermark_place",
    "label",
)
# Files that may come with a request, and the flag that each becomes.
UPLOADS: Mapping[str, str] = {
    "input_reference": "",  # a picture starts the video, a video is continued
    "image": "image",
    "last_image": "last_image",
    "extend": "extend",
    "edit": "edit",
    "reference": "reference_path",  # several, numbered from 0, for mask_strategy
}
OWN_FIELDS = ("prompt", "model", "seconds", "size", "priority", "n", "response_format", "user")
# Ids of earlier jobs: earlier.py makes their files uploads of the new one.
EARLIER_FIELDS = ("extend_video_id", "files_of_video_id")
_SIZE = re.compile(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*")
_SECONDS = re.compile(r"\s*(\d{1,4}(?:\.\d{1,6})?)\s*s?\s*")
MOST_PROMPT = 20_000  # characters
MOST_PRIORITY = 1000


class BadRequest(Exception):  # noqa: N818 (the client's mistake, told as HTTP 400)
    """A mistake in a request: one line, and the field at fault where it is known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Asked:
    """A request's fields: arguments for the command line, and what is told again."""

    arguments: tuple[str, ...]
    shown: dict[str, Any]
    priority: int


@cache
def flags_by_key() -> dict[str, Setting]:
    """Every flag by its key."""
    return {flag.key: flag for flag in all_flags()}


def read_fields(fields: Mapping[str, Any], uploads: Sequence[tuple[str, str, str]] = ()) -> Asked:
    """A request's fields, as text or JSON values, as arguments.

    uploads: (field, path, kind) of each file that came along, kind "picture" or "video". Raises
    BadRequest for a field that is unknown, twice what only one can be, or no text, number or
    truth value; values themselves are judged by the flags.
    """
    _refuse_no_text(fields)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRequest("prompt is needed: a text that says what the video shows", "prompt")
    if len(prompt) > MOST_PROMPT:
        raise BadRequest(
            f"prompt has {len(prompt)} characters; at most {MOST_PROMPT} are taken", "prompt"
        )
    _refuse_unknown(fields)
    model = MODEL if fields.get("model") in (None, "") else fields["model"]
    if model not in (MODEL, "default"):
        raise BadRequest(f"model {shown(model)} is not here: there is {MODEL}", "model")
    arguments = [f"--prompt={prompt}"]
    arguments += _length(fields)
    arguments += _size(fields)
    flags = flags_by_key()
    for name, value in fields.items():
        key = ALIASES.get(name, name)
        if key in REQUEST_FIELDS and value is not None and value != "":
            arguments += _argument(flags[key], name, value)
    _refuse_step_cache_file(fields.get("step_cache"))
    arguments += _references(uploads)
    asked = DEFAULT_PRIORITY if fields.get("priority") in (None, "") else fields["priority"]
    priority = _whole(asked, "priority", 1, MOST_PRIORITY)
    told = {"model": model, "prompt": prompt, "settings": _settings(fields)}
    told["files"] = [(field, path.rpartition("/")[2]) for field, path, _ in uploads]
    if fields.get("extend_video_id"):
        told["remixed_from_video_id"] = fields["extend_video_id"]
    return Asked(tuple(arguments), told, priority)


def _refuse_step_cache_file(value: Any) -> None:
    """A client names a level; a path would be one of the server's."""
    levels = (OFF, *LEVELS)
    if value not in (None, "", *levels):
        raise BadRequest(
            f"step_cache {shown(value)} is not one of {', '.join(levels)}", "step_cache"
        )


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for beside the prompt, to be asked for again."""
    names = {"seconds", "size", *ALIASES, *REQUEST_FIELDS}
    return {
        name: value for name, value in fields.items() if name in names and value not in (None, "")
    }


def read_json(raw: bytes) -> dict[str, Any]:
    """The fields of a body of JSON. Raises BadRequest for no object, and for a field twice."""
    try:
        fields = parse_json(raw)
    except NotJson as error:
        if error.key is not None:
            raise BadRequest(
                f"{shown(error.key)} came twice: one value is taken", quoted_name(error.key)
            ) from None
        raise BadRequest(f"the body {error}") from None
    if not isinstance(fields, dict):
        raise BadRequest("the body is not a JSON object")
    return fields


def quoted_name(text: str) -> str:
    """A name that came from a client, as it is told again: short, and any screen can show it."""
    return text[:60].encode("ascii", "backslashreplace").decode()


def _refuse_no_text(fields: Mapping[str, Any]) -> None:
    """Half a character, and NUL: neither is written to a file or sent in an answer."""
    for name, value in fields.items():
        for text in (name, value):
            if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
                raise BadRequest(
                    f"{quoted_name(name)} holds a character that is no text: NUL, or half of one",
                    quoted_name(name),
                )


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
    known = {*OWN_FIELDS, *EARLIER_FIELDS, *ALIASES, *REQUEST_FIELDS, *UPLOADS}
    for name in fields:
        if name not in known:
            raise BadRequest(
                f"{shown(name)} is not a field; there are {', '.join(sorted(known))}",
                quoted_name(name),
            )
        if name in UPLOADS and fields[name] not in (None, ""):
            raise BadRequest(f"{name} is a file: send it as a form, as -F {name}=@cat.png", name)
    if fields.get("n") not in (None, "", 1, "1"):
        raise BadRequest(f"n {shown(fields['n'])} is not 1: send one request a video", "n")


def _length(fields: Mapping[str, Any]) -> list[str]:
    seconds = fields.get("seconds")
    if seconds in (None, ""):
        return []
    if fields.get("num_frames") not in (None, ""):
        raise BadRequest("seconds and num_frames both say how long it is: give one", "seconds")
    found = _SECONDS.fullmatch(str(seconds))
    if found is None or float(found[1]) == 0:
        raise BadRequest(
            f'seconds {shown(seconds)} is not a number of seconds, such as "4"', "seconds"
        )
    amount = found[1]
    # The file's rate decides how long it is; fps is only what the model is told.
    usual = flags_by_key()["save_fps"].default
    rate = _whole(fields.get("save_fps") or usual, "save_fps", 1, 1000)
    # The durations of the table, whole chunks of frames, are of the usual rate.
    if rate == usual and amount in ("2", "4", "8", "16"):
        return [f"--num-frames={amount}s"]
    return [f"--num-frames={max(1, round(float(amount) * rate))}"]


def _size(fields: Mapping[str, Any]) -> list[str]:
    size = fields.get("size")
    if size in (None, ""):
        return []
    found = _SIZE.fullmatch(str(size))
    if found is None:
        raise BadRequest(
            f'size {shown(size)} is not "WIDTHxHEIGHT" in pixels, such as "426x240"; sizes by '
            "name are given as resolution and aspect_ratio",
            "size",
        )
    width, height = found[1], found[2]
    return ["--image-size", height, width]


def _argument(flag: Setting, name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, (str, int, float)):
        text = str(value)
    else:
        raise BadRequest(f"{name} {shown(value)} is not a text or a number", name)
    if flag.nargs == 0:
        if text.lower() not in ("true", "false", "1", "0", "on", "off"):
            raise BadRequest(f"{name} {shown(value)} is not true or false", name)
        return [flag.name] if text.lower() in ("true", "1", "on") else []
    return [f"{flag.name}={text}"]


def _references(uploads: Sequence[tuple[str, str, str]]) -> list[str]:
    arguments: list[str] = []
    numbered = [path for field, path, _ in uploads if field == "reference"]
    if numbered:
        arguments.append(f"--reference-path={';'.join(numbered)}")
    seen: set[str] = set()
    for field, path, kind in uploads:
        flag = UPLOADS[field]
        if field == "input_reference":
            flag = "image" if kind == "picture" else "extend"
        if field == "reference":
            continue
        if flag in seen:
            raise BadRequest(f"{field} came twice: one file is taken", field)
        seen.add(flag)
        arguments.append(f"--{flag.replace('_', '-')}={path}")
    return arguments


def _whole(value: Any, name: str, low: int, high: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise BadRequest(f"{name} {shown(value)} is not a whole number from {low} to {high}", name)
    return number


def as_bad_request(error: UserError) -> BadRequest:
    """A refusal of the command line in the API's words: its fields instead of flags."""
    names = {value: key for key, value in ALIASES.items()}
    names |= {"image_size": "size", "prompt_path": "prompt"}
    param: str | None = None

    def field(found: re.Match[str]) -> str:
        nonlocal param
        key = found[1].replace("-", "_")
        name = names.get(key, key)
        param = param or name
        return name

    text = re.sub(r"--([a-z][a-z0-9-]*)", field, str(error))
    return BadRequest(text, param)


def video_json(
    spec: JobSpec,
    status: str,
    progress: JobProgress | None,
    result: JobResult | None,
    *,
    place: int | None = None,
    eta_s: float | None = None,
    kept_seconds: float = 0.0,
) -> dict[str, Any]:
    """A job as the API's Video. status: queued, in_progress, completed or failed.

    place: how many jobs are before it. eta_s: seconds until a queued one has ended. kept_seconds:
    how long ended jobs are kept; 0 for ever.
    """
    percent = progress.percent if progress is not None and status == "in_progress" else 0
    error = None
    if status == "failed":
        error = {
            "code": (result and result.error_code) or "failed",
            "message": (result and result.error) or "the engine ended while it was made",
        }
    finished = int(result.finished_at) if result is not None else None
    video: dict[str, Any] = {
        "id": spec.id,
        "object": "video",
        "model": spec.shown.get("model", MODEL),
        "status": status,
        "progress": 100 if status == "completed" else percent,
        "created_at": int(spec.created_at),
        "completed_at": finished if status == "completed" else None,
        "expires_at": None
        if result is None or not kept_seconds
        else int(result.finished_at + kept_seconds),
        "prompt": spec.shown.get("prompt", ""),
        "seconds": spec.shown.get("seconds", ""),
        "size": spec.shown.get("size", ""),
        "remixed_from_video_id": spec.shown.get("remixed_from_video_id"),
        "error": error,
        "seed": spec.shown.get("seed"),
        "num_frames": spec.shown.get("num_frames"),
        "settings": spec.shown.get("settings", {}),
        "files": [field for field, _ in spec.shown.get("files", [])],
        "notes": spec.shown.get("notes", []),
        "file_name": None if result is None else result.file,
        "inference_time_s": None if result is None else round(result.seconds, 3),
        "stage_durations": {} if result is None else result.stages,
        "peak_memory_mb": None
        if result is None or result.peak_bytes is None
        else round(result.peak_bytes / 1e6, 1),
    }
    if status == "queued":
        video |= {"queue_position": place, "eta_s": eta_s}
    if status == "in_progress" and progress is not None:
        video |= {
            "stage": progress.stage,
            "step": progress.step,
            "steps": progress.steps,
            "eta_s": progress.eta_s,
            "preview": progress.preview,
        }
    return video


def error_json(
    message: str, *, kind: str = "invalid_request_error", param: str | None, code: str | None = None
) -> dict[str, Any]:
    """The API's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
