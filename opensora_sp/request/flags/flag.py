"""What a flag is, and which features are delivered.

The table itself is in flag_table.py; switching a feature on is one word in FEATURES.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opensora_sp.base.value_types import ValueType


@dataclass(frozen=True)
class Feature:
    """Something that may not be delivered yet; `available` is the one word that switches it on."""

    title: str
    available: bool


FEATURES: Mapping[str, Feature] = {
    "references": Feature("references and mask strategies", available=True),
    "prompt-json": Feature("JSON inside a prompt", available=True),
    "loops": Feature("more than one loop", available=True),
    "watermark": Feature("the watermark", available=True),
    "llm-refine": Feature("prompt refinement by a language model", available=True),
    "compile": Feature("compilation", available=False),
    "mesh": Feature("choosing how ranks are grouped", available=True),
    "replicas": Feature("replicas", available=True),
    "overlap": Feature("switching overlap off", available=True),
}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag. `nargs`: None one value, 0 a switch, 2 two values, "+" one or more.

    `feature`: a value other than the default needs this feature. `program`: only this program
    takes it. `control`: steers the command itself, so it is no YAML key. `note`: said once when
    the value is not the default. `shown_default`: for help, where the default is not a value.
    """

    name: str
    kind: ValueType
    default: Any
    help: str
    nargs: Literal[0, 2, "+"] | None = None
    feature: str | None = None
    program: str | None = None
    control: bool = False
    note: str | None = None
    shown_default: str | None = None

    @property
    def key(self) -> str:
        """Its YAML key and name in Python."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def available(self) -> bool:
        """Whether values other than the default are delivered."""
        return self.feature is None or FEATURES[self.feature].available

    @property
    def usage(self) -> str:
        """The flag with the names of its values, as help shows it."""
        value = self.kind.metavar
        two = f" {value}" if " " in value else " H W"
        values = {None: f" {value}", 0: "", 2: two, "+": f" {value} [{value} ...]"}
        return self.name + values[self.nargs]


def flag(name: str, kind: ValueType, default: Any, help: str, **more: Any) -> Flag:
    """A flag in one line of the table."""
    return Flag(name=name, kind=kind, default=default, help=help, **more)


Group = tuple[str, tuple[Flag, ...]]
