"""Write the counts in docs/speed.md: Open-Sora's order of operations beside the program's.

`python scripts/count_forwards.py` writes the page's tables anew; `--check` compares them instead
and exits with 1 where they differ. It needs no device and no memory, and takes about a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle_stdit3  # noqa: E402

from opensora_sp.benchmark.count.command import sent  # noqa: E402
from opensora_sp.benchmark.count.counter import ATTENTION, FUSED, Counter  # noqa: E402
from opensora_sp.benchmark.count.forward import (  # noqa: E402
    META,
    ForwardSize,
    first_rank,
    guided_forward,
)
from opensora_sp.benchmark.count.parts import PARTS  # noqa: E402
from opensora_sp.benchmark.count.table import Table, markdown  # noqa: E402
from opensora_sp.benchmark.count.traffic import tensors_in  # noqa: E402
from opensora_sp.models.kernels.active import Kernels, using  # noqa: E402
from opensora_sp.parallel.mesh import plan_mesh  # noqa: E402
from opensora_sp.parallel.session import MeshComms  # noqa: E402
from opensora_sp.request.runtime import Runtime  # noqa: E402

PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- counts, by scripts/count_forwards.py -->", "<!-- end of counts -->"
RANKS = ("<!-- ranks, by scripts/count_forwards.py -->", "<!-- end of ranks -->")
# What each collective of a step is called in a table: calls / GB that the rank sends.
COLLECTIVES = {
    "patches_to_frames": "to frames",
    "frames_to_patches": "to patches",
    "velocity": "velocity",
}
SIZE = ForwardSize(frames=120, size=(90, 160), pixels=(720, 1280))
REFERENCE = "Open-Sora 1.2"
PARTS_OF_ATTENTION = ("spatial attention", "temporal attention")


def oracle_table(size: ForwardSize = SIZE) -> Table:
    """Open-Sora 1.2's order of operations."""
    oracle, inputs = oracle_stdit3.oracle_of(size), oracle_stdit3.inputs_of(size)
    with torch.no_grad(), Counter(device=META, parts=oracle_stdit3.PARTS) as counter:
        oracle.forward(inputs)
    return _table(counter, size)


