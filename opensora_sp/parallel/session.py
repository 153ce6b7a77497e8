"""A run's process: its device, its process groups, and their teardown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from opensora_sp.base import faults
from opensora_sp.base.errors import SharedFault, UserError
from opensora_sp.base.launcher import (
    Launch,
    join,
    launcher_keeps_store,
    nobody_answers,
    others_missing,
    port_taken,
    under_torchrun,
)
from opensora_sp.base.processes import Process
from opensora_sp.base.screen import nothing_on_stdout
from opensora_sp.base.wording import plural
from opensora_sp.parallel.backend import (
    device_module,
    load_plugin,
    pick_backend,
    pick_device,
    require_backend,
    visible_note,
)
from opensora_sp.parallel.backend_table import Backend
from opensora_sp.parallel.control import ControlPlane
from opensora_sp.parallel.exchange import Comm
from opensora_sp.parallel.ledger import Ledger
from opensora_sp.parallel.mesh import Mesh, Place
from opensora_sp.parallel.nodes import node_name, number_nodes
from opensora_sp.parallel.watchdog.signals import default_signals
from opensora_sp.parallel.watchdog.stages import Limits
from opensora_sp.parallel.watchdog.store import StatusStore, connect_store
from opensora_sp.parallel.watchdog.watch import Watchdog

if TYPE_CHECKING:
    from opensora_sp.parallel.colossal import Colossal

# Collectives wait this long for a peer. Long phases of the leading rank are waited for on the
# side group, which has its own limit, so this only has to cover one denoising step.
COLLECTIVE_TIMEOUT_S = 1800.0
# Ranks are started together; loading torch from a slow disk is what they may differ by.
MEET_S = 180.0
SIDE_TIMEOUT_S = 24 * 3600.0
RELEASE_S = 0.1


@dataclass(frozen=True)
class MeshComms:
    """The groups that this rank works in."""

    mesh: Mesh
    place: Place
    sequence: Comm
    guidance: Comm


@dataclass
class Session:
    """One process of the run: who it is, and its groups. Alone it has no process groups at all.

    control: objects, barriers and stages, beside the collectives. nodes: the number of each rank's
    node. colossal: makes the groups of a mesh, where asked to.
    A replica's session (see `split`) counts its ranks from 0 and has groups of its own.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    backend: Backend
    world: Comm
    control: ControlPlane = field(default_factory=ControlPlane)
    nodes: tuple[int, ...] = (0,)
    colossal: Colossal | None = None
    replica: int = 0
    parent: Session | None = None
    made: dict[Mesh, MeshComms] = field(default_factory=dict)
    closed: bool = False  # its block has been left; of a replica's, its parent's counts

    @property
    def leads(self) -> bool:
        """Rank 0: writes its videos; of the whole world also encodes the text and reports."""
        return self.rank == 0

    @property
    def whole(self) -> Session:
        """The session of all ranks, where this one is a replica's."""
        return self if self.parent is None else self.parent

    def world_rank(self, rank: int) -> int:
        """What the whole world calls a rank of this session."""
        return self.whole.rank - self.rank + rank

    @property
    def ledger(self) -> Ledger:
        """Where all collectives of this process are booked."""
        return self.world.ledger

    def split(self, mesh: Mesh) -> Session:
        """The session of this rank's replica, for a mesh of all ranks. Collective.

        Replicas work through different lists at their own pace, so every group that any of them
        needs is made here, where all ranks meet: making one later would wait for the others.
        Raises ValueError for one replica, and for a session that is a replica's already.
        """
        if self.parent is not None or mesh.replicas == 1:
            raise ValueError(f"{mesh}: nothing to split")
        place, size = mesh.place(self.rank), mesh.replica_size
        replicas = [mesh.replica_ranks(first) for first in range(0, mesh.size, size)]
        one = Mesh(guidance=mesh.guidance, sequence=mesh.sequence)
        comms = self.build(mesh)
        world, side = self._group_of(replicas), None
        for ranks in replicas if size > 1 else []:
            with self.control.mark.inside("new_group"):
                group = _side_group(ranks)
            side = group if self.rank in ranks else side
        session = replace(
            self,
            rank=world.rank,
            world_size=size,
            world=world,
            control=replace(
                self.control,
                rank=world.rank,
                world_size=size,
                first=self.rank - world.rank,
                side=side,
            ),
            replica=place.replica,
            nodes=tuple(self.nodes[rank] for rank in mesh.replica_ranks(self.rank)),
            parent=self,
            made={},
        )
        session.made[one] = MeshComms(one, one.place(world.rank), comms.sequence, comms.guidance)
        return session

    def build(self, mesh: Mesh) -> MeshComms:
        """The groups of a mesh. Every rank calls this at the same point.

        Raises ValueError for a mesh of another number of ranks, and for one that `split` has not
        made.
        """
        if mesh in self.made:
            return self.made[mesh]
        if mesh.size != self.world_size:
            raise ValueError(f"mesh {mesh} on {self.world_size} ranks")
        if self.parent is not None and mesh.size > 1:
            raise ValueError(f"mesh {mesh} was not made when the session was split")
        with self.control.mark.inside("new_group"):
            made = None if self.colossal is None else self.colossal.groups(mesh)
        return MeshComms(
            mesh=mesh,
            place=mesh.place(self.rank),
            sequence=self._group_of(mesh.sequence_groups(), made),
            guidance=self._group_of(mesh.guidance_groups(), made),
        )

    def _group_of(
        self, groups: Sequence[list[int]], made: Mapping[tuple[int, ...], Any] | None = None
    ) -> Comm:
        """The group that holds this rank; all ranks must make all groups, in the same order.

        made: this rank's groups by their ranks, where somebody else has made them all.
        """
        found: Comm | None = None
        for ranks in groups:
            group = None
            if len(ranks) > 1 and made is None:
                with self.control.mark.inside("new_group"), nothing_on_stdout():
                    group = dist.new_group(ranks)
            elif len(ranks) > 1 and self.rank in ranks and made is not None:
                group = made[tuple(ranks)]
            if self.rank in ranks:
                found = Comm(
                    group,
                    ranks.index(self.rank),
                    len(ranks),
                    self.ledger,
                    self.world.through_host,
                    _elsewhere(ranks, self.rank, self.nodes),
                )
        if found is None:
            raise ValueError(f"rank {self.rank} is in none of {groups}")
        return found


