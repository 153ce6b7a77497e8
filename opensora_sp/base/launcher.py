"""Rank and world size of this process, from the environment that its launcher set.

torchrun, accelerate launch and colossalai run set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. mpirun and srun set variables of their own, which `join` copies to
torchrun's names, because torch reads those. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Mapping, MutableMapping
from contextlib import closing
from dataclasses import dataclass

from opensora_sp.base.errors import UserError

# More ranks than any machine has, and few enough that lists of all ranks are cheap.
MOST_RANKS = 65_536
# A launcher that hosts the store opens it before it starts any rank, so it answers soon.
STORE_ANSWERS_S = 10.0
_DEFAULT_PORT = 29_500  # torch's own
_PORTS = range(20_000, 32_000)  # below the ephemeral ports of common systems
# Slurm gives numbers from here on to steps without an srun: batch scripts, interactive shells.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_START = "--no-python opensora-sp generate …"
_HOW = f"start with torchrun --nproc_per_node N {_START} (docs/launching.md)"


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that were started together. Alone it is rank 0 of 1.

    local_rank, local_world_size: rank and size within this node. master_addr, master_port: where
    rank 0 or the launcher hosts the store; None for a single process. notes: lines for the user.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def keeps_store(self) -> bool:
        """Whether this process hosts the store, if the launcher does not."""
        return self.rank == 0 and self.world_size > 1


@dataclass(frozen=True)
class _Family:
    """The variables of one kind of launcher. job: the variables that identify the run."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...]