class FusedNorms:
    """Stands for the device's fused norms: counts what their kernels load and store."""

    def __init__(self, counter: Counter) -> None:
        self.add = counter.add

    def takes_heads(self, q: Tensor, k: Tensor) -> bool:
        """As the Triton kernels'."""
        return q.shape == k.shape and q.stride() == k.stride()

    def norm_rotary_(self, q: Tensor, k: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        """q and k are read and written where they lie."""
        self.add("norm_rotary", [q, k, *tensors_in(more)], [q, k])
        return q, k

    def residual_norm_(self, x: Tensor, **more: Tensor | None) -> Tensor:
        """x and what is added are read once; x is written where something is added."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        adds = any(more.get(name) is not None for name in ("added", "bias"))
        self.add("residual_norm", [x, *tensors_in(list(more.values()))], [x, out][not adds :])
        return out


PARTS_OF_FUSED = {
    "FusedNorms.norm_rotary_": "query and key norm",
    "FusedNorms.residual_norm_": "norm and modulation",
}


def program_table(
    runtime: Runtime,
    fused: AbstractSet[str] = FUSED,
    size: ForwardSize = SIZE,
    *,
    cuda: bool = False,
    comms: MeshComms | None = None,
    norms: bool = False,
) -> Table:
    """The program's own code. cuda: the forms of its operations that CUDA has; norms: fused."""
    forward = guided_forward(size, runtime, comms)
    counter = Counter(device=META, fused=fused, parts={**PARTS, **PARTS_OF_FUSED})
    module: Any = FusedNorms(counter) if norms else None
    with (
        counter,
        patch("opensora_sp.models.kernels.folded.on_cuda", lambda _: cuda),
        using(Kernels(fused=module)),
    ):
        forward()
    return _table(counter, size)


def _table(counter: Counter, size: ForwardSize) -> Table:
    return Table(rows=counter.rows, residual_bytes=size.residual_bytes, depth=size.config.depth)


def summary(name: str, table: Table) -> tuple[str, ...]:
    """One line of the first table."""
    return (
        name,
        f"{table.kernels:,}",
        f"{table.x_per_pair(table.bytes):.0f}",
        f"{table.bytes / 1e12:.1f}",
    )


def by_part(tables: Mapping[str, Table]) -> list[tuple[str, ...]]:
    """The second table: X a pair of each part."""
    columns = []
    for table in tables.values():
        parts = {name: table.x_per_pair(size) for name, _, size in table.by("part")}
        spatial, temporal = (parts.pop(part, 0.0) for part in PARTS_OF_ATTENTION)
        parts["self-attention"] = parts.get("self-attention", 0.0) + spatial + temporal
        columns.append(parts)
    names = {name for parts in columns for name in parts}
    order = sorted(names, key=lambda name: (-max(p.get(name, 0.0) for p in columns), name))
    cells = [(name, *(f"{p.get(name, 0.0):.1f}" for p in columns)) for name in order]
    return [("part", *tables), *(row for row in cells if set(row[1:]) != {"0.0"})]


def tables(size: ForwardSize = SIZE) -> str:
    """The page's first two tables."""
    apart = frozenset({ATTENTION})  # rms_norm as its parts
    plain, folded = Runtime(step_kernels="plain"), Runtime(step_kernels="folded")
    tiled = replace(Runtime.of("speed"), step_kernels="folded")
    oracle = oracle_table(size)
    on_cuda = program_table(folded, size=size, cuda=True)
    fused = program_table(folded, size=size, cuda=True, norms=True)
    everywhere = program_table(folded, apart, size)
    lines = [
        ("one guided forward", "kernels", "X a pair", "TB"),
        summary(REFERENCE, oracle),
        summary("plain, rms_norm as its parts", program_table(plain, apart, size)),
        summary("plain, rms_norm as one kernel", program_table(plain, size=size)),
        summary("folded, operations that every device has", everywhere),
        summary("folded, operations of CUDA", on_cuda),
        summary(
            "plain, operations of CUDA and fused norms", program_table(plain, size=size, norms=True)
        ),
        summary("folded, operations of CUDA and fused norms", fused),
        summary(
            "the same in the tiles of `--memory speed`",
            program_table(tiled, size=size, cuda=True, norms=True),
        ),
    ]
    parts = {
        REFERENCE: oracle,
        "folded, every device": everywhere,
        "folded, CUDA": on_cuda,
        "folded, CUDA, fused norms": fused,
    }
    return f"{markdown(lines)}\n\n{markdown(by_part(parts))}"


def rank_line(ranks: int, size: ForwardSize = SIZE) -> tuple[str, ...]:
    """The first of so many ranks: its mesh, kernels, TB, GB that it sends, by collective."""
    mesh = plan_mesh(ranks, guided=True)
    comms = first_rank(mesh)
    # A lone branch is cut in two, as on an accelerator, to have something to overlap with.
    runtime = Runtime(step_kernels="folded", chunks=2)
    table = program_table(runtime, size=size, cuda=True, comms=comms, norms=True)
    gone = sent(comms.sequence)
    kinds = (gone.get(kind, (0, 0)) for kind in COLLECTIVES)
    return (
        str(ranks),
        f"{mesh.guidance} × {mesh.sequence}",
        f"{table.kernels:,}",
        f"{table.bytes / 1e12:.2f}",
        *(f"{calls} / {moved / 1e9:.2f}" if calls else "0" for calls, moved in kinds),
    )


def by_ranks(size: ForwardSize = SIZE) -> str:
    """The table of one rank's share."""
    head = ("ranks", "guidance × sequence", "kernels", "TB", *COLLECTIVES.values())
    return markdown([head, *(rank_line(ranks, size) for ranks in (1, 2, 4, 8))])


def written(text: str, marks: tuple[str, str], made: str) -> str:
    """A page with what is between two marks made anew."""
    before, rest = text.split(marks[0])
    return f"{before}{marks[0]}\n\n{made}\n\n{marks[1]}{rest.split(marks[1])[1]}"


def main() -> int:
    """Write the page, or check it."""
    text = PAGE.read_text(encoding="utf-8")
    made = written(text, (BEGIN, END), tables())
    made = written(made, RANKS, by_ranks())
    if "--check" in sys.argv[1:]:
        if made != text:
            print(f"{PAGE.name} is not what is counted: run {Path(__file__).name}")
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
