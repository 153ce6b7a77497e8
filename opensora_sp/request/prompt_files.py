"""Files of prompts: one prompt a line, or CSV, JSON or JSON Lines with named fields.

The extension decides the format. A file with another extension is lines of text, unless all of it
is JSON or its first line is a heading of known fields. An unclear file is refused, so that a
heading, a bracket or a wrong encoding does not become a video. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_json import NotJson, parse_json
from opensora_sp.base.value_types import shown
from opensora_sp.base.wording import plural
from opensora_sp.request.request import Request
from opensora_sp.request.setting import settings_of

# Each field of a request, and the names that it may have in a file. The first name found is read.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "text", "caption"),
    "reference_path": ("reference_path", "reference", "ref"),
    "mask_strategy": ("mask_strategy",),
    "seed": ("seed",),
}
_NAMES = frozenset(name for names in FIELDS.values() for name in names)
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_OTHER_ENCODINGS = ("GBK", "BIG5", "SHIFT_JIS", "EUC-KR")  # as iconv and Python both call them
_ONE_BYTE = "WINDOWS-1252"
_OTHER_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a ZIP archive, as .docx and .xlsx files are"),
    (b"%PDF", "a PDF"),
    (b"{\\rtf", "an RTF document"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"\x1f\x8b", "compressed with gzip"),
)
_OTHER_EXTENSIONS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".xml": "XML"}
_COMMENT = re.compile(r"#+(\s|\Z)")
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """One prompt of a file. index: its place in the file, from 0.

    own: values of the request's fields, of those in `FIELDS`, that this prompt sets for itself.
    """

    index: int
    prompt: str
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and notes for the user about how it was read."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Content:
    """All entries, with blank ones. count: of the places. places: their name in messages."""

    entries: Sequence[Entry]
    count: int
    places: str = "entries"
    notes: tuple[str, ...] = ()


def read_prompt_file(path: str, start: int = 0, end: int | None = None) -> PromptFile:
    """The prompts at the places `start` to `end` - 1 of a file. Blank entries are left out.

    A place is the number of a line, or of an entry in CSV and JSON, from 0. It counts in the whole
    file, so that a part of a list gives the same videos and names as the whole list. Raises
    UserError for a file that cannot be used.
    """
    what = f"--prompt-path {shown(path)}"
    data = access.read_bytes(path, limit=access.PROMPTS_LIMIT, what=what)
    content = _parse(what, Path(path).suffix.lower(), _decode(what, path, data))
    if start >= content.count and any(entry.prompt for entry in content.entries):
        raise UserError(
            f"--start-index {start} is beyond the {content.places} of {what}: the last one is "
            f"{content.count - 1}"
        )
    last = content.count if end is None else end
    entries = tuple(e for e in content.entries if start <= e.index < last and e.prompt)
    if not entries:
        until = "the end" if end is None else str(end)
        part = "" if (start, end) == (0, None) else f" in {content.places} {start} to {until}"
        raise UserError(f"{what} holds no prompt{part}")
    return PromptFile(entries, content.notes)


def _decode(what: str, path: str, data: bytes) -> str:
    """The text of UTF-8 bytes, or of UTF-16 or UTF-32 bytes with a byte order mark."""
    for beginning, kind in _OTHER_KINDS:
        if data.startswith(beginning):
            raise UserError(f"{what} is {kind}: save the prompts as plain text (UTF-8)")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding not in ("utf-8", "utf-8-sig"):
            raise UserError(
                f"{what} begins as {encoding.upper()} does, but is not (byte {error.start}): "
                "save it as UTF-8"
            ) from None
        names = _possible_encodings(data)
        guess = f", but may be {' or '.join(names)}" if names else ""
        raise UserError(
            f"{what} is not UTF-8 text (byte {error.start}){guess}: save it as UTF-8, such as with "
            f"`iconv -f {names[0] if names else 'ITS-ENCODING'} -t UTF-8 {quote(path)} > new.txt`"
        ) from None
    if "\0" in text:
        raise UserError(
            f"{what} holds NUL bytes, so it is no UTF-8 text; if it is UTF-16 without a byte order "
            f"mark: `iconv -f UTF-16LE -t UTF-8 {quote(path)} > new.txt`"
        )
    return text


def _possible_encodings(data: bytes) -> list[str]:
    """The encodings that these bytes may be in."""

    def fits(name: str) -> bool:
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            return False
        return all(character.isprintable() or character.isspace() for character in text)

    # In GBK and similar encodings two bytes make a character, so such bytes come in rows. In a
    # one-byte encoding most of them, such as é, come alone.
    runs = re.findall(rb"[\x80-\xff]+", data)
    alone = sum(len(run) == 1 for run in runs) > len(runs) / 2
    order = (_ONE_BYTE, *_OTHER_ENCODINGS) if alone else (*_OTHER_ENCODINGS, _ONE_BYTE)
    names = [name for name in order if fits(name)]
    return names[:1] if alone else [n for n in names if n != _ONE_BYTE] or names


def _parse(what: str, extension: str, text: str) -> _Content:
    if extension in _OTHER_EXTENSIONS:
        raise UserError(
            f"{what} is {_OTHER_EXTENSIONS[extension]}, which is not read: give one prompt a line "
            "in a .txt file, or .csv, .json or .jsonl with a field named prompt"
        )
    if extension in (".csv", ".tsv"):
        return _read_table(what, text)
    if extension == ".json":
        return _read_json(what, text)
    if extension in (".jsonl", ".ndjson"):
        return _read_json_lines(what, text)
    stripped = text.strip()
    if stripped.startswith("[") and isinstance(_json_or_none(stripped), list):
        return _read_json(what, text)
    if stripped.startswith("[\n") or stripped.startswith("[\r"):
        raise UserError(f"{what} begins as JSON does, but is not: mend it, or take its first '['")
    first = _lines(stripped)[0]
    if first.startswith("{") and _prompt_field(_json_or_none(first)):
        return _read_json_lines(what, text)
    if (delimiter := _delimiter(first)) and all(_name(n) in _NAMES for n in first.split(delimiter)):
        return _read_table(what, text)
    return _read_lines(what, text)


def _lines(text: str) -> list[str]:
    """Lines that end in line feeds, or in carriage returns where there is no line feed.

    `splitlines` would also split at U+2028.
    """
    end = "\n" if "\n" in text or "\r" not in text else "\r"
    return text.removesuffix(end).split(end)


def is_comment(line: str) -> bool:
    """Whether a line of a list, without white space around it, is a comment and no prompt."""
    return _COMMENT.match(line) is not None


def _read_lines(what: str, text: str) -> _Content:
    lines = [line.strip() for line in _lines(text)]
    comments = [number for number, line in enumerate(lines, 1) if is_comment(line)]
    entries = [Entry(index, "" if is_comment(line) else line) for index, line in enumerate(lines)]
    notes: tuple[str, ...] = ()
    if comments:
        numbers = ", ".join(map(str, comments[:_MOST_SHOWN]))
        more = ", ..." if len(comments) > _MOST_SHOWN else ""
        one = len(comments) == 1
        said = (
            "begins with '# ' is a comment and makes"
            if one
            else "begin with '# ' are comments and make"
        )
        notes = (
            f"{what}: {plural(len(comments), 'line')} that {said} no video "
            f"(line{'' if one else 's'} {numbers}{more})",
        )
    return _Content(entries, len(lines), "lines", notes)


def _read_table(what: str, text: str) -> _Content:
    """CSV, separated by commas, semicolons or tabs. The first row names the columns."""
    first = _lines(text.lstrip())[0]
    delimiter = _delimiter(first) or ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    def filled() -> Iterator[tuple[int, list[str]]]:
        try:
            for row in rows:
                if row:
                    yield rows.line_num, row
        except csv.Error as error:
            raise UserError(f"{what} line {rows.line_num} is not CSV: {error}") from None

    given = filled()
    _, heading = next(given, (1, []))
    names = [_name(cell) for cell in heading]
    if len(set(names)) < len(names):
        raise UserError(f"{what} names a column twice: {shown(heading)}")
    records = []
    for line, row in given:
        if len(row) > len(names):
            raise UserError(
                f"{what} line {line} has {plural(len(row), 'cell')}, but the first row names "
                f"{plural(len(names), 'column')}: put a cell that holds {shown(delimiter)} "
                "in double quotes"
            )
        records.append((f"line {line}", dict(zip(names, row, strict=False))))
    return _entries_of(what, records, "the first row names")


def _delimiter(heading: str) -> str | None:
    """The separator of a heading: the one that gives a column for the prompt; None without one."""
    for sign in (",", ";", "\t"):
        if sign in heading and any(_name(n) in FIELDS["prompt"] for n in heading.split(sign)):
            return sign
    return None


def _name(cell: str) -> str:
    return cell.strip().strip('"').strip().lower().replace("-", "_").replace(" ", "_")


def _read_json(what: str, text: str) -> _Content:
    """An array of prompts, or of objects with a field for the prompt."""
    content = _load(what, text)
    if not isinstance(content, list):
        raise UserError(
            f'{what} is not an array of prompts, such as ["a red ball", "a blue square"] or '
            '[{"prompt": "a red ball"}]'
        )
    return _entries_of(what, _records(what, ((f"entry {i}", v) for i, v in enumerate(content))))


def _read_json_lines(what: str, text: str) -> _Content:
    """A JSON object or string on each line that is not blank. Places are lines."""

    def values() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines, 1):
            where = f"line {number}"
            yield where, _load(f"{what} {where}", line) if line.strip() else ""

    lines = _lines(text)
    content = _entries_of(what, _records(what, values()))
    return _Content(content.entries, content.count, "lines", content.notes)


def _records(what: str, values: Iterable[tuple[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Every entry as (its place for messages, its fields by name)."""
    records = []
    for where, value in values:
        if isinstance(value, str):
            records.append((where, {"prompt": value}))
        elif isinstance(value, dict):
            named = {_name(key): one for key, one in value.items()}
            if not _prompt_field(named):
                raise UserError(f"{what} {where} has no field {_one_of('prompt')}: {shown(value)}")
            records.append((where, named))
        else:
            raise UserError(
                f"{what} {where} is neither a prompt nor an object with one: {shown(value)}"
            )
    return records


def _entries_of(
    what: str, records: Sequence[tuple[str, Mapping[str, Any]]], said: str = "the fields are"
) -> _Content:
    names = list(dict.fromkeys(name for _, record in records for name in record))
    if records and not _prompt_field(dict.fromkeys(names, "")):
        raise UserError(
            f"{what}: {said} {', '.join(map(shown, names))}, none of which is {_one_of('prompt')}; "
            "for one prompt a line without a heading use a .txt file"
        )
    used: set[str] = set()
    entries = []
    for index, (where, record) in enumerate(records):
        own: dict[str, Any] = {}
        for key, aliases in FIELDS.items():
            name = next((alias for alias in aliases if alias in record), None)
            if name is not None:
                used.add(name)
                value = _value(f"{what} {where}: {name}", key, record[name])
                if value != "":
                    own[key] = value
        entries.append(Entry(index, str(own.pop("prompt", "")).strip(), own))
    unread = [name for name in names if name not in used]
    notes = (
        (
            f"{what}: not read: {', '.join(map(shown, unread[:_MOST_SHOWN]))}"
            f"{', ...' if len(unread) > _MOST_SHOWN else ''} (read are {', '.join(FIELDS)})",
        )
        if unread
        else ()
    )
    return _Content(entries, len(entries), "entries", notes)


def _value(what: str, key: str, value: Any) -> Any:
    """A field's value, "" where it is empty; raises UserError where it is not legal."""
    kind = settings_of(Request)[key].kind
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    if isinstance(value, str) and key == "seed":
        return kind.parse(what, value)
    kind.check(what, value)
    return value


def _prompt_field(record: object) -> bool:
    return isinstance(record, Mapping) and any(name in record for name in FIELDS["prompt"])


def _one_of(key: str) -> str:
    return " or ".join(map(shown, FIELDS[key]))


def _load(what: str, text: str) -> Any:
    try:
        return parse_json(text)
    except NotJson as error:
        if error.key is not None:
            raise UserError(f"{what} gives the field {shown(error.key)} twice") from None
        raise UserError(f"{what} {error}") from None


def _json_or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except NotJson:
        return None
