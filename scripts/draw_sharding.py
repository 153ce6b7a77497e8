"""Draws how ranks share a video, from the program's own splits: scripts/draw_sharding.py [--check]

Writes docs/images/layouts.svg (the two layouts of a sequence group, and what its ranks send each
other between them) and docs/images/mesh.svg (guidance × sequence). --check writes nothing and ends
with 1 where either is old.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In the place of this folder, whose file names must not be importable as modules.
sys.path[0] = str(ROOT)

from opensora_sp.parallel.layout import Layout  # noqa: E402
from opensora_sp.parallel.mesh import Mesh  # noqa: E402

IMAGES = ROOT / "docs" / "images"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
INK, FAINT, BETWEEN = "#223", "#667", "#c44e52"
WIDTH, CELL, GAP = 1000, 21, 22
# Small enough to be counted, and even in nothing: 18 patches and 5 frames on 4 ranks.
LAYOUT = Layout(frames=5, size=(6, 12), ranks=4)
MESH = Mesh(replicas=1, guidance=2, sequence=4)


def main() -> int:
    """Write both pictures, or compare both with what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one is old")
    check = parser.parse_args().check
    old = []
    for name, content in (("layouts.svg", layouts()), ("mesh.svg", mesh())):
        path = IMAGES / name
        if path.is_file() and path.read_text(encoding="utf-8") == content:
            continue
        old.append(name)
        if not check:
            path.write_text(content, encoding="utf-8")
    if check and old:
        print(f"{', '.join(old)}: old; run python scripts/draw_sharding.py", file=sys.stderr)
        return 1
    return 0


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 15,
    anchor: str = "start",
    fill: str = INK,
) -> str:
    """A line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{fill}">{words}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    """A rectangle; more: further attributes."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"'
        f"{' ' * bool(more)}{more}/>"
    )


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str, *, both: bool = False) -> str:
    """A line with a head at its end, or at both ends."""
    head = f"url(#end{colour[1:]})"
    start = f' marker-start="{head}"' if both else ""
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" '
        f'stroke-width="2.5" marker-end="{head}"{start}/>'
    )


def page(height: float, parts: list[str]) -> str:
    """A whole picture of these parts on white."""
    heads = "".join(
        f'<marker id="end{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto-start-reverse">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
        for colour in (INK, BETWEEN)
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        'font-family="sans-serif">'
    )
    whole = [head, f"<defs>{heads}</defs>", box(0, 0, WIDTH, height, "white"), *parts, "</svg>"]
    return "\n".join(whole) + "\n"


def frames(x: float, y: float, owner: list[list[int]]) -> list[str]:
    """The frames of a video in a row, each patch in the colour of the rank that holds it.

    owner: the rank of each patch of each frame [T][S].
    """
    columns = LAYOUT.grid[1]
    parts = []
    for t, ranks in enumerate(owner):
        left = x + t * (columns * CELL + GAP)
        parts.append(text(left, y - 7, f"frame {t}", size=13, fill=FAINT))
        for patch, rank in enumerate(ranks):
            row, column = divmod(patch, columns)
            parts.append(
                box(
                    left + column * CELL,
                    y + row * CELL,
                    CELL,
                    CELL,
                    COLOURS[rank],
                    'stroke="white" stroke-width="1.5"',
                )
            )
    return parts


def holders() -> tuple[list[list[int]], list[list[int]]]:
    """The rank of each patch of each frame, in either layout: [T][S]."""
    ranks = range(LAYOUT.ranks)
    by_patch = [rank for rank in ranks for _ in range(LAYOUT.patch_split[rank])]
    by_frame = [rank for rank in ranks for _ in range(LAYOUT.frame_split(LAYOUT.frames, 0)[rank])]
    return (
        [by_patch for _ in range(LAYOUT.frames)],
        [[rank] * LAYOUT.patch_count for rank in by_frame],
    )