# mpirun inside a Slurm job sets both kinds. Slurm's then describe the daemons of mpirun.
_MPI = (
    _Family(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Family(
        "mpirun (MVAPICH2)",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        ("SLURM_JOB_ID",),
    ),
    _Family(
        "mpirun (MPICH, Intel MPI)",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        ("PMI_JOBID", "SLURM_JOB_ID"),
    ),
)


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """The launch that the environment describes; a single process where it describes none.

    An empty variable counts as unset. Raises UserError for impossible numbers, for a variable that
    is missing beside others, and for processes of mpirun or srun that cannot find each other.
    """
    if _text(environ, "RANK") is not None or _text(environ, "WORLD_SIZE") is not None:
        return _torchruns(environ)
    foreign = _of_mpi(environ) or _of_slurm(environ)
    # These two may be set without the others. They choose the device and threads of one process.
    local_rank = _number(environ, "LOCAL_RANK", 0, MOST_RANKS - 1)
    local_size = _number(environ, "LOCAL_WORLD_SIZE", 1, MOST_RANKS)
    return foreign or Launch(local_rank=local_rank or 0, local_world_size=local_size or 1)


def join(environ: MutableMapping[str, str] = os.environ) -> Launch:
    """As `read_launch`, and set torchrun's variables where mpirun or srun started the ranks."""
    launch = read_launch(environ)
    if launch.world_size > 1:
        environ.update(
            RANK=str(launch.rank),
            WORLD_SIZE=str(launch.world_size),
            LOCAL_RANK=str(launch.local_rank),
            LOCAL_WORLD_SIZE=str(launch.local_world_size),
            MASTER_ADDR=str(launch.master_addr),
            MASTER_PORT=str(launch.master_port),
        )
    return launch


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints what all ranks find, which is rank 0.

    Where the environment is wrong the rank is not known, and every process prints.
    """
    try:
        return read_launch(environ).rank == 0
    except UserError:
        return True


def under_torchrun() -> bool:
    """Whether torchrun, or what is built on it, started this process as its child."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher_keeps_store() -> bool:
    """Whether torchrun hosts the store. It then outlives every rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def check_store(launch: Launch, *, kept_by_launcher: bool) -> None:
    """Check, before torch is loaded, whether the ranks can reach the store.

    Raises UserError where the address cannot be resolved, where this rank has to listen on a port
    that is taken, and where a launcher's store does not answer. It does not wait for other ranks,
    which may start later.
    """
    if launch.world_size == 1 or launch.master_addr is None or launch.master_port is None:
        return
    try:
        found = socket.getaddrinfo(launch.master_addr, launch.master_port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise UserError(
            f"MASTER_ADDR={_shown(launch.master_addr)} in the environment cannot be resolved "
            f"({reason}): name the host that rank 0 runs on"
        ) from None
    if kept_by_launcher:
        _require_answer(launch, STORE_ANSWERS_S)
    elif launch.keeps_store:
        _require_free(launch.master_port, {family for family, *_ in found})


def nobody_answers(launch: Launch, waited_s: float) -> UserError:
    """The error for a store that does not answer."""
    return UserError(
        f"nobody was reached at MASTER_ADDR:MASTER_PORT {launch.master_addr}:{launch.master_port} "
        f"within {waited_s:.0f} s: is rank 0 running, and is the port open?"
    )


def others_missing(launch: Launch, waited_s: float) -> UserError:
    """The error for ranks that did not come to the store."""
    return UserError(
        f"not all of the {launch.world_size} ranks (WORLD_SIZE) came to "
        f"{launch.master_addr}:{launch.master_port} within {waited_s:.0f} s: start all of them"
    )


def port_taken(launch: Launch) -> UserError:
    """The error for a port that rank 0 cannot listen on."""
    return UserError(
        f"MASTER_PORT={launch.master_port} is in use on this machine: choose another port, with "
        "torchrun --master_port, or leave it to torchrun --standalone"
    )


def _require_answer(launch: Launch, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        left = max(0.5, end - time.monotonic())
        try:
            socket.create_connection((launch.master_addr, launch.master_port), left).close()
        except OSError:
            if time.monotonic() > end:
                raise nobody_answers(launch, seconds) from None
            time.sleep(0.2)
        else:
            return


def _require_free(port: int, families: set[int]) -> None:
    """Refuse a port that is in use or not permitted. torch reports other errors."""
    for family in families:
        with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except PermissionError:
                raise UserError(
                    f"MASTER_PORT={port} may not be listened on by this user: choose one from "
                    "1024 to 65535"
                ) from None
            except OSError:
                raise port_taken(Launch(master_port=port)) from None


def _torchruns(environ: Mapping[str, str]) -> Launch:
    """The launch that torchrun's variables describe."""
    rank = _number(environ, "RANK", 0, MOST_RANKS - 1)
    world = _number(environ, "WORLD_SIZE", 1, MOST_RANKS)
    local_rank = _number(environ, "LOCAL_RANK", 0, MOST_RANKS - 1)
    local_size = _number(environ, "LOCAL_WORLD_SIZE", 1, MOST_RANKS)
    if world is None and rank:
        raise UserError(f"RANK={rank} in the environment, but WORLD_SIZE is missing: {_HOW}")
    world = world or 1
    if rank is not None and rank >= world:
        raise UserError(
            f"RANK={rank} in the environment, but WORLD_SIZE={world}: a rank is from 0 to "
            f"{world - 1}; {_HOW}"
        )
    if world == 1:
        return Launch(local_rank=local_rank or 0, local_world_size=local_size or 1)
    address = _text(environ, "MASTER_ADDR")
    port = _number(environ, "MASTER_PORT", 1, 65_535)
    for name, value in (
        ("RANK", rank),
        ("LOCAL_RANK", local_rank),
        ("MASTER_ADDR", address),
        ("MASTER_PORT", port),
    ):
        if value is None:
            raise UserError(f"WORLD_SIZE={world} in the environment, but {name} is missing: {_HOW}")
    assert rank is not None
    assert local_rank is not None
    local_size = world if local_size is None else local_size
    if local_size > world or local_rank >= local_size:
        raise UserError(
            f"LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_size} and WORLD_SIZE={world} in the "
            f"environment do not fit: LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE; {_HOW}"
        )
    return Launch(rank, world, local_rank, local_size, address, port)


def _of_mpi(environ: Mapping[str, str]) -> Launch | None:
    """The launch by mpirun, or None. srun --mpi=pmi2 is left to `_of_slurm`."""
    for family in _MPI:
        size = _number(environ, family.size, 1, MOST_RANKS)
        if size is None or size == 1:
            continue
        rank = _number(environ, family.rank, 0, size - 1)
        if rank is None:
            return Launch(notes=(_alone_note(family.size, size, family.launcher),))
        local_rank = _number(environ, family.local_rank, 0, MOST_RANKS - 1)
        local_size = _number(environ, family.local_size, 1, size)
        if local_rank is None or local_size is None:
            if slurm := _of_slurm(environ):
                return slurm
            missing = family.local_rank if local_rank is None else family.local_size
            raise UserError(
                f"{family.size}={size} in the environment, but {missing} is missing, so that the "
                f"copies cannot share a node's devices: torchrun --nproc_per_node {size} "
                f"{_START}"
            )
        where = "127.0.0.1" if local_size == size else None
        return _met(environ, family, (rank, size, local_rank, local_size), where)
    return None


def _of_slurm(environ: Mapping[str, str]) -> Launch | None:
    """The launch by srun, or None. A shell inside an allocation is a single process.

    Slurm sets SLURM_NTASKS for every process of an allocation. Only processes that srun started
    have a task number as well.
    """
    family = _Family("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", ())
    tasks = _number(environ, "SLURM_NTASKS", 1, MOST_RANKS)
    step = _text(environ, "SLURM_STEP_ID")
    in_step = step is not None and step.isdecimal() and int(step[:12]) < _FIRST_SPECIAL_STEP
    if not in_step or _text(environ, "SLURM_PTY_PORT") is not None:
        if tasks is not None and tasks > 1:
            return Launch(notes=(_alone_note("SLURM_NTASKS", tasks, "srun"),))
        return None
    size = _number(environ, "SLURM_STEP_NUM_TASKS", 1, MOST_RANKS) or tasks
    if size is None or size == 1:
        return None
    rank = _number(environ, "SLURM_PROCID", 0, size - 1)
    local_rank = _number(environ, "SLURM_LOCALID", 0, MOST_RANKS - 1)
    local_size = _slurm_local_size(environ, size)
    if rank is None or local_rank is None or local_size is None:
        raise UserError(
            f"srun started {size} tasks, but SLURM_PROCID, SLURM_LOCALID or "
            f"SLURM_STEP_TASKS_PER_NODE is missing in the environment: srun --ntasks-per-node 1 "
            f"torchrun --nproc_per_node N {_START}"
        )
    where = "127.0.0.1" if local_size == size else None
    nodes = _text(environ, "SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST")
    if where is None and nodes is not None:
        where = first_host(nodes)
    place = (rank, size, local_rank, local_size)
    return _met(environ, family, place, where, ("SLURM_JOB_ID", "SLURM_STEP_ID"))


def _slurm_local_size(environ: Mapping[str, str], size: int) -> int | None:
    """Tasks of this step on this node, from a list such as "4(x2),3"."""
    text = _text(environ, "SLURM_STEP_TASKS_PER_NODE") or _text(environ, "SLURM_TASKS_PER_NODE")
    node = _number(environ, "SLURM_NODEID", 0, MOST_RANKS)
    if text is None or node is None:
        return None
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part.strip())
        if match is None:
            return None
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1]) if 0 < int(match[1]) <= size else None
    return None


