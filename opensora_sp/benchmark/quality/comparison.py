"""A whole comparison: what was compared, its measures, and its report as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_sp import __version__
from opensora_sp.base.errors import UserError
from opensora_sp.benchmark.quality.measure import (
    Facts,
    FrameQuality,
    LatentQuality,
    Quality,
    look,
    measure,
)
from opensora_sp.benchmark.quality.sides import Pair, Pairs, Side, match, named, read_side

_FORMAT = "opensora-sp quality 1"


@dataclass(frozen=True)
class Compared:
    """A pair with its measures. floors: per noise floor; None where that has no such output."""

    pair: Pair
    facts: Facts
    quality: Quality
    floors: Sequence[Quality | None]


@dataclass(frozen=True)
class Comparison:
    """What is compared, checked but not measured yet.

    floors: the noise floors. floor_pairs: for each of them the pairs of A with it, by name. facts:
    in the order of the pairs.
    """

    a: Side
    b: Side
    floors: Sequence[Side]
    pairs: Pairs
    floor_pairs: Sequence[Mapping[str, Pair]]
    facts: Sequence[Facts]

    def missing_in(self, floor: int) -> list[str]:
        """The names of pairs that a noise floor has no output for."""
        return [p.name for p in self.pairs.pairs if p.name not in self.floor_pairs[floor]]

    def measured(self) -> Iterator[Compared]:
        """Measure pair by pair. Raises UserError as `measure`."""
        for pair, facts in zip(self.pairs.pairs, self.facts, strict=True):
            floors = [
                measure(pairs[pair.name]) if pair.name in pairs else None
                for pairs in self.floor_pairs
            ]
            yield Compared(pair, facts, measure(pair), floors)


def prepare(a: Path, b: Path, floors: Sequence[Path]) -> Comparison:
    """Find the pairs and look at the headers and first frames of all files.

    Raises:
        UserError: nothing can be paired, or a pair cannot be compared.
    """
    side_a, side_b = read_side(a, "A"), read_side(b, "B")
    pairs = match(side_a, side_b)
    facts = [look(pair) for pair in pairs.pairs]
    sides, floor_pairs = [], []
    for path in floors:
        side = read_side(path, "--floor")
        found = {pair.name: pair for pair in match(side_a, side).pairs}
        found = {pair.name: found[pair.name] for pair in pairs.pairs if pair.name in found}
        if not found:
            raise UserError(
                f"--floor {path} has none of the {named([p.name for p in pairs.pairs])}: give "
                "outputs of the same names"
            )
        for pair in found.values():
            look(pair)
        sides.append(side)
        floor_pairs.append(found)
    return Comparison(side_a, side_b, sides, pairs, floor_pairs, facts)


def report(comparison: Comparison, found: Sequence[Compared]) -> dict[str, Any]:
    """The comparison as plain data for JSON. docs/quality.md says what each key means."""
    pairs = comparison.pairs
    return {
        "format": _FORMAT,
        "opensora_sp": __version__,
        "a": str(comparison.a.path),
        "b": str(comparison.b.path),
        "floors": [
            {"path": str(side.path), "missing": comparison.missing_in(index)}
            for index, side in enumerate(comparison.floors)
        ],
        "only_in_a": list(pairs.only_in_a),
        "only_in_b": list(pairs.only_in_b),
        "not_outputs": sorted({*comparison.a.others, *comparison.b.others}),
        "pairs": [
            {
                "name": one.pair.name,
                "a": str(one.pair.a),
                "b": str(one.pair.b),
                "kind": one.facts.kind,
                "what": one.facts.what,
                "encoded_with_loss": one.facts.loss is not None,
                "differ_in": _plain(one.facts.differ_in),
                "quality": _quality(one.quality),
                "floors": [None if each is None else _quality(each) for each in one.floors],
            }
            for one in found
        ],
        "summary": _summaries([one.quality for one in found]),
        "floor_summaries": [
            _summaries([one.floors[index] for one in found])
            for index in range(len(comparison.floors))
        ],
    }


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write the report, whole or not at all. Raises UserError where that fails."""
    from opensora_sp.base.atomic import atomic_output, reported

    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    with atomic_output(path) as temporary, reported(path):
        temporary.write_text(text, encoding="utf-8")


