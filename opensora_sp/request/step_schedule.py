"""Step schedules: which denoising steps are computed, and what fills the others. Read from YAML.

A schedule is made for a model, a number of steps, a range of sizes and a range of guidance scales.
`opensora-sp calibrate` measures and writes them. Imports no torch, so that a wrong file is refused
before a model is loaded, and so that a plan knows how many steps are computed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from opensora_sp.base import access
from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.base.errors import UserError
from opensora_sp.base.outside_yaml import yaml_values
from opensora_sp.base.value_types import shown

# What fills a step left out, of the guided velocities computed before it: the last one, or the
# line in t through the last two, or the parabola through the last three.
FILLS = ("hold", "linear", "quadratic")

MOST_SCHEDULES = 1000  # of one file
MOST_STEPS = 100_000  # as --num-sampling-steps
MOST_TOKENS = 2**40  # no video is larger: "to" of the size class that has no end
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FINGERPRINT = re.compile(r"[A-Za-z0-9:_-]{1,200}")
_HEADER = "# Step schedules of opensora-sp: which denoising steps are computed. See --step-cache.\n"


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """The steps of a run that are computed, and what the run has to be for it.

    name: near-lossless, fast, or a person's own: letters, digits and . _ - only.
    steps: the num_sampling_steps it is for.
    computed: the steps that are computed, counted from 0, ascending, with 0 as the first.
    fill: what fills the others; one of FILLS.
    tokens: the sizes it is for: from (inclusive) to (exclusive) T·S tokens of one sample.
    cfg_scale: the guidance scales it is for, both ends inclusive.
    model: the fingerprint of the transformer it was measured on; None is any.
    psnr: dB against all steps, measured at calibration with `prompts` prompts.
    images: it is for one frame, whose steps lie at other times than those of videos.

    Raises UserError, naming the field, for a value that is not legal.
    """

    name: str
    steps: int
    computed: tuple[int, ...]
    fill: str
    tokens: tuple[int, int] = (1, MOST_TOKENS)
    cfg_scale: tuple[float, float] = (0.0, 1e6)
    model: str | None = None
    psnr: float | None = None
    prompts: int | None = None
    images: bool = False

    def __post_init__(self) -> None:
        for name, (legal, allowed) in _FIELDS.items():
            value = getattr(self, name)
            if not legal(value):
                raise UserError(f"{name} {shown(value)} is not {allowed}")
        if self.computed[-1] >= self.steps:
            raise UserError(
                f"computed has step {self.computed[-1]}, but of {self.steps} steps the last is "
                f"{self.steps - 1}"
            )

    @property
    def left_out(self) -> int:
        """How many of the steps are not computed."""
        return self.steps - len(self.computed)

    def computes(self, step: int, t: float) -> bool:
        """Whether a step, counted from 0, is computed: so a schedule is a step cache's policy."""
        return step in self.computed

    def fits(
        self,
        *,
        steps: int,
        tokens: int,
        cfg_scale: float,
        model: str | None,
        images: bool = False,
    ) -> bool:
        """Whether it is for a run of these numbers with this transformer (None: not known)."""
        return (
            self.steps == steps
            and self.images == images
            and self.tokens[0] <= tokens < self.tokens[1]
            and self.cfg_scale[0] <= cfg_scale <= self.cfg_scale[1]
            and (self.model is None or self.model == model)
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field that is not at its default, as YAML and JSON hold it."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = {k: v for k, v in vars(self).items() if v != defaults[k]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def steps_text(steps: Sequence[int]) -> str:
    """Ascending steps in short, as 0-8 10 12."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], step]
        else:
            runs.append([step])
    return " ".join("-".join(map(str, run)) for run in runs)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _real(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _computed(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and 0 < len(value) <= MOST_STEPS
        and all(_whole(step, 0, MOST_STEPS) for step in value)
        and value[0] == 0
        and all(one < next_one for one, next_one in pairwise(value))
    )


def _range(value: Any, legal: Callable[[Any, Any, Any], bool], low: Any, high: Any) -> bool:
    two = isinstance(value, tuple) and len(value) == 2
    return two and all(legal(end, low, high) for end in value) and value[0] <= value[1]


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (
        lambda value: isinstance(value, str) and bool(_NAME.fullmatch(value)),
        "a name of at most 64 letters, digits, dots, dashes and underscores",
    ),
    "steps": (
        lambda value: _whole(value, 1, MOST_STEPS),
        f"a whole number from 1 to {MOST_STEPS}",
    ),
    "computed": (_computed, "a list of ascending whole numbers that begins with 0"),
    "fill": (lambda value: value in FILLS, f"one of {', '.join(FILLS)}"),
    "tokens": (
        lambda value: _range(value, _whole, 1, MOST_TOKENS) and value[0] < value[1],
        f"a list of two whole numbers from 1 to {MOST_TOKENS}, the first below the second",
    ),
    "cfg_scale": (
        lambda value: _range(value, _real, 0, 1e6),
        "a list of two numbers from 0 to 1000000, the first not above the second",
    ),
    "model": (
        lambda value: (
            value is None or (isinstance(value, str) and bool(_FINGERPRINT.fullmatch(value)))
        ),
        "the fingerprint of a transformer, or null",
    ),
    "psnr": (lambda value: value is None or _real(value, 0, 1000), "a number from 0 to 1000"),
    "prompts": (
        lambda value: value is None or _whole(value, 1, 10**6),
        "a whole number from 1 to 1000000",
    ),
    "images": (lambda value: isinstance(value, bool), "true or false"),
}


def fill_weights(fill: str, times: Sequence[float], t: float) -> tuple[float, ...]:
    """The weights of the last computed velocities that give the velocity at time t.

    times: when velocities were computed, in their order, at least one; only the last 1, 2 or 3
    count, as `fill` says. Where there are fewer, the fill of the next lower order is used. The
    weights are those of the last len(weights) velocities, in their order, and their sum is 1
    (Lagrange's formula). Raises ValueError without a time, and for two that are equal.
    """
    known = times[-(FILLS.index(fill) + 1) :]
    if not known or len(set(known)) < len(known):
        raise ValueError(f"velocities at the times {known} give none at {t}")
    weights = []
    for i, one in enumerate(known):
        weight = 1.0
        for j, other in enumerate(known):
            if i != j:
                weight *= (t - other) / (one - other)
        weights.append(weight)
    return tuple(weights)


def choose(
    schedules: Iterable[StepSchedule],
    *,
    name: str | None,
    steps: int,
    tokens: int,
    cfg_scale: float,
    model: str | None,
    images: bool = False,
) -> StepSchedule | None:
    """The first schedule of that name (None: of any) that fits; None where none does."""
    for one in schedules:
        named = name is None or one.name == name
        if named and one.fits(
            steps=steps, tokens=tokens, cfg_scale=cfg_scale, model=model, images=images
        ):
            return one
    return None


def read_schedules(path: access.AnyPath, what: str | None = None) -> tuple[StepSchedule, ...]:
    """The schedules of a file, in its order, at least one.

    what: how an error names the file. Raises UserError, naming file and key, for a file that
    cannot be read, is larger than 1 MiB, is no YAML, or says something else than schedules.
    """
    said = what or shown(str(path))
    content = yaml_values(access.read_text(path, limit=access.CONFIG_LIMIT, what=what), said)
    if not isinstance(content, list) or not 0 < len(content) <= MOST_SCHEDULES:
        raise UserError(
            f"{said} is not a list of 1 to {MOST_SCHEDULES} schedules, each of `key: value` lines"
        )
    return tuple(_schedule(one, f"{said} schedule {i + 1}") for i, one in enumerate(content))


def _schedule(content: Any, where: str) -> StepSchedule:
    fields = {field.name: field for field in dataclasses.fields(StepSchedule)}
    if not isinstance(content, dict):
        raise UserError(f"{where} {shown(content)} is not a group of `key: value` lines")
    for key in content:
        if key not in fields:
            raise UserError(f"{where}: {shown(key)} is not a key; it takes {', '.join(fields)}")
    for name, field in fields.items():
        if name not in content and field.default is dataclasses.MISSING:
            raise UserError(f"{where}: the key {name} is missing")
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    try:
        return StepSchedule(**lists)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_schedules(path: access.AnyPath, schedules: Iterable[StepSchedule]) -> None:
    """Write a file that `read_schedules` reads back to the same schedules; it appears whole.

    Raises UserError where it cannot be written.
    """
    import yaml

    text = yaml.safe_dump(
        [one.to_dict() for one in schedules],
        sort_keys=False,
        default_flow_style=None,  # a list of steps is one line
        width=100,
    )
    target = Path(path)
    with atomic_output(target) as temporary, reported(target):
        temporary.write_text(_HEADER + text, encoding="utf-8")