def first_host(nodes: str) -> str | None:
    """The first host of a Slurm list such as "gpu[03-05,9],login1"; None for another form."""
    match = re.match(r"([\w.-]+?)(?:\[([0-9]+)[0-9,-]*\])?(?:,|$)", nodes)
    return None if match is None else match[1] + (match[2] or "")


def _met(
    environ: Mapping[str, str],
    family: _Family,
    place: tuple[int, int, int, int],
    where: str | None,
    job: tuple[str, ...] | None = None,
) -> Launch:
    """The launch by mpirun or srun, with an address and port that all ranks derive alike."""
    rank, size, local_rank, local_size = place
    address = _text(environ, "MASTER_ADDR") or where
    if address is None:
        raise UserError(
            f"{family.launcher} started {size} copies on several nodes: set MASTER_ADDR to the "
            f"host of rank 0 for all of them, or start torchrun on every node (docs/launching.md)"
        )
    if local_rank >= local_size:
        raise UserError(
            f"{family.launcher} says that this is process {local_rank} of {local_size} on its "
            f"node, which cannot be: {_HOW}"
        )
    port = _number(environ, "MASTER_PORT", 1, 65_535)
    if port is None:
        names = family.job if job is None else job
        known = "/".join(value for name in names if (value := _text(environ, name)) is not None)
        port = _port_of(known) if known else _DEFAULT_PORT
    note = f"{family.launcher} started {size} copies: they work together as {size} ranks"
    return Launch(rank, size, local_rank, local_size, address, port, (note,))


def _port_of(job: str) -> int:
    """A port from the job's name: the same on all its ranks, and seldom another job's."""
    return _PORTS[int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big") % len(_PORTS)]


def _alone_note(name: str, size: int, launcher: str) -> str:
    start = (
        f"srun -n {size} opensora-sp generate …"
        if launcher == "srun"
        else f"torchrun --nproc_per_node {size} {_START}"
    )
    return (
        f"{name}={size} in the environment, but {launcher} did not say which of them this process "
        f"is: it runs alone; {start} makes {size} ranks share a video"
    )


def _text(environ: Mapping[str, str], name: str) -> str | None:
    return environ.get(name, "").strip() or None


def _number(environ: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    """A whole number of the environment, None where there is none; UserError for anything else."""
    text = _text(environ, name)
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,10}", text) and low <= int(text) <= high:
        return int(text)
    raise UserError(
        f"{name}={_shown(text)} in the environment is not a whole number from {low} to {high}: "
        f"{_HOW}"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
