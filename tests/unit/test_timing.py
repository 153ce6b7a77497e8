"""The clock: sums always, intervals while recording, and no cost of steps otherwise."""

from __future__ import annotations

import time

import pytest
import torch

from opensora_sp.engine import timing
from opensora_sp.engine.timing import Clock
from opensora_sp.parallel.ledger import Ledger


def test_recorded_intervals_lie_where_they_ran() -> None:
    clock, ledger = Clock(torch.device("cpu")), Ledger()
    with clock.record() as recording:
        with clock.stage("denoise"):
            with clock.part("prepare"):
                time.sleep(0.01)
            step_ended = clock.steps(ledger)
            for step in range(2):
                ledger.add("patches_to_frames", calls=1, bytes_sent=8, seconds=0.25)
                ledger.add("velocity", calls=1, bytes_sent=8, seconds=0.5 + step)
                ledger.add("gather_latents", calls=1, bytes_sent=8, seconds=9.0)
                step_ended(step)
        with clock.stage("decode"):
            pass
    names = [(i.stage, i.inside, i.step) for i in recording.intervals]
    assert names == [
        ("prepare", "denoise", None),
        ("step", "denoise", 0),
        ("step", "denoise", 1),
        ("denoise", None, None),
        ("decode", None, None),
    ]
    prepare, first, second, denoise, decode = recording.intervals
    assert (first.exchange, first.velocity) == (0.25, 0.5)
    assert (second.exchange, second.velocity) == (0.25, 1.5)
    assert prepare.start + prepare.seconds <= first.start <= first.start + first.seconds
    assert first.start + first.seconds <= second.start
    assert second.start + second.seconds <= denoise.start + denoise.seconds <= decode.start
    assert clock.seconds.keys() == {"denoise", "decode"}  # parts are not counted twice


def test_a_stage_within_a_stage_counts_once() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.record() as recording, clock.stage("wait"):
        time.sleep(0.01)
        with clock.stage("encode text"):
            time.sleep(0.02)
    encode, wait = recording.intervals
    assert (encode.stage, encode.inside, encode.nested) == ("encode text", None, 0)
    assert wait.nested == encode.seconds
    assert wait.seconds - wait.nested >= 0.01


def test_steps_cost_nothing_without_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(timing, "synchronize", lambda device: waits.append("wait"))
    clock = Clock(torch.device("cpu"))
    with clock.part("prepare"):
        step_ended = clock.steps(Ledger())
        for step in range(100):
            step_ended(step)
    assert not waits
    with clock.record(), clock.stage("denoise"):
        clock.steps(Ledger())(0)
    assert len(waits) == 4


def test_the_stage_of_a_failure_is_known() -> None:
    clock = Clock(torch.device("cpu"))
    with pytest.raises(ValueError), clock.stage("outer"), clock.stage("inner"):
        raise ValueError
    assert clock.failed_in == "inner"