def _elsewhere(ranks: Sequence[int], rank: int, nodes: Sequence[int]) -> frozenset[int]:
    """The places in a group of ranks that are on other nodes than this rank."""
    return frozenset(i for i, other in enumerate(ranks) if nodes[other] != nodes[rank])


def alone(device: str | None = None) -> Session:
    """A session of this process alone, whatever started it; device as for `open_session`."""
    kind = pick_device(device)
    load_plugin(kind)
    here = _claim_device(kind, 0, 1)
    return Session(0, 0, 1, here, pick_backend(None, kind), Comm(None, 0, 1))


@contextmanager
def open_session(
    device: str | None = None,
    backend: str | None = None,
    *,
    launcher: str = "torch",
    timeout_s: float = COLLECTIVE_TIMEOUT_S,
    limits: Limits | None = None,
) -> Iterator[Session]:
    """The session of this process, as torchrun's environment describes it; alone without one.

    device: one of `backend_table.DEVICES`, or None for the first of them that is here. backend:
    None for the device's own. launcher: torch, or colossalai to have it make the groups. limits:
    of silence and of stages. Raises UserError for what is not there. Groups are destroyed on a
    clean exit. With peers, an exception that leaves the block ends the run on all ranks, says why
    once, and comes out as JobEnded; the groups are left to die with the process then, for peers may
    be stuck inside them.
    """
    launch = join()
    rank, world, local_rank = launch.rank, launch.world_size, launch.local_rank
    kind = pick_device(device)
    row = pick_backend(backend, kind)
    load_plugin(kind)  # before the process group: it registers the backend
    here = _claim_device(kind, local_rank, launch.local_world_size)
    faults.note_process()
    if world == 1:
        yield from _alone(Session(0, 0, 1, here, row, Comm(None, 0, 1)), limits)
        return
    require_backend(row)
    colossal = _colossal(here, row) if launcher == "colossalai" else None
    with default_signals():  # nothing to tidy up yet, and a handler could not run in there
        _make_world(row.name, launch, timeout_s, colossal)
        side = _side_group()
    through_host = row.device != kind
    ledger = Ledger()
    control = ControlPlane(rank, world, side=side, mark=ledger.mark)
    comm = Comm(dist.group.WORLD, rank, world, ledger, through_host)
    if not row.through_host:
        _require_own_devices(here, control)
    nodes = number_nodes(control.all_gather_object(node_name()))
    comm = replace(comm, elsewhere=_elsewhere(range(world), rank, nodes))
    session = Session(rank, local_rank, world, here, row, comm, control, nodes, colossal)
    watchdog = Watchdog(
        rank,
        StatusStore.connect(rank),
        control.all_gather_object(Process.current()),
        limits or Limits(),
        ledger.mark,
    )
    control.watchdog = watchdog
    watchdog.start()
    try:
        with control.stage("start"):
            faults.reach("after-init")
        yield session
    except SharedFault:
        _close(session)
        raise
    except BaseException as error:
        raise watchdog.failed(error) from error
    _close(session)


