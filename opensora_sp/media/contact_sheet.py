"""A contact sheet: one HTML page that shows a run's outputs. It needs no other file or network."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from opensora_sp.base.atomic import atomic_output, reported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LONGEST_SIDE = 1280  # pixels; a larger frame is scaled down
_LOSSLESS_PIXELS = 256 * 256
_MOST_ENLARGED = 4  # times that a tiny picture is enlarged at most

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --ink: #1c1e21; --dim: #5d636b;
  --line: #dcdedb; --card: #ffffff; --bar: #2f6f9f; --track: #e8ebec; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e6e7e8; --dim: #9aa1a9;
  --line: #31353a; --card: #1c1f23; --bar: #6bb0dd; --track: #2a2e33; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem; max-width: 90rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 1.2rem; }
h2 { font-size: 1.05rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
a { color: inherit; text-underline-offset: .2em; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem; margin-bottom: 1.2rem; }
.prompt { margin: 0 0 .8rem; max-width: 70ch; overflow-wrap: anywhere; white-space: pre-wrap; }
.strip { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .8rem; }
@media (max-width: 40rem) { .strip { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; max-height: 26rem; object-fit: contain;
  object-position: left top; margin-bottom: .2rem; }
p.dim { margin: .6rem 0 0; }
figcaption, .dim { color: var(--dim); font-size: .875rem; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.2rem 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--dim); width: 40%; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums;
  padding-right: 0; width: 6rem; }
.track { display: block; height: .6rem; margin-top: .45rem; min-width: 3rem;
  border-radius: .2rem; background: var(--track); }
.fill { display: block; height: 100%; border-radius: inherit; background: var(--bar); }
"""


@dataclass(frozen=True)
class Picture:
    """A frame in the page: its data URL, and its size in pixels."""

    address: str
    height: int
    width: int


@dataclass(frozen=True)
class SheetEntry:
    """One image or video on the sheet.

    Args:
        output: the file that was written. The sheet links to it by a relative path.
        prompt: its text.
        frames: pictures of frames, usually those of `chosen_frames`.
        labels: one line under each frame, such as "frame 25, 1.04 s".
        details: what differs between entries, such as the seed.
    """

    output: Path
    prompt: str
    frames: Sequence[Picture]
    labels: Sequence[str]
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.frames):
            raise ValueError(f"{len(self.labels)} labels for {len(self.frames)} frames")


def chosen_frames(count: int) -> list[int]:
    """Indices of the first, the middle and the last of `count` frames, each of them once."""
    return sorted({0, count // 2, count - 1}) if count > 0 else []


def write_sheet(
    path: Path,
    *,
    entries: Sequence[SheetEntry],
    settings: Mapping[str, Any],
    timings: Mapping[str, float | None],
    title: str = "Contact sheet",
) -> None:
    """Write the page; it appears whole or not at all.

    Args:
        path: of the HTML file.
        entries: what was made, in order.
        settings: of the whole run; nested mappings become `outer.inner` rows.
        timings: seconds by stage, None where a stage was not measured.
        title: heading and window title.

    Raises:
        UserError: the directory or the disk does not allow it.
    """
    path = Path(path)
    articles = "\n".join(_article(entry, path) for entry in entries)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{articles}
<div class="facts">
<section><h2>Settings</h2>{_settings_table(settings)}</section>
<section><h2>Time</h2>{_timings_table(timings)}</section>
</div>
</body>
</html>
"""
    with atomic_output(path) as temporary, reported(path):
        temporary.write_text(page, encoding="utf-8")


def _article(entry: SheetEntry, sheet: Path) -> str:
    figures = "".join(
        f'<figure><img src="{frame.address}" alt="{_text(label)}" '
        f'width="{frame.width}" height="{frame.height}" '
        f'style="max-width:{_MOST_ENLARGED * frame.width}px">'
        f"<figcaption>{_text(label)}</figcaption></figure>"
        for frame, label in zip(entry.frames, entry.labels, strict=True)
    )
    where = os.path.relpath(entry.output, sheet.parent)
    link = quote(os.fsencode(where))  # quotes colons too, so that no name reads as an address
    details = " · ".join(f"{_text(k)} {_text(_shown(v))}" for k, v in entry.details.items())
    return (
        f'<article><h2><a href="{link}">{_text(entry.output.name)}</a></h2>'
        f'<p class="prompt">{_text(entry.prompt)}</p>'
        f'<div class="strip">{figures}</div>'
        + (f'<p class="dim">{details}</p>' if details else "")
        + "</article>"
    )


def _settings_table(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{_text(key)}</th><td>{_text(_shown(value))}</td></tr>"
        for key, value in _flat(settings)
    )
    return f"<table>{rows}</table>"


def _timings_table(timings: Mapping[str, float | None]) -> str:
    longest = max((t for t in timings.values() if t is not None), default=0.0)
    rows = []
    for stage, seconds in timings.items():
        if seconds is None:
            bar, number = "", "not measured"
        else:
            share = 100 * seconds / longest if longest > 0 else 0
            bar = (
                f'<span class="track"><span class="fill" style="width:{share:.1f}%"></span></span>'
            )
            number = f"{seconds:.2f} s"
        rows.append(
            f"<tr><th scope='row'>{_text(stage)}</th><td>{bar}</td>"
            f'<td class="number">{number}</td></tr>'
        )
    return f"<table>{''.join(rows)}</table>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each) for each in value)
    return str(value)


def _text(value: object) -> str:
    # A prompt from a command line may hold lone surrogates, which UTF-8 cannot.
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def picture(frame: NDArray[np.uint8]) -> Picture:
    """The picture of a frame `[H, W, 3]`: PNG for a small one, JPEG for a large one."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(frame))
    data = io.BytesIO()
    if image.width * image.height <= _LOSSLESS_PIXELS:
        kind = "png"
        image.save(data, format="PNG")
    else:
        kind = "jpeg"
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        image.save(data, format="JPEG", quality=90)
    address = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
    return Picture(address, height=frame.shape[0], width=frame.shape[1])
