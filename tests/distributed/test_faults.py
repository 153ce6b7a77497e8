"""A mistake that only one rank can see ends all of them, with one line and exit code 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import machine_faults
import pytest
from fault_matrix import Cell, run_cell
from forked import Copies
from PIL import Image
from ranks import environments, free_port, run_ranks
from safetensors.torch import load_file, save_file

from opensora_sp.base.errors import SharedFault, UserError
from opensora_sp.base.faults import SLOW_S, VARIABLE
from opensora_sp.cli.infer import main
from opensora_sp.parallel.session import open_session

ROOT = Path(__file__).resolve().parents[2]


def one_fails(rank: int, world: int, init_file: str, failing: int) -> str:
    def work() -> int:
        if rank == failing:
            raise UserError("the disk is full")
        return rank

    try:
        with open_session("cpu") as session:
            assert session.control.together(lambda: rank) == rank
            leading = session.control.together(lambda: rank, leading_only=True)
            assert leading == (0 if rank == 0 else None)
            session.control.together(work)
    except SharedFault as fault:
        return str(fault)
    return "nothing happened"


@pytest.mark.parametrize(("failing", "told"), [(0, ""), (2, "rank 2: ")])
def test_every_rank_is_told(failing: int, told: str) -> None:
    assert run_ranks(one_fails, 3, failing) == [f"{told}the disk is full"] * 3


@pytest.mark.parametrize("fault", ["strategy", "transformer", "text encoder"])
def test_the_command_says_one_line(fault: str, embedded_dir: Path, tmp_path: Path) -> None:
    """Above torchrun's banner for what is seen first; the others without a launcher's seconds."""
    flags = ["--prompt", "x", "--image-size", "32", "48", "--num-frames", "17", "--verbose", "0"]
    flags += ["--device", "cpu", "--save-dir", str(tmp_path / "out")]
    if fault == "strategy":
        Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
        flags += ["--reference-path", str(tmp_path / "one.png"), "--mask-strategy", "0,0,-5,0,5"]
        expected = "mask strategy: ref_start -5"
        stdout, stderr = under_torchrun(flags)
        assert stderr.index("error: ") < stderr.index("FAILED")
    else:
        flags, expected = with_damaged(fault, embedded_dir, tmp_path, flags)
        stdout, stderr = as_two_ranks(flags, tmp_path)
    assert "opensora_sp/" not in stderr  # no traceback of ours; torchrun prints its own
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert expected in errors[0]
    assert stdout == ""
    assert not list((tmp_path / "out").glob("*.mp4"))
    assert not list((tmp_path / "out").rglob("*.tmp"))


def under_torchrun(flags: list[str]) -> tuple[str, str]:
    """What the command says on both streams, started by torchrun on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "launch/infer.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1  # torchrun's own, whatever the ranks return
    return done.stdout, done.stderr


def as_two_ranks(flags: list[str], folder: Path) -> tuple[str, str]:
    """What two ranks say that no launcher watches; both refuse."""
    out, err = folder / "stdout", folder / "stderr"
    environment = [{**os.environ, **own} for own in environments(2)]
    assert Copies(flags, environment, out, err).finish() == [2, 2]
    return out.read_text(), err.read_text()


def with_damaged(
    fault: str, embedded_dir: Path, folder: Path, flags: list[str]
) -> tuple[list[str], str]:
    """The flags with a copy of the models, one of which is damaged, and what names the damage."""
    models = folder / "models"
    shutil.copytree(embedded_dir, models)
    paths = [f"--ckpt-path-{name}={models / name}" for name in ("dit", "t5", "vae2d", "vae3d")]
    if fault == "transformer":
        weights = load_file(models / "dit" / "model.safetensors")
        weights["x_embedder.proj.bias"][0] = float("nan")
        save_file(weights, models / "dit" / "model.safetensors")
        return [*flags, *paths], "x_embedder.proj.bias"
    shard = sorted((models / "t5").glob("*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    return [*flags, *paths], shard.name


# Each way at some place, each place of another kind of work; the whole matrix is a command.
CELLS = [
    Cell("exchange", "kill", 2),
    Cell("exchange", "hang", 2),
    Cell("velocity", "stop", 2),
    Cell("hand-out", "corrupt", 2),
    Cell("encode", "exception", 0),
    Cell("between-outputs", "exit", 2),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.point}-{c.way}-{c.rank}")
def test_one_ends_all_end(cell: Cell, tmp_path: Path) -> None:
    """All ranks gone in time, the right one and its stage named, nothing left that is not whole."""
    outcome = run_cell(cell, tmp_path, forked=True)
    assert not outcome.wrong, outcome.log


@pytest.mark.parametrize(
    "cell",
    [machine_faults.Cell("two-runs", "velocity"), machine_faults.Cell("memory", "decode")],
    ids=lambda cell: cell.fault,
)
def test_faults_of_the_machine(cell: machine_faults.Cell, tmp_path: Path) -> None:
    """All end in time with one line, and the same command then makes the same bytes."""
    outcome = machine_faults.run_cell(cell, tmp_path)
    assert not outcome.wrong, outcome.log


def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path: Path) -> None:
    outcome = run_cell(Cell("encode-to-file", "kill", 0), tmp_path, ranks=2, max_restarts=1)
    assert not outcome.wrong, outcome.log


def slow_leader(rank: int, world: int, init_file: str, folder: str) -> int:
    """The whole command, with a decode that takes longer than a collective may."""
    os.environ[VARIABLE] = "rank=0 point=decode way=slow"
    flags = ["--prompt", "one", "two", "--image-size", "32", "48", "--num-frames", "17"]
    flags += ["--num-sampling-steps", "1", "--device", "cpu", "--verbose", "0"]
    return main([*flags, "--save-dir", folder, "--timeout", str(SLOW_S - 3)])


def test_a_long_decode_does_not_trip_the_timeout_of_those_who_wait(tmp_path: Path) -> None:
    assert run_ranks(slow_leader, 2, str(tmp_path)) == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".opensora-sp",
        "sample_0000.mp4",
        "sample_0001.mp4",
    ]
