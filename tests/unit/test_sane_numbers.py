"""Deadlines as people write them, disk space, and NaN found where it begins."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, conditions, normal, tiny_transformer

from opensora_sp.base.deadlines import DEADLINES, parse_deadlines
from opensora_sp.base.errors import UserError
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.session import alone
from opensora_sp.parallel.watchdog.stages import Stages
from opensora_sp.request import preflight
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.settings import parse_command_line, resolve


@pytest.mark.parametrize("flag", ["--timeout", "--heartbeat-timeout", "--deadlines"])
@pytest.mark.parametrize("value", ["1e300", "1e-9", "0", "-1", "nan", "inf", "1e7"])
def test_limits_are_times_that_timers_can_count(flag: str, value: str) -> None:
    text = f"step={value}" if flag == "--deadlines" else value
    with pytest.raises(UserError, match=rf"{flag} .*(2592000|2\.592e\+06)"):
        resolve(parse_command_line(["--prompt", "x", f"{flag}={text}"]), program="infer")


def test_deadlines() -> None:
    assert parse_deadlines("") == DEADLINES
    assert parse_deadlines("step=5, decode=off") == {**DEADLINES, "step": 5, "decode": math.inf}
    for wrong in ("step", "walk=3", "step=x", "step=-1", "step=nan", "=3"):
        with pytest.raises(ValueError):
            parse_deadlines(wrong)


def test_a_stage_is_late_by_its_own_time() -> None:
    now = [100.0]
    stages = Stages(lambda: now[0])
    assert stages.late(DEADLINES) is None
    with suppress(KeyError), stages.enter("denoise"):
        now[0] += DEADLINES["step"] - 1
        stages.progress("step 2 of 3")
        now[0] += DEADLINES["step"] - 1
        assert stages.late(DEADLINES) is None
        now[0] += 3
        late = stages.late(DEADLINES)
        assert late is not None
        assert (late.kind, late.over) == ("step", 2)
        with stages.enter("waits for others"):
            now[0] += 1e6
            assert stages.late(DEADLINES) is None
        raise KeyError
    assert (stages.failed, stages.where) == ("denoise, step 2 of 3", "between stages")


def test_space_is_looked_at_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free: Any = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: free)
    small = Request(prompt="x", height=32, width=48, num_frames=17)
    preflight.check_space(tmp_path / "new", [small], lossless=False)
    big = Request(prompt="x", height=720, width=1280, num_frames=217)
    with pytest.raises(UserError, match=r"1.00 MB are free .* need about 100 MB"):
        preflight.check_space(tmp_path / "new", [big, big], lossless=False)
    with pytest.raises(UserError, match="free space or choose"):
        preflight.check_space(tmp_path, [small] * 20, lossless=True)


def test_the_block_where_nan_begins_is_named() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        model.temporal_blocks[1].mlp.fc2.bias[3] = float("inf")  # type: ignore[union-attr,index,operator]
    layout = Layout(frames=3, size=(8, 12), ranks=1)
    z = normal(1, TINY.in_channels, 3, 8, 12)
    denoiser = parallelize(model, None, layout, Runtime(check_blocks=True))
    velocity = denoiser.prepare(conditions())
    with torch.no_grad(), pytest.raises(UserError, match="output of temporal block 1"):
        velocity(denoiser.shard(z), 500.0)


@pytest.mark.parametrize("check", ["steps", "off"])
def test_a_run_stops_at_the_step_where_nan_appears(check: Any) -> None:
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32", check_finite=check)
    with torch.no_grad():
        pipeline.models.transformer.final_layer.linear.bias[0] = float("nan")
    request = Request(prompt="x", height=32, width=48, num_frames=1, steps=2)
    said = "velocity of step 1" if check == "steps" else "decoded video"
    with pytest.raises(UserError, match=said):
        pipeline.generate_to([request], [Collector()])
