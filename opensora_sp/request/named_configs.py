"""Configurations that come with the program, found by name: --config 720p-16s."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from opensora_sp.base import access
from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown

_PACKAGE = Path(__file__).resolve().parents[1]
_SUFFIX = ".yaml"


def directory() -> Path:
    """Where they lie: in the package where it was installed, beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Every name that --config knows, sorted."""
    return sorted(path.stem for path in directory().glob(f"*{_SUFFIX}"))


def find_config(given: str, flag: str = "--config") -> str:
    """The file that is meant by a path or a name; a file that is there is meant before a name.

    flag: the one that it was given to. Raises UserError, naming the nearest, where it can only be a
    name and there is none such.
    """
    is_path = os.sep in given or given.endswith((_SUFFIX, ".yml"))
    if is_path or access.exists(given):
        return given
    known = names()
    if given in known:
        return str(directory() / f"{given}{_SUFFIX}")
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.4)
    offered = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(known)}"
    raise UserError(
        f"{flag} {shown(given)}: there is no such file, and no configuration of that name; "
        f"{offered}"
    )
