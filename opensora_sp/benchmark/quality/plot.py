"""The plot of a comparison: quality frame by frame, with the noise floors as dashed lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from opensora_sp.benchmark.quality.comparison import Compared, Comparison
from opensora_sp.benchmark.quality.measure import (
    FrameQuality,
    LatentQuality,
    Quality,
    signal_to_noise,
)
from opensora_sp.benchmark.quality.table import floor_name
from opensora_sp.media.line_plot import Line, Panel, write_plot
from opensora_sp.media.metrics import decibels

Curve = Sequence[float]
# Of several pairs: what becomes of the values that they have at one frame.
Merge = Callable[[Sequence[float]], float]


def write(path: Path, comparison: Comparison, found: Sequence[Compared]) -> None:
    """Draw PSNR, SSIM and PSNR of motion by frame, and the error of latents by latent frame.

    One pair is one line. Several are drawn by their mean and their worst at each frame, and
    pictures by their number in the list. Equal frames have no finite PSNR and leave a gap.

    Raises:
        UserError: the file cannot be written.
    """
    count = len(found)
    title = f"{comparison.b.path.name} against {comparison.a.path.name}"
    panels: list[Panel] = []
    x_titles = []
    videos = [one for one in found if one.facts.kind == "video"]
    pictures = [one for one in found if one.facts.kind == "picture"]
    latents = [one for one in found if one.facts.kind == "latents"]
    if videos:
        panels += _panels(comparison, videos, _OF_FRAMES, "")
        x_titles.append("frame")
    if pictures:
        panels += _panels(comparison, pictures, _OF_PICTURES, " of pictures", across=True)
        x_titles.append("number of the picture")
    if latents:
        panels += _panels(comparison, latents, _OF_LATENTS, "")
        x_titles.append("latent frame")
    if count > 1:
        title += f", {count} pairs"
    write_plot(path, panels, title=title, x_title=" / ".join(x_titles))


Measure = tuple[str, Callable[[Quality], Curve], Callable[[float], float], Merge]


def _errors(quality: Quality) -> Curve:
    assert isinstance(quality, FrameQuality)
    return quality.squared_error


def _similarities(quality: Quality) -> Curve:
    assert isinstance(quality, FrameQuality)
    return quality.ssim


def _motions(quality: Quality) -> Curve:
    """The error between a frame and the one before; the first frame has none."""
    assert isinstance(quality, FrameQuality)
    return [math.nan, *quality.motion]


def _latent_errors(quality: Quality) -> Curve:
    assert isinstance(quality, LatentQuality)
    return quality.errors


def _same(value: float) -> float:
    return value


# Title, the values by frame, what is drawn of a value, the worst of several.
_OF_PICTURES: tuple[Measure, ...] = (
    ("PSNR, dB", _errors, decibels, max),
    ("SSIM", _similarities, _same, min),
)
_OF_FRAMES: tuple[Measure, ...] = (
    *_OF_PICTURES,
    ("PSNR of motion, dB: between a frame and the one before", _motions, decibels, max),
)
_OF_LATENTS: tuple[Measure, ...] = (
    ("latents: norm over norm of the error, dB", _latent_errors, signal_to_noise, max),
)


def _panels(
    comparison: Comparison,
    found: Sequence[Compared],
    measures: Sequence[Measure],
    what: str,
    *,
    across: bool = False,
) -> Iterator[Panel]:
    """A panel for each measure. across: every pair is one point, and not a curve."""
    for title, of, drawn, worst in measures:
        lines = _lines("B", [of(one.quality) for one in found], drawn, worst, 0, across)
        for index in range(len(comparison.floors)):
            floors = [of(each) for one in found if (each := one.floors[index]) is not None]
            if across:
                floors = [
                    [math.nan] if (each := one.floors[index]) is None else of(each) for one in found
                ]
            name = f"{floor_name(comparison, index)}: {comparison.floors[index].path.name}"
            lines += _lines(name, floors, drawn, None, index + 2, across)
        name, _, rest = title.partition(",")
        yield Panel(f"{name}{what}{',' if rest else ''}{rest}", lines)


def _lines(
    name: str,
    curves: Sequence[Curve],
    drawn: Callable[[float], float],
    worst: Merge | None,
    colour: int,
    across: bool,
) -> list[Line]:
    """The lines of one side. worst: None for a noise floor, which has one dashed line alone."""
    dashed = worst is None
    if across:
        curves = [[value for curve in curves for value in curve]]
    if len(curves) <= 1:
        return [Line(name, _points(curve, drawn), colour, dashed) for curve in curves]
    lines = [Line(f"{name}, mean", _points(_merged(curves, fmean), drawn), colour, dashed)]
    if worst is not None:
        lines.append(Line(f"{name}, worst", _points(_merged(curves, worst), drawn), colour + 1))
    return lines


def _points(curve: Curve, drawn: Callable[[float], float]) -> list[tuple[float, float]]:
    return [
        (float(x), value if math.isnan(value) else drawn(value)) for x, value in enumerate(curve)
    ]


def _merged(curves: Sequence[Curve], merge: Merge) -> list[float]:
    """One curve of several, which may have different lengths."""
    found = []
    for same in zip_longest(*curves):
        known = [value for value in same if value is not None and not math.isnan(value)]
        found.append(merge(known) if known else math.nan)
    return found
