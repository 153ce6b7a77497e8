"""From a command line and a YAML file to a checked `Job`. Imports no torch.

The order: what was written (flags over YAML over defaults) → values, each legal by itself →
delivered, sizes, combinations, ranks → files and folders → requests with their output paths.
The first problem ends it, with one line.
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from opensora_sp.base import geometry
from opensora_sp.base.errors import PromptFault, UserError
from opensora_sp.base.redaction import is_address, redacted
from opensora_sp.base.value_types import shown
from opensora_sp.base.wording import plural
from opensora_sp.models.kernels.attention import check_attention
from opensora_sp.parallel.launchers import check_launcher
from opensora_sp.parallel.mesh import plan_mesh
from opensora_sp.request import sizes
from opensora_sp.request.conditions import Facts, total_frames
from opensora_sp.request.config_file import Raw, read_config, write_config
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.engine_settings import MODELS, remote_of
from opensora_sp.request.flags.foreign import explain
from opensora_sp.request.flags.rules import check_combinations
from opensora_sp.request.flags.shortcuts import TYPED, compose, flags_of
from opensora_sp.request.flags.table import all_flags
from opensora_sp.request.labels import check_labels
from opensora_sp.request.naming import output_stems
from opensora_sp.request.preflight import (
    check_checkpoints,
    check_conditions,
    check_output,
    check_save_dir,
    check_space,
)
from opensora_sp.request.prompt_files import Entry, PromptFile, read_prompt_file
from opensora_sp.request.prompts import parse_prompt_json, split_loops
from opensora_sp.request.request import (
    Checkpoints,
    EngineSettings,
    Job,
    JobSettings,
    Request,
    Task,
)
from opensora_sp.request.setting import Setting, from_flags
from opensora_sp.request.step_choice import check_step_cache

Values = dict[str, Any]

PER_PROMPT = ("reference_path", "mask_strategy")  # lists with one entry per prompt


_LEFT_OUT = "# left out of the addresses below: user, password and query; put them in again\n"


@dataclass(frozen=True)
class CommandLine:
    """What was written on a command line: values by key, and the control flags.

    program_control: the control flags of one program only, by key.
    """

    written: Mapping[str, Raw]
    config: str | None
    print_config: bool
    version: bool
    help: bool
    program_control: Mapping[str, Raw] = dataclasses.field(default_factory=dict)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Split a command line into flags and texts; `--cfg_scale` is `--cfg-scale`.

    Raises UserError for an unknown flag, naming the nearest one, or a wrong number of values.
    """
    found, extra = _parser().parse_known_args([_dashes(token) for token in argv])
    given = vars(found)
    if extra and "help" not in given:
        _refuse_extra(extra[0])
    control = {flag.key: flag for flag in all_flags() if flag.control}
    return CommandLine(
        written={key: raw for key, raw in given.items() if key not in control},
        config=given.get("config"),
        print_config="print_config" in given,
        version="version" in given,
        help="help" in given,
        program_control={
            key: raw for key, raw in given.items() if key in control and control[key].program
        },
    )


@cache
def _parser() -> _Parser:
    """Of every flag. A server parses a command line for each request: making it takes 2 ms."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in all_flags():
        if flag.nargs == 0:
            parser.add_argument(flag.name, action="store_const", const="true")
        elif flag.nargs == "+":
            parser.add_argument(flag.name, nargs="+", action="extend")
        else:
            parser.add_argument(flag.name, nargs=flag.nargs)
    parser.add_argument("-h", dest="help", action="store_const", const="true")
    return parser


def _dashes(token: str) -> str:
    """A flag's name with dashes; any other text unchanged."""
    if not re.match(r"--[A-Za-z][\w-]*(=|$)", token):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


