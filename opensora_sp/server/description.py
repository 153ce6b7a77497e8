"""What /openapi.json says of bodies: of requests from the flags' declarations, and of answers.

Values are described as JSON has them. A form has them as text, and JSON may too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from opensora_sp.request.setting import Setting
from opensora_sp.request.sizes import resolutions
from opensora_sp.request.step_cache import LEVELS, OFF
from opensora_sp.server.job_store import DEFAULT_PRIORITY
from opensora_sp.server.protocol import (
    ALIASES,
    EARLIER_FIELDS,
    MODEL,
    MOST_PRIORITY,
    MOST_PROMPT,
    REQUEST_FIELDS,
    UPLOADS,
    flags_by_key,
)

Schema = Mapping[str, Any]

_LIST_OF_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_FILE = {"type": "string", "format": "binary"}


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JobError(_Answer):
    """Why a video failed."""

    code: str
    message: str


class Video(_Answer):
    """A job as the video API shows it; the fields behind `error` are this server's own.

    notes: what the model does not read of the prompt. group, waiting_for: of a shared queue, who
    makes it, and why no group can.
    """

    id: str
    object: str
    model: str
    status: str
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None
    error: JobError | None
    seed: int | None
    num_frames: int | None
    settings: dict[str, Any]
    files: list[str]
    notes: list[str]
    file_name: str | None
    inference_time_s: float | None
    stage_durations: dict[str, float]
    peak_memory_mb: float | None
    queue_position: int | None = None
    eta_s: float | None = None
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    preview: int | None = None
    group: str | None = None
    waiting_for: str | None = None


class VideoList(_Answer):
    """A page of videos."""

    object: str
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(_Answer):
    """A video that is deleted."""

    id: str
    deleted: bool
    object: str


class Estimate(_Answer):
    """What a video would need. Seconds are null where nothing is known yet.

    notes: what the model does not read of the prompt.
    """

    fits: bool
    reason: str | None
    size: str
    seconds: str
    num_frames: int
    peak_memory_mb: float | None
    estimated_s: float | None
    queue_s: float | None
    tflop: float
    notes: list[str]


class Picture(_Answer):
    """One picture: its bytes in base64, or its address."""

    id: str
    seed: int | None
    b64_json: str | None = None
    url: str | None = None


class Pictures(_Answer):
    """The pictures of one request."""

    created: int
    data: list[Picture]
    output_format: str
    size: str | None


class Model(_Answer):
    """A model."""

    id: str
    object: str
    created: int
    owned_by: str


class Models(_Answer):
    """All models."""

    object: str
    data: list[Model]


class Refusal(_Answer):
    """What is wrong: one line, and the field at fault where it is known."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refused(_Answer):
    """The answer to a request that is not answered otherwise."""

    error: Refusal


# For FastAPI's `responses`.
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Refused, "description": "The request is refused."},
    "5XX": {"model": Refused, "description": "The server cannot answer now."},
}


def answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of an operation that answers with such JSON."""
    return {200: {"model": model}}


def files(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of an operation that answers with a file of one of these types."""
    return {200: {"content": {kind: {"schema": _FILE} for kind in media_types}}}


def video_body() -> dict[str, Any]:
    """FastAPI's `openapi_extra` of the operations that take a video's fields."""
    fields = _video_fields()
    file_fields = {name: _LIST_OF_FILES if name == "reference" else _FILE for name in UPLOADS}
    as_form = _object(fields | file_fields)
    return _body({"application/json": _json_object(fields), "multipart/form-data": as_form})


def picture_body(
    most: int, not_taken: Collection[str], only: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """FastAPI's `openapi_extra` of the operation that makes up to `most` pictures.

    not_taken: fields of a video that a picture has not. only: other fields, and what they may be.
    """
    fields = {name: schema for name, schema in _video_fields().items() if name not in not_taken}
    fields |= {
        "n": {"type": "integer", "minimum": 1, "maximum": most, "default": 1},
        "response_format": {"enum": ["b64_json", "url"], "default": "b64_json"},
        "size": {"anyOf": [fields["size"], {"enum": ["auto"]}]},
    }
    fields |= {name: {"enum": list(values)} for name, values in only.items()}
    return _body({"application/json": _json_object(fields)})


def _body(contents: Mapping[str, Schema]) -> dict[str, Any]:
    content = {kind: {"schema": schema} for kind, schema in contents.items()}
    return {"requestBody": {"required": True, "content": content}}


def _json_object(fields: Mapping[str, Schema]) -> dict[str, Any]:
    """In JSON a field that is null counts as not given; the prompt is needed."""
    nullable = {name: {"anyOf": [each, {"type": "null"}]} for name, each in fields.items()}
    return _object(nullable | {"prompt": fields["prompt"]})


def _object(fields: Mapping[str, Schema]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": ["prompt"],
        "additionalProperties": False,
    }


def _video_fields() -> dict[str, Schema]:
    """Every field of a video that is no file, by its name in the API."""
    flags = flags_by_key()
    names = {key: name for name, key in ALIASES.items()}
    own: dict[str, Schema] = {
        "prompt": {
            "type": "string",
            "pattern": r"\S",
            "maxLength": MOST_PROMPT,
            "description": "what the video shows",
        },
        "model": {"enum": [MODEL, "default"]},
        "seconds": {
            "anyOf": [
                {"type": "string", "pattern": r"^\s*\d{1,4}(\.\d{1,6})?\s*s?\s*$"},
                {"type": "number", "exclusiveMinimum": 0},
            ],
            "description": "how long it is, instead of num_frames",
        },
        "size": {
            "type": "string",
            "pattern": r"^\s*\d{1,5}\s*[xX×]\s*\d{1,5}\s*$",
            "description": "WIDTHxHEIGHT in pixels, instead of resolution and aspect_ratio",
        },
        "priority": {
            "type": "integer",
            "minimum": 1,
            "maximum": MOST_PRIORITY,
            "default": DEFAULT_PRIORITY,
            "description": "1 is first",
        },
        "n": {"enum": [1]},
        "response_format": {"description": "taken from clients that send it, and not used"},
        "user": {"description": "taken from clients that send it, and not used"},
    }
    earlier = {name: {"type": "string"} for name in EARLIER_FIELDS}
    of_flags = {key: _described(flags[key]) for key in REQUEST_FIELDS}
    of_flags["step_cache"] |= {"enum": [OFF, *LEVELS]}
    of_flags["resolution"] |= {"enum": list(resolutions())}
    aliases = {names[key]: schema for key, schema in of_flags.items() if key in names}
    return own | earlier | of_flags | aliases


def _described(flag: Setting) -> dict[str, Any]:
    """A flag's value in JSON, with its help and its default."""
    kind: dict[str, Any] = dict(flag.kind.schema)
    if flag.field_kind is not None and flag.field_kind.schema != kind and flag.nargs is None:
        kind = {"anyOf": [flag.field_kind.schema, kind]}
    default = {} if flag.default is None else {"default": flag.default}
    return kind | {"description": flag.help} | default
