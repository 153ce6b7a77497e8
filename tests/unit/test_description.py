"""What /openapi.json says of requests, against what the API takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import pytest

pytest.importorskip("fastapi")

from opensora_sp.base.errors import UserError
from opensora_sp.server.description import picture_body, video_body
from opensora_sp.server.images import MOST_IMAGES, ONLY, VIDEO_FIELDS, read_image_fields
from opensora_sp.server.protocol import (
    ALIASES,
    EARLIER_FIELDS,
    OWN_FIELDS,
    REQUEST_FIELDS,
    UPLOADS,
    BadRequest,
    flags_by_key,
    read_fields,
)

VIDEO = video_body()["requestBody"]["content"]
PICTURE = picture_body(MOST_IMAGES, VIDEO_FIELDS, ONLY)["requestBody"]["content"]
PLAIN = {*OWN_FIELDS, *EARLIER_FIELDS, *ALIASES, *REQUEST_FIELDS}


def schema_of(contents: Mapping[str, Any], kind: str = "application/json") -> dict[str, Any]:
    schema: dict[str, Any] = contents[kind]["schema"]
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def leaves(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema, or those of its anyOf, without null."""
    for one in schema.get("anyOf", [schema]):
        if "anyOf" in one:
            yield from leaves(one)
        elif one.get("type") != "null":
            yield one


def test_the_fields_are_those_that_are_taken() -> None:
    assert set(schema_of(VIDEO)["properties"]) == PLAIN
    assert set(schema_of(VIDEO, "multipart/form-data")["properties"]) == PLAIN | {*UPLOADS}
    taken = set(schema_of(PICTURE)["properties"])
    assert taken == (PLAIN - {*VIDEO_FIELDS}) | {*ONLY}
    for name in taken & PLAIN:
        read_image_fields({"prompt": "a", name: None} if name != "prompt" else {"prompt": "a"})
    for name in VIDEO_FIELDS:
        with pytest.raises(BadRequest, match=name):
            read_image_fields({"prompt": "a", name: 1})


def judged(name: str, value: Any) -> None:
    """As far as one field alone can be judged. Raises for what is refused."""
    read_fields({"prompt": "a", name: value} if name != "prompt" else {name: value})
    key = ALIASES.get(name, name)
    if key in REQUEST_FIELDS and flags_by_key()[key].nargs != 0:
        flag = flags_by_key()[key]
        text = str(value).lower() if isinstance(value, bool) else str(value)
        read = flag.kind.parse(flag.name, text)
        if key == "num_frames" and flag.field_kind is not None:
            flag.field_kind.check(key, int(read))


@pytest.mark.parametrize("name", sorted(PLAIN - {"seconds", "size"}))
def test_what_a_schema_allows_and_forbids_is_taken_and_refused(name: str) -> None:
    schema = schema_of(VIDEO)["properties"][name]
    assert jsonschema.Draft202012Validator(schema).is_valid(None) is (name != "prompt")
    tried = 0
    for leaf in leaves(schema):
        for value in leaf.get("enum", ()):
            judged(name, value)
            tried += 1
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if bound in leaf:
                judged(name, leaf[bound])
                with pytest.raises((BadRequest, UserError)):
                    judged(name, leaf[bound] + step)
                tried += 1
        if "exclusiveMinimum" in leaf:
            judged(name, leaf["exclusiveMinimum"] + 1e-9)
            with pytest.raises((BadRequest, UserError)):
                judged(name, leaf["exclusiveMinimum"])
            tried += 1
        if leaf.get("type") == "boolean":
            judged(name, True)
            judged(name, False)
            tried += 1
        if "maxLength" in leaf:
            judged(name, "a" * leaf["maxLength"])
            with pytest.raises(BadRequest):
                judged(name, "a" * (leaf["maxLength"] + 1))
            tried += 1
        if leaf.get("pattern") == r"\S":
            judged(name, "a")
            tried += 1
    free = {"mask_strategy", "aspect_ratio", "response_format", "user", *EARLIER_FIELDS}
    assert tried or name in free


def test_lengths_and_sizes_are_described_as_they_are_read() -> None:
    properties = schema_of(VIDEO)["properties"]
    samples: dict[str, tuple[Any, ...]] = {
        "seconds": ("4", "4s", " 0.5 s", 4, 0.25, "", "x", "-1", "4m", "1e3", "12345", -1),
        "size": ("64x48", " 64 X 48 ", "64×48", "64", "64x", "123456x1", "x", "64x48x2"),
    }
    for name, values in samples.items():
        valid = jsonschema.Draft202012Validator(properties[name])
        for value in values:
            try:
                read_fields({"prompt": "a", name: value})
                taken = value != ""  # which counts as not given
            except BadRequest:
                taken = False
            assert valid.is_valid(value) is taken, (name, value)


def test_seconds_are_those_of_the_file_whatever_the_model_is_told() -> None:
    def frames(**fields: Any) -> str:
        (found,) = (
            word
            for word in read_fields({"prompt": "a", **fields}).arguments
            if word.startswith("--num-frames")
        )
        return found.partition("=")[2]

    assert frames(seconds="4") == "4s"
    assert frames(seconds="4", save_fps=24, fps=8) == "4s"
    assert frames(seconds="3", fps=8) == "72"
    assert frames(seconds="3", save_fps=8) == "24"
    assert frames(seconds="4", save_fps="8") == "32"
