"""What was counted, as a table that people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opensora_sp.benchmark.count.counter import Row

By = Literal["part", "operation"]
HEADS = ("kernels", "GB", "X a pair", "share")


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one forward, beside the units that they are read in.

    residual_bytes: X, the bytes of the residual stream. depth: pairs of blocks.
    """

    rows: Sequence[Row]
    residual_bytes: int
    depth: int

    @property
    def kernels(self) -> int:
        """Operations that launch a kernel."""
        return sum(row.kernels for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(row.bytes for row in self.rows)

    def x_per_pair(self, size: int) -> float:
        """Bytes of a whole forward in X a pair of blocks."""
        return size / self.residual_bytes / self.depth

    def by(self, what: By) -> list[tuple[str, int, int]]:
        """(name, kernels, bytes) of each part or operation; what moves most comes first."""
        sums: dict[str, list[int]] = {}
        for row in self.rows:
            total = sums.setdefault(getattr(row, what), [0, 0])
            total[0] += row.kernels
            total[1] += row.bytes
        lines = [(name, kernels, size) for name, (kernels, size) in sums.items()]
        return sorted(lines, key=lambda line: -line[2])

    def cells(self, what: By) -> list[tuple[str, ...]]:
        """The lines of the table as text, heads first and the total last."""
        lines = [*self.by(what), ("all", self.kernels, self.bytes)]
        return [
            (what, *HEADS),
            *(
                (
                    name,
                    f"{kernels:,}",
                    f"{size / 1e9:,.1f}",
                    f"{self.x_per_pair(size):.1f}",
                    f"{size / self.bytes:.1%}",
                )
                for name, kernels, size in lines
            ),
        ]


def plain(cells: Sequence[Sequence[str]]) -> str:
    """Cells in columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells as a table of Markdown."""
    first, *others = cells
    rule = ["---", *("---:" for _ in first[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (first, rule, *others))
