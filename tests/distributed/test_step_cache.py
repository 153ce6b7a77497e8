"""Steps left out, on several ranks: the velocities of one rank, no exchange, and no lost bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from command import SMALL, infer, run, saved, stages
from ranks import RankFailure, run_ranks
from tiny import TINY, conditions, normal, tiny_transformer

from opensora_sp.engine.denoising import denoise
from opensora_sp.engine.noise import draw_noise
from opensora_sp.engine.parallelize import parallelize
from opensora_sp.engine.pipeline import Pipeline
from opensora_sp.engine.progress import Position, ResumePoint
from opensora_sp.engine.sampling import sample
from opensora_sp.engine.step_cache.filled import FilledVelocity
from opensora_sp.jobs.identity import identity_of, latents_identity
from opensora_sp.jobs.saved_latents import StateFiles
from opensora_sp.jobs.saved_progress import SavedProgress
from opensora_sp.parallel.layout import Layout
from opensora_sp.parallel.mesh import Mesh
from opensora_sp.parallel.session import Session, open_session
from opensora_sp.planner.cost import Workload, step_traffic
from opensora_sp.planner.models import ModelSizes
from opensora_sp.planner.peaks import Shape, denoising_peak
from opensora_sp.request.embedded import embedded_checkpoints
from opensora_sp.request.memory_modes import Offload
from opensora_sp.request.prompts import caption
from opensora_sp.request.request import EngineSettings, JobSettings, Request, Task
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.step_schedule import StepSchedule, write_schedules

FRAMES, SIZE = 5, (5, 9)  # 15 patches a frame, odd sides: padded cells
TIMES = [1000.0, 900.0, 800.0, 700.0, 500.0, 300.0, 200.0, 100.0]
MODEL = tiny_transformer()
SCHEDULE = StepSchedule(name="own", steps=8, computed=(0, 1, 2, 5), fill="quadratic")
MASK = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.6], [1.0] * 5])
RUNTIMES = {
    "together": Runtime(),
    "chunks": Runtime(serial_guidance=True, chunks=2),
    "offload": Runtime(serial_guidance=True, tokens=20, offload=Offload(models=True, layers=True)),
}
MESHES = [Mesh(sequence=2), Mesh(guidance=2), Mesh(sequence=3), Mesh(guidance=2, sequence=2)]


def fill(
    runtime: Runtime,
    mask: torch.Tensor | None,
    mesh: Mesh | None = None,
    session: Session | None = None,
) -> torch.Tensor | None:
    """Latents on the leading rank after all steps."""
    layout = Layout(frames=FRAMES, size=SIZE, ranks=1 if mesh is None else mesh.sequence)
    comms = None if mesh is None or session is None else session.build(mesh)
    denoiser = parallelize(MODEL, comms, layout, runtime)
    velocity = FilledVelocity(denoiser.prepare(conditions(2)), SCHEDULE, TIMES, mask)
    z = denoiser.shard(normal(2, 4, FRAMES, *SIZE))
    with torch.no_grad():
        z = sample(z, TIMES, velocity, mask, lambda step: torch.zeros_like(z))
    held = sum(one.velocity.untyped_storage().nbytes() for one in velocity.held())
    assert held == len(velocity.held()) * planned_bytes(mesh or Mesh(), session if mesh else None)
    return denoiser.gather(z)


def planned_bytes(mesh: Mesh, session: Session | None) -> int:
    """What the plan counts for one held velocity on this rank."""
    shape = Shape(height=8 * SIZE[0], width=8 * SIZE[1], num_frames=17, batch=2, dtype="fp32")
    rank = 0 if session is None else session.rank
    none, one = (
        denoising_peak(replace(shape, held=held), mesh, Runtime(), ModelSizes(), rank)
        for held in (0, 1)
    )
    return one - none


Sent = dict[str, tuple[int, int]]


def ranks_fill(
    rank: int, world: int, init_file: str, mesh: Mesh
) -> list[tuple[str, float | None, Sent, Sent]]:
    """Per run: how far the leading rank is from one rank, what was sent, and what the plan says."""
    found = []
    with open_session("cpu") as session:
        for name, runtime in RUNTIMES.items():
            for mask, computed in ((None, 4), (MASK, 5)):
                before = session.ledger.snapshot()
                got = fill(runtime, mask, mesh, session)
                spent = session.ledger.since(before)
                sent = {
                    kind: (entry.calls, entry.bytes_sent)
                    for kind, entry in spent.items()
                    if entry.calls and kind != "gather_latents"
                }
                work = Workload(
                    frames=FRAMES,
                    size=SIZE,
                    channels=TINY.hidden_size,
                    depth=TINY.depth,
                    batch=2,
                    itemsize=4,
                )
                planned = {
                    kind: (computed * calls, computed * size)
                    for kind, (calls, size) in step_traffic(work, mesh, rank, runtime).items()
                }
                alone = fill(runtime, mask)
                assert alone is not None
                error = (
                    None if got is None else float((got - alone).abs().max() / alone.abs().max())
                )
                found.append((name, error, sent, planned))
    return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ranks_fill_as_one_does_and_a_step_left_out_exchanges_nothing(mesh: Mesh) -> None:
    for rank, runs in enumerate(run_ranks(ranks_fill, mesh.size, mesh)):
        for name, error, sent, planned in runs:
            assert sent == planned, name
            if rank == 0:
                assert error is not None
                assert error <= 1e-4, (name, error)


REQUEST = Request(
    prompt="a red ball", height=40, width=56, num_frames=17, steps=8, step_cache=SCHEDULE
)
BATCH = [REQUEST, replace(REQUEST, prompt="a blue square", prompt_index=1)]


def states(folder: Path, step: int) -> list[StateFiles]:
    """Of the batch, after a step."""
    found = []
    for request in BATCH:
        task = Task(request=request, output=folder / f"{step}" / f"{request.prompt_index}.mp4")
        identity = identity_of(task, EngineSettings(), JobSettings(), {"dit": "d"})
        found.append(StateFiles(task.output, latents_identity(identity)))
    return found


def ranks_go_on(
    rank: int, world: int, init_file: str, folder: Path, steps: Sequence[int]
) -> list[torch.Tensor | None]:
    """Latents of the run that goes on after each of the steps. From 0 on it makes the states."""
    made = []
    with open_session("cpu") as session:
        models = (pipeline := Pipeline.load(session=session, dtype="fp32")).models

        def keep(step: int, t: float, latents: object) -> None:
            if session.leads and step + 1 < REQUEST.steps:
                shutil.copytree(states(folder, 0)[0].folder, states(folder, step + 1)[0].folder)

        with torch.no_grad(), models.arithmetic():
            captions = [caption(request, 0) for request in BATCH]
            text = pipeline.text.broadcast(captions, models.max_length(REQUEST))
            for step in steps:
                files = states(folder, step)
                progress = SavedProgress(session, files, Position(0, step), every=step == 0)
                start = progress.resume_point(0) or ResumePoint(0, draw_noise(BATCH, 0), MASK)
                told = keep if step == 0 else None
                made.append(denoise(models, BATCH, 0, text, start, None, progress, None, told))
    return made


def test_a_run_goes_on_from_every_step_to_the_same_bits_and_on_other_ranks_within_rounding(
    tmp_path: Path,
) -> None:
    whole, *others = run_ranks(ranks_go_on, 2, tmp_path, range(REQUEST.steps))[0]
    assert whole is not None
    assert len(others) == REQUEST.steps - 1
    for step, latents in enumerate(others, start=1):
        assert latents is not None, step
        assert torch.equal(latents, whole), step
    for world in (1, 3):
        (latents,) = run_ranks(ranks_go_on, world, tmp_path, [3])[0]
        assert latents is not None
        assert float((latents - whole).abs().max() / whole.abs().max()) <= 1e-4, world


def with_schedules(rank: int, world: int, init_file: str, ends: Sequence[int]) -> None:
    """Generate with each rank's own schedule."""
    with open_session("cpu") as session:
        pipeline = Pipeline.load(session=session)
        own = replace(SCHEDULE, steps=4, computed=(0, ends[rank]))
        request = Request(prompt="a ball", height=32, width=48, num_frames=17, steps=4)
        pipeline.generate(replace(request, step_cache=own))


