"""Started by whatever launcher people have, on one node or two, the command makes one video."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from ranks import free_port, run_ranks
from tiny import TINY, conditions, normal, tiny_transformer

from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.nodes import crossing_note
from opensora_sp.parallel.session import alone, open_session
from opensora_sp.planner.cost import Workload, step_traffic
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
FLAGS = ["--prompt", "ball", "--image-size", "32", "48", "--num-frames", "17", "--lossless"]
FLAGS += ["--num-sampling-steps", "2", "--dtype", "fp32", "--device", "cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def need_colossalai(*modules: str) -> None:
    for module in ("colossalai", *modules):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; docs/launching.md says how")


@pytest.fixture(scope="module")
def plain() -> Any:
    """The frames of one process, [F,H,W,3]."""
    request = Request(prompt="ball", height=32, width=48, num_frames=17, steps=2)
    pipeline = Pipeline.load(session=alone("cpu"), dtype="fp32")
    return pipeline.generate(request).videos[0]


def start(command: list[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each wrote to its standard error; all must end well."""
    try:
        ends = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, out + err
    return [err for _, err in ends]


def same_video(folder: Path, plain: Any) -> None:
    """One file, with the frames of one process up to a grey level of rounding here and there."""
    (file,) = folder.glob("*.mp4")
    with av.open(str(file)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    difference = np.abs(frames.astype(int) - plain.astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_accelerate_launch(tmp_path: Path) -> None:
    """What it says of the ranks is understood; from there on it is a run like torchrun's."""
    script = tmp_path / "told.py"
    script.write_text(
        "from opensora_sp.base.launcher import read_launch\n"
        "launch = read_launch()\n"
        f"open(r'{tmp_path}/rank' + str(launch.rank), 'w').write(repr(launch))\n"
    )
    launcher = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    finish([start([*launcher, "--main_process_port", str(free_port()), str(script)])])
    for rank in range(2):
        found = (tmp_path / f"rank{rank}").read_text()
        assert f"(rank={rank}, world_size=2, local_rank={rank}, local_world_size=2" in found


def test_colossalai_run(tmp_path: Path, plain: Any) -> None:
    need_colossalai("fabric", "click")
    launcher = [str(BIN / "colossalai"), "run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port())]
    (said,) = finish([start([*launcher, "launch/infer.py", *FLAGS, "--save-dir", str(tmp_path)])])
    assert "on 2 x cpu" in said
    same_video(tmp_path, plain)


@pytest.mark.parametrize("mesh", [["--sequence-parallel", "2"], ["--guidance-parallel", "2"]])
def test_groups_made_by_colossalai(mesh: list[str], tmp_path: Path, plain: Any) -> None:
    need_colossalai("psutil")
    launcher = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*launcher, "launch/infer.py", *FLAGS, *mesh, "--launcher", "colossalai"]
    finish([start([*command, "--save-dir", str(tmp_path)])])
    same_video(tmp_path, plain)


def test_two_nodes_each_with_its_own_weights(
    tmp_path: Path, plain: Any, embedded_dir: Path
) -> None:
    """Two torchrun agents of two ranks each, one reading a copy of the checkpoints."""
    endpoint = f"127.0.0.1:{free_port()}"
    processes = []
    for node in range(2):
        launcher = [*TORCHRUN, "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "2"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "test"]
        weights = tmp_path / f"weights-of-node-{node}"
        shutil.copytree(embedded_dir, weights)
        paths = [f"--ckpt-path-{name}={weights / name}" for name in ("dit", "t5", "vae2d", "vae3d")]
        command = [*launcher, "launch/infer.py", *FLAGS, *paths]
        processes.append(start([*command, "--save-dir", str(tmp_path / "out")]))
    said = "".join(finish(processes))
    assert "on 4 x cpu (1 × 2 × 2" in said
    assert "goes between" not in said
    same_video(tmp_path / "out", plain)


def sent_between(
    rank: int, world: int, init_file: str, meshes: list[Mesh]
) -> list[tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]], str | None]]:
    """Per mesh: (bytes sent, bytes that left the node) by kind, the plan's traffic, the note."""
    os.environ["GROUP_RANK"] = str(rank // 2)  # as torchrun's agents say it
    model, frames, size = tiny_transformer(), 5, (4, 6)
    results = []
    with open_session("cpu") as session, torch.no_grad():
        for mesh in meshes:
            layout = Layout(frames=frames, size=size, ranks=mesh.sequence)
            denoiser = parallelize(model, session.build(mesh), layout)
            velocity = denoiser.prepare(conditions())
            z = denoiser.shard(normal(1, 4, frames, *size))
            before = session.ledger.snapshot()
            velocity(z, 500.0)
            spent = session.ledger.since(before)
            sent = {k: (e.bytes_sent, e.bytes_between) for k, e in spent.items() if e.calls}
            work = Workload(
                frames=frames, size=size, channels=TINY.hidden_size, depth=TINY.depth, itemsize=4
            )
            plan = step_traffic(work, mesh, rank, Runtime())
            results.append((sent, plan, crossing_note(mesh, session.nodes)))
    return results


def test_only_what_the_mesh_says_leaves_a_node() -> None:
    """Two nodes of two ranks: velocities between them, activations inside, or all across."""
    meshes = [Mesh(guidance=2, sequence=2), Mesh(sequence=4)]
    for inside, across in run_ranks(sent_between, 4, meshes):
        sent, plan, note = inside
        assert {kind: both[0] for kind, both in sent.items()} == {
            k: b for k, (_, b) in plan.items()
        }
        assert sent["velocity"][1] == sent["velocity"][0] > 0
        assert sent["patches_to_frames"][0] > 0
        assert sent["patches_to_frames"][1] == sent["frames_to_patches"][1] == 0
        assert note is None

        sent, _, note = across
        assert 0 < sent["patches_to_frames"][1] < sent["patches_to_frames"][0]
        assert note is not None
        assert "goes between" in note
