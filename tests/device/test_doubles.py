"""The accelerators' path, executed: the real command line on a double of each device.

The doubles are in tests/device_doubles. They show that the program keeps the rules of such a
device; what only a real card can show stands in docs/gcu.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import device_doubles
import pytest
import torch
from ranks import free_port

from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.media.sinks import Collector
from opensora_sp.parallel.session import alone
from opensora_sp.request.request import Request

ROOT = Path(__file__).resolve().parents[2]
REQUEST = Request(prompt="a red ball", height=32, width=48, num_frames=17, steps=2)
FLAGS = ["--prompt", "a red ball", "--image-size", "32", "48", "--num-frames", "17"]
FLAGS += ["--num-sampling-steps", "2", "--dtype", "fp32"]
FLAGS += ["--text-cache", "off"]  # every run is to show T5 on the device


@pytest.fixture(scope="module", params=device_doubles.DOUBLES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that has a double."""
    return str(request.param)


@pytest.fixture(scope="module")
def environment(device: str) -> dict[str, str]:
    """What a process needs to find the device and its plugin."""
    try:
        built = device_doubles.build(device)
    except device_doubles.CannotBuildError as error:
        pytest.skip(f"the test device cannot be built here: {error}")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", device_doubles.HERE / device)))
    return {**os.environ, "DEVICE_DOUBLE": str(built), "PYTHONPATH": path}


@pytest.fixture(scope="module")
def cpu() -> tuple[torch.Tensor, float]:
    """The CPU's latents, and ten times their response to a one-ulp change of the noise."""
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    noise = draw_noise([REQUEST], 0)
    nudged = torch.nextafter(noise, torch.full_like(noise, torch.inf))
    plain, moved = (
        pipeline.generate_to([REQUEST], [Collector()], noise=z).latents[0] for z in (noise, nudged)
    )
    assert plain is not None
    assert moved is not None
    return plain, 10 * float((moved - plain).abs().max() / plain.abs().max())


def run(command: list[str], environment: dict[str, str]) -> str:
    """The command's standard output; its standard error is shown if it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(("ranks", "groups_by"), [(1, "torch"), (2, "torch"), (2, "colossalai")])
def test_the_command_equals_the_cpu(
    ranks: int,
    groups_by: str,
    device: str,
    environment: dict[str, str],
    cpu: tuple[torch.Tensor, float],
    tmp_path: Path,
) -> None:
    """One rank on a build without memory functions; two that share the sequence, with them."""
    if groups_by == "colossalai" and importlib.util.find_spec("colossalai") is None:
        pytest.skip("colossalai is not installed; docs/launching.md says how")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    torchrun += ["--master_port", str(free_port())]
    launcher, more = ([], []) if ranks == 1 else (torchrun, ["--sequence-parallel", "2"])
    more += ["--launcher", groups_by, "--device", device]
    where = {
        "DEVICE_DOUBLE_JOURNAL": str(tmp_path),
        "DEVICE_DOUBLE_BARE": "1" if ranks == 1 else "0",
    }
    out = str(tmp_path / "out")
    said = run(
        [*launcher, "launch/infer.py", *FLAGS, *more, "--save-dir", out], {**environment, **where}
    )
    assert Path(said.strip()).stat().st_size > 1000

    wanted, tolerance = cpu
    latents = torch.load(tmp_path / "latents.pt", weights_only=True)
    assert float((latents - wanted).abs().max() / wanted.abs().max()) <= tolerance

    journals = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    for rank, journal in enumerate(journals):
        check_journal(journal, rank, ranks)
    # T5's own position buckets and mask are the one thing that libraries do in 64 bits.
    assert {work.partition(":")[0] for work in journals[0]["wide"]} == {"transformers"}


@pytest.mark.parametrize("memory", ["balanced", "small"])
def test_weights_that_come_and_go(
    memory: str,
    device: str,
    environment: dict[str, str],
    cpu: tuple[torch.Tensor, float],
    tmp_path: Path,
) -> None:
    """Memory modes lend weights to the device; one used before or after is on another device."""
    where = {"DEVICE_DOUBLE_JOURNAL": str(tmp_path), "DEVICE_DOUBLE_BARE": "0"}
    more = ["--device", device, "--memory", memory, "--save-dir", str(tmp_path / "out")]
    run(["launch/infer.py", *FLAGS, *more], {**environment, **where})
    wanted, tolerance = cpu
    latents = torch.load(tmp_path / "latents.pt", weights_only=True)
    assert float((latents - wanted).abs().max() / wanted.abs().max()) <= tolerance


def check_journal(journal: dict[str, Any], rank: int, ranks: int) -> None:
    """What one rank did on the device."""
    assert set(journal["set_device"]) == {rank}
    assert journal["peak bytes"] > 1_000_000
    if ranks == 1:
        assert not journal["collectives"]
        return
    # World and sequence group; text handed out; two all-to-alls a block pair and step, one home.
    assert journal["groups"] == [ranks, ranks]
    assert journal["collectives"]["broadcast"] == 1
    assert journal["collectives"]["all_to_all_single"] > REQUEST.steps
    if rank > 0:
        assert not journal["wide"]


RULES = """
import sys, torch
from device_doubles.rules import RuleBroken
from opensora_sp.parallel.backend import for_device, load_plugin
device = sys.argv[1]
load_plugin(device)

def broken(code):
    try:
        exec(compile(code, "/somewhere/opensora_sp/module.py", "exec"), globals())
    except RuleBroken as error:
        return True
    return False

x = torch.ones(3).to(device)
assert not broken("(x + 1).cpu()")
assert broken("torch.arange(3, device=device) + 1"), "index arithmetic"
assert broken("x.double() * 2"), "64 bits"
assert broken("x[torch.tensor([True, False, True]).to(device)]"), "a mask as an index"
assert broken("x[torch.tensor([True, False, True])]"), "a mask on the host as an index"
assert broken("torch.cuda.is_available()"), "a name of another device"

import torch.distributed as dist
def group():
    store = dist.HashStore()
    dist.init_process_group(for_device(device).name, store=store, rank=0, world_size=1)
try:
    group()
except RuleBroken:
    getattr(torch, device).set_device(0)
    group()
else:
    raise AssertionError("a group before set_device")
pairs = torch.ones(4, 2, device=device)
for buffer, fine in ((pairs, True), (pairs.t(), False), (pairs.cpu(), False)):
    try:
        dist.broadcast(buffer, 0)
    except (RuleBroken, RuntimeError):
        assert not fine
    else:
        assert fine, buffer.stride()
dist.destroy_process_group()  # or a thread of gloo may still run when the process ends
"""


def test_the_double_refuses_what_a_card_would_get_wrong(
    device: str, environment: dict[str, str]
) -> None:
    run(["-c", RULES, device], environment)
