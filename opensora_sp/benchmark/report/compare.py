"""Comparison of two reports, with ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opensora_sp.benchmark.report import units
from opensora_sp.benchmark.report.table import columns, headline
from opensora_sp.parallel.backend_table import PACKAGES

Report = Mapping[str, Any]
_SETTINGS = (
    "dtype",
    "device",
    "ranks",
    "mesh",
    "overlap",
    "serial_guidance",
    "chunks",
    "batch_size",
)


def compare_lines(a: Report, b: Report, names: tuple[str, str]) -> Iterator[str]:
    """The lines of the comparison. The ratio is B over A, so below 1 B has less."""
    yield f"A: {names[0]}: {headline(a)}"
    yield f"B: {names[1]}: {headline(b)}"
    different = list(differences(a, b))
    yield ("differ in: " + "; ".join(different)) if different else "the same request and settings"
    yield ""
    yield from columns(("", "A", "B", "B / A"), list(_rows(a, b)))


def differences(a: Report, b: Report) -> Iterator[str]:
    """Differences of the two: request, settings, device, versions, weights."""
    one, two = a["request"]["first"], b["request"]["first"]
    for name in one:
        if one[name] != two.get(name):
            yield f"{name} {one[name]!r} / {two.get(name)!r}"
    for name in _SETTINGS:
        if a["run"].get(name) != b["run"].get(name):
            yield f"{name} {a['run'].get(name)} / {b['run'].get(name)}"
    if _device(a) != _device(b):
        yield f"device {_device(a)} / {_device(b)}"
    for package in ("torch", *PACKAGES):
        mine, theirs = ((r["python_packages"] or {}).get(package) for r in (a, b))
        if mine != theirs:
            yield f"{package} {mine} / {theirs}"
    if _weights(a) != _weights(b):
        yield "weights"


def _device(report: Report) -> Any:
    return (report["device"] or {}).get("name")


def _weights(report: Report) -> Any:
    return (report["model"] or {}).get("weights")


def _rows(a: Report, b: Report) -> Iterator[tuple[str, str, str, str]]:
    one, two = a["summary"], b["summary"]
    yield _row("whole run, median", _median(one["seconds"]), _median(two["seconds"]), units.seconds)
    names = list(dict.fromkeys([*one["stages"], *two["stages"]]))
    for name in names:
        yield _row(
            f"  {name}", _stage(one["stages"], name), _stage(two["stages"], name), units.seconds
        )
    for name in ("step", "compute", "exchange", "velocity"):
        pair = (_stage(one["steps"] or {}, name), _stage(two["steps"] or {}, name))
        yield _row(f"  {'one step' if name == 'step' else f'  of it {name}'}", *pair, units.seconds)
    infos = (a["performance_info"], b["performance_info"])
    yield _row("frames per second", infos[0]["QPS"], infos[1]["QPS"], lambda v: f"{v:.4g}")
    loads = [info["model_load_time"] for info in infos]
    yield _row("model load", loads[0], loads[1], units.seconds)
    for label, key in (("device", "peak_device_bytes"), ("host", "peak_host_bytes")):
        yield _row(f"peak {label} memory", _peak(one, key), _peak(two, key), units.gibibytes)
    yield _row("bytes sent, all ranks", _sent(one), _sent(two), units.size)
    achieved = [
        None if r["flops"] is None else r["flops"]["achieved_per_second"]["denoise"] for r in (a, b)
    ]
    yield _row("denoising FLOP/s", achieved[0], achieved[1], units.flops)


def _row(name: str, a: float | None, b: float | None, shown: Any) -> tuple[str, str, str, str]:
    both = a is not None and b is not None and a > 0
    texts = ("–" if value is None else shown(value) for value in (a, b))
    return (name, *texts, units.ratio(b / a) if both and a and b is not None else "–")  # type: ignore[return-value]


def _median(spread: Mapping[str, float]) -> float:
    return spread["median"]


def _stage(stages: Mapping[str, Any], name: str) -> float | None:
    return _median(stages[name]["over_runs"]) if name in stages else None


def _peak(summary: Mapping[str, Any], key: str) -> float | None:
    known = [row[key] for row in summary["memory"] if row[key] is not None]
    return max(known) if known else None


def _sent(summary: Mapping[str, Any]) -> float:
    return float(sum(sum(spent["bytes_sent"]) for spent in summary["ledger"].values()))
