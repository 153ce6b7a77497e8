"""Validation of a report against schema.json.

Only the keywords that this schema uses are implemented. Keys that a newer version added are
accepted, because the program does not read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from opensora_sp.base.value_types import shown

Schema = Mapping[str, Any]
# Keywords that do not restrict values, or that would refuse keys of a newer version.
IGNORED = frozenset({"$schema", "$id", "$defs", "title", "description", "additionalProperties"})
CHECKED = frozenset(
    {"$ref", "type", "const", "enum", "pattern", "minimum", "exclusiveMinimum", "properties"}
    | {"required", "items", "prefixItems", "minItems", "maxItems", "anyOf", "allOf", "if", "then"}
)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def first_problem(value: Any, schema_file: Path) -> str | None:
    """The first violation of the schema, such as "run.ranks 'x' is not integer"; None if valid."""
    schema = _read(schema_file)
    return next(_problems(value, schema, schema, ""), None)


@cache
def _read(path: Path) -> Schema:
    schema: Schema = json.loads(path.read_text(encoding="utf-8"))
    return schema


def _problems(value: Any, schema: Schema | bool, root: Schema, where: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{where or 'it'} is not allowed"
        return
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from _problems(value, root["$defs"][name], root, where)
    if (wrong := _own(value, schema)) is not None:
        yield f"{where or 'it'} {shown(value)} is not {wrong}"
        return
    if isinstance(value, dict):
        yield from _of_object(value, schema, root, where)
    if isinstance(value, list):
        yield from _of_list(value, schema, root, where)
    for part in schema.get("allOf", ()):
        yield from _problems(value, part, root, where)
    if "anyOf" in schema:
        ways = [next(_problems(value, way, root, where), None) for way in schema["anyOf"]]
        if None not in ways:
            yield str(ways[0])
    if "if" in schema and next(_problems(value, schema["if"], root, where), None) is None:
        yield from _problems(value, schema.get("then", True), root, where)


def _own(value: Any, schema: Schema) -> str | None:
    """What a value should be by keywords without nesting; None where it is that."""
    kinds = schema.get("type")
    if kinds is not None:
        names = [kinds] if isinstance(kinds, str) else list(kinds)
        if not any(_is(value, name) for name in names):
            return " or ".join(names)
    if "const" in schema and value != schema["const"]:
        return shown(schema["const"])
    if "enum" in schema and value not in schema["enum"]:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return f"of the pattern {schema['pattern']}"
    if _is(value, "number"):
        if value < schema.get("minimum", value):
            return f"at least {schema['minimum']}"
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            return f"above {schema['exclusiveMinimum']}"
    return None


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])


def _of_object(value: Any, schema: Schema, root: Schema, where: str) -> Iterator[str]:
    start = f"{where}." if where else ""
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{start}{key} is missing"
    known = schema.get("properties", {})
    others = schema.get("additionalProperties")
    for key, inner in value.items():
        if key in known:
            yield from _problems(inner, known[key], root, f"{start}{key}")
        elif isinstance(others, dict):
            yield from _problems(inner, others, root, f"{start}{key}")


def _of_list(value: Any, schema: Schema, root: Schema, where: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{where} has {len(value)} entries"
    first = schema.get("prefixItems", ())
    for place, inner in enumerate(value):
        rule = first[place] if place < len(first) else schema.get("items", True)
        yield from _problems(inner, rule, root, f"{where}[{place}]")
