"""The properties of the suite, each on as many cases as there is time for.

    python tests/properties.py --examples 40000 --seconds 3600
    python tests/properties.py --examples 1000 --only caption

A property is a test that is given its cases by Hypothesis: those of tests/unit/test_properties*.py.
The suite tries a sample of each, always the same. This command draws new ones in rounds, until
every property has had --examples cases or its part of --seconds. What does not hold is printed with
the smallest case that was found. The exit code is 1 then.

The counts go to docs/benchmarks/properties.json (--out), whole or not at all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
MODULES = ("unit.test_properties", "unit.test_properties_outside")
ROUND = 250  # cases between two looks at the clock


def properties() -> dict[str, Callable[[], None]]:
    """Every property by its name. Those that need what only pytest gives have none."""
    import hypothesis

    hypothesis.settings.register_profile(
        "rounds",
        max_examples=ROUND,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("rounds")
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for key, test in vars(module).items():
            if key.startswith("test_") and hypothesis.is_hypothesis_test(test):
                found[key.removeprefix("test_")] = test
    return found


def counted(test: Any, counts: list[int]) -> None:
    """Count the property's cases in counts[0]."""
    inner = test.hypothesis.inner_test

    def counting(*args: Any, **kwargs: Any) -> None:
        counts[0] += 1
        inner(*args, **kwargs)

    test.hypothesis.inner_test = counting


def try_property(test: Callable[[], None], examples: int, seconds: float) -> dict[str, Any]:
    """Try one property; its cases, CPU seconds and finding (None where it holds)."""
    counts, began, worked = [0], time.monotonic(), time.process_time()
    finding = None
    counted(test, counts)
    while counts[0] < examples and time.monotonic() - began < seconds and finding is None:
        try:
            test()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # Hypothesis raises what the property raised
            finding = "\n".join([f"{type(error).__name__}: {error}", *notes(error)])
    return {
        "cases": counts[0],
        "cpu_seconds": round(time.process_time() - worked, 1),
        "finding": finding,
    }


def notes(error: BaseException) -> list[str]:
    """What Hypothesis says of the smallest case."""
    inner = [note for one in getattr(error, "exceptions", ()) for note in [repr(one), *notes(one)]]
    return [*getattr(error, "__notes__", ()), *inner]


def main() -> int:
    """Try the properties that were asked for, and write their counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="cases of each property")
    parser.add_argument("--seconds", type=float, default=600, help="of all properties together")
    parser.add_argument("--only", default="", help="properties whose name holds this")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks" / "properties.json"
    )
    options = parser.parse_args()
    os.environ["OPENSORA_SP_EXAMPLES"] = str(ROUND)
    sys.path[:0] = [str(TESTS), str(ROOT)]
    warnings.simplefilter("ignore")
    chosen = {name: test for name, test in properties().items() if options.only in name}
    if not chosen:
        parser.error(f"no property has {options.only!r} in its name")
    results, began = {}, time.monotonic()
    for place, (name, test) in enumerate(chosen.items()):
        left = options.seconds - (time.monotonic() - began)
        result = try_property(test, options.examples, left / (len(chosen) - place))
        results[name] = result
        verdict = "holds" if result["finding"] is None else "DOES NOT HOLD"
        print(
            f"{result['cases']:8d} cases {result['cpu_seconds']:8.1f} s  {verdict}: {name}",
            flush=True,
        )
        if result["finding"] is not None:
            print(result["finding"], flush=True)
    cases = sum(result["cases"] for result in results.values())
    broken = [name for name, result in results.items() if result["finding"] is not None]
    print(f"{cases} cases of {len(results)} properties, {len(broken)} do not hold")
    report = {
        "cases": cases,
        "cpu_seconds": round(sum(result["cpu_seconds"] for result in results.values()), 1),
        "python": platform.python_version(),
        "do_not_hold": broken,
        "properties": results,
    }
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(options.out)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
