"""Line plots as SVG or PNG: panels below each other that share one axis.

The SVG needs no other file. The PNG is drawn by Pillow, which is imported only for it. No plotting
library is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, Protocol

from opensora_sp.base.atomic import atomic_output, reported
from opensora_sp.base.errors import UserError

SUFFIXES = (".svg", ".png")
# Colours that people with a colour vision deficiency tell apart (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK, _DIM, _GRID, _PAPER = "#1c1e21", "#5d636b", "#e2e4e3", "#ffffff"
_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _GAP = 900, 190, 70, 20, 30, 34
_LEGEND, _BOTTOM, _TEXT = 18, 40, 12
_PNG_SCALE = 2
_MOST_LABEL = 90  # characters of a legend's entry
_DASH = (6, 4)

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Line:
    """A named line through points (x, y). A y that is not finite leaves a gap.

    colour: an index of `COLOURS`, taken round. dashed: for what the other lines are compared with.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines with one vertical axis. levels: named horizontal lines, drawn dashed."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = field(default_factory=tuple)


def check_plot_path(path: Path, flag: str) -> None:
    """Raise UserError for a name that ends neither in .svg nor in .png."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{flag} {path}: the name has to end in {' or '.join(SUFFIXES)}")


def write_plot(path: Path, panels: Sequence[Panel], *, title: str, x_title: str) -> None:
    """Draw panels into a file that appears whole or not at all.

    Args:
        path: ends in .svg or .png, which decides the format.
        panels: from the top. One without a finite point says so.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    check_plot_path(path, "plot")
    legends = [_legend(panel) for panel in panels]
    heights = [_PANEL + _LEGEND * len(legend) + _GAP for legend in legends]
    size = (_WIDTH, _TOP + sum(heights) + _BOTTOM)
    canvas: _Canvas = _Svg(*size) if path.suffix.lower() == ".svg" else _Png(*size)
    canvas.text((_LEFT, 20), title, size=_TEXT + 3)
    across = _Axis.over(
        [x for panel in panels for line in panel.lines for x, y in line.points if math.isfinite(y)],
        _LEFT,
        _WIDTH - _RIGHT,
        whole=True,
    )
    top = _TOP
    for panel, legend, height in zip(panels, legends, heights, strict=True):
        _draw(canvas, panel, legend, across, top)
        top += height
    canvas.text(((_LEFT + _WIDTH - _RIGHT) / 2, size[1] - 12), x_title, anchor="middle")
    with atomic_output(path) as temporary, reported(path):
        canvas.save(temporary)


def _legend(panel: Panel) -> list[Line]:
    return [line for line in panel.lines if line.name]


def _draw(canvas: _Canvas, panel: Panel, legend: Sequence[Line], across: _Axis, top: float) -> None:
    """One panel from `top` on: title, legend, grid, lines."""
    upper = top + 22 + _LEGEND * len(legend)
    lower = upper + _PANEL - 22
    canvas.text((_LEFT, top + 14), panel.title, colour=_INK)
    for number, line in enumerate(legend):
        y = top + 26 + _LEGEND * number
        colour = COLOURS[line.colour % len(COLOURS)]
        canvas.line([(_LEFT, y), (_LEFT + 28, y)], colour, 2, dashed=line.dashed)
        canvas.text((_LEFT + 36, y + 4), _shortened(line.name), colour=_DIM)
    values = [y for line in panel.lines for _, y in line.points if math.isfinite(y)]
    if not values:
        canvas.text((_LEFT, upper + 30), "nothing to draw: no value is finite", colour=_DIM)
        return
    values += [value for _, value in panel.levels if math.isfinite(value)]
    up = _Axis.over(values, lower, upper)
    for value in up.ticks:
        y = up.place(value)
        canvas.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], _GRID, 1)
        canvas.text((_LEFT - 8, y + 4), f"{value:.10g}", colour=_DIM, anchor="end")
    for value in across.ticks:
        canvas.text(
            (across.place(value), lower + 16), f"{value:.10g}", colour=_DIM, anchor="middle"
        )
    for name, value in panel.levels:
        if math.isfinite(value):
            y = up.place(value)
            canvas.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], _DIM, 1.5, dashed=True)
            canvas.text((_WIDTH - _RIGHT, y - 4), _shortened(name), colour=_DIM, anchor="end")
    for line in panel.lines:
        colour = COLOURS[line.colour % len(COLOURS)]
        for part in _unbroken(line.points):
            placed = [(across.place(x), up.place(y)) for x, y in part]
            if len(placed) == 1:
                canvas.dot(placed[0], colour)
            else:
                canvas.line(placed, colour, 2, dashed=line.dashed)


