"""Flags of generate as forms of the API: one form for each prompt, with the files it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.redaction import is_address
from opensora_sp.base.screen import note
from opensora_sp.base.value_types import shown
from opensora_sp.cli.client.connection import Form
from opensora_sp.request.config_file import Raw, read_config
from opensora_sp.request.engine_settings import engine_keys
from opensora_sp.request.flags.shortcuts import TYPED
from opensora_sp.request.prompt_files import Entry, read_prompt_file
from opensora_sp.request.settings import (
    PER_PROMPT,
    CommandLine,
    parse_command_line,
    per_prompt,
    resolve,
)
from opensora_sp.server.protocol import REQUEST_FIELDS, flags_by_key

PROMPTS = ("prompt", "prompt_path", "start_index", "end_index")
# The keys of the flags that a request may have, in the order of the flag table.
SUBMITTED = tuple(
    key
    for key in flags_by_key()
    if key in {*PROMPTS, *TYPED, *PER_PROMPT, *REQUEST_FIELDS, "image_size"}
)


def forms_of(words: Sequence[str], more: Mapping[str, str]) -> list[Form]:
    """A form for each prompt. more: fields that all of them have.

    What a configuration says of the engine, such as embedded.yaml its dtype, is the server's and is
    left out with a note.

    Raises UserError, before anything is sent, for a flag that does not go with a request, a value
    that is not legal by itself, and a file that is not there.
    """
    command = parse_command_line(words)
    written: dict[str, Raw] = {}
    if command.config is not None:
        written |= _without_engine(command.config, read_config(command.config))
    written |= command.written
    for key in [*written, *command.program_control]:
        if key not in SUBMITTED:
            raise UserError(
                f"--{key.replace('_', '-')} does not go with a request; opensora-sp submit --help "
                "lists what does"
            )
    if command.print_config:
        raise UserError("--print-config belongs to opensora-sp generate")
    values = resolve(CommandLine(written, None, False, False, False))
    # Those with one entry for each prompt are lists.
    asked = {key: raw for key, raw in written.items() if key in REQUEST_FIELDS}
    shared = {key: raw for key, raw in asked.items() if isinstance(raw, str)} | dict(more)
    if values["image_size"] is not None:
        height, width = values["image_size"]
        shared["size"] = f"{width}x{height}"
    entries = _entries(values)
    columns = {key: per_prompt(values, key, len(entries)) for key in PER_PROMPT}
    files = [(key, _file(key, values[key])) for key in TYPED if values[key] is not None]
    return [
        _form(entry, {key: column[place] for key, column in columns.items()}, shared, files)
        for place, entry in enumerate(entries)
    ]


def _without_engine(config: str, read: Mapping[str, Raw]) -> dict[str, Raw]:
    """What a configuration says of requests; a note names what it says of the engine."""
    left = [key for key in read if key in engine_keys() and key not in SUBMITTED]
    if left:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in left)
        note(f"--config {shown(config)}: the server has its own {names}, so the file's is not sent")
    return {key: raw for key, raw in read.items() if key not in left}


def _form(
    entry: Entry,
    given: Mapping[str, str],
    shared: Mapping[str, str],
    files: Sequence[tuple[str, Path]],
) -> Form:
    fields = {"prompt": entry.prompt, **shared}
    own = {key: str(value) for key, value in entry.own.items()}
    if "seed" in own:
        fields["seed"] = own["seed"]
    if strategy := own.get("mask_strategy", given["mask_strategy"]):
        fields["mask_strategy"] = strategy
    paths = own.get("reference_path", given["reference_path"]).split(";")
    references = [("reference", _file("reference_path", path)) for path in paths if path.strip()]
    return Form(fields, [*files, *references])


def _entries(values: Mapping[str, object]) -> Sequence[Entry]:
    prompts = values["prompt"]
    if isinstance(prompts, list) and prompts:
        return [Entry(place, prompt) for place, prompt in enumerate(prompts)]
    path = values["prompt_path"]
    if path is None:
        raise UserError('--prompt or --prompt-path is needed, such as --prompt "a red ball"')
    start, end = values["start_index"], values["end_index"]
    assert isinstance(start, int)
    assert end is None or isinstance(end, int)
    return read_prompt_file(str(path), start, end).entries


def _file(key: str, path: object) -> Path:
    flag, text = f"--{key.replace('_', '-')}", str(path).strip()
    if is_address(text):
        raise UserError(f"{flag} {shown(text)}: the server fetches no address; send a file")
    if not access.is_file(text):
        raise UserError(f"{flag} {shown(text)}: {access.no_file(text)}")
    return Path(text)
