"""The results as a table of Markdown and as one HTML page without other files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora_sp.benchmark import report as benchmark_report
from opensora_sp.benchmark.count.table import markdown
from opensora_sp.benchmark.report import units
from opensora_sp.benchmark.report.charts import text

Report = Mapping[str, Any]
Show = Callable[[Any], str]
_STYLE = Path(benchmark_report.__file__).with_name("page.css")

PARTS = {
    "device": "The device",
    "step": "One guided step",
    "memory": "Measured and planned memory of a step",
    "shard": "One rank's share of a step, computed here",
    "projection": "Projected steps: that compute and an assumed link, not measured",
    "attention": "Attention kernels",
    "decode": "Decoding",
    "text": "Text encoding",
}


def _rate(unit: str) -> Show:
    return lambda value: f"{value / 1e12:.3g} T{unit}/s"


_SHOWN: Mapping[str, tuple[str, Show]] = {
    "seconds": ("median", units.seconds),
    "fastest": ("fastest", units.seconds),
    "slowest": ("slowest", units.seconds),
    "runs": ("runs", str),
    "warm_up": ("warm-up", units.seconds),
    "of_plain": ("of plain", units.ratio),
    "difference": ("difference", lambda value: f"{value:.1e}"),
    "flop_rate": ("FLOP/s", _rate("FLOP")),
    "byte_rate": ("bytes/s", _rate("B")),
    "peak_bytes": ("peak", units.size),
    "planned_bytes": ("planned", units.size),
    "planned_of_measured": ("planned / measured", lambda value: f"{value:.3f}"),
    "within_5_percent": ("within 5 %", lambda value: "yes" if value else "no"),
    "frames": ("frames", str),
    "calls": ("collectives", str),
    "sent_bytes": ("sent", units.size),
    "link_rate": ("link", lambda value: units.size(value) + "/s"),
    "sending": ("sending", units.seconds),
    "exposed": ("step, nothing hidden", units.seconds),
    "efficiency_exposed": ("efficiency", units.percent),
    "hidden": ("step, all hidden", units.seconds),
    "efficiency_hidden": ("efficiency then", units.percent),
}


def tables(report: Report) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Title and cells of each part's table, heads first."""
    for part, title in PARTS.items():
        rows = [row for row in report["rows"] if row["part"] == part]
        known = {name for row in rows for name, v in row["figures"].items() if v is not None}
        names = [name for name in _SHOWN if name in known]
        if not rows:
            continue
        heads = ("case", "variant", *(_SHOWN[name][0] for name in names), "status")
        yield title, [heads, *(_cells(row, names) for row in rows)]


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    values = (row["figures"].get(name) for name in names)
    shown = ("–" if v is None else _SHOWN[n][1](v) for n, v in zip(names, values, strict=True))
    status = row["status"] if row["reason"] is None else f"{row['status']}: {row['reason']}"
    return (row["case"], row["variant"], *shown, status)


def headline(report: Report) -> str:
    """One line: what was measured, where and when."""
    device = report["machine"]["device"]
    name = device["name"] or device["type"]
    return f"{name}, {report['dtype']}, {report['sizes']} sizes, {report['created']}"


def _facts(report: Report) -> Iterator[tuple[str, Any]]:
    device = report["machine"]["device"]
    yield "command", report["command"]
    yield "commit", report["commit"]
    yield "status", report["status"]
    yield "torch", report["machine"]["torch"]
    yield "Python", report["machine"]["os"]["python"]
    yield "driver", device["driver"]
    yield "device memory", units.gibibytes(device["total_memory_bytes"])
    yield "clocks", device["clocks"] and " / ".join(device["clocks"].split("\n")).strip(" /")


def markdown_of(report: Report) -> str:
    """The whole report as Markdown."""
    facts = "\n".join(f"- {name}: {_one_line(value)}" for name, value in _facts(report))
    parts = "".join(
        f"\n## {title}\n\n{markdown([tuple(map(_one_line, line)) for line in cells])}\n"
        for title, cells in tables(report)
    )
    return f"# {_one_line(headline(report))}\n\n{facts}\n{parts}"


def _one_line(value: Any) -> str:
    return "–" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def page_of(report: Report) -> str:
    """The whole report as an HTML page."""
    sections = "".join(_section(title, cells) for title, cells in tables(report))
    facts = "".join(
        f"<tr><th>{text(name)}</th><td>{text(_one_line(value))}</td></tr>"
        for name, value in _facts(report)
    )
    style = _STYLE.read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>{text(headline(report))}</title>
<style>{style}</style>
</head>
<body>
<h1>{text(headline(report))}</h1>
{sections}
<section><h2>Run</h2><table><tbody>{facts}</tbody></table></section>
</body>
</html>
"""


def _section(title: str, cells: Sequence[Sequence[str]]) -> str:
    heads, *lines = cells
    head = "".join(f"<th>{text(cell)}</th>" for cell in heads)
    body = "".join(
        f"<tr><th>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in others)}</tr>"
        for first, *others in lines
    )
    return (
        f'<section><h2>{text(title)}</h2><div class="scroll"><table class="figures">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )
