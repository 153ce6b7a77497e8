"""What `opensora-sp benchmark --count` prints: the traffic of one guided forward of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora_sp.benchmark.count.counter import Counter
from opensora_sp.benchmark.count.forward import META, ForwardSize, guided_forward
from opensora_sp.benchmark.count.table import Table, markdown, plain
from opensora_sp.engine.model_set import DTYPES
from opensora_sp.models.stdit3 import STDiT3Config
from opensora_sp.request.memory_modes import FASTEST, NO_OFFLOAD, MemoryMode, memory_mode
from opensora_sp.request.request import Request
from opensora_sp.request.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One counted forward: its size, its memory mode, its rows."""

    request: Request
    size: ForwardSize
    mode: MemoryMode
    table: Table


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
    runtime = Runtime.of(mode, serial_guidance=values["guidance"] == "serial")
    # Weights that are copied from the host are no traffic of the forward.
    forward = guided_forward(size, replace(runtime, offload=NO_OFFLOAD))
    with Counter(device=META) as counter:
        forward()
    table = Table(rows=counter.rows, residual_bytes=size.residual_bytes, depth=config.depth)
    return Counted(request=request, size=size, mode=mode, table=table)


def count_text(counted: Counted, *, as_markdown: bool) -> str:
    """The count as people read it: by part, then by operation."""
    request, size, table = counted.request, counted.size, counted.table
    dtype = next(name for name, each in DTYPES.items() if each == size.dtype)
    head = (
        f"One {'guided ' * (size.cfg_scale != 1)}forward of {request.num_frames} frames of "
        f"{request.height}x{request.width}, {dtype}, --memory {counted.mode}: "
        f"X = {size.residual_bytes / 1e9:.3g} GB, {size.config.depth} pairs of blocks"
    )
    draw = markdown if as_markdown else plain
    by_part, by_operation = draw(table.cells("part")), draw(table.cells("operation"))
    return f"{head}\n\n{by_part}\n\n{by_operation}\n"
