"""One declaration per setting: everything the program knows of a setting is made from it.

A setting is declared once: as a field of `Request`, `EngineSettings`, `JobSettings` or
`BenchmarkSettings`, or in flags/others.py where a flag is no field of these. From the declaration
come the flag, the YAML key, `--help`, docs/flags.md, the check of the value, the default, and
whether the value is part of an output's identity.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import ValueType, path, shown

T = TypeVar("T")

# What another value changes: the latents of an output, only the file that is made of them, or
# neither beyond float rounding.
Changes = Literal["content", "file", "nothing"]

_KEY = "opensora_sp setting"
_SAME: Any = object()
_known: dict[type[Any], Mapping[str, Setting]] = {}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The declaration of one setting.

    name: the flag, such as --cfg-scale; "" where no flag sets it.
    kind: how the flag is read and what is legal for it.
    default: of the flag.
    help: one line of `--help` and docs/flags.md.
    changes: what another value changes; it has no default, so that nobody forgets it.
    field: its name in the dataclass; "" where it is no field.
    field_kind: what is legal for the field.
    nargs: None one value, 0 a switch, 2 two values, "+" one or more. A field whose flag has "+"
        takes one of the values for each prompt.
    program: only this program takes the flag.
    control: steers the command itself, so it is no YAML key.
    note: said once when the value is not the default.
    shown_default: for help, where the default is not a value.
    stored_as: its name in an output's identity, where that is not the field's.
    """

    name: str
    kind: ValueType
    default: Any
    help: str
    changes: Changes
    field: str = ""
    field_kind: ValueType | None = None
    nargs: Literal[0, 2, "+"] | None = None
    program: str | None = None
    control: bool = False
    note: str | None = None
    shown_default: str | None = None
    stored_as: str | None = None

    def __post_init__(self) -> None:
        if self.changes not in get_args(Changes):
            raise ValueError(f"{self.name or self.field}: changes {self.changes!r} is not declared")

    @property
    def key(self) -> str:
        """Its YAML key: the flag's name with _ for -. Of a setting without a flag, the field."""
        return self.name.removeprefix("--").replace("-", "_") or self.field

    @property
    def usage(self) -> str:
        """The flag with the names of its values, as help shows it."""
        value = self.kind.metavar
        two = f" {value}" if " " in value else " H W"
        values = {None: f" {value}", 0: "", 2: two, "+": f" {value} [{value} ...]"}
        return self.name + values[self.nargs]

    @property
    def identity_name(self) -> str:
        """Its name in an output's identity."""
        return self.stored_as or self.field

    def check(self, value: Any) -> None:
        """Raise UserError, naming the field, where a field's value is not legal."""
        assert self.field_kind is not None
        if value is None and self.default is None and self.nargs is None:
            return
        is_path = isinstance(value, Path) and self.field_kind.metavar in ("DIR", "FILE")
        self.field_kind.check(self.field, str(value) if is_path else value)


def declared(
    flag: str,
    kind: ValueType,
    default: Any = None,
    help: str = "",
    *,
    changes: Changes,
    flag_kind: ValueType | None = None,
    flag_default: Any = _SAME,
    **more: Any,
) -> Mapping[str, Setting]:
    """The metadata of a dataclass's field that is a setting; see `Setting`.

    flag_kind, flag_default: where the flag's are not the field's.
    """
    return {
        _KEY: Setting(
            name=flag,
            kind=flag_kind or kind,
            default=default if flag_default is _SAME else flag_default,
            help=help,
            changes=changes,
            field_kind=kind,
            **more,
        )
    }


def setting(
    flag: str, kind: ValueType, default: T, help: str = "", *, changes: Changes, **more: Any
) -> T:
    """A dataclass's field with a default that is a setting; see `declared`."""
    field: T = dataclasses.field(
        default=default, metadata=declared(flag, kind, default, help, changes=changes, **more)
    )
    return field


def settings_of(cls: type[Any]) -> Mapping[str, Setting]:
    """The declarations of a dataclass's fields, by the field's name, in their order."""
    if cls not in _known:
        _known[cls] = {
            field.name: dataclasses.replace(field.metadata[_KEY], field=field.name)
            for field in dataclasses.fields(cls)
            if _KEY in field.metadata
        }
    return _known[cls]


def from_flags(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that flags set, by name, from the flags' values by key.

    Left out: fields without a flag, and those that take one of the values for each prompt.
    """
    return {
        name: values[one.key]
        for name, one in settings_of(cls).items()
        if one.name and one.nargs != "+"
    }


def field_names(cls: type[Any]) -> tuple[str, ...]:
    """Names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(cls))


def a_path(name: str, value: Any) -> Path:
    """A path given as text or as a path. Raises UserError naming `name`."""
    whole = str(value) if isinstance(value, Path) else value
    path("DIR").check(name, whole)
    return Path(path("DIR").read(whole)) if isinstance(value, str) else Path(whole)


class Declared:
    """A frozen dataclass that is made by names and checks its settings.

    Raises UserError in one line for a name that is no field, where a dataclass alone would raise
    a TypeError, and for a value that is not legal. Scalars of numpy become Python's own.
    """

    def __new__(cls, *arguments: Any, **given: Any) -> Any:
        _refuse_unknown(cls, arguments, given)
        return super().__new__(cls)

    def check_values(self) -> None:
        """Check every declared field; call it from `__post_init__`."""
        for name, one in settings_of(type(self)).items():
            value = _plain(getattr(self, name))
            one.check(value)
            object.__setattr__(self, name, value)


def _plain(value: Any) -> Any:
    """A scalar of numpy as Python's own, without numpy; anything else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _refuse_unknown(cls: type[Any], arguments: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """UserError for a name that is no field, with the nearest that is one."""
    names = field_names(cls)
    if arguments:
        raise UserError(
            f"{cls.__name__} {shown(arguments[0])}: values are given by name, as "
            f"{cls.__name__}({names[0]}=...)"
        )
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            nearest = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{name} is not a field of {cls.__name__}{nearest}")
