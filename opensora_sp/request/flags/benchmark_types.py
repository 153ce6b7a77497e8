"""Legal values of the benchmark's own flags; imported by the flag table, so it needs little."""

from collections.abc import Mapping

from opensora_sp.base.value_types import ValueType, boolean, integer, number, optional, path

WARMUP_STEPS = 5  # of a warm-up run, as in the vendor's benchmark
DEFAULT_REPORT = "./benchmark/report-opensora-v1.2.json"

BENCHMARK_KINDS: Mapping[str, ValueType] = {
    "warmup_count": integer(0, 10_000),
    "eval_count": integer(1, 10_000),
    "benchmark_save_path": path("FILE"),
    "baseline": optional(path("FILE")),
    "peak_tflops": optional(number(0, above=True, metavar="TFLOPS")),
    "measure_peak": boolean(),
    "profile": optional(path("DIR")),
    "weight_hashes": boolean(),
}