def _refuse_extra(token: str) -> NoReturn:
    if token.startswith("-"):
        name = token.partition("=")[0]
        if (said := explain(name)) is not None:
            raise UserError(f"{shown(name)} is not a flag; {said} (--help lists them all)")
        raise UserError(
            f"{shown(name)} is not a flag{_nearest(name, (flag.name for flag in all_flags()))} "
            "(--help lists them all)"
        )
    if token.endswith(".py"):
        raise UserError(
            f"{shown(token)} is not expected here: configurations are YAML, given by --config "
            "(docs/porting.md has Open-Sora's keys)"
        )
    raise UserError(f"{shown(token)} is not expected here; quote a value that has spaces")


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def resolve(command: CommandLine, *, program: str = "infer") -> Values:
    """Every key's value: flags over the YAML file over defaults, each checked by itself.

    `num_frames` comes out as a number. Raises UserError.
    """
    flags = {flag.key: flag for flag in all_flags() if not flag.control}
    values = {key: flag.default for key, flag in flags.items()}
    if command.config is not None:
        for key, raw in read_config(command.config).items():
            if key not in flags:
                if (said := explain(key)) is not None:
                    raise UserError(
                        f"--config {shown(command.config)}: {shown(key)} is not a key; {said}"
                    )
                raise UserError(
                    f"--config {shown(command.config)}: {shown(key)} is not a key"
                    f"{_nearest(key, flags)}"
                )
            values[key] = _convert(flags[key], raw, program)
    for key, raw in command.written.items():
        values[key] = _convert(flags[key], raw, program)
    for flag in all_flags():
        if flag.key in command.program_control and flag.program != program:
            _refuse_program(flag, command.program_control[flag.key])
    values["num_frames"] = sizes.resolve_frames(values["num_frames"])
    return values


def compose_references(values: Values, prompts: int) -> Values:
    """The values with --image and its like written out: one path and strategy for each prompt."""
    frames = geometry.latent_frames(values["num_frames"], values["micro_frame_size"])
    path, strategy = compose(values, frames)
    written: Values = {}
    if path:
        written = {"reference_path": [path] * prompts, "mask_strategy": [strategy] * prompts}
    return values | written | dict.fromkeys(TYPED)


def _convert(flag: Setting, raw: Raw, program: str) -> Any:
    """A flag's value from its text or texts."""
    if flag.program is not None and flag.program != program:
        _refuse_program(flag, raw)
    if raw is None and flag.default is None:
        return None
    many = flag.nargs in (2, "+")
    texts = [raw] if many and not isinstance(raw, list) else raw
    if many:
        assert isinstance(texts, list)
        if not texts or (flag.nargs == 2 and len(texts) != 2):
            count = "2 values" if flag.nargs == 2 else "1 value or more"
            raise UserError(f"{flag.name} {shown(raw)}: {count} are needed")
        return [_convert_one(flag, text) for text in texts]
    if isinstance(raw, list):
        raise UserError(f"{flag.name} {shown(raw)}: one value is needed, not a list")
    return _convert_one(flag, raw)


def _refuse_program(flag: Setting, raw: Raw) -> NoReturn:
    raise UserError(f"{flag.name} {shown(raw)} belongs to opensora-sp {flag.program}")


def _convert_one(flag: Setting, text: str | None) -> Any:
    if text is None:
        flag.kind.check(flag.name, None)
        return None
    return flag.kind.parse(flag.name, text)


def print_config(values: Values, program: str = "infer") -> str:
    """The resolved configuration as YAML, headed by the shapes that follow from it."""
    values = compose_references(values, len(values["prompt"] or [""]))
    height, width = size_of(values)
    frames = values["num_frames"]
    latent = geometry.latent_shape(frames, height, width, values["micro_frame_size"])
    rows, columns = geometry.patch_grid(*latent[1:])
    kept = {flag.key: values[flag.key] for flag in all_flags() if _is_written(flag, program)}
    shown_as = {key: _without_logins(kept[key]) for key in ("prompt", "reference_path")}
    left_out = any(kept[key] != value for key, value in shown_as.items())
    kept |= shown_as
    return (
        f"# {plural(frames, 'frame')} of {height}x{width} (height x width) pixels: "
        f"latents {latent[0]}x{latent[1]}x{latent[2]}, patches {rows}x{columns}\n"
        + (_LEFT_OUT if left_out else "")
        + write_config(kept)
    )


def _without_logins(entries: list[str] | None) -> list[str] | None:
    """References, or prompts with references in JSON, without what is secret in addresses."""
    return entries and [redacted(one) if "://" in one and _names(one) else one for one in entries]


def _names(entry: str) -> bool:
    return is_address(entry) or ";" in entry or "reference_path" in entry


def _is_written(flag: Setting, program: str) -> bool:
    return not flag.control and flag.program in (None, program)


def size_of(values: Values) -> tuple[int, int]:
    """(height, width) in pixels as given to the model."""
    return sizes.resolve_size(values["resolution"], values["aspect_ratio"], values["image_size"])


def check_request(values: Values, *, world_size: int = 1, embedded: bool = False) -> list[str]:
    """Everything about the values that needs no file: sizes, combinations, ranks.

    embedded: the embedded model makes it. Returns what is worth telling a person. Raises UserError.
    """
    height, width = size_of(values)
    notes = sizes.size_notes(height, width, values["num_frames"], embedded=embedded)
    notes += check_combinations(values)
    for flag in all_flags():
        if flag.note is not None and values[flag.key] != flag.default:
            notes.append(flag.note.format(value=values[flag.key]))
    plan_mesh(
        world_size,
        guided=values["cfg_scale"] != 1,
        replicas=values["replicas"] or 1,
        guidance=values["guidance_parallel"],
        sequence=values["sequence_parallel"],
    )
    return notes


def _checkpoints(values: Values, *, leading: bool) -> Checkpoints | None:
    """The four directories; those that only the leading rank sees are looked at there alone."""
    given = {name: values[f"ckpt_path_{name}"] for name in MODELS}
    if not leading and values["weights_from"] == "rank0" and None not in given.values():
        return Checkpoints(**{name: Path(path) for name, path in given.items()})
    return check_checkpoints(given)


def build_job(values: Values, *, world_size: int = 1, leading: bool = True) -> Job:
    """The whole run, checked against the files and folders it names; creates nothing.

    leading: whether this process is rank 0.

    Raises UserError.
    """
    embedded = all(values[f"ckpt_path_{name}"] is None for name in MODELS)
    notes = check_request(values, world_size=world_size, embedded=embedded)
    check_launcher(values["launcher"])
    if values["llm_refine"]:
        from opensora_sp.request.llm_endpoint import check_endpoint

        check_endpoint(values["prompt_generator"])
    requests, failed, caption_notes = _requests(values)
    notes += caption_notes
    checkpoints = _checkpoints(values, leading=leading)
    if checkpoints is None:
        notes.append("no --ckpt-path flags: the small embedded model is used")
    save_dir = check_save_dir(values["save_dir"])
    engine = EngineSettings(checkpoints=checkpoints, **from_flags(EngineSettings, values))
    if leading:  # only rank 0 reads a file of schedules
        check_step_cache(requests, (checkpoints or embedded_checkpoints()).dit)
    check_attention(engine.attention, engine.device, engine.dtype)
    settings = JobSettings(**from_flags(JobSettings, values) | {"save_dir": save_dir})
    if leading:  # it alone draws and writes
        one = requests[0]  # all have its size and length
        seconds = None if one.is_image else total_frames(one) / one.save_fps
        notes += check_labels(settings, one.decoded_size, seconds)
    tasks = _tasks(requests, settings)
    for task in tasks:
        check_output(task.output)
    if settings.sheet:
        check_output(settings.sheet_path)
    check_space(save_dir, [task.request for task in tasks], lossless=settings.lossless)
    return Job(
        engine=engine, settings=settings, tasks=tasks, notes=tuple(notes), failed=tuple(failed)
    )