def test_ranks_with_other_schedules_are_refused_before_the_first_step() -> None:
    with pytest.raises(
        RankFailure, match=r"step_cache \['own 0 3'\] differs from rank 0's \['own 0 2'\]"
    ):
        run_ranks(with_schedules, 2, [2, 3])


LIST = ["--num-frames", "17", "--num-sampling-steps", "6", "--keep-state", "--text-cache", "off"]
TWO = ["--prompt", "a red ball", "a blue square", *LIST]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of schedules, of which steps 2, 4 and 5 are left out."""
    path = tmp_path_factory.mktemp("schedules") / "own.yaml"
    write_schedules(path, [replace(SCHEDULE, steps=6, computed=(0, 1, 3), fill="linear")])
    return path


def test_replicas_make_what_one_rank_makes_also_from_a_step_left_out_on(
    file: Path, tmp_path: Path
) -> None:
    argv = [*TWO, "--step-cache", str(file)]
    assert run(1, tmp_path / "one", *argv)
    whole, folder = saved(tmp_path / "one"), tmp_path / "two"
    # Step 4 was filled, and is saved when the process ends; step 5 is to be filled.
    trouble = (1, 0, 5, signal.SIGKILL)
    assert not run(2, folder, *argv, "--replicas", "2", "--save-every", "1", trouble=trouble)
    # Of the second prompt; how far the other replica came until it was ended is not fixed.
    assert stages(folder)["sample_0001.mp4"] == "denoising"
    assert "sample_0001.mp4.step.safetensors/velocities" in saved(folder)
    assert run(2, folder, *argv, "--replicas", "2")
    made = saved(folder)
    clips = [name for name in whole if "clip" in name]
    assert len(clips) == 2
    for name in clips:
        assert torch.equal(made[name], whole[name]), name
    assert run(1, tmp_path / "every", *TWO)
    assert not torch.equal(saved(tmp_path / "every")[clips[0]], whole[clips[0]])


def infer_seeing_little(rank: int, world: int, init_file: str, argv: list[str]) -> int:
    """As `infer`. Only the leading rank sees the weights and the file of schedules."""
    from opensora_sp.request import step_choice

    def not_there(path: object, what: object = None) -> NoReturn:
        raise AssertionError(f"rank {rank} reads {path}")

    if rank > 0:
        setattr(step_choice, "read_schedules", not_there)  # noqa: B010
        seen = {str(one) for one in vars(embedded_checkpoints()).values()}
        argv = ["/nowhere" if one in seen else one for one in argv]
    return infer(rank, world, init_file, argv)


def test_only_the_leading_rank_need_see_weights_and_schedules(file: Path, tmp_path: Path) -> None:
    argv = [*SMALL, *TWO[:2], *LIST, "--step-cache", str(file), "--save-dir"]
    for name, path in vars(embedded_checkpoints()).items():
        argv = [f"--ckpt-path-{name}", str(path), *argv]
    codes = run_ranks(infer, 2, [*argv, str(tmp_path / "disk")])
    own = ["--weights-from", "rank0", *argv, str(tmp_path / "rank0")]
    codes += run_ranks(infer_seeing_little, 2, own)
    assert codes == [0] * 4
    disk, rank0 = saved(tmp_path / "disk"), saved(tmp_path / "rank0")
    assert list(disk) == list(rank0)
    assert len(disk) > 0
    for name, latents in disk.items():
        assert torch.equal(latents, rank0[name]), name
