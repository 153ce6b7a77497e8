"""Write the counts in docs/speed.md: Open-Sora's order of operations beside the program's.

`python scripts/count_forwards.py` writes the page's tables anew; `--check` compares them instead
and exits with 1 where they differ. It needs no device and no memory, and takes about a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle_stdit3  # noqa: E402

from opensora_sp.benchmark.count.counter import ATTENTION, FUSED, Counter  # noqa: E402
from opensora_sp.benchmark.count.forward import META, ForwardSize, guided_forward  # noqa: E402
from opensora_sp.benchmark.count.table import Table, markdown  # noqa: E402
from opensora_sp.request.runtime import Runtime  # noqa: E402

PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- counts, by scripts/count_forwards.py -->", "<!-- end of counts -->"
SIZE = ForwardSize(frames=120, size=(90, 160), pixels=(720, 1280))
REFERENCE, PROGRAM = "Open-Sora 1.2, flash-attn and xformers on", "this program"
PARTS_OF_ATTENTION = ("spatial attention", "temporal attention")


def oracle_table(size: ForwardSize = SIZE) -> Table:
    """Open-Sora 1.2's order of operations."""
    oracle, inputs = oracle_stdit3.oracle_of(size), oracle_stdit3.inputs_of(size)
    with torch.no_grad(), Counter(device=META, parts=oracle_stdit3.PARTS) as counter:
        oracle.forward(inputs)
    return _table(counter, size)


def program_table(
    runtime: Runtime, fused: frozenset[str] = FUSED, size: ForwardSize = SIZE
) -> Table:
    """The program's own code."""
    forward = guided_forward(size, runtime)
    with Counter(device=META, fused=fused) as counter:
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


def by_part(oracle: Table, program: Table) -> list[tuple[str, ...]]:
    """The second table: X a pair of each part, in both."""
    theirs, ours = (
        {name: size for name, _, size in table.by("part")} for table in (oracle, program)
    )
    ours["self-attention"] = sum(ours.pop(part) for part in PARTS_OF_ATTENTION)
    lines = sorted(theirs | ours, key=lambda part: -max(theirs.get(part, 0), ours.get(part, 0)))
    cells = [
        (part, *(f"{oracle.x_per_pair(each.get(part, 0)):.1f}" for each in (theirs, ours)))
        for part in lines
    ]
    return [("part", REFERENCE, PROGRAM), *(line for line in cells if line[1:] != ("0.0", "0.0"))]


def tables() -> str:
    """Both tables of the page."""
    oracle, program = oracle_table(), program_table(Runtime())
    lines = [
        ("one guided forward", "kernels", "X a pair", "TB"),
        summary(REFERENCE, oracle),
        summary(
            f"{PROGRAM}, rms_norm as its parts", program_table(Runtime(), frozenset({ATTENTION}))
        ),
        summary(f"{PROGRAM}, rms_norm as one kernel", program),
        summary(
            f"{PROGRAM}, the same in the tiles of `--memory speed`",
            program_table(Runtime.of("speed")),
        ),
    ]
    return f"{markdown(lines)}\n\n{markdown(by_part(oracle, program))}"


def main() -> int:
    """Write the page, or check it."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if made != text:
            print(f"{PAGE.name} is not what is counted: run {Path(__file__).name}")
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
