"""The properties of the suite, each on as many cases as there is time for.

    python tests/properties.py --examples 200000 --seconds 2400 --in-all 1000000
    python tests/properties.py --examples 1000 --only caption

A property is a test that is given its cases by Hypothesis: those of tests/unit/test_properties*.py.
The suite tries a sample of each, always the same. This command draws new ones in rounds, until
every property has had --examples cases or its part of --seconds, which are of CPU time. Where fewer
than --in-all cases were tried by then, every property that holds goes on, one round each in turn.
What does not hold is printed with the smallest case that was found. The exit code is 1 then.

The counts go to docs/benchmarks/properties.json (--out), also of a run that Ctrl-C ends: `whole`
is false then.
"""

from __future__ import annotations

import argparse
import contextlib
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


class Trial:
    """One property under trial: its cases, CPU seconds and finding (None while it holds)."""

    def __init__(self, test: Any) -> None:
        self.test, self.cases, self.cpu_seconds = test, 0, 0.0
        self.finding: str | None = None
        inner = test.hypothesis.inner_test

        def counting(*args: Any, **kwargs: Any) -> None:
            self.cases += 1
            inner(*args, **kwargs)

        test.hypothesis.inner_test = counting

    def round(self) -> None:
        """Try one round of new cases."""
        began = time.process_time()
        try:
            self.test()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # Hypothesis raises what the property raised
            self.finding = "\n".join([f"{type(error).__name__}: {error}", *notes(error)])
        finally:
            self.cpu_seconds += time.process_time() - began

    def rounds(self, examples: int, seconds: float) -> None:
        """Try rounds until so many cases or CPU seconds are reached, or it does not hold."""
        while self.cases < examples and self.cpu_seconds < seconds and self.finding is None:
            self.round()

    def report(self) -> dict[str, Any]:
        """The counts, as JSON."""
        seconds = round(self.cpu_seconds, 1)
        return {"cases": self.cases, "cpu_seconds": seconds, "finding": self.finding}


def fill(trials: dict[str, Trial], in_all: int) -> None:
    """Go on in turn with what holds until there are so many cases in all."""
    while sum(trial.cases for trial in trials.values()) < in_all:
        holding = [trial for trial in trials.values() if trial.finding is None]
        if not holding:
            return
        for trial in holding:
            trial.round()


def notes(error: BaseException) -> list[str]:
    """What Hypothesis says of the smallest case."""
    inner = [note for one in getattr(error, "exceptions", ()) for note in [repr(one), *notes(one)]]
    return [*getattr(error, "__notes__", ()), *inner]


def main() -> int:
    """Try the properties that were asked for, and write their counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="cases of each property")
    parser.add_argument("--seconds", type=float, default=600, help="CPU time in all")
    parser.add_argument("--in-all", type=int, default=0, help="cases of all properties together")
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
    trials = {name: Trial(test) for name, test in chosen.items()}
    whole = False
    with contextlib.suppress(KeyboardInterrupt):
        began = time.process_time()
        for place, (name, trial) in enumerate(trials.items()):
            left = options.seconds - (time.process_time() - began)
            trial.rounds(options.examples, left / (len(trials) - place))
            verdict = "holds" if trial.finding is None else "DOES NOT HOLD"
            seconds = f"{trial.cpu_seconds:8.1f} s"
            print(f"{trial.cases:8d} cases {seconds}  {verdict}: {name}", flush=True)
        fill(trials, options.in_all)
        whole = True
    broken = [name for name, trial in trials.items() if trial.finding is not None]
    for name in broken:
        print(f"DOES NOT HOLD: {name}\n{trials[name].finding}", flush=True)
    cases = sum(trial.cases for trial in trials.values())
    print(f"{cases} cases of {len(trials)} properties, {len(broken)} do not hold")
    report = {
        "cases": cases,
        "cpu_seconds": round(sum(trial.cpu_seconds for trial in trials.values()), 1),
        "python": platform.python_version(),
        "do_not_hold": broken,
        "whole": whole,
        "properties": {name: trial.report() for name, trial in trials.items()},
    }
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(options.out)
    if not whole:
        print("ended by Ctrl-C: the run is not whole")
    return 1 if broken or not whole else 0


if __name__ == "__main__":
    sys.exit(main())
