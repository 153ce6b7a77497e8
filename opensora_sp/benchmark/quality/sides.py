"""What is compared with what: two files, or the outputs of equal names in two folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.wording import plural
from opensora_sp.jobs.records import FOLDER

_FRAMES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v"}
    | {".png", ".gif", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".bmp", ".tif", ".tiff"}
)
_CLIP = re.compile(r"(?P<output>.+)\.clip(?P<clip>\d{4,})\.safetensors")
_MOST_FILES = 10_000
_MOST_NAMED = 8


@dataclass(frozen=True)
class Side:
    """One of the arguments. role: how messages call it, such as A or --floor.

    items: the files that can be compared, by name; a single file has the name "". others: names in
    a folder that are no outputs.
    """

    role: str
    path: Path
    is_folder: bool
    items: Mapping[str, Path]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two files that are compared. name: "" where only one pair is."""

    name: str
    a: Path
    b: Path

    @property
    def of_latents(self) -> bool:
        """Whether they are latents and not pictures or videos."""
        return _is_latents(self.a)


@dataclass(frozen=True)
class Pairs:
    """The pairs of two sides, and the names that only one of them has."""

    pairs: Sequence[Pair]
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()


def read_side(path: Path, role: str) -> Side:
    """Look at a file or a folder. Raises UserError where neither is there."""
    if access.is_dir(path):
        return _folder(path, role)
    if not access.exists(path):
        raise UserError(
            f"{role} {path} does not exist: give a video, a picture, saved latents or a folder"
        )
    if not access.is_file(path):
        raise UserError(
            f"{role} {path} is no regular file: give a video, a picture, saved latents or a folder"
        )
    return Side(role, path, False, {"": path})


def _folder(path: Path, role: str) -> Side:
    items: dict[str, Path] = {}
    others = []
    for file in _files(path, role):
        suffix = file.suffix.lower()
        if access.is_file(file) and (suffix in _FRAMES or _is_latents(file)):
            items[file.name] = file
        elif file.name != FOLDER:
            others.append(file.name)
    # Latents of finished clips; the state of a clip on its way is no output.
    state = path / FOLDER
    if access.is_dir(state):
        for file in _files(state, role):
            if (found := _CLIP.fullmatch(file.name)) and access.is_file(file):
                items[f"{found['output']}, latents of clip {int(found['clip'])}"] = file
    return Side(role, path, True, items, tuple(others))


def _files(path: Path, role: str) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST_FILES + 1), strict=False)]
    except OSError as error:
        raise UserError(f"{role} {path} cannot be read: {error.strerror or error}") from None
    if len(names) > _MOST_FILES:
        raise UserError(
            f"{role} {path} holds more than {_MOST_FILES} files: give a folder of one run's outputs"
        )
    return [path / name for name in sorted(names)]


def match(a: Side, b: Side) -> Pairs:
    """Pair the files of two sides by name.

    Raises:
        UserError: a file and a folder, latents and frames, or folders without a common name.
    """
    if a.is_folder != b.is_folder:
        sort = {True: "a folder", False: "a file"}
        raise UserError(
            f"{a.role} {a.path} is {sort[a.is_folder]}, but {b.role} {b.path} is "
            f"{sort[b.is_folder]}: give two files, or two folders with outputs of equal names"
        )
    names = [name for name in a.items if name in b.items]
    pairs = [Pair(name, a.items[name], b.items[name]) for name in names]
    if not pairs:
        raise UserError(
            f"no output in {a.role} {a.path} ({named(list(a.items))}) has the name of one in "
            f"{b.role} {b.path} ({named(list(b.items))}): give two folders with outputs of equal "
            "names"
        )
    for pair in pairs:
        if _is_latents(pair.a) != _is_latents(pair.b):
            raise UserError(
                f"{pair.a} and {pair.b}: one is saved latents and the other is not; compare "
                "latents with latents"
            )
    return Pairs(
        pairs,
        tuple(name for name in a.items if name not in b.items),
        tuple(name for name in b.items if name not in a.items),
    )


def _is_latents(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def named(names: Sequence[str]) -> str:
    """A number of names and the first of them."""
    if not names:
        return "0 outputs"
    more = ", …" if len(names) > _MOST_NAMED else ""
    count = plural(len(names), "output")
    return f"{count}: {', '.join(names[:_MOST_NAMED])}{more}"
