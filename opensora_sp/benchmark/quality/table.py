"""A comparison as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from opensora_sp.base.value_types import shown
from opensora_sp.benchmark.quality.comparison import Compared, Comparison, Summary, summarize
from opensora_sp.benchmark.quality.measure import FrameQuality, LatentQuality, Quality
from opensora_sp.benchmark.quality.sides import named
from opensora_sp.benchmark.report.table import columns

_FIGURE = 12  # characters of a column of figures
_MOST_NAME = 48
_NOTHING = "–"


def opening_lines(comparison: Comparison) -> Iterator[str]:
    """What is compared, what is left out, and what the files say of themselves."""
    pairs, facts = comparison.pairs, comparison.facts
    yield f"A: {comparison.a.path} (the reference)"
    yield f"B: {comparison.b.path}"
    for index, side in enumerate(comparison.floors):
        yield f"{floor_name(comparison, index)}: {side.path}"
        if missing := comparison.missing_in(index):
            yield f"without a partner in {floor_name(comparison, index)}: {named(missing)}"
    if comparison.a.is_folder:
        count = len(pairs.pairs)
        alone = f"1 pair: {pairs.pairs[0].name}, {facts[0].what}"
        yield f"{count} pairs of equal names" if count > 1 else alone
    else:
        yield facts[0].what
    for letter, lone in (("A", pairs.only_in_a), ("B", pairs.only_in_b)):
        if lone:
            yield f"only in {letter}, not compared: {named(lone)}"
    if others := sorted({*comparison.a.others, *comparison.b.others}):
        yield f"no outputs, not compared: {', '.join(others[:8])}{', …' * (len(others) > 8)}"
    yield from _made_otherwise(comparison)
    for loss in dict.fromkeys(each.loss for each in facts if each.loss is not None):
        yield f"{loss}."
        yield "For exact figures make both with --lossless, or keep latents (--keep-state)."
    yield ""


def _made_otherwise(comparison: Comparison) -> Iterator[str]:
    """The settings that differ, each with its first two values."""
    found: dict[str, str] = {}
    for facts in comparison.facts:
        for name, (a, b) in (facts.differ_in or {}).items():
            found.setdefault(name, f"{name} {shown(a)} / {shown(b)}")
    if found:
        yield "made with other settings (A / B): " + "; ".join(found.values())


def floor_name(comparison: Comparison, index: int) -> str:
    """How a noise floor is called."""
    return "floor" if len(comparison.floors) == 1 else f"floor {index + 1}"


def pair_lines(comparison: Comparison, found: Compared) -> Iterator[str]:
    """The measures of the only pair, one a line, beside those of the noise floors."""
    heads = ["B", *(floor_name(comparison, i) for i in range(len(comparison.floors)))]
    all_of = [found.quality, *found.floors]
    rows = (_frame_rows if isinstance(found.quality, FrameQuality) else _latent_rows)(all_of)
    yield from columns(("", *heads, ""), [(*row, "") for row in rows])
    yield from _verdicts(comparison, [found])


def _frame_rows(found: Sequence[Quality | None]) -> Iterator[tuple[str, ...]]:
    own = [one for one in found if isinstance(one, FrameQuality)]
    yield "PSNR", *(decibels(one.psnr) for one in own)
    if len(own[0].squared_error) > 1:
        yield "  mean of frames", *(decibels(one.mean_psnr) for one in own)
        yield (
            "  worst frame",
            *(_at(decibels(one.psnrs[one.worst_frame]), one, one.worst_frame) for one in own),
        )
    yield "SSIM", *(similarity(one.mean_ssim) for one in own)
    if len(own[0].squared_error) > 1:
        yield (
            "  worst frame",
            *(
                _at(similarity(one.ssim[one.worst_ssim_frame]), one, one.worst_ssim_frame)
                for one in own
            ),
        )
        yield "PSNR of motion", *(decibels(one.motion_psnr) for one in own)
        yield (
            "equal frames",
            *(f"{one.equal_frames} of {len(one.squared_error)}" for one in own),
        )
    yield "largest difference", *(f"{one.largest} of 255" for one in own)


def _at(text: str, found: FrameQuality, frame: int) -> str:
    return text if found.equal else f"{text} ({frame})"


def _latent_rows(found: Sequence[Quality | None]) -> Iterator[tuple[str, ...]]:
    own = [one for one in found if isinstance(one, LatentQuality)]
    yield "relative error", *(relative(one.error) for one in own)
    yield (
        "  worst frame",
        *(
            "equal" if one.equal else f"{relative(one.errors[one.worst_frame])} ({one.worst_frame})"
            for one in own
        ),
    )
    yield "largest difference", *(f"{one.largest:.3g}" for one in own)


class RowPrinter:
    """The table of several pairs, a row as soon as it is measured."""

    def __init__(self, comparison: Comparison) -> None:
        names = [pair.name for pair in comparison.pairs.pairs]
        self._width = min(max(map(len, names)), _MOST_NAME)
        self._heads: tuple[str, ...] = ()

    def lines(self, found: Compared) -> Iterator[str]:
        """The row of a pair, below its headings where they change."""
        quality = found.quality
        if isinstance(quality, FrameQuality):
            heads: tuple[str, ...] = ("PSNR", "worst frame", "SSIM", "motion")
            cells: tuple[str, ...] = (
                decibels(quality.psnr),
                decibels(quality.psnrs[quality.worst_frame]),
                similarity(quality.mean_ssim),
                decibels(quality.motion_psnr),
            )
        else:
            heads = ("rel. error", "worst frame")
            cells = relative(quality.error), relative(quality.errors[quality.worst_frame])
        if heads != self._heads:
            self._heads = heads
            yield self._row("", heads)
        name = found.pair.name
        if len(name) > self._width:
            name = f"{name[: self._width - 1]}…"
        yield self._row(name, cells)

    def _row(self, name: str, cells: Sequence[str]) -> str:
        return f"{name:<{self._width}}" + "".join(f"  {cell:>{_FIGURE}}" for cell in cells)


def summary_lines(comparison: Comparison, found: Sequence[Compared]) -> Iterator[str]:
    """Means and worst pairs of B and of the noise floors."""
    heads = ("B", *(floor_name(comparison, i) for i in range(len(comparison.floors))))
    for sort, say in ((FrameQuality, _frame_figure), (LatentQuality, _latent_figure)):
        own = summarize([one.quality for one in found], sort)
        if own is None or (not comparison.floors and own.equal == own.pairs):
            continue
        floors = [
            summarize([one.floors[index] for one in found], sort)
            for index in range(len(comparison.floors))
        ]
        rows = [
            (
                "equal pairs",
                *(_NOTHING if s is None else f"{s.equal} of {s.pairs}" for s in (own, *floors)),
                "",
            )
        ]
        for key in own.figures:
            for kind in ("mean", "worst"):
                cells = (say(key, kind, each) for each in (own, *floors))
                rows.append((f"{_NAMES[key]}, {kind}", *cells, ""))
        # Pictures have no motion, and small frames no SSIM.
        rows = [row for row in rows if set(row[1:-1]) != {_NOTHING}]
        yield ""
        yield from columns(("over the pairs that differ", *heads, ""), rows)
    yield from _verdicts(comparison, found)


_NAMES = {
    "psnr_db": "PSNR",
    "psnr_worst_frame_db": "PSNR of the worst frame",
    "ssim": "SSIM",
    "motion_psnr_db": "PSNR of motion",
    "relative_error": "relative error",
    "relative_error_worst_frame": "relative error, worst frame",
}


def _frame_figure(key: str, kind: str, summary: Summary | None) -> str:
    value = None if summary is None else getattr(summary.figures[key], kind)
    return similarity(value) if key == "ssim" else decibels(value)


def _latent_figure(key: str, kind: str, summary: Summary | None) -> str:
    return relative(None if summary is None else getattr(summary.figures[key], kind))


def _verdicts(comparison: Comparison, found: Sequence[Compared]) -> Iterator[str]:
    """Whether B is equal, and where it stands beside each noise floor."""
    yield ""
    if all(one.quality.equal for one in found):
        yield "B is equal to A." if len(found) == 1 else "All pairs are equal."
        return
    for index in range(len(comparison.floors)):
        pairs = [(one.quality, one.floors[index]) for one in found]
        beyond = [q for q, floor in pairs if floor is not None and _is_worse(q, floor)]
        known = sum(floor is not None for _, floor in pairs)
        name = floor_name(comparison, index)
        if len(found) == 1:
            where = "farther from A than" if beyond else "no farther from A than"
            yield f"B is {where} the {name}."
        else:
            yield f"{len(beyond)} of {known} pairs are farther from A than the {name}."


def _is_worse(quality: Quality, floor: Quality) -> bool:
    if isinstance(quality, FrameQuality) and isinstance(floor, FrameQuality):
        return quality.psnr < floor.psnr
    assert isinstance(quality, LatentQuality)
    assert isinstance(floor, LatentQuality)
    return quality.error > floor.error


def decibels(value: float | None) -> str:
    """dB with two places; "equal" for what has no error."""
    if value is None:
        return _NOTHING
    return "equal" if value == math.inf else f"{value:.2f} dB"


def similarity(value: float | None) -> str:
    """SSIM with five places."""
    return _NOTHING if value is None or math.isnan(value) else f"{value:.5f}"


def relative(value: float | None) -> str:
    """A relative error; "equal" for 0."""
    if value is None:
        return _NOTHING
    return "equal" if value == 0 else f"{value:.2e}"
