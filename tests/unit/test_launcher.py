"""What a launcher says in the environment: read once, refused in one line, joined where it can."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Copies
from ranks import free_port

from opensora_sp.base.errors import UserError
from opensora_sp.base.launcher import Launch, check_store, first_host, join, read_launch, speaks
from opensora_sp.base.processes import Process

ROOT = Path(__file__).resolve().parents[2]
TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TWO |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
OMPI = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
OMPI |= {f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "LOCAL_RANK")}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {"SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
SRUN |= {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77"}
SRUN |= {"SLURM_STEP_NODELIST": "gpu[03-04]"}
NAMES = {*TWO, *OMPI, *MPICH, *SRUN, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"}


@pytest.mark.parametrize("environ", [{}, {"RANK": ""}, {"RANK": "0"}, {"WORLD_SIZE": ""}])
def test_alone(environ: dict[str, str]) -> None:
    assert read_launch(environ) == Launch()


def test_torchruns_variables() -> None:
    assert read_launch(TWO) == Launch(1, 2, 1, 2, "127.0.0.1", 29511)
    without = {name: value for name, value in TWO.items() if name != "LOCAL_WORLD_SIZE"}
    assert read_launch(without).local_world_size == 2
    assert not speaks(TWO)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": "5"}, "RANK=5"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "x" * 5000}, "RANK='xxx"),
        ({"RANK": "9" * 5000}, "RANK='999"),
        ({"RANK": ""}, "RANK is missing"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "1000000000"}, "WORLD_SIZE='1000000000'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE='²'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is missing"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0'"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is missing"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        read_launch({**TWO, **change})
    assert len(str(caught.value)) < 300
    assert speaks({**TWO, **change})


@pytest.mark.parametrize("environ", [OMPI, MPICH])
def test_copies_of_mpirun_join(environ: dict[str, str]) -> None:
    joined = dict(environ)
    launch = join(joined)
    assert (launch.rank, launch.world_size, launch.local_rank) == (1, 2, 1)
    assert launch.local_world_size == 2
    assert launch.master_addr == "127.0.0.1"
    again = read_launch(joined)
    assert (again.rank, again.master_port) == (1, launch.master_port)


def test_tasks_of_srun_join_over_nodes() -> None:
    launch = read_launch(SRUN)
    assert (launch.rank, launch.world_size, launch.local_rank) == (2, 3, 0)
    assert (launch.local_world_size, launch.master_addr) == (1, "gpu03")
    first = read_launch({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert (first.local_world_size, first.master_port) == (2, launch.master_port)
    other = read_launch({**SRUN, "SLURM_STEP_ID": "1"})
    assert other.master_port != launch.master_port
    assert [first_host(n) for n in ("a1,a2", "n[001-2,5],b", "h.x-1", "[")] == [
        "a1",
        "n001",
        "h.x-1",
        None,
    ]


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_NTASKS": "2"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
        {**SRUN, "SLURM_PTY_PORT": "1234", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
    ],
)
def test_a_shell_inside_an_allocation_runs_alone_with_a_note(environ: dict[str, str]) -> None:
    launch = read_launch(environ)
    assert launch.world_size == 1
    assert "runs alone" in launch.notes[0]


@pytest.mark.parametrize(
    "environ",
    [
        {**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_LOCALID": "0"},
    ],
)
def test_copies_that_cannot_find_each_other_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match="torchrun"):
        read_launch(environ)


def test_where_the_ranks_meet_is_looked_at_before_torch() -> None:
    first = Launch(0, 2, 0, 2, "127.0.0.1", free_port())
    check_store(first, kept_by_launcher=False)
    with socket.create_server(("", first.master_port or 0)):
        with pytest.raises(UserError, match=f"MASTER_PORT={first.master_port} is in use"):
            check_store(first, kept_by_launcher=False)
        check_store(first, kept_by_launcher=True)
    with pytest.raises(UserError, match="cannot be resolved"):
        check_store(Launch(0, 2, 0, 2, "no.such.host.invalid", 29500), kept_by_launcher=False)


def clean(**more: str) -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if k not in NAMES}
    return {**environ, "PYTHONPATH": str(ROOT), **more}


@pytest.mark.parametrize("program", ["infer", "verify"])
@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**TWO, "RANK": "5"}, "RANK=5"),
        ({**TWO, "RANK": "-1"}, "RANK='-1'"),
        ({**TWO, "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({**TWO, "WORLD_SIZE": "1000000000"}, "WORLD_SIZE='1000000000'"),
        ({"RANK": "3"}, "WORLD_SIZE is missing"),
    ],
)
def test_one_line_and_code_2(
    program: str, environ: dict[str, str], said: str, tmp_path: Path
) -> None:
    flags = ["--prompt", "x", "--save-dir", str(tmp_path)] if program == "infer" else []
    done = subprocess.run(
        [sys.executable, f"launch/{program}.py", *flags],
        cwd=ROOT,
        env=clean(**environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("environ", [{"RANK": ""}, {"RANK": "3"}])
def test_a_refused_flag_is_heard_whatever_the_environment_says(environ: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "launch/infer.py", "--prompt", "x", "--dtype", "fp8"],
        cwd=ROOT,
        env=clean(**environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "fp8" in done.stderr


def test_nobody_at_the_address_is_one_line(tmp_path: Path) -> None:
    environ = clean(**{**TWO, "MASTER_PORT": str(free_port())})
    flags = ["--prompt", "x", "--image-size", "32", "48", "--num-frames", "17", "--timeout", "2"]
    argv = [*flags, "--device", "cpu", "--save-dir", str(tmp_path / "made")]
    said = tmp_path / "said"
    assert Copies(argv, [environ], said).finish(120) == [2], said.read_text()
    assert "Traceback" not in said.read_text()
    assert "error: rank 1: nobody was reached" in said.read_text().splitlines()[-1]


def test_two_copies_of_mpirun_make_one_video(tmp_path: Path) -> None:
    flags = ["--prompt", "x", "--image-size", "32", "48", "--num-frames", "17", "--device", "cpu"]
    flags += ["--num-sampling-steps", "1", "--dtype", "fp32", "--save-dir", str(tmp_path / "made")]
    place = {"MASTER_PORT": str(free_port())}
    environments = [
        clean(**{**OMPI, **place, "OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_LOCAL_RANK": r})
        for r in "01"
    ]
    said = tmp_path / "said"
    assert Copies(flags, environments, said).finish(120) == [0, 0], said.read_text()
    assert said.read_text().count("on 2 x cpu") == 1
    assert [path.name for path in (tmp_path / "made").glob("*.mp4")] == ["sample_0000.mp4"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("moment", [0.0, 0.6, 2.0])
def test_no_rank_outlives_a_killed_torchrun(moment: float, tmp_path: Path) -> None:
    """Killed while the ranks load torch or meet; the moment counts from the first rank's start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "launch/infer.py", "--prompt", "x"]
    command += ["--num-sampling-steps", "90000", "--save-dir", str(tmp_path), "--device", "cpu"]
    torchrun = subprocess.Popen(
        [*command, "--image-size", "32", "48", "--num-frames", "17"],
        cwd=ROOT,
        env=clean(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ranks: list[int] = []
    try:
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
        end = time.monotonic() + 60
        while len(ranks) < 2 and time.monotonic() < end:
            ranks = [int(pid) for pid in children.read_text().split()]
            time.sleep(0.02)
        assert len(ranks) == 2
        time.sleep(moment)
        torchrun.kill()
        torchrun.wait()
        end = time.monotonic() + 20
        while any(Process(pid, "", "").state() != "gone" for pid in ranks):
            assert time.monotonic() < end, f"{ranks} are still there"
            time.sleep(0.05)
    finally:
        torchrun.kill()
        for pid in ranks:
            if Process(pid, "", "").state() != "gone":
                os.kill(pid, signal.SIGKILL)
