"""A report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora_sp.benchmark.report import charts, units
from opensora_sp.benchmark.report.build import measured
from opensora_sp.benchmark.report.charts import text
from opensora_sp.benchmark.report.table import headline, planned_rows
from opensora_sp.parallel.backend_table import PACKAGES

_STYLE = Path(__file__).with_name("page.css")
Report = Mapping[str, Any]


def write_page(path: Path, report: Report) -> None:
    """Write the page, whole or not at all. Raises UserError where that fails."""
    from opensora_sp.base.atomic import atomic_output, reported

    with atomic_output(path) as temporary, reported(path):
        temporary.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The HTML page of a report with any status."""
    title = f"Benchmark: {headline(report)}"
    status = report["status"]
    first = report["request"]["first"]
    body = "".join(_sections(report))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<h1>{text(headline(report))}</h1>
<p class="dim"><span class="status {status}">{status}</span> · {text(report["created"])}
 · {text(_device_name(report))} · {text(first["prompt"])}</p>
{body}
</body>
</html>
"""


def _sections(report: Report) -> Iterator[str]:
    if report["error"] is not None:
        yield _section("What failed", _pairs(report["error"].items()))
    found, runs = report["summary"], measured(report["runs"])
    if found is not None:
        yield f'<div class="tiles">{"".join(_tiles(report))}</div>'
        middle = sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]
        yield _section(
            "Timeline",
            charts.timeline(middle),
            f"Measured run {middle['number']}, the median of {len(runs)}. Small marks below the "
            "stages are denoising steps.",
        )
        yield '<div class="two">'
        yield _section(
            "Stages",
            charts.stage_bars(found),
            "Of the slowest rank: median over the runs; the thin line goes from the fastest run "
            "to the slowest.",
        )
        if found["steps"] is not None:
            yield _section(
                "Denoising steps", charts.step_columns(runs), "Of the slowest rank, step by step."
            )
        yield _section("Memory over time", _memory(middle))
        yield _section(
            "Bytes sent", charts.byte_bars(found), "By the rank that sends most, in one run."
        )
        yield "</div>"
        yield _section("Figures", _figures(found), scroll=True)
        yield '<div class="two">'
        yield _section("Speed and load", _pairs(_speed(report)))
        if planned := list(planned_rows(report)):
            yield _section("Device memory by stage, and as planned", _pairs(planned))
        yield _section("First run and later ones", _first_and_warm(report["first_and_warm"]))
        yield "</div>"
    yield '<div class="two">'
    yield _section("Request", _pairs(report["request"]["first"].items()))
    yield _section("Run", _pairs(report["run"].items()))
    yield _section("Machine", _pairs(_machine(report)))
    yield _section("Weights", _weights(report))
    yield "</div>"


def _section(title: str, body: str, caption: str = "", *, scroll: bool = False) -> str:
    if scroll:
        body = f'<div class="scroll">{body}</div>'
    said = f'<p class="dim">{text(caption)}</p>' if caption else ""
    return f"<section><h2>{text(title)}</h2>{said}{body}</section>"


def _tiles(report: Report) -> Iterator[str]:
    found, info = report["summary"], report["performance_info"]
    yield _tile(units.seconds(found["seconds"]["median"]), "a whole run")
    yield _tile(f"{info['QPS']:.3g}", "frames per second")
    if found["steps"] is not None:
        yield _tile(units.seconds(found["steps"]["step"]["over_runs"]["median"]), "a step")
    for label, key in (("device", "peak_device_bytes"), ("host", "peak_host_bytes")):
        known = [row[key] for row in found["memory"] if row[key] is not None]
        if known:
            yield _tile(units.gibibytes(max(known)), f"peak {label} memory of a rank")
    yield _tile(units.seconds(info["model_load_time"]), "model load")
    if report["efficiency"] is not None:
        gain = report["efficiency"]
        share = units.percent(gain["efficiency"]["run"])
        yield _tile(units.ratio(gain["speedup"]["run"]), f"one rank's speed, {share} efficient")
    if report["flops"] is not None and report["flops"]["fraction_of_peak"] is not None:
        yield _tile(
            units.percent(report["flops"]["fraction_of_peak"]["denoise"]), "of peak in denoising"
        )


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{text(value)}</b><span class="dim">{text(label)}</span></div>'


def _memory(run: Mapping[str, Any]) -> str:
    parts = []
    samples = [s for rank in run["ranks"] for s in rank["memory"]["samples"]]
    if any(sample[2] is not None for sample in samples):
        parts.append('<p class="dim">Device</p>' + charts.memory_lines(run, 2))
    parts.append('<p class="dim">Host, resident set</p>' + charts.memory_lines(run, 1))
    return "".join(parts)


def _figures(found: Mapping[str, Any]) -> str:
    heads = ("stage", "min", "median", "p90", "max", "ranks: min", "max", "imbalance")
    rows = []
    for name, stage in found["stages"].items():
        rows.append(_figure_row(name, stage))
        if name == "denoise":
            rows += [_figure_row(n, s, part=True) for n, s in (found["steps"] or {}).items()]
    head = "".join(f"<th>{text(cell)}</th>" for cell in heads)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<table class="figures">{body}</table>'


def _figure_row(name: str, stage: Mapping[str, Any], *, part: bool = False) -> str:
    cells = [units.seconds(stage["over_runs"][key]) for key in ("min", "median", "p90", "max")]
    cells += [units.seconds(stage["over_ranks"][key]) for key in ("min", "max")]
    cells.append(f"{stage['imbalance']:.2f}")
    figures = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr{' class=part' if part else ''}><th>{text(name)}</th>{figures}</tr>"


def _speed(report: Report) -> Iterator[tuple[str, Any]]:
    work, found = report["flops"], report["summary"]
    yield "frames per second, with writing", f"{found['frames_per_second']:.4g}"
    yield "imbalance of busy time", f"{found['busy_imbalance']:.2f}"
    if work is not None:
        yield "denoising, all ranks", units.flops(sum(work["denoise"]))
        yield "decoding", units.flops(work["decode"])
        yield "text encoding", units.flops(work["text"])
        yield "achieved in denoising", units.flops(work["achieved_per_second"]["denoise"]) + "/s"
        yield "achieved in the whole run", units.flops(work["achieved_per_second"]["run"]) + "/s"
        if work["peak"] is not None:
            peak = units.flops(sum(work["peak"]["per_rank"])) + "/s"
            yield f"peak, {work['peak']['source']}, all ranks", peak
            yield "share of it in denoising", units.percent(work["fraction_of_peak"]["denoise"])
    if (gain := report["efficiency"]) is not None:
        yield "baseline", gain["baseline"]
        for key in ("run", "denoise"):
            share = units.percent(gain["efficiency"][key])
            yield f"speedup, {key}", f"{units.ratio(gain['speedup'][key])}, {share} efficient"


def _first_and_warm(pair: Mapping[str, Any]) -> str:
    first, warm = pair["first"], pair["warm"]
    names = list(dict.fromkeys([*first["stages"], *(warm["stages"] if warm else ())]))
    rows = [("whole run", first["seconds"], warm and warm["seconds"])]
    rows.append(("a step", first["step_seconds"], warm and warm["step_seconds"]))
    rows += [(n, first["stages"].get(n), warm and warm["stages"].get(n)) for n in names]
    body = "".join(
        f"<tr><th>{text(name)}</th><td>{units.seconds(a)}</td><td>{units.seconds(b)}</td></tr>"
        for name, a, b in rows
    )
    return (
        f'<p class="dim">The first run is a {text(first["kind"])} run, on rank 0.</p>'
        '<table class="figures"><thead><tr><th></th><th>first</th><th>later, median</th></tr>'
        f"</thead><tbody>{body}</tbody></table>"
    )


def _device_name(report: Report) -> str:
    device = report["device"] or {}
    return str(device.get("name") or report["performance_info"]["device"])


def _machine(report: Report) -> Iterator[tuple[str, Any]]:
    for part in ("device", "os", "cpu", "disk", "host"):
        for name, value in (report[part] or {}).items():
            if name not in ("tool_output", "block_devices"):
                yield f"{part} {name.replace('_', ' ')}", value
    packages = report["python_packages"] or {}
    for name in ("torch", *PACKAGES, "transformers", "diffusers", "av"):
        if name in packages:
            yield name, packages[name]
    for name, version in (report["driver_packages"] or {}).items():
        yield name, version


def _weights(report: Report) -> str:
    model = report["model"]
    if model is None:
        return '<p class="dim">Not known.</p>'
    rows = [("checkpoints", model["checkpoints"])]
    rows += [
        (w["file"], f"{units.size(w['bytes'])}, SHA-256 {w['sha256'] or 'not taken'}")
        for w in model["weights"]
    ]
    return _pairs(rows)


def _pairs(rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(
        f"<tr><th>{text(name)}</th><td>{text(_shown(value))}</td></tr>" for name, value in rows
    )
    return f"<table><tbody>{body}</tbody></table>"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each) for each in value)
    return str(value)