def _requests(values: Values) -> tuple[list[Request], list[str], list[str]]:
    """The first sample of every prompt that is asked for, what is wrong with the others, notes.

    A reference that cannot be used ends its own prompt alone, where there are others.
    """
    file = _prompts(values)
    prompts = file.entries
    flags = flags_of(values)
    values = compose_references(values, len(prompts))
    height, width = size_of(values)
    shared = from_flags(Request, values) | {"height": height, "width": width}
    remote = remote_of(values["allow_remote"], values["allow_private"])
    conditions = {key: per_prompt(values, key, len(prompts)) for key in PER_PROMPT}
    requests: list[Request] = []
    failed: list[str] = []
    notes = list(file.notes)
    known: dict[str, Facts] = {}
    for place, entry in enumerate(prompts):
        own = {key: entry.own.get(key, entries[place]) for key, entries in conditions.items()}
        split = parse_prompt_json(entry.prompt, **own)
        split_loops(split.prompt)  # only to refuse bad segments now
        seed = entry.own.get("seed", shared["seed"])
        request = Request(
            **shared | {"seed": seed}, **dataclasses.asdict(split), prompt_index=entry.index
        )
        as_typed = (request.reference_path, request.mask_strategy) == tuple(own.values())
        try:
            notes += check_conditions(
                request, allow_remote=remote, flags=flags if as_typed else (), known=known
            )
        except PromptFault as fault:
            if len(prompts) == 1:
                raise
            failed.append(f"prompt {entry.index} ({shown(split.prompt.strip())}): {fault}")
            continue
        requests.append(request)
    if not requests:
        raise UserError(f"none of the {len(prompts)} prompts can be made: {failed[0]}")
    return requests, failed, list(dict.fromkeys(notes))


def _prompts(values: Values) -> PromptFile:
    """The prompts as written, from the flag or from a file."""
    if values["prompt"]:
        return PromptFile(tuple(Entry(index, raw) for index, raw in enumerate(values["prompt"])))
    if values["prompt_path"] is None:
        raise UserError('--prompt or --prompt-path is needed, such as --prompt "a red ball"')
    file = read_prompt_file(values["prompt_path"], values["start_index"], values["end_index"])
    flags = [f"--{key.replace('_', '-')}" for key in (*PER_PROMPT, *TYPED) if values[key]]
    if flags and any(key in entry.own for entry in file.entries for key in PER_PROMPT):
        raise UserError(
            f"--prompt-path {shown(values['prompt_path'])} has references of its own: leave "
            f"{' and '.join(flags)} out, or take them out of the file"
        )
    return file


def per_prompt(values: Values, key: str, count: int) -> list[str]:
    """The entries of a flag that takes one for each of `count` prompts; none is "".

    Raises UserError for another number of entries.
    """
    entries: list[str] | None = values[key]
    if entries is None:
        return [""] * count
    if len(entries) != count:
        raise UserError(
            f"--{key.replace('_', '-')} {shown(entries)} has {len(entries)} entries, but there "
            f'are {count} prompts: give one entry per prompt, "" for none'
        )
    return entries


def _tasks(requests: Sequence[Request], settings: JobSettings) -> tuple[Task, ...]:
    """Every sample with its output, in the order they are made: batch by batch, each sample."""
    stems = output_stems(
        [(request.prompt_index, request.prompt) for request in requests],
        sample_name=settings.sample_name,
        prompt_as_path=settings.prompt_as_path,
    )
    named = list(zip(requests, stems, strict=True))
    tasks = []
    for start in range(0, len(named), settings.batch_size):
        for sample in range(settings.num_sample):
            for request, stem in named[start : start + settings.batch_size]:
                number = f"-{sample}" if settings.num_sample > 1 else ""
                suffix = ".png" if request.is_image else ".mp4"
                tasks.append(
                    Task(
                        request=dataclasses.replace(request, sample_index=sample),
                        output=settings.save_dir / f"{stem}{number}{suffix}",
                    )
                )
    return tuple(tasks)