def _make_world(backend: str, launch: Launch, timeout_s: float, colossal: Colossal | None) -> None:
    """The process group of all ranks. Raises UserError where they do not find each other."""
    if colossal is not None:
        colossal.launch()
        return
    meet_s = min(timeout_s, MEET_S)
    started = time.monotonic()
    try:
        store = _meet(launch, timedelta(seconds=meet_s))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise port_taken(launch) from None
        missing = others_missing if launch.rank == 0 else nobody_answers
        raise missing(launch, time.monotonic() - started) from error
    timeout = timedelta(seconds=timeout_s)
    with nothing_on_stdout():
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )


def _meet(launch: Launch, limit: timedelta) -> Any:
    """The store of the process groups: the launcher's, or one that rank 0 keeps."""
    if launcher_keeps_store():
        return connect_store("groups", limit)
    c10d: Any = dist  # its type stubs leave the stores out
    store = c10d.TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=launch.keeps_store,
        timeout=limit,
        wait_for_workers=True,
    )
    return c10d.PrefixStore("opensora_sp/groups", store)


def _colossal(device: torch.device, backend: Backend) -> Colossal:
    """ColossalAI, imported now that it is asked for."""
    from opensora_sp.parallel.colossal import Colossal

    return Colossal(device, backend)


def _alone(session: Session, limits: Limits | None) -> Iterator[Session]:
    """A session without peers: its stages have deadlines, its errors pass through."""
    watchdog = Watchdog(0, None, [], limits or Limits())
    session.control.watchdog = watchdog
    watchdog.start()
    try:
        faults.reach("after-init")
        yield session
    finally:
        session.closed = True
        watchdog.close()


def _side_group(ranks: list[int] | None = None) -> Any:
    """A group for control data and long waits; ranks None: all of them."""
    with nothing_on_stdout():
        return dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=SIDE_TIMEOUT_S))


def _close(session: Session) -> None:
    """Destroy the groups when every rank has come here."""
    session.control.barrier()
    session.closed = True
    if session.control.watchdog is not None:
        session.control.watchdog.close()
    # gloo's threads let go of a collective's tensors a moment after it was waited for, and need
    # the interpreter for that; torch 2.3 tears a group down while holding it, and waits for the
    # threads. So they get their moment first.
    time.sleep(RELEASE_S)
    dist.destroy_process_group()


def _claim_device(kind: str, local_rank: int, local_world: int) -> torch.device:
    """This rank's device, made current; UserError when there are fewer devices than ranks.

    Slurm and mpirun can show each rank one device alone, which is number 0 to all of them (srun
    --gpus-per-task=1). torchrun shows all ranks the same ones. `_require_own_devices` tells whether
    one is shared.
    """
    if kind == "cpu":
        return torch.device("cpu")
    module = device_module(kind)
    count = int(module.device_count())
    if count == 1 < local_world and not under_torchrun():
        local_rank = 0
    elif local_world > count:
        raise UserError(
            f"{plural(local_world, 'rank')} on this node but "
            f"{plural(count, f'visible {kind} device')}{visible_note(kind)}; "
            f"start with torchrun --nproc_per_node {count}"
        )
    module.set_device(local_rank)
    return torch.device(kind, local_rank)


def _require_own_devices(device: torch.device, control: ControlPlane) -> None:
    """UserError, on all ranks, where two of them have the same device. Collective.

    Only where torch can say which one it is: torch 2.3 cannot, and then the backend finds it.
    """
    properties = device_module(device.type).get_device_properties(device)
    names = control.all_gather_object(str(getattr(properties, "uuid", "")))
    for rank, name in enumerate(names):
        first = names.index(name)
        if name and first < rank:
            raise UserError(
                f"ranks {first} and {rank} have the same {device.type} device ({name}): show "
                "each rank of a node a device of its own, or all of the node's devices"
            )