def _unbroken(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The stretches of points with a finite y."""
    part: list[Point] = []
    for point in points:
        if math.isfinite(point[1]):
            part.append(point)
        elif part:
            yield part
            part = []
    if part:
        yield part


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_LABEL else f"{text[: _MOST_LABEL - 1]}…"


@dataclass(frozen=True)
class _Axis:
    """Maps values between `low` and `high` to pixels between `first` and `last`."""

    low: float
    high: float
    first: float
    last: float
    ticks: Sequence[float]

    @staticmethod
    def over(values: Sequence[float], first: float, last: float, *, whole: bool = False) -> _Axis:
        """An axis with room for all values. whole: ticks are whole numbers, and ends are exact."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):
            # Every value is the same: it stands in the middle.
            room = 0.5 if whole else max(abs(low) * 0.01, 1e-6)
            low, high = low - room, high + room
        step = _tick_step(high - low)
        if whole:
            step = max(1.0, step)
        else:
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        count = math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9)
        start = math.ceil(low / step - 1e-9)
        return _Axis(low, high, first, last, [(start + n) * step for n in range(count + 1)])

    def place(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def _tick_step(span: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that gives about five ticks."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= span / 5 * 0.999)


class _Canvas(Protocol):
    def line(
        self, points: Sequence[Point], colour: str, width: float, *, dashed: bool = False
    ) -> None: ...

    def dot(self, at: Point, colour: str) -> None: ...

    def text(
        self,
        at: Point,
        text: str,
        *,
        colour: str = _INK,
        anchor: Anchor = "start",
        size: int = _TEXT,
    ) -> None: ...

    def save(self, path: Path) -> None: ...


class _Svg:
    def __init__(self, width: int, height: int) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="system-ui, sans-serif">',
            f'<rect width="{width}" height="{height}" fill="{_PAPER}"/>',
        ]

    def line(
        self, points: Sequence[Point], colour: str, width: float, *, dashed: bool = False
    ) -> None:
        placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = f' stroke-dasharray="{_DASH[0]} {_DASH[1]}"' if dashed else ""
        self._parts.append(
            f'<polyline points="{placed}" fill="none" stroke="{colour}" '
            f'stroke-width="{width:g}"{dash}/>'
        )

    def dot(self, at: Point, colour: str) -> None:
        self._parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3" fill="{colour}"/>')

    def text(
        self,
        at: Point,
        text: str,
        *,
        colour: str = _INK,
        anchor: Anchor = "start",
        size: int = _TEXT,
    ) -> None:
        self._parts.append(
            f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}">{escape(_shown(text))}</text>'
        )

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self._parts, "</svg>"]) + "\n", encoding="utf-8")


class _Png:
    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (width * _PNG_SCALE, height * _PNG_SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def line(
        self, points: Sequence[Point], colour: str, width: float, *, dashed: bool = False
    ) -> None:
        for part in _dashes(points) if dashed else (points,):
            self._draw.line(
                [(x * _PNG_SCALE, y * _PNG_SCALE) for x, y in part],
                fill=colour,
                width=round(width * _PNG_SCALE),
                joint="curve",
            )

    def dot(self, at: Point, colour: str) -> None:
        x, y = at
        box = [n * _PNG_SCALE for n in (x - 3, y - 3, x + 3, y + 3)]
        self._draw.ellipse(box, fill=colour)

    def text(
        self,
        at: Point,
        text: str,
        *,
        colour: str = _INK,
        anchor: Anchor = "start",
        size: int = _TEXT,
    ) -> None:
        from PIL import ImageFont

        font: Any = ImageFont.load_default(size * _PNG_SCALE)
        place = (at[0] * _PNG_SCALE, at[1] * _PNG_SCALE)
        side = {"start": "l", "middle": "m", "end": "r"}[anchor]
        self._draw.text(place, _shown(text), fill=colour, font=font, anchor=f"{side}s")

    def save(self, path: Path) -> None:
        self._image.save(path, format="PNG")


def _dashes(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The dashes of a line, whose pattern goes on around its corners."""
    drawn, left = True, float(_DASH[0])
    part = [points[0]]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while length - done > left:
            done += left
            at = (x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length)
            if drawn:
                yield [*part, at]
            drawn = not drawn
            part, left = [at], float(_DASH[not drawn])
        left -= length - done
        part.append((x1, y1))
    if drawn:
        yield part


def _shown(text: str) -> str:
    """Text without line breaks, and without surrogates that no file can hold."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
