"""Checks of the files and folders that a request names, before torch or a model is loaded."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from opensora_sp.base import access
from opensora_sp.base.access import Remote
from opensora_sp.base.errors import CheckpointError, NoSpaceError, PromptFault, UserError
from opensora_sp.base.value_types import shown
from opensora_sp.models.configs import read_shards
from opensora_sp.models.foreign_checkpoints import how_to_convert
from opensora_sp.request.conditions import Facts, inspect_reference, strategy_notes
from opensora_sp.request.mask_strategy import parse_mask_strategy
from opensora_sp.request.request import Checkpoints, Request, reference_paths
from opensora_sp.request.setting import a_path

BYTES_PER_PIXEL = 0.25  # H.264 at crf 17, for detailed and moving pictures
LOSSLESS_BYTES_PER_PIXEL = 3.0

# The files of each checkpoint directory. Of a tuple one file is enough.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_T5_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NEEDED: Mapping[str, tuple[str | tuple[str, ...], ...]] = {
    "dit": ("config.json", _WEIGHTS),
    "t5": ("config.json", "spiece.model", (*_T5_WEIGHTS, *_WEIGHTS)),
    "vae2d": ("vae/config.json",),
    "vae3d": ("config.json", _WEIGHTS),
}


def check_checkpoints(directories: Mapping[str, str | None]) -> Checkpoints | None:
    """The four directories by short name ("dit", ...), or None where none is given.

    Raises CheckpointError naming the flag that is missing, or the directory or file that is not
    there.
    """
    given = {name: path for name in _NEEDED if (path := directories.get(name)) is not None}
    if not given:
        return None
    missing = [f"--ckpt-path-{name}" for name in _NEEDED if name not in given]
    if missing:
        have = ", ".join(f"--ckpt-path-{name} {shown(path)}" for name, path in given.items())
        raise CheckpointError(
            f"{', '.join(missing)} missing beside {have}: give all four paths, or none for the "
            "embedded model"
        )
    for name, path in given.items():
        _check_directory(f"--ckpt-path-{name} {shown(path)}", path, name)
    return Checkpoints(**{name: Path(path) for name, path in given.items()})


def find_checkpoints(
    directory: str | Path | None, given: Mapping[str, str | Path | None]
) -> Checkpoints:
    """Checkpoints for `Pipeline.from_pretrained`: four in one directory, or each by its name.

    Raises CheckpointError naming the one that is missing or the file that it lacks.
    """
    places: dict[str, Path] = {}
    for name, place in given.items():
        if place is not None:
            places[name] = a_path(name, place)
        elif directory is None:
            raise CheckpointError(
                f"{name} is not given: give one directory that holds {', '.join(given)}, or all "
                "four"
            )
        else:
            places[name] = a_path("directory", directory) / name
        _check_directory(f"{name} {shown(str(places[name]))}", str(places[name]), name)
    return Checkpoints(**places)


def check_transformer(directory: str) -> None:
    """The transformer's directory alone; raises CheckpointError as `check_checkpoints`."""
    _check_directory(f"--ckpt-path-dit {shown(directory)}", directory, "dit")


def _check_directory(what: str, directory: str, kind: str) -> None:
    if not access.is_dir(directory):
        problem = "is not a directory" if access.exists(directory) else "does not exist"
        raise CheckpointError(_with_a_way(f"{what} {problem}", kind, directory))
    for entry in _NEEDED[kind]:
        names = (entry,) if isinstance(entry, str) else entry
        found = [name for name in names if access.is_file(os.path.join(directory, name))]
        if not found:
            raise CheckpointError(
                _with_a_way(f"{what} has no {' or '.join(names)}", kind, directory)
            )
        if found[0].endswith(".index.json"):
            try:
                read_shards(Path(directory, found[0]))
            except CheckpointError as error:
                raise CheckpointError(f"{what}: {error}") from None


def _with_a_way(problem: str, kind: str, path: str) -> str:
    """A refusal, with what to do where the checkpoint has a form that can be converted."""
    way = how_to_convert(kind, path)
    return problem if way is None else f"{problem}; {way}"


def check_save_dir(directory: str, flag: str = "--save-dir") -> Path:
    """Check a directory for outputs. It need not exist yet, and nothing is created.

    Raises UserError where it could not be made or written to.
    """
    access.require_room_for_names(directory, flag)
    place = str(access.absolute(directory))
    while not os.path.lexists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    if not access.is_dir(place):
        raise UserError(f"{flag} {shown(directory)}: {place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {shown(directory)}: {place} may not be written to")
    return Path(directory)


def check_space(directory: Path, requests: Sequence[Request], *, lossless: bool) -> None:
    """Raises NoSpaceError where the outputs of these requests would likely not fit on the disk.

    The size of a video is not known before it is made. The estimate is at the upper end of what
    real videos need at this quality.
    """
    per_pixel = LOSSLESS_BYTES_PER_PIXEL if lossless else BYTES_PER_PIXEL
    needed = sum(
        request.num_frames * request.loop * request.height * request.width * per_pixel
        for request in requests
    )
    place = access.absolute(directory)
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise NoSpaceError(
            f"--save-dir {shown(str(directory))}: {amount(free)} are free there, but the "
            f"outputs need about {amount(needed)}: free space or choose another place",
            amount(free),
            amount(needed),
        )


def amount(size: float) -> str:
    """A number of bytes for a message: "640 bytes", "31.9 kB", "2.05 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * factor:
            value = size / factor
            return f"{value:.{max(0, 3 - len(f'{value:.0f}'))}f} {unit}"
    return f"{size:.0f} bytes"


def check_output(output: Path) -> None:
    """Raise UserError where something else than a file has the name of an output file."""
    if access.is_dir(output):
        raise UserError(f"{output} is a directory, but an output has this name: rename one")
    if access.exists(output) and not access.is_file(output):
        raise UserError(f"{output} is a device or a pipe, but an output has this name: rename one")


def check_conditions(
    request: Request,
    *,
    allow_remote: Remote = False,
    flags: Sequence[str] = (),
    known: dict[str, Facts] | None = None,
) -> list[str]:
    """A request's references and strategy, as far as that goes without decoding the videos.

    Args:
        flags: the typed flag that each reference came from; see `conditions.strategy_notes`.
        known: what is known of files already, by path; filled.

    Returns notes for the user. Raises UserError for a malformed strategy. Raises PromptFault, which
    names the file, the address or the flag, for what cannot be used or followed, because the other
    prompts of a list can still be made.
    """
    known = {} if known is None else known
    parse_mask_strategy(request.mask_strategy)  # a mistake in it is refused before files are opened
    try:
        for path in reference_paths(request):
            if path not in known:
                known[path] = inspect_reference(path, request, allow_remote=allow_remote)
        return strategy_notes(request, known, flags)
    except UserError as error:
        raise PromptFault(str(error)) from error
