"""The benchmark's own settings: declared here, because the flag table is made from them."""

from dataclasses import dataclass
from pathlib import Path

from opensora_sp.base.value_types import boolean, integer, number, optional, path
from opensora_sp.request.setting import Declared, setting

WARMUP_STEPS = 5  # of a warm-up run, as in the vendor's benchmark
DEFAULT_REPORT = "./benchmark/report-opensora-v1.2.json"
_BENCHMARK = "benchmark"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(Declared):
    """What the benchmark does around the runs, as its flags say it.

    benchmark_save_path: the report; the page goes beside it. baseline: a report of one rank that
    efficiency is counted from. peak_tflops: what the device could do, in 10¹² FLOP/s.
    measure_peak: time a matrix product for it. profile: where the traces of one more run go.

    Raises UserError, naming the field, for a value that is not legal.
    """

    warmup_count: int = setting(
        "--warmup-count",
        integer(0, 10_000),
        1,
        "runs of 5 steps before measuring, not saved",
        changes="nothing",
        program=_BENCHMARK,
    )
    eval_count: int = setting(
        "--eval-count",
        integer(1, 10_000),
        1,
        "measured runs, each written as generate does",
        changes="nothing",
        program=_BENCHMARK,
    )
    benchmark_save_path: Path = setting(
        "--benchmark-save-path",
        path("FILE"),
        Path(DEFAULT_REPORT),
        "the report, JSON; a page goes beside it",
        changes="nothing",
        flag_default=DEFAULT_REPORT,
        program=_BENCHMARK,
    )
    baseline: Path | None = setting(
        "--baseline",
        optional(path("FILE")),
        None,
        "a report of one rank to count efficiency from",
        changes="nothing",
        program=_BENCHMARK,
    )
    peak_tflops: float | None = setting(
        "--peak-tflops",
        optional(number(0, above=True, metavar="TFLOPS")),
        None,
        "what one device can do, to say what share was used",
        changes="nothing",
        program=_BENCHMARK,
    )
    measure_peak: bool = setting(
        "--measure-peak",
        boolean(),
        False,
        "time a large matrix product for that instead",
        changes="nothing",
        nargs=0,
        program=_BENCHMARK,
    )
    profile: Path | None = setting(
        "--profile",
        optional(path("DIR")),
        None,
        "trace one more run of 5 steps, a file per rank",
        changes="nothing",
        program=_BENCHMARK,
    )
    weight_hashes: bool = setting(
        "--weight-hashes",
        boolean(),
        True,
        "SHA-256 of every weight file in the report",
        changes="nothing",
        program=_BENCHMARK,
    )

    def __post_init__(self) -> None:
        self.check_values()
