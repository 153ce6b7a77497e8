"""What `opensora-sp benchmark --count` prints: the traffic of one guided forward of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora_sp.base.wording import plural
from opensora_sp.benchmark.count.counter import Counter
from opensora_sp.benchmark.count.forward import META, ForwardSize, first_rank, guided_forward
from opensora_sp.benchmark.count.table import Table, markdown, plain
from opensora_sp.engine.model_set import DTYPES
from opensora_sp.models.kernels.probe import DTYPE_NAMES
from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.parallel.exchange import Comm
from opensora_sp.parallel.mesh import Mesh, plan_mesh
from opensora_sp.planner.plan import Options
from opensora_sp.request.memory_modes import FASTEST, NO_OFFLOAD, MemoryMode, memory_mode
from opensora_sp.request.request import Request


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One counted forward: its size, its memory mode, its rows, of the first rank of its mesh.

    sent: calls and bytes that this rank sends to others, by the kind of collective.
    """

    request: Request
    size: ForwardSize
    mode: MemoryMode
    mesh: Mesh
    table: Table
    sent: Mapping[str, tuple[int, int]]


def count_request(request: Request, values: Mapping[str, Any]) -> Counted:
    """Count one step of a request, by the values of the flags.

    Without --ckpt-path-dit the published transformer is counted. Raises CheckpointError.
    """
    dit = values["ckpt_path_dit"]
    config = STDiT3Config() if dit is None else STDiT3Config.load(Path(dit))
    frames, *cells = request.latent_shape
    size = ForwardSize(
        frames=frames,
        size=(cells[0], cells[1]),
        pixels=(request.height, request.width),
        config=config,
        dtype=DTYPES[values["dtype"]],
        batch=values["batch_size"],
        text=config.model_max_length,
        cfg_scale=request.cfg_scale,
    )
    mode = FASTEST if values["memory"] == "auto" else memory_mode(values["memory"])
    mesh = plan_mesh(
        values["count_ranks"],
        guided=request.cfg_scale != 1,
        guidance=values["guidance_parallel"],
        sequence=values["sequence_parallel"],
    )
    options = Options(
        serial_guidance=values["guidance"] == "serial", step_kernels=values["step_kernels"]
    )
    # Weights that are copied from the host are no traffic of the forward.
    runtime = replace(options.runtime(mode), offload=NO_OFFLOAD)
    comms = first_rank(mesh)
    forward = guided_forward(size, runtime, comms)
    with Counter(device=META) as counter:
        forward()
    table = Table(rows=counter.rows, residual_bytes=size.residual_bytes, depth=config.depth)
    return Counted(
        request=request, size=size, mode=mode, mesh=mesh, table=table, sent=sent(comms.sequence)
    )


def sent(comm: Comm) -> dict[str, tuple[int, int]]:
    """Calls and bytes sent to other ranks so far, by the kind of collective."""
    entries = comm.ledger.snapshot().items()
    return {kind: (entry.calls, entry.bytes_sent) for kind, entry in entries if entry.calls}


def count_text(counted: Counted, *, as_markdown: bool) -> str:
    """The count as people read it: by part, then by operation."""
    request, size, table = counted.request, counted.size, counted.table
    frames = plural(request.num_frames, "frame")
    head = (
        f"One {'guided ' * (size.cfg_scale != 1)}forward of {frames} of "
        f"{request.height}x{request.width}, {DTYPE_NAMES[size.dtype]}, --memory {counted.mode}: "
        f"X = {size.residual_bytes / 1e9:.3g} GB, {size.config.depth} pairs of blocks"
    )
    draw = markdown if as_markdown else plain
    tables = [draw(table.cells("part")), draw(table.cells("operation"))]
    if counted.mesh.size > 1:
        head += f"; the first rank of {counted.mesh}"
        lines = [
            (kind, f"{n:,}", f"{moved / 1e9:,.3f}") for kind, (n, moved) in counted.sent.items()
        ]
        tables.append(draw([("sent to other ranks", "calls", "GB"), *lines]))
    return "\n\n".join([head, *tables]) + "\n"