def _plain(differences: Mapping[str, tuple[Any, Any]] | None) -> dict[str, Any] | None:
    if differences is None:
        return None
    return {name: {"a": a, "b": b} for name, (a, b) in differences.items()}


def _quality(found: Quality) -> dict[str, Any]:
    if isinstance(found, LatentQuality):
        return {
            "equal": found.equal,
            "relative_error": found.error,
            "worst_frame": found.worst_frame,
            "worst_relative_error": found.errors[found.worst_frame],
            "largest_difference": found.largest,
            "frames": {"relative_error": list(found.errors)},
        }
    return {
        "equal": found.equal,
        "psnr_db": found.psnr,
        "psnr_mean_db": found.mean_psnr,
        "worst_frame": found.worst_frame,
        "psnr_worst_db": found.psnrs[found.worst_frame],
        "equal_frames": found.equal_frames,
        "ssim_mean": found.mean_ssim,
        "ssim_worst_frame": found.worst_ssim_frame,
        "ssim_worst": found.ssim[found.worst_ssim_frame],
        "motion_psnr_db": found.motion_psnr,
        "largest_difference": found.largest,
        "frames": {
            "psnr_db": found.psnrs,
            "ssim": list(found.ssim),
            "motion_psnr_db": found.motions,
        },
    }


@dataclass(frozen=True)
class Spread:
    """A figure over several pairs. mean: over the pairs that differ; None where none does."""

    mean: float | None
    worst: float | None


@dataclass(frozen=True)
class Summary:
    """The figures of several pairs of one kind, by name: PSNR, SSIM, … or the relative error."""

    pairs: int
    equal: int
    figures: Mapping[str, Spread]


Figure = tuple[str, Callable[[Any], float | None], Callable[[Sequence[float]], float]]
_OF_FRAMES: tuple[Figure, ...] = (
    ("psnr_db", lambda q: q.psnr, min),
    ("psnr_worst_frame_db", lambda q: q.psnrs[q.worst_frame], min),
    ("ssim", lambda q: q.mean_ssim, min),
    ("motion_psnr_db", lambda q: q.motion_psnr, min),
)
_OF_LATENTS: tuple[Figure, ...] = (
    ("relative_error", lambda q: q.error, max),
    ("relative_error_worst_frame", lambda q: q.errors[q.worst_frame], max),
)


def summarize(found: Sequence[Quality | None], sort: type[Quality]) -> Summary | None:
    """The summary of frames or of latents; None without such a pair."""
    own = [quality for quality in found if isinstance(quality, sort)]
    if not own:
        return None
    figures = {}
    for name, of, worst in _OF_FRAMES if sort is FrameQuality else _OF_LATENTS:
        # Equal pairs have no finite PSNR, and would hide the others in a mean of the rest.
        known = [value for q in own if not q.equal and (value := of(q)) is not None]
        finite = [value for value in known if math.isfinite(value)]
        figures[name] = Spread(
            math.fsum(finite) / len(finite) if finite else None, worst(known) if known else None
        )
    return Summary(len(own), sum(q.equal for q in own), figures)


def _summaries(found: Sequence[Quality | None]) -> dict[str, Any]:
    return {
        name: None
        if (one := summarize(found, sort)) is None
        else {
            "pairs": one.pairs,
            "equal": one.equal,
            **{
                key: {"mean": spread.mean, "worst": spread.worst}
                for key, spread in one.figures.items()
            },
        }
        for name, sort in (("frames", FrameQuality), ("latents", LatentQuality))
    }


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for: infinity and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