def layouts() -> str:
    """Patches of every frame, whole frames, and the exchange from one to the other."""
    by_patch, by_frame = holders()
    x, top, middle = 24, 96, 330
    patches, counts = LAYOUT.patch_split, LAYOUT.frame_split(LAYOUT.frames, 0)
    parts = [
        text(x, 30, "Between spatial attentions: a rank holds its patches of every frame", size=17),
        text(
            x,
            53,
            "temporal attention, cross-attention and MLP are local",
            fill=FAINT,
        ),
        *frames(x, top, by_patch),
    ]
    parts += [
        arrow(250, 182, 250, 262, INK),
        text(238, 216, "all-to-all", anchor="end"),
        text(238, 236, "before spatial attention", size=13, anchor="end", fill=FAINT),
        arrow(420, 262, 420, 182, INK),
        text(432, 216, "all-to-all"),
        text(432, 236, "after it", size=13, fill=FAINT),
    ]
    parts += [
        *frames(x, middle - 30, by_frame),
        text(x, middle + 66, "Around spatial attention: a rank holds whole frames", size=17),
        text(x, middle + 89, "every patch attends to its whole frame, all heads", fill=FAINT),
    ]
    parts += legend(790, 96, patches, counts)
    parts += table(790, 268, patches, counts)
    return page(440, parts)


def legend(x: float, y: float, patches: tuple[int, ...], counts: tuple[int, ...]) -> list[str]:
    """The ranks' colours, and how much each holds."""
    parts = []
    for rank, (some, whole) in enumerate(zip(patches, counts, strict=True)):
        line = y + 27 * rank
        parts.append(box(x, line, 18, 18, COLOURS[rank]))
        held = f"rank {rank}: {some} patches, {whole} frame{'s' * (whole > 1)}"
        parts.append(text(x + 27, line + 14, held, size=14))
    return parts


def table(x: float, y: float, patches: tuple[int, ...], counts: tuple[int, ...]) -> list[str]:
    """Tokens that each rank gives to each in the first all-to-all."""
    parts = [
        text(x, y, "tokens sent, to rank", size=14),
        *(
            text(x + 75 + 34 * to, y + 24, str(to), size=14, anchor="middle", fill=COLOURS[to])
            for to in range(len(counts))
        ),
    ]
    for rank, some in enumerate(patches):
        line = y + 48 + 24 * rank
        parts.append(text(x, line, f"rank {rank}", size=14, fill=COLOURS[rank]))
        for to, whole in enumerate(counts):
            colour = "#aaa" if to == rank else INK
            tokens = str(some * whole)
            parts.append(
                text(x + 75 + 34 * to, line, tokens, size=14, anchor="middle", fill=colour)
            )
    parts.append(text(x, y + 150, "gray: stays where it is", size=12, fill=FAINT))
    return parts


def mesh() -> str:
    """Two rows of ranks: the CFG branches; a row is a sequence group."""
    left, step, top, down = 210, 185, 70, 165
    names = ("conditional branch", "unconditional branch")
    parts = [text(24, 30, f"{MESH.size} ranks as {MESH.guidance} × {MESH.sequence}", size=17)]
    for branch in range(MESH.guidance):
        y = top + branch * down
        parts.append(
            box(
                left - 22,
                y - 16,
                step * (MESH.sequence - 1) + 154,
                92,
                "#f2f5f9",
                'rx="10" stroke="#c8d0dc"',
            )
        )
        parts.append(text(24, y + 26, names[branch].split()[0], size=15))
        parts.append(text(24, y + 46, "branch", size=15))
        for place in range(MESH.sequence):
            x, rank = left + place * step, branch * MESH.sequence + place
            parts.append(box(x, y, 110, 60, COLOURS[place], 'rx="6"'))
            parts.append(text(x + 55, y + 27, f"rank {rank}", anchor="middle", fill="white"))
            parts.append(
                text(x + 55, y + 46, f"patches {place}", size=13, anchor="middle", fill="white")
            )
            if place:
                parts.append(arrow(x - step + 114, y + 30, x - 5, y + 30, INK, both=True))
    for place in range(MESH.sequence):
        x = left + place * step + 55
        parts.append(arrow(x, top + 80, x, top + down - 20, BETWEEN, both=True))
    y = top + 2 * down - 40
    parts += [
        arrow(24, y, 66, y, INK, both=True),
        text(
            78,
            y + 5,
            "all-to-all within a group: every rank with every other, twice a pair of blocks",
        ),
        arrow(24, y + 28, 66, y + 28, BETWEEN, both=True),
        text(78, y + 33, "velocities of the two branches: once a step, 16 values a patch"),
    ]
    return page(y + 52, parts)


if __name__ == "__main__":
    sys.exit(main())
